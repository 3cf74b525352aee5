"""Recorded steps: a batch of single rows gets the logits that calling the model gives, by a recording of other numbers.

On the CPU the recorder is a tape that obeys CUDA's rules (tape.py); where there is a GPU, CUDA graphs are it.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from server.model import graphs as graphs_module
from server.model.batch import Batch, Chunk, Draw
from server.model.graphs import COARSE_STEP, WIDENED, CudaRecorder, Graphs, Size, recorded_rows, recorded_widths
from server.model.probe import can_be_recorded, choose_runner, record_steps
from server.model.proof import Proof
from server.model.runner import PagedRunner, StepBuffer
from server.records import KV_BLOCK_TOKENS, SamplingParams
from tests.server.greedy import check_greedy, prompt_of
from tests.server.tape import TapeRecorder
from tests.server.tiny_cases import Case
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def narrow_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are recorded with tables of two widths, though the sequences here are short."""
    monkeypatch.setattr(graphs_module, "NARROWEST", 2)


BLOCKS = 64
MOST = 12
PROVEN_BLOCKS = MOST
"""One for each row."""
LENGTH = 256
DRAW = Draw(SamplingParams(max_tokens=9, temperature=0.0), 0, 1)


CASES = {
    "llama": Case("llama"),
    "llama, bfloat16": Case("llama", "bfloat16"),
    "llama, nf4": Case("llama", "bfloat16", "nf4-dq"),
    "llama, int8, cache in int8": Case("llama", "bfloat16", "int8", "int8"),
    "mistral": Case("mistral", changes={"sliding_window": 5}),
    "qwen3, fp4": Case("qwen3", quantization="fp4"),
    "gpt2": Case("gpt2"),
    "gemma3, nf4": Case("gemma3_text", "bfloat16", "nf4"),
    "mixtral, nf4": Case("mixtral", "bfloat16", "nf4"),
    "mixtral, int8": Case("mixtral", "bfloat16", "int8"),
    "gpt_oss": Case("gpt_oss"),
}


def runner_of(case: Case, device: str = "cpu") -> tuple[PagedRunner, Proof]:
    """A runner without recordings, and what it has to prove with them."""
    model, spec = case.load(device=device, max_sequences=MOST, cuda_graphs=False)
    proof = Proof.of(model, blocks=BLOCKS, block_tokens=KV_BLOCK_TOKENS, max_model_len=LENGTH)
    runner = choose_runner(model, spec, blocks=BLOCKS, max_model_len=LENGTH)
    assert isinstance(runner, PagedRunner)
    return runner, proof


