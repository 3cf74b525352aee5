"""A KV cache in every dtype: how near logits stay, and that blocks with scales are shared, given up and freed whole.

What an answer may differ in follows from TOLERANCE: that of the model's own logits, teacher-forced.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
import transformers

from quant import kv
from server.errors import ConfigError, LoadError
from server.memory.kv import kv_bytes_per_token
from server.model import encoder_probe, probe
from server.model.batch import Batch, Chunk, Draw
from server.model.cache_runner import CacheRunner
from server.model.probe import ModelRunner, choose_runner
from server.model.runner import PagedRunner
from server.records import KV_BLOCK_TOKENS, Abort, ModelSpec, SamplingParams
from tests.server.engines import Engine, generate
from tests.server.test_runner import expected, prompt_of
from tests.tiny_models import VOCABULARY, tiny_model

ARCHITECTURES = {"llama": {}, "mistral": {"sliding_window": 5}, "qwen3": {}, "gpt2": {}, "bloom": {}}
"""The last one attends by itself, over pages that are gathered for it."""
TOLERANCE = {
    ("float32", "auto"): 1e-5,
    ("float32", "float32"): 1e-5,
    ("float32", "float16"): 0.0015,
    ("float32", "bfloat16"): 0.012,
    ("float32", "int8"): 0.03,
    ("bfloat16", "auto"): 0.02,
    ("bfloat16", "float32"): 0.02,
    ("bfloat16", "float16"): 0.02,
    ("bfloat16", "int8"): 0.045,
}
"""Of teacher-forced logits, |difference| / |expected|, by the model's dtype and the cache's: twice to three times the
most that a thousand rows of tiny random models showed, whose heads of 32 and flat logits are the hard case."""
LENGTH = 256


def runner_for(architecture: str, dtype: str, kv_dtype: str, **changes: object) -> ModelRunner:
    model = tiny_model(architecture, dtype=getattr(torch, dtype), **ARCHITECTURES[architecture])
    spec = ModelSpec("m", "", kv_cache_dtype=kv_dtype, **changes)  # type: ignore[arg-type]
    return choose_runner(model, spec, blocks=64, max_model_len=LENGTH)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "kv_dtype"), TOLERANCE)
def test_logits_are_near_the_models_own(dtype: str, kv_dtype: str, architecture: str) -> None:
    """In chunks and token by token, over blocks in no order."""
    own = tiny_model(architecture, dtype=getattr(torch, dtype), **ARCHITECTURES[architecture])
    runner = runner_for(architecture, dtype, kv_dtype)
    assert isinstance(runner, CacheRunner if architecture == "bloom" else PagedRunner)
    prompt, table = prompt_of(60), [5, 2, 7, 1]
    with torch.inference_mode():
        wanted = own(input_ids=torch.tensor([prompt])).logits[0].float()
    draw = Draw(SamplingParams(max_tokens=1), 0, 0)
    for start, end in pairwise([0, 11, 16, *range(17, 40), 60]):
        found = runner.logits(Batch((Chunk("a", prompt[start:end], start, table, draw),)))[0].float()
        error = float((found - wanted[end - 1]).norm() / wanted[end - 1].norm())
        assert error < TOLERANCE[dtype, kv_dtype]


@torch.inference_mode()
def same_as_far_as_told_apart(model: transformers.PreTrainedModel, prompt: list[int], found: list[int]) -> None:
    """transformers' greedy answer up to a token whose logit is as near the best as the tolerance may move the two."""
    answer = expected(model, prompt, len(found))
    different = [place for place, (ours, theirs) in enumerate(zip(found, answer, strict=True)) if ours != theirs]
    if different:
        place = different[0]
        logits = model(input_ids=torch.tensor([prompt + answer[:place]]), use_cache=False).logits[0, -1]
        gap = float(logits[answer[place]] - logits[found[place]])
        assert gap <= 2 * TOLERANCE["float32", "int8"] * float(logits.norm())


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_int8_blocks_are_shared_and_freed(architecture: str) -> None:
    """In chunks beside decodes, with a beginning from the cache, and somebody aborted in between."""
    beginning = prompt_of(40)
    prompts = {f"r{i}": beginning[: 40 - 9 * i] + prompt_of(5 + 3 * i) for i in range(3)}
    for i in (1, 2):  # which part from it there, and not a token later by chance
        prompts[f"r{i}"][40 - 9 * i] = 3 + (beginning[40 - 9 * i] - 2) % (VOCABULARY - 3)
    requests = {name: generate(name, prompt, 24) for name, prompt in prompts.items()}
    neighbour = generate("n", prompt_of(20), 30, temperature=1.0)
    engine = Engine(runner_for(architecture, "float32", "int8"), max_batch_tokens=24)
    found = engine.serve([requests["r0"], neighbour], {6: [requests["r1"], Abort("n")], 9: [requests["r2"]]})
    for name, prompt in prompts.items():
        same_as_far_as_told_apart(tiny_model(architecture, **ARCHITECTURES[architecture]), prompt, found[name])
    assert sum(report.prefix_hit_tokens for report in engine.reports) == 32, "a block for r1, and one for r2"
    assert engine.reports[-1].kv_blocks_used == 0
    assert engine.ends["n"] == ("abort", None)


