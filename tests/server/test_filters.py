"""The filters against transformers' own, by drawing with every u of a fine grid: the whole distribution shows."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from server.model.batch import Draw
from server.model.filters import _row_sums, leave_out
from server.records import SamplingParams
from tests.server.sampled import sampled

GRID = 1024
VOCABULARY = 40
ROUNDING = 1e-5
"""Nearer than this to a threshold, float32 probabilities (a few units of 2^-24 off) may fall on its other side."""

choices = st.fixed_dictionaries(
    {"temperature": st.floats(0.3, 2.0)},
    optional={
        "top_k": st.integers(1, VOCABULARY + 5),
        "top_p": st.floats(0.05, 0.99),
        "min_p": st.floats(0.001, 0.9),
        "typical_p": st.floats(0.05, 0.99),
    },
)


def drawn(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """How often each token is drawn by u = 0.5 / GRID, 1.5 / GRID, ...: [vocabulary] float64, their sum is GRID."""
    with patch("server.model.sampler.uniform", lambda seed, index: (index + 0.5) / GRID):
        tokens = sampled(logits.expand(GRID, -1), [Draw(params, 0, index) for index in range(GRID)])
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]).double()


def theirs(logits: torch.Tensor, settings: dict[str, float]) -> torch.Tensor:
    """The same as probabilities, by transformers' warpers in their own order, in float64."""
    makers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": lambda value: TopKLogitsWarper(int(value)),
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
        "typical_p": TypicalLogitsWarper,
    }
    warpers = LogitsProcessorList([make(settings[name]) for name, make in makers.items() if name in settings])
    scores: torch.Tensor = warpers(torch.zeros(1, 1, dtype=torch.int64), logits.double()[None])  # type: ignore[arg-type]
    return torch.softmax(scores, -1)[0]


def near_a_threshold(logits: torch.Tensor, settings: dict[str, float]) -> bool:
    """Whether some filter's decision hangs on a rounding."""
    for name in ("top_p", "min_p", "typical_p"):
        if name not in settings:
            continue
        before = theirs(logits, {key: value for key, value in settings.items() if ORDER.index(key) < ORDER.index(name)})
        falling = before[before > 0].sort(descending=True).values
        if name == "min_p":
            places = falling / falling[0]
        elif name == "top_p":
            places = falling.cumsum(-1)
        else:
            distance, order = (falling.log() - torch.xlogy(falling, falling).sum()).abs().sort()
            if bool((distance.diff() < ROUNDING).any()):
                return True
            places = falling[order].cumsum(-1)
        if bool(((places - settings[name]).abs() < ROUNDING).any()):
            return True
    return False


ORDER = ["temperature", "top_k", "top_p", "min_p", "typical_p"]


@given(seed=st.integers(0, 2**32 - 1), chosen=choices)
@settings(max_examples=100)
def test_each_token_is_drawn_for_its_share_of_the_grid(seed: int, chosen: dict[str, float]) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    assume(not near_a_threshold(logits, chosen))
    expected = theirs(logits, chosen) * GRID
    found = drawn(logits, SamplingParams(max_tokens=1, **chosen))  # type: ignore[arg-type]
    assert torch.equal(found[expected == 0], torch.zeros(int((expected == 0).sum()), dtype=torch.float64))
    # A token's part of [0, 1) holds as many points of the grid as its length in steps, give or take one; its two ends
    # are off by the float32 roundings of the probabilities, which is less than 1e-6 of the grid each.
    assert bool(((found - expected).abs() < 1 + 2 * GRID * 1e-6).all())


def test_a_filter_that_would_leave_nothing_leaves_the_likeliest() -> None:
    logits = torch.randn(VOCABULARY)
    for chosen in ({"top_p": 1e-9}, {"min_p": 1.0}, {"typical_p": 1e-9}, {"top_k": 1}):
        (token,) = drawn(logits, SamplingParams(max_tokens=1, **chosen)).nonzero()  # type: ignore[arg-type]
        if "typical_p" not in chosen:
            assert int(token) == int(logits.argmax())


def test_equals_are_kept_or_cut_in_the_order_of_their_ids() -> None:
    logits = torch.zeros(VOCABULARY)
    assert drawn(logits, SamplingParams(max_tokens=1, top_k=3)).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert drawn(logits, SamplingParams(max_tokens=1, top_p=0.25)).nonzero()[:, 0].tolist() == list(range(10))
    for chosen in ({"min_p": 1.0}, {"typical_p": 0.1}):
        assert int(drawn(logits, SamplingParams(max_tokens=1, **chosen)).count_nonzero()) == VOCABULARY  # type: ignore[arg-type]


@given(data=st.data(), rows=st.integers(2, 9))
@settings(max_examples=60)
def test_a_row_among_any_others_is_the_row_alone(data: st.DataObject, rows: int) -> None:
    logits = torch.randn(rows, 300, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))) * 3
    draws = [
        Draw(
            SamplingParams(max_tokens=1, **data.draw(choices | st.just({"temperature": 0.0}))),
            seed=data.draw(st.integers(0, 2**64 - 1)),
            index=data.draw(st.integers(0, 1000)),
        )
        for _ in range(rows)
    ]
    before = logits.clone()
    together = sampled(logits, draws)
    assert together == list(itertools.chain(*(sampled(logits[row : row + 1], [draws[row]]) for row in range(rows))))
    assert torch.equal(logits, before)


def test_a_row_of_a_large_vocabulary_has_the_same_bits_alone() -> None:
    ordered = torch.randn(5, 100_003).softmax(-1).sort(dim=-1, descending=True).values
    params = SamplingParams(max_tokens=1, top_p=0.99, min_p=1e-7, typical_p=0.9)
    together, alone = ordered.clone(), ordered.clone()
    leave_out(together, [params] * 5)
    for row in alone.split(1):
        leave_out(row, [params])
    assert torch.equal(together, alone)
    sums = torch.cat([_row_sums(row) for row in ordered.double().split(1)])
    assert torch.equal(_row_sums(ordered.double()), sums), "which decide, where two tokens are equally far away"