def started(runner: PagedRunner) -> list[Chunk]:
    """Sequences of random lengths in the cache, each with its next row: over blocks in no order, none of which is
    written to when steps are recorded and proven."""
    blocks = random.sample(range(PROVEN_BLOCKS, BLOCKS), BLOCKS - PROVEN_BLOCKS)
    rows = []
    for number in range(MOST):
        prompt = prompt_of(random.randint(2, 3 * KV_BLOCK_TOKENS))
        own = [blocks.pop() for _ in range(-(-len(prompt) // KV_BLOCK_TOKENS))]
        runner.logits(Batch((Chunk(f"r{number}", prompt[:-1], 0, own, None),)))
        rows.append(Chunk(f"r{number}", prompt[-1:], len(prompt) - 1, own, DRAW))
    return rows


def batches(rows: list[Chunk]) -> list[Batch]:
    """Of every number of rows, in a new order each."""
    return [Batch(tuple(random.sample(rows, count))) for count in (*range(1, len(rows) + 1), 1, 5)]


@pytest.mark.parametrize("name", CASES)
def test_replayed_logits_are_those_of_calls(name: str) -> None:
    """One recording serves batches of other sequences, of other lengths, and of fewer rows."""
    runner, proof = runner_of(CASES[name])
    tried = batches(started(runner))
    called = [runner.logits(batch).clone() for batch in tried]
    recorder = TapeRecorder()
    record_steps(runner, proof, recorder)
    before = [tensor[PROVEN_BLOCKS:].clone() for tensor in runner.kv_tensors]
    for batch, expected in zip(tried, called, strict=True):
        recorder.replayed = 0
        found = runner.logits(batch)
        assert recorder.replayed == 1
        # Sums of another number of rows are added up in another order; an int8 or bfloat16 rounding may turn over.
        torch.testing.assert_close(
            found.float(), expected.float(), rtol=0, atol=_allowed(CASES[name]) * float(expected.float().std())
        )
    for now, then in zip(runner.kv_tensors, before, strict=True):
        difference = (now[PROVEN_BLOCKS:].float() - then.float()).abs().max()
        assert float(difference) <= _allowed(CASES[name]) * float(then.float().abs().max()), (
            "what the batches wrote is what was there; copies of their last rows wrote nothing else"
        )


def _allowed(case: Case) -> float:
    if case.dtype == "float32":
        return 1e-5
    return 0.25 if case.quantization == "int8" or case.cache == "int8" else 0.1


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "qwen3"])
def test_greedy_is_transformers_generate_with_recorded_steps(architecture: str) -> None:
    runner, proof = runner_of(Case(architecture))
    recorder = TapeRecorder()
    record_steps(runner, proof, recorder)
    assert recorder.recorded == len(recorded_rows(MOST)) * len(recorded_widths(LENGTH // KV_BLOCK_TOKENS))
    check_greedy(runner, tiny_model(architecture))
    assert recorder.replayed > 20


def test_rows_that_draw_nothing_get_no_logits() -> None:
    runner, proof = runner_of(Case("llama"))
    record_steps(runner, proof, TapeRecorder())
    rows = started(runner)[:3]
    whole = runner.logits(Batch(tuple(rows))).clone()
    silent = Chunk(rows[1].request_id, rows[1].tokens, rows[1].start, rows[1].blocks, None)
    assert torch.equal(runner.logits(Batch((rows[0], silent, rows[2]))), whole[[0, 2]])
    assert runner.logits(Batch((silent,))).shape == (0, whole.shape[1])


def test_a_buffer_is_not_filled_before_what_it_held_has_been_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that draw nothing do not wait for the device, so the next one may come while a copy is on its way."""
    happened: list[str] = []

    class Sent:
        def record(self, _stream: object) -> None:
            happened.append("sent")

        def synchronize(self) -> None:
            happened.append("waited")

    buffer = StepBuffer(4, torch.device("cpu"))
    monkeypatch.setattr(buffer, "_sent", Sent())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    for _ in range(2):
        buffer.on_host(2, 2)[:] = 1
        buffer.send(4)
    assert happened == ["waited", "sent"] * 2


def test_what_recordings_keep_is_counted() -> None:
    runner, proof = runner_of(Case("llama"))
    before = sum(tensor.nbytes for tensor in runner.buffers)
    record_steps(runner, proof, TapeRecorder())
    kept = sum(tensor.nbytes for tensor in runner.buffers) - before
    assert kept == MOST * runner.model.config.vocab_size * 4 + (MOST + 1) * 8


def spoil(model: transformers.PreTrainedModel, spoiled: Any) -> None:
    """`spoiled` is what the model's head gives from now on, called with what it gave."""
    model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, output: spoiled(output))


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        (lambda logits: logits * float(logits.abs().max() > 0), "waits for the device"),
        (lambda logits: logits + 0 * torch.rand_like(logits), "draws a random number"),
    ],
    ids=["waiting", "random"],
)
def test_a_model_that_cannot_be_recorded_is_served_without(
    spoiled: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    runner, proof = runner_of(Case("llama"))
    spoil(runner.model, spoiled)
    before = runner.buffers
    with caplog.at_level(logging.WARNING):
        record_steps(runner, proof, TapeRecorder())
    assert reason in caplog.text
    assert [id(tensor) for tensor in runner.buffers] == [id(tensor) for tensor in before]
    assert proof.difference(runner) < 0.01


def test_a_model_that_replays_other_logits_is_served_without(caplog: pytest.LogCaptureFixture) -> None:
    """One that counts its calls in Python, say: what is replayed is what was true when it was recorded."""
    runner, proof = runner_of(Case("llama"))
    recording = False

    class Marked(TapeRecorder):
        def __call__(self, work: Any) -> Any:
            nonlocal recording
            recording = True
            try:
                return super().__call__(work)
            finally:
                recording = False

    spoil(runner.model, lambda logits: logits.flip(-1) if recording else logits)
    with caplog.at_level(logging.WARNING):
        record_steps(runner, proof, Marked())
    assert "its logits differ from the model's own" in caplog.text
    assert proof.difference(runner) < 0.01


def test_models_in_parts_and_those_of_two_ways_are_not_recorded() -> None:
    runner, _ = runner_of(Case("llama"))
    assert can_be_recorded(runner.model, runner)
    runner.switch_length = 100
    assert not can_be_recorded(runner.model, runner)
    runner.switch_length = None
    runner.model.get_output_embeddings().to("meta")
    assert not can_be_recorded(runner.model, runner)


@given(
    most=st.integers(1, 4096), rows=st.integers(1, 4096), longest=st.integers(1, 2**17), blocks=st.integers(1, 2**17)
)
def test_every_batch_fits_in_a_recording_that_is_not_much_larger(
    most: int, rows: int, longest: int, blocks: int
) -> None:
    for sizes, largest in ((recorded_rows(most), most), (recorded_widths(longest), longest)):
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
    done: list[Size] = []
    graphs = Graphs(done.append, most, longest, lambda work: work)
    fitting = graphs.fitting(rows, blocks)
    if rows > most or blocks > longest:
        assert fitting is None
    else:
        assert fitting is not None
        assert rows <= fitting.rows <= min(most, max(2 * rows - 1, rows + COARSE_STEP - 1))
        assert blocks <= fitting.width <= min(longest, max(graphs_module.NARROWEST, WIDENED * blocks))
        graphs.replay(fitting)
        assert done == [fitting]


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_cuda_graphs_give_the_logits_of_calls(name: str) -> None:
    runner, proof = runner_of(CASES[name], "cuda")
    tried = batches(started(runner))
    called = [runner.logits(batch).clone() for batch in tried]
    record_steps(runner, proof, CudaRecorder(runner.device))
    assert len(runner.buffers) == 6, "it was recorded"
    for batch, expected in zip(tried, called, strict=True):
        found = runner.logits(batch)
        allowed = _allowed(CASES[name]) * float(expected.float().std())
        torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=allowed)