def test_int8_blocks_are_given_up_and_computed_anew() -> None:
    prompts = {f"r{i}": prompt_of(30) for i in range(4)}
    runner = runner_for("llama", "float32", "int8")
    engine = Engine(runner, blocks=6, max_model_len=6 * KV_BLOCK_TOKENS)
    found = engine.serve([generate(name, prompt, 40) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        same_as_far_as_told_apart(tiny_model("llama"), prompt, found[name])
    recomputed = sum(report.prefill_tokens for report in engine.reports) - 4 * 30
    assert recomputed > 0, "the pool was small enough to throw somebody out"
    assert engine.reports[-1].kv_blocks_used == 0


def test_what_lies_in_a_shared_block_is_what_was_written() -> None:
    """The same bits whoever computed it: a sequence that begins after another's blocks, beside one that does not."""
    runner = runner_for("llama", "float32", "int8")
    prompt = prompt_of(40)
    draw = Draw(SamplingParams(max_tokens=1), 0, 0)
    runner.logits(Batch((Chunk("a", prompt[:32], 0, [3, 9], None),)))
    alone = runner.logits(Batch((Chunk("a", prompt[32:], 32, [3, 9, 4], draw),)))
    for tensor in runner.kv_tensors:
        tensor[11], tensor[12] = tensor[3].clone(), tensor[9].clone()  # moved as a unit: codes with their scales
    moved = runner.logits(Batch((Chunk("b", prompt[32:], 32, [11, 12, 5], draw),)))
    assert torch.equal(moved, alone)


@pytest.mark.parametrize("kv_dtype", ["auto", *kv.DTYPES])
def test_the_cache_takes_the_bytes_of_the_plan(kv_dtype: str) -> None:
    runner = runner_for("llama", "bfloat16", kv_dtype)
    dtype = kv.DTYPES.get(kv_dtype, torch.bfloat16)
    per_token = kv_bytes_per_token(runner.model.config, dtype)
    assert sum(tensor.nbytes for tensor in runner.kv_tensors) == 64 * KV_BLOCK_TOKENS * per_token
    assert per_token == 2 * 2 * 2 * {"float32": 128, "int8": 36}.get(kv_dtype, 64)


def test_a_model_that_keeps_more_than_keys_and_values_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "cached_shapes", lambda *_: [])
    with pytest.raises(LoadError, match=r"architecture 'bloom' .* kv_cache.dtype is 'int8', accepted is auto"):
        choose_runner(tiny_model("bloom"), ModelSpec("m", "", kv_cache_dtype="int8"), blocks=8, max_model_len=64)


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("auto", 1e-5), ("bfloat16", 0.02), ("int8", 0.03)])
def test_an_encoder_decoder_is_near_its_own_logits(kv_dtype: str, tolerance: float) -> None:
    """Its prompt's keys and values lie in the pages too; the probe compares them with the model's."""
    model = tiny_model("t5")
    spec = ModelSpec("m", "", kv_cache_dtype=kv_dtype)
    runner = choose_runner(model, spec, blocks=64, max_model_len=64)
    proof = encoder_probe.EncoderDecoderProof.of(
        tiny_model("t5"), encoder_probe.decoder_prompt(model), blocks=64, block_tokens=KV_BLOCK_TOKENS, longest=64
    )
    assert proof.difference(runner) < tolerance
    per_token = kv_bytes_per_token(model.config, kv.DTYPES.get(kv_dtype, torch.float32))
    assert sum(tensor.nbytes for tensor in runner.kv_tensors) == 64 * KV_BLOCK_TOKENS * per_token


def test_an_unknown_dtype_is_refused() -> None:
    spec = ModelSpec("m", "", kv_cache_dtype="int4")
    with pytest.raises(ConfigError, match="kv_cache.dtype is 'int4'; accepted are auto, float32, float16, bfloat16, i"):
        choose_runner(tiny_model("llama"), spec, blocks=8, max_model_len=64)


@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16"])
def test_random_neighbours_change_nothing(kv_dtype: str) -> None:
    """At a fixed number of rows: a neighbour's tokens are not seen, in keys, values or scales."""
    runner = runner_for("qwen3", "float32", kv_dtype)
    own, draw = prompt_of(20), Draw(SamplingParams(max_tokens=1), 0, 0)
    found = []
    for _ in range(2):
        blocks = random.sample(range(64), 4)
        chunks = (Chunk("a", own, 0, blocks[:2], draw), Chunk("n", prompt_of(25), 0, blocks[2:], draw))
        found.append(runner.logits(Batch(chunks))[0])
    assert torch.equal(*found)
