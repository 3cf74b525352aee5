"""Logits to results: logprobs against float64, prompts scored in passes, and what is not a number."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.model.batch import Batch, Chunk, Draw, Score, StepResult
from server.model.history import History
from server.model.logprobs import read, token_logprobs
from server.model.readout import read_logits
from server.records import MAX_TOP_LOGPROBS, SCORED_SLICE_ROWS, SamplingParams, TokenLogprobs


def logprobs_of(logits: torch.Tensor, tokens: list[int], tops: list[int]) -> list[TokenLogprobs | None]:
    found = token_logprobs(logits, torch.tensor(tokens)).tolist()
    return [read(row, top) for row, top in zip(found, tops, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, MAX_TOP_LOGPROBS, 500])
def test_logprobs_are_the_logs_of_the_softmax(vocabulary: int, dtype: torch.dtype) -> None:
    rows = SCORED_SLICE_ROWS + 7
    logits = (torch.randn(rows, vocabulary) * 5).to(dtype)
    tokens = [random.randrange(vocabulary) for _ in range(rows)]
    tops = [random.randint(0, MAX_TOP_LOGPROBS) for _ in range(rows)]
    expected = torch.log_softmax(logits.double(), -1)
    # x - max - log(sum): two subtractions, each rounded in float32 to 2^-24 of numbers below 64, and a log of a sum
    # whose terms are off by a few 2^-24 each, relatively.
    bound = 64 * 2.0**-24 * 2 + (4 + vocabulary.bit_length()) * 2.0**-24
    for row, found in enumerate(logprobs_of(logits, tokens, tops)):
        assert found is not None
        assert abs(found.logprob - float(expected[row, tokens[row]])) <= bound
        assert len(found.top_ids) == len(found.top_logprobs) == min(tops[row], vocabulary)
        assert len(set(found.top_ids)) == len(found.top_ids)
        largest = expected[row].sort(descending=True).values[: len(found.top_ids)]
        assert bool(((torch.tensor(found.top_logprobs).double() - largest).abs() <= bound).all())
        assert bool(((expected[row, list(found.top_ids)] - largest).abs() <= bound).all())


def test_a_row_s_logprobs_do_not_hang_on_its_neighbours() -> None:
    logits = torch.randint(0, 4, (9, 200)).float()  # many equals: which of them come is decided in one way
    tops = [random.randint(0, MAX_TOP_LOGPROBS) for _ in range(9)]
    together = logprobs_of(logits, list(range(9)), tops)
    assert together == [logprobs_of(logits[row : row + 1], [row], [tops[row]])[0] for row in range(9)]


GREEDY = Draw(SamplingParams(max_tokens=1, temperature=0.0, logprobs=1), 0, 0)


def chunk(name: str, rows: int, scored: int, *, draw: bool) -> Chunk:
    score = Score([random.randrange(50) for _ in range(scored)], 1) if scored else None
    return Chunk(name, list(range(rows)), 10, [0], GREEDY if draw else None, score)


def test_results_are_told_apart_by_request() -> None:
    chunks = [chunk("a", 1, 0, draw=True), chunk("b", 6, 4, draw=False), chunk("c", 3, 0, draw=False)]
    chunks.append(chunk("d", 4, 3, draw=True))
    logits = torch.randn(1 + 4 + 0 + 4, 50)
    result = StepResult()
    read_logits(chunks, logits, result)
    best = logits.argmax(-1).tolist()
    assert result.tokens == {"a": [best[0]], "d": [best[8]]}
    assert {name: [one.top_ids for one in found] for name, found in result.logprobs.items()} == {
        "a": [(best[0],)],
        "d": [(best[8],)],
    }
    assert [found.top_ids[0] for found in result.prompt_logprobs["b"]] == best[1:5]
    assert [found.top_ids[0] for found in result.prompt_logprobs["d"]] == best[5:8]
    expected = torch.log_softmax(logits, -1)
    for name, first in (("b", 1), ("d", 5)):
        score = next(one.score for one in chunks if one.request_id == name)
        assert score is not None
        for place, token in enumerate(score.tokens):
            assert result.prompt_logprobs[name][place].logprob == pytest.approx(
                float(expected[first + place, token]), abs=1e-5
            )
    assert result.errors == {}


@pytest.mark.parametrize("row", [3, 4], ids=["a prompt's row", "the draw's row"])
def test_one_bad_row_is_its_request_s_error(row: int) -> None:
    logits = torch.randn(1 + 4, 50)
    logits[row, 7] = torch.nan
    result = StepResult()
    read_logits([chunk("fine", 1, 0, draw=True), chunk("bad", 4, 3, draw=True)], logits, result)
    assert list(result.tokens) == ["fine"]
    assert "not finite" in result.errors["bad"]
    assert result.refused == set()


@given(data=st.data(), rows=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_rows_that_only_draw_give_the_same_alone_and_beside_one_of_which_more_is_wanted(
    data: st.DataObject, rows: int, seed: int
) -> None:
    logits = torch.randn(rows + 1, 50, generator=torch.Generator().manual_seed(seed))
    chunks, kinds = [], []
    for row in range(rows):
        kind = data.draw(st.sampled_from(["greedy", "drawn", "not finite", "none left"]))
        kinds.append(kind)
        params = SamplingParams(max_tokens=9, temperature=0.0 if kind == "greedy" else 1.0)
        if kind == "not finite":
            logits[row, 7] = torch.nan
        if kind == "none left":
            params = SamplingParams(max_tokens=9, allowed_token_ids=(3,), bad_words=((3,),))
        draw = Draw(params, seed + row, 0, History.needed(params, [1]))
        chunks.append(Chunk(str(row), [1], 10, [0], draw))
    alone, beside = StepResult(), StepResult()
    read_logits(chunks, logits[:rows], alone)
    read_logits([*chunks, chunk("more", 1, 0, draw=True)], logits, beside)
    del beside.tokens["more"]
    assert (alone.tokens, alone.errors, alone.refused) == (beside.tokens, beside.errors, beside.refused)
    assert alone.errors.keys() == {str(row) for row, kind in enumerate(kinds) if kind in ("not finite", "none left")}
    assert alone.refused == {str(row) for row, kind in enumerate(kinds) if kind == "none left"}
    assert alone.tokens.keys() == {str(row) for row in range(rows)} - alone.errors.keys()
    assert all(0 <= token < 50 for (token,) in alone.tokens.values())


edits = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0]),
        "top_k": st.just(3),
        "repetition_penalty": st.just(1.7),
        "frequency_penalty": st.just(2.0),
        "presence_penalty": st.just(-1.0),
        "logit_bias": st.just(((0, 1.5),)),
        "allowed_token_ids": st.just((0, 1, 2, 3)),
        "bad_words": st.just(((0, 1), (2, 3, 1), (3,))),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.just((1, 4)),
    },
)


def drawn_one_by_one(rows: torch.Tensor, draft: list[int], draw: Draw) -> tuple[list[int], list[TokenLogprobs], str]:
    """A step for each row; its tokens, their logprobs, and the error of the first one."""
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for place, row in enumerate(rows):
        result = StepResult()
        one = Draw(draw.params, draw.seed, draw.index + place, draw.history)
        read_logits([Chunk("a", [7], 10 + place, [0], one)], row[None], result)
        if "a" in result.errors:
            return tokens, logprobs, "" if tokens else result.errors["a"]
        tokens += result.tokens["a"]
        logprobs += result.logprobs["a"]
        if draft[place : place + 1] != tokens[-1:]:
            break
        if draw.history is not None:
            draw.history.append(tokens[-1])
    return tokens, logprobs, ""


@given(data=st.data(), fields=edits, draft=st.lists(st.integers(0, 5), max_size=5), seed=st.integers(0, 2**16))
@settings(max_examples=300)
def test_a_draft_gives_what_a_step_for_each_of_its_tokens_would_give(
    data: st.DataObject, fields: dict[str, object], draft: list[int], seed: int
) -> None:
    """Whatever the parameters; another sequence stands beside it, and its own history stays as it was."""
    params = SamplingParams(max_tokens=20, logprobs=2, **fields)  # type: ignore[arg-type]
    prompt = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    logits = torch.randn(len(draft) + 1, 6, generator=torch.Generator().manual_seed(seed))
    for place, token in enumerate(draft):
        if data.draw(st.booleans()):
            logits[place, token] += 4.0  # else a guess would hardly come true
    if data.draw(st.booleans()):
        logits[data.draw(st.integers(0, len(draft)))] = torch.nan
    draw = Draw(params, seed, 2, History.needed(params, prompt))
    before = copy.deepcopy(draw.history)
    result = StepResult()
    chunks = [chunk("b", 1, 0, draw=True), Chunk("a", [prompt[-1], *draft], 10, [0], draw, drafted=len(draft))]
    read_logits(chunks, torch.cat([torch.zeros(1, 6), logits]), result)
    if draw.history is not None and before is not None:
        assert draw.history.banned() == before.banned()
        for counts, known in [(draw.history.counts, before.counts)]:
            if counts is not None and known is not None:
                assert counts.tokens.tolist() == known.tokens.tolist()
                assert counts.generated.tolist() == known.generated.tolist()
    tokens, logprobs, error = drawn_one_by_one(logits, draft, draw)
    assert result.tokens["b"] == [0]
    assert list(result.tokens.get("a", ())) == tokens
    assert result.logprobs.get("a", []) == logprobs
    assert result.errors.get("a", "") == error


shapes = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20), st.booleans()), min_size=1, max_size=6)


@given(shapes=shapes, limit=st.integers(1, 12))
def test_passes_hold_every_row_once_in_order_and_few_that_are_scored(
    shapes: list[tuple[int, int, bool]], limit: int
) -> None:
    chunks = [
        chunk(f"r{which}", rows, min(scored, rows - draw), draw=draw)
        for which, (rows, scored, draw) in enumerate(shapes)
    ]
    passes = Batch(tuple(chunks)).passes(limit)
    pieces: dict[str, list[Chunk]] = {}
    for part in passes:
        assert sum(piece.scored for piece in part.chunks) <= limit
        assert len({piece.request_id for piece in part.chunks}) == len(part.chunks) >= 1
        for piece in part.chunks:
            assert piece.tokens
            pieces.setdefault(piece.request_id, []).append(piece)
    for whole in chunks:
        parts = pieces[whole.request_id]
        assert [token for piece in parts for token in piece.tokens] == whole.tokens
        assert [piece.start for piece in parts[1:]] == [piece.end for piece in parts[:-1]]
        assert [piece.draw for piece in parts] == [None] * (len(parts) - 1) + [whole.draw]
        assert [t for piece in parts if piece.score for t in piece.score.tokens] == list(
            whole.score.tokens if whole.score else []
        )
        for piece in parts:
            assert piece.wanted <= len(piece.tokens)
    if sum(one.scored for one in chunks) <= limit:
        assert passes == [Batch(tuple(chunks))]
