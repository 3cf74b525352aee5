"""Biases, penalties and banned tokens against transformers' processors and OpenAI's formula, in mixed batches."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from server.model.batch import Draw
from server.model.edits import edit
from server.model.history import History, TokenCounts
from server.model.sampler import NONE_LEFT, NOT_FINITE
from server.records import SamplingParams
from tests.server.sampled import sampled

VOCABULARY = 30

tokens = st.integers(0, VOCABULARY - 1)
text = st.lists(tokens, min_size=1, max_size=25)
changes = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(tokens, st.floats(-100, 100), max_size=8).map(lambda one: tuple(one.items())),
        "allowed_token_ids": st.lists(tokens, min_size=1, max_size=20).map(tuple),
        "bad_words": st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=6).map(tuple),
        "min_tokens": st.integers(0, 30),
        "stop_token_ids": st.lists(tokens, max_size=3).map(tuple),
    },
)


def after(params: SamplingParams, prompt: list[int], generated: list[int]) -> History:
    history = History(params, prompt)
    for token in generated:
        history.append(token)
    return history


def plain(scores: torch.Tensor, params: SamplingParams, prompt: list[int], generated: list[int]) -> torch.Tensor:
    """One row, float64, one rule after the other."""
    row, ids = scores[None].clone(), torch.tensor([prompt + generated])
    if params.logit_bias:
        row = SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias})(ids, row)  # type: ignore[arg-type]
    row = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, row)  # type: ignore[arg-type]
    for token, count in Counter(generated).items():
        row[0, token] -= params.frequency_penalty * count + params.presence_penalty
    if params.allowed_token_ids is not None:
        for token in set(range(VOCABULARY)) - set(params.allowed_token_ids):
            row[0, token] = -torch.inf
    if params.bad_words:
        row = NoBadWordsLogitsProcessor([list(word) for word in params.bad_words])(ids, row)  # type: ignore[arg-type]
    if params.stop_token_ids and params.min_tokens:
        stops = torch.tensor(params.stop_token_ids)
        row = MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, stops)(ids, row)  # type: ignore[arg-type]
    return row[0]


@given(rows=st.lists(st.tuples(changes, text, text | st.just([])), min_size=1, max_size=6), seed=st.integers(0, 2**32))
@settings(max_examples=200)
def test_each_row_is_changed_as_transformers_and_openai_say(
    rows: list[tuple[dict[str, object], list[int], list[int]]], seed: int
) -> None:
    raw = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 5
    asked = [(SamplingParams(max_tokens=1, **chosen), prompt, made) for chosen, prompt, made in rows]  # type: ignore[arg-type]
    found = raw.clone()
    edit(found, [after(*one) for one in asked])
    for row, (params, prompt, generated) in enumerate(asked):
        expected = plain(raw[row].double(), params, prompt, generated)
        assert torch.equal(found[row].isneginf(), expected.isneginf())
        # Six roundings to float32 at most (the penalties themselves are rounded too), of numbers no larger than this.
        most = (raw[row].abs() + 100) * 2 + 2 * (1 + len(generated))
        finite = expected.isfinite()
        assert bool(((found[row] - expected).abs() <= 6 * 2.0**-24 * most)[finite].all())
        alone = raw[row : row + 1].clone()
        edit(alone, [after(params, prompt, generated)])
        assert torch.equal(alone[0], found[row]), "a neighbour changed a row"


@given(prompt=text, generated=st.lists(st.integers(0, 10**6), max_size=200))
def test_counts_are_those_of_a_counter(prompt: list[int], generated: list[int]) -> None:
    counts = TokenCounts(prompt)
    for token in generated:
        counts.add(token)
    expected = Counter(generated)
    assert counts.tokens.tolist() == list(dict.fromkeys(prompt + generated))
    assert counts.generated.tolist() == [expected[token] for token in counts.tokens.tolist()]


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.0}, {"top_k": 5, "logprobs": 3, "stop_token_ids": (1,)}])
def test_a_sequence_whose_logits_nothing_changes_has_no_history(asked: dict[str, object]) -> None:
    assert History.needed(SamplingParams(max_tokens=1, **asked), [1]) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": ((3, 1.0),)},
        {"allowed_token_ids": (3,)},
        {"bad_words": ((3,),)},
        {"min_tokens": 1},
    ],
    ids=str,
)
def test_a_sequence_whose_logits_something_changes_has_one(asked: dict[str, object]) -> None:
    assert History.needed(SamplingParams(max_tokens=1, **asked), [1]) is not None  # type: ignore[arg-type]


def draw(asked: dict[str, object], prompt: list[int], generated: list[int]) -> Draw:
    params = SamplingParams(max_tokens=1, **asked)  # type: ignore[arg-type]
    history = after(params, prompt, generated) if History.needed(params, prompt) else None
    return Draw(params, seed=random.getrandbits(64), index=len(generated), history=history)


def test_greedy_takes_the_largest_of_what_is_left() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(5, 4)
    asked: list[dict[str, object]] = [
        {},
        {"bad_words": ((0,),)},
        {"allowed_token_ids": (2, 3)},
        {"logit_bias": ((3, 5.0),)},
        {"min_tokens": 2, "stop_token_ids": (0, 1)},
    ]
    assert sampled(logits, [draw({"temperature": 0.0} | one, [1], [1]) for one in asked]) == [0, 1, 2, 3, 2]


def test_a_row_with_no_token_left_harms_no_other() -> None:
    logits = torch.randn(4, VOCABULARY)
    logits[2, 5] = torch.nan
    nothing: dict[str, object] = {"allowed_token_ids": (3, 4), "bad_words": ((4,), (7, 3))}
    for temperature in (0.0, 1.0):
        draws = [
            draw({"temperature": temperature} | asked, [7], [])
            for asked in ({}, nothing, nothing, {"allowed_token_ids": (3,)})
        ]
        tokens = sampled(logits, draws)
        assert tokens[0] >= 0
        assert tokens[1:] == [NONE_LEFT, NOT_FINITE, 3]


@given(data=st.data(), count=st.integers(2, 7), seed=st.integers(0, 2**32))
@settings(max_examples=100)
def test_a_seed_gives_the_same_token_whatever_else_is_in_the_batch(data: st.DataObject, count: int, seed: int) -> None:
    logits = torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    warm = st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.0, 0.7, 1.5]), "top_p": st.sampled_from([0.8, 1.0])}
    )
    draws = [
        draw(data.draw(changes) | data.draw(warm), data.draw(text), data.draw(text | st.just([]))) for _ in range(count)
    ]
    alone = [sampled(logits[row : row + 1], [draws[row]])[0] for row in range(count)]
    order = data.draw(st.permutations(range(count)))
    together = sampled(logits[order], [draws[row] for row in order])
    assert [together[order.index(row)] for row in range(count)] == alone
