"""Sampling against its own definition: greedy is argmax, frequencies are the softmax's, filters keep what they say."""

from __future__ import annotations

import math
import random

import pytest
import torch

from server.model.batch import Draw
from server.model.sampler import NOT_FINITE, uniform
from server.records import SamplingParams
from tests.server.sampled import sampled


def draw(seed: int = 0, index: int = 0, **changes: float) -> Draw:
    return Draw(SamplingParams(max_tokens=1, **changes), seed, index)  # type: ignore[arg-type]


def test_greedy_is_the_first_largest_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(16, 1000).to(dtype)
        logits[3, 10] = logits[3, 700] = 9.0
        tokens = sampled(logits, [draw(temperature=0.0)] * 16)
        assert tokens == logits.argmax(-1).tolist()
        assert tokens[3] == 10


def test_uniform_is_uniform_and_a_function_of_seed_and_index() -> None:
    seed = random.getrandbits(64)
    numbers = torch.tensor([uniform(seed, index) for index in range(20_000)])
    across = torch.tensor([uniform(seed + step, 0) for step in range(20_000)])
    for sample_of in (numbers, across):
        assert float(sample_of.min()) >= 0.0
        assert float(sample_of.max()) < 1.0
        counts = torch.histc(sample_of, bins=20, min=0, max=1)
        chi_square = float(((counts - 1000) ** 2 / 1000).sum())
        assert chi_square < 75, "19 degrees of freedom: beyond 75 once in 75 million draws"
    assert abs(float(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1])) < 0.04
    assert uniform(seed, 7) == uniform(seed, 7)
    assert 0.0 <= uniform(-1, 0) < 1.0


@pytest.mark.parametrize(
    ("settings", "survivors"),
    [
        ({"temperature": 1.0}, 6),
        ({"temperature": 2.5}, 6),
        ({"temperature": 0.5}, 6),
        ({"temperature": 1.0, "top_k": 3}, 3),
        ({"temperature": 1.0, "top_k": 500}, 6),
        ({"temperature": 1.0, "top_p": 0.7}, 3),
        ({"temperature": 1.0, "top_p": 1e-9}, 1),
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.75}, 3),
        ({"temperature": 1e-30}, 1),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_filtered_softmax(settings: dict[str, float], survivors: int) -> None:
    weights = torch.tensor([0.05, 0.4, 0.1, 0.2, 0.02, 0.23])
    scaled = weights.log() / settings["temperature"]
    expected = torch.softmax(scaled - scaled.max(), -1)
    kept = expected.argsort(descending=True)[:survivors]
    mask = torch.zeros(6).index_fill(0, kept, 1.0)
    expected = expected * mask / (expected * mask).sum()
    rows, base = 32_000, random.getrandbits(60)
    logits = (weights.log() + 3.0).expand(rows, 6)
    tokens = sampled(logits, [draw(seed=base, index=i, **settings) for i in range(rows)])
    frequencies = torch.bincount(torch.tensor(tokens), minlength=6) / rows
    assert float(frequencies[mask == 0].sum()) == 0.0
    # Each count is binomial. Chernoff's bound holds for small ones too, whose tail is longer than a normal one: a count
    # lies so far out once in 10^9 draws. That is six standard deviations, 0.017 of a frequency of 0.4.
    ours, theirs = (torch.stack([each, 1 - each]).double() for each in (frequencies, expected))
    divergence = (torch.xlogy(ours, ours) - torch.xlogy(ours, theirs.clamp_min(1e-30))).sum(0)
    assert bool((rows * divergence < math.log(2e9)).all()), (frequencies, expected)


def test_a_row_does_not_see_its_neighbours() -> None:
    logits = torch.randn(12, 500) * 3
    draws = [
        draw(seed=random.getrandbits(64), index=i, temperature=t, top_k=k, top_p=p)
        for i, (t, k, p) in enumerate([(0.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 20, 1.0), (1.3, 0, 0.9)] * 3)
    ]
    alone = [sampled(logits[row : row + 1], [draws[row]])[0] for row in range(12)]
    order = list(range(12))
    random.shuffle(order)
    together = sampled(logits[order], [draws[row] for row in order])
    assert [together[order.index(row)] for row in range(12)] == alone


def test_rows_that_are_not_numbers_are_named_and_harm_no_other() -> None:
    logits = torch.randn(5, 50)
    logits[1, 3] = float("nan")
    logits[3] = float("-inf")
    for temperature in (0.0, 1.0):
        tokens = sampled(logits, [draw(temperature=temperature, index=row) for row in range(5)])
        assert [token == NOT_FINITE for token in tokens] == [False, True, False, True, False]


def test_masked_tokens_are_never_drawn_and_no_rows_is_no_work() -> None:
    logits = torch.full((2000, 40), float("-inf"))
    logits[:, 17] = 0.0
    logits[:, 39] = -1.0
    tokens = sampled(logits, [draw(seed=1, index=i) for i in range(2000)])
    assert set(tokens) == {17, 39}
    assert sampled(torch.empty(0, 40), []) == []
