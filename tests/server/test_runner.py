"""Real models through the real loop: token for token what transformers.generate says, alone and in company."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.gptj import modeling_gptj

from quant.config import BitsAndBytesConfig, from_spec
from quant.linear import PackedLinear
from server.errors import LoadError
from server.memory.kv import kv_bytes_per_token
from server.memory.ledger import measure
from server.memory.plan import make_plan
from server.model import probe
from server.model.attention import Segment
from server.model.batch import Batch, Chunk, Draw, StepError
from server.model.cache_runner import MOST_PADDED, SMALL_CALL, CacheRunner, groups
from server.model.encoder_decoder import EncoderDecoderRunner
from server.model.encoder_probe import decoder_prompt
from server.model.load import load_model
from server.model.probe import ModelRunner, choose_cache_runner, choose_runner
from server.model.proof import Proof
from server.model.runner import PagedRunner
from server.model.single_runner import SingleRunner
from server.records import KV_BLOCK_TOKENS, Batching, ModelSpec, SamplingParams
from tests.server.engines import Engine, generate
from tests.server.greedy import INT8_TIE, check_greedy, expected, prompt_of, same_up_to_a_tie
from tests.tiny_models import auto_class, save_tiny, tiny_model

GPTJ_CALLS_THE_INTERFACE = hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS")
"""From transformers 5.24 on."""
PAGED = ("llama", "mistral", "qwen3", "gpt2", *(("gptj",) if GPTJ_CALLS_THE_INTERFACE else ()))
CACHED = (
    "bloom",
    "mpt",
    "falcon",
    "falcon with alibi",
    "falcon with groups",
    *(() if GPTJ_CALLS_THE_INTERFACE else ("gptj",)),
)
ENCODER_DECODERS = ("t5", "t5 with a deeper encoder", "bart")
CHANGES: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 5},
    "bloom": {"tie_word_embeddings": False},
    "bart": {"tie_word_embeddings": False},
    "falcon with alibi": {"alibi": True},
    "t5": {"initializer_factor": 1.0},
    "t5 with a deeper encoder": {
        "initializer_factor": 1.4,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "feed_forward_proj": "relu",
    },
    "falcon with groups": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
"""Changes to tiny models that exercise what a short test would otherwise not reach. (transformers itself fails to
generate with a decoder of more layers than the encoder.)"""
LENGTH = 256
BLOCKS = 64


def tiny(architecture: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    return tiny_model(architecture.partition(" ")[0], dtype=dtype, **CHANGES.get(architecture, {}))


@cache
def original(architecture: str) -> transformers.PreTrainedModel:
    """The model as transformers runs it; never handed to a runner."""
    return tiny(architecture)


@cache
def runner_for(architecture: str) -> ModelRunner:
    return choose_runner(tiny(architecture), ModelSpec(architecture, ""), blocks=BLOCKS, max_model_len=LENGTH)


def cache_runner_for(model: transformers.PreTrainedModel, *, batch_invariant: bool = False) -> ModelRunner:
    """What serves a model that attends by itself, for one that need not."""
    proof = Proof.of(model, blocks=BLOCKS, block_tokens=KV_BLOCK_TOKENS, max_model_len=LENGTH)
    return choose_cache_runner(model, ModelSpec("m", "", batch_invariant=batch_invariant), proof, blocks=BLOCKS)


def runner_kind(architecture: str) -> tuple[type[ModelRunner], Batching]:
    if architecture in ENCODER_DECODERS:
        return EncoderDecoderRunner, "equal" if architecture == "bart" else "padded"
    return (PagedRunner, "packed") if architecture in PAGED else (CacheRunner, "padded")


@pytest.mark.parametrize("architecture", PAGED + CACHED + ENCODER_DECODERS)
def test_each_architecture_gets_its_runner(architecture: str) -> None:
    runner = runner_for(architecture)
    assert (type(runner), runner.batching) == runner_kind(architecture)
    planned = kv_bytes_per_token(runner.model.config, torch.float32) * BLOCKS * KV_BLOCK_TOKENS
    assert sum(tensor.nbytes for tensor in runner.kv_tensors) == planned


@pytest.mark.parametrize("architecture", PAGED + CACHED + ENCODER_DECODERS)
def test_greedy_is_transformers_generate_alone_and_in_company(architecture: str) -> None:
    check_greedy(runner_for(architecture), original(architecture))


@pytest.mark.parametrize("architecture", ["gptj", "llama", "gpt2"])
def test_a_cache_runner_pads_models_that_take_positions(architecture: str) -> None:
    runner = cache_runner_for(tiny(architecture))
    assert (type(runner), runner.batching) == (CacheRunner, "padded")
    check_greedy(runner, original(architecture))


def test_a_batch_invariant_cache_runner_computes_sequences_one_by_one() -> None:
    runner = cache_runner_for(tiny("bloom"), batch_invariant=True)
    assert (type(runner), runner.batching, runner.shares_blocks) == (CacheRunner, "single", True)
    check_greedy(runner, original("bloom"))


def test_a_runner_of_single_sequences_answers_as_transformers_does() -> None:
    check_greedy(SingleRunner(tiny("bloom")), original("bloom"))


@pytest.mark.parametrize("architecture", ["llama", "bloom", "t5"])
def test_greedy_survives_preemption(architecture: str) -> None:
    model = original(architecture)
    prompts = {f"r{i}": prompt_of(30) for i in range(4)}
    engine = Engine(runner_for(architecture), blocks=6, max_model_len=6 * KV_BLOCK_TOKENS)
    found = engine.serve([generate(name, prompt, 40) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        same_up_to_a_tie(model, prompt, found[name], expected(model, prompt, 40))
    recomputed = sum(report.prefill_tokens for report in engine.reports) - 4 * 30
    assert recomputed > 0, "the pool was small enough to throw somebody out"


@pytest.mark.parametrize("architecture", PAGED + CACHED)
def test_greedy_is_the_same_with_a_beginning_from_the_cache(architecture: str) -> None:
    """In company, in chunks, while the first one runs and after it has ended."""
    beginning = prompt_of(60)
    prompts = {f"r{i}": beginning[: 60 - 9 * i] + prompt_of(5 + 3 * i) for i in range(4)}
    prompts["again"] = [*prompts["r0"], *expected(original(architecture), prompts["r0"], 12)][:-1]
    requests = {name: generate(name, prompt, 12) for name, prompt in prompts.items()}
    answers, computed = [], []
    for caching in (True, False):
        engine = Engine(runner_for(architecture), max_batch_tokens=24, prefix_caching=caching)
        found = engine.serve([requests["r0"], generate("n", prompt_of(20), 30)], {5: [requests["r1"], requests["r2"]]})
        found |= engine.serve([requests["again"], requests["r3"]])
        answers.append({name: found[name] for name in prompts})
        computed.append(sum(report.prefill_tokens for report in engine.reports))
        hits = sum(report.prefix_hit_tokens for report in engine.reports)
        assert engine.scheduler.prefix_caching == caching
        # r1 shares 51 tokens, r2 42, r3 33, all but the last of what "again" has are full blocks: 75 of 76.
        assert hits == (48 + 32 + 32 + 64 if caching else 0)
        assert engine.reports[-1].kv_blocks_used == 0
    for name, prompt in prompts.items():
        answer = expected(original(architecture), prompt, 12)
        for found in answers:
            same_up_to_a_tie(original(architecture), prompt, found[name], answer)
    assert computed[1] - computed[0] == 48 + 32 + 32 + 64


@pytest.mark.parametrize("quantization", ["nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "bloom", "falcon", "t5"])
def test_quantized_models_answer_as_transformers_does(architecture: str, quantization: str, tmp_path: Path) -> None:
    path = save_tiny(architecture, tmp_path / "model", **CHANGES.get(architecture, {}))
    config = from_spec(quantization, compute_dtype=torch.float32)
    model = auto_class(architecture).from_pretrained(path, quantization_config=config)
    loaded = load_model(ModelSpec("m", str(path), quantization=quantization), lambda *_: None)
    runner = choose_runner(loaded.model, ModelSpec("m", ""), blocks=BLOCKS, max_model_len=LENGTH)
    prompts = {f"r{i}": prompt_of(length) for i, length in enumerate((1, 9, 33, 50))}
    engine = Engine(runner, max_batch_tokens=24)
    found = engine.serve(
        [generate("r0", prompts["r0"], 12), generate("r2", prompts["r2"], 12)],
        {3: [generate("r1", prompts["r1"], 12), generate("r3", prompts["r3"], 12)]},
    )
    for name, prompt in prompts.items():
        answer = expected(model, prompt, 12)
        if quantization == "int8":
            same_up_to_a_tie(model, prompt, found[name], answer, INT8_TIE)
        else:
            same_up_to_a_tie(model, prompt, found[name], answer)


@pytest.mark.parametrize("skips", [None, ["decoder", "lm_head", "wo"]])
def test_a_packed_checkpoint_of_t5_is_served_with_the_skip_list_in_it(skips: list[str] | None, tmp_path: Path) -> None:
    source = save_tiny("t5", tmp_path / "source", **CHANGES["t5"])
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skips)
    model = auto_class("t5").from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    spec = ModelSpec("m", str(tmp_path / "packed"), max_model_len=64, kv_cache_tokens=BLOCKS * KV_BLOCK_TOKENS)
    loaded = load_model(spec, lambda *_: None)
    packed = [name for name, module in loaded.model.named_modules() if isinstance(module, PackedLinear)]
    assert packed
    assert not any(name.endswith(".wo") for name in packed)
    assert any(name.startswith("decoder") for name in packed) == (skips is None)
    runner = choose_runner(loaded.model, spec, blocks=BLOCKS, max_model_len=64)
    assert measure(loaded.model, runner.kv_tensors).items() <= make_plan(spec).components.items()
    check_greedy(runner, model)


LLAMA = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
PLACES = dict.fromkeys(LLAMA, "cpu") | {"model.layers.1": "disk"}


@pytest.mark.filterwarnings("ignore:.*offloaded.*")
@pytest.mark.parametrize(
    ("fields", "device_map"),
    [({"quantize_embeddings": True}, None), ({"llm_int8_enable_fp32_cpu_offload": True}, PLACES)],
    ids=["packed tied embedding", "a layer on disk"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_embeddings_and_offloaded_layers_are_paged(
    dtype: str, fields: dict[str, bool], device_map: dict[str, str | int] | None, tmp_path: Path
) -> None:
    path = save_tiny("llama", tmp_path, tie_word_embeddings=device_map is None)
    quantization = {"load_in_4bit": True} | fields
    spec = ModelSpec("m", str(path), dtype=dtype, device="cpu", device_map=device_map, quantization=quantization)
    alone, served = (load_model(spec, lambda *_: None) for _ in range(2))
    runner = choose_runner(served.model, spec, blocks=BLOCKS, max_model_len=LENGTH)
    assert type(runner) is PagedRunner
    prompt = prompt_of(30)
    found = Engine(runner, max_batch_tokens=24).serve([generate("r", prompt, 12)])["r"]
    if dtype == "float32":
        same_up_to_a_tie(alone.model, prompt, found, expected(alone.model, prompt, 12))
    assert len(found) == 12
    for loaded in (alone, served):
        if loaded.offload is not None:
            loaded.offload.cleanup()


@pytest.mark.filterwarnings("ignore:.*offloaded.*")
@pytest.mark.parametrize(("kind", "warns"), [("tmpfs", True), ("ext4", False)])
def test_a_disk_that_is_memory_is_said(
    kind: str, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.model.load.file_system", lambda path: kind)
    spec = ModelSpec("m", str(save_tiny("llama", tmp_path)), device="cpu", device_map=PLACES)
    loaded = load_model(spec, lambda *_: None)
    assert loaded.offload is not None
    loaded.offload.cleanup()
    assert ("a tmpfs, which is memory" in caplog.text) == warns


@pytest.mark.parametrize(("architecture", "prefills"), [("llama", 0), ("bloom", 1), ("t5", 1)])
def test_eight_requests_share_forward_passes(architecture: str, prefills: int) -> None:
    """Packed are prompts and decodes; side by side, four late prompts of one length are one more call."""
    runner = runner_for(architecture)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = runner.model.register_forward_hook(count)
    engine = Engine(runner)
    late = {3: [generate(f"late{i}", prompt_of(4), 10) for i in range(4)]}
    engine.serve([generate(f"r{i}", prompt_of(5), 20) for i in range(8)], late)
    handle.remove()
    assert passes == sum(report.forward_passes for report in engine.reports) == 20 + prefills
    assert max(report.decode_tokens for report in engine.reports) == 12
    assert len(engine.ends) == 12


def test_steps_that_only_decode_make_no_segments_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tables are enough; of many sequences, segments would be a tenth of what the engine takes of a step."""
    runner = runner_for("llama")
    made: list[int] = []

    def counted(*parts: Any) -> Segment:
        made.append(parts[0])
        return Segment(*parts)

    monkeypatch.setattr("server.model.runner.Segment", counted)
    engine = Engine(runner)
    engine.serve([generate(f"r{i}", prompt_of(5), 20) for i in range(8)])
    assert sum(report.decode_tokens > 0 for report in engine.reports) == 19
    assert len(made) in (0, 8)  # those of the prompts, if any


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    engine = Engine(runner_for("qwen3"), max_batch_tokens=24)
    prompt = prompt_of(35)
    settings = {"temperature": 1.2, "top_p": 0.95, "top_k": 50}
    alone = engine.serve([generate("a", prompt, 20, seed=42, **settings)])["a"]
    neighbours = [generate(f"n{i}", prompt_of(10 + i), 25, temperature=1.0) for i in range(5)]
    company = engine.serve([*neighbours, generate("a", prompt, 20, seed=42, **settings)])["a"]
    assert company == alone
    assert engine.serve([generate("a", prompt, 20, seed=43, **settings)])["a"] != alone


def test_stop_ids_end_the_text() -> None:
    prompt = prompt_of(6)
    answer = expected(original("gpt2"), prompt, 12)
    stop = answer[5]
    engine = Engine(runner_for("gpt2"))
    found = engine.serve([generate("a", prompt, 12, stop_token_ids=(stop,))])["a"]
    assert found == answer[: answer.index(stop) + 1]
    assert engine.ends["a"] == ("stop", None)


BF16_TOLERANCE = 0.02
"""Of teacher-forced logits, |difference| / |expected|: bfloat16 keeps 8 bits, and the two attentions round apart."""


@pytest.mark.parametrize("architecture", PAGED + CACHED)
def test_bfloat16_logits_are_near_the_models_own(architecture: str) -> None:
    own = tiny(architecture, torch.bfloat16)
    runner = choose_runner(tiny(architecture, torch.bfloat16), ModelSpec("m", ""), blocks=8, max_model_len=64)
    prompt, table = prompt_of(40), [5, 2, 7]
    with torch.inference_mode():
        wanted = own(input_ids=torch.tensor([prompt])).logits[0].float()
    draw = Draw(SamplingParams(max_tokens=1), 0, 0)
    cuts = [0, 11, 16, *range(17, 41)]
    for start, end in pairwise(cuts):
        found = runner.logits(Batch((Chunk("a", prompt[start:end], start, table, draw),)))[0].float()
        error = float((found - wanted[end - 1]).norm() / wanted[end - 1].norm())
        assert error < BF16_TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_logits_that_are_not_numbers_end_one_request_only(architecture: str) -> None:
    model = tiny_model(architecture, tie_word_embeddings=False)  # a tied head would give everybody the NaN
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = float("nan")
    engine = Engine(choose_runner(model, ModelSpec("m", ""), blocks=BLOCKS, max_model_len=LENGTH))
    whole = tiny_model(architecture, tie_word_embeddings=False)
    good, answer = [77], [77]
    while 77 in good + answer:
        good = prompt_of(12)
        answer = expected(whole, good, 10)
    found = engine.serve([generate("good", good, 10), generate("bad", [5, 77, 9], 10)])
    assert engine.ends["bad"][0] == "error"
    assert "not finite" in str(engine.ends["bad"][1])
    same_up_to_a_tie(whole, good, found["good"], answer)


def test_running_out_of_memory_ends_the_step_and_not_the_engine() -> None:
    runner = choose_runner(tiny_model("llama"), ModelSpec("m", ""), blocks=BLOCKS, max_model_len=LENGTH)
    handle = runner.model.register_forward_pre_hook(lambda *_: torch.empty(1 << 55, dtype=torch.uint8) and None)
    engine = Engine(runner)
    engine.serve([generate("a", [5, 6], 4), generate("b", [7], 4)])
    for name in "ab":
        assert engine.ends[name][0] == "error"
        assert "memory ran out in a step of 3 tokens" in str(engine.ends[name][1])
    handle.remove()
    assert engine.serve([generate("c", [5, 6], 4)])["c"] == expected(original("llama"), [5, 6], 4)


def test_prompts_of_an_encoder_that_are_not_numbers_end_their_own_requests() -> None:
    model = tiny("t5")
    with torch.no_grad():
        model.encoder.final_layer_norm.register_forward_hook(
            lambda _, arguments, given: given.fill_(float("nan")) if given.shape[1] == 3 else given
        )
    engine = Engine(choose_runner(model, ModelSpec("m", ""), blocks=BLOCKS, max_model_len=LENGTH))
    prompt = prompt_of(12)
    found = engine.serve([generate("good", prompt, 10), generate("bad", [5, 77, 9], 10)])
    assert "not finite" in str(engine.ends["bad"][1])
    same_up_to_a_tie(original("t5"), prompt, found["good"], expected(original("t5"), prompt, 10))


def test_an_encoder_decoder_shares_no_beginnings_and_scores_no_prompts() -> None:
    engine = Engine(runner_for("t5"))
    prompt = prompt_of(40)
    found = engine.serve([generate(name, prompt, 5) for name in "ab"] + [generate("c", prompt, 5, prompt_logprobs=0)])
    assert not engine.scheduler.prefix_caching
    assert found["a"] == found["b"]
    same_up_to_a_tie(original("t5"), prompt, found["a"], expected(original("t5"), prompt, 5))
    assert "an encoder-decoder has no logprobs of its prompt" in str(engine.ends["c"][1])


def test_penalties_and_bad_words_of_an_encoder_decoder_look_at_its_answer_alone() -> None:
    model, prompt = original("t5"), prompt_of(30)
    plain = expected(model, prompt, 12)
    beginning = decoder_prompt(model)[0]
    words = [[plain[0]], [plain[3], plain[4]], [prompt[-1], plain[1]], [beginning, plain[2]]]
    asked: list[tuple[dict[str, object], dict[str, object]]] = [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"bad_words": tuple(map(tuple, words))}, {"bad_words_ids": words}),
    ]
    prompt = [*prompt, *plain]  # words of the answer are in the prompt
    engine = Engine(runner_for("t5"))
    found = engine.serve([generate(f"r{i}", prompt, 12, **ours) for i, (ours, _) in enumerate(asked)])
    for which, (_, theirs) in enumerate(asked):
        same_up_to_a_tie(model, prompt, found[f"r{which}"], expected(model, prompt, 12, **theirs), **theirs)


def test_a_runner_of_single_sequences_reports_one_that_is_not_there() -> None:
    runner = SingleRunner(tiny("bloom"))
    chunk = Chunk("nobody", [5], 3, [0], Draw(SamplingParams(max_tokens=1), 0, 0))
    assert "where its cache does not end" in runner.step(Batch((chunk,))).errors["nobody"]
    with pytest.raises(StepError):
        runner.logits(Batch((chunk,)))
    with pytest.raises(StepError, match="where it was not left"):
        runner_for("t5").step(Batch((Chunk("nobody", [5], 3, [0], chunk.draw, encoder_tokens=4),)))


def test_a_model_that_looks_ahead_is_refused_by_name() -> None:
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # weak attention would look like rounding
    with pytest.raises(LoadError, match="architecture 'bert' .* later tokens change the logits of earlier ones"):
        choose_runner(model, ModelSpec("m", ""), blocks=8, max_model_len=64)


def test_a_model_with_states_is_served_a_sequence_at_a_time() -> None:
    config = transformers.GraniteMoeHybridConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, shared_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, layer_types=["mamba", "attention"], num_local_experts=2,
        num_experts_per_tok=1, mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GraniteMoeHybridForCausalLM(config).eval()
    runner = choose_runner(model, ModelSpec("m", ""), blocks=8, max_model_len=64)
    assert (type(runner), runner.batching) == (SingleRunner, "single")


def test_an_encoder_decoder_whose_decoder_has_no_config_is_refused_by_name() -> None:
    config = transformers.FSMTConfig(
        langs=["a", "b"], src_vocab_size=320, tgt_vocab_size=320, d_model=64, max_position_embeddings=64,
        encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64,
    )  # fmt: skip
    model = transformers.FSMTForConditionalGeneration(config).eval()
    with pytest.raises(LoadError, match="architecture 'fsmt' .* failed with a cache .*'FSMTDecoder' object has no"):
        choose_runner(model, ModelSpec("m", ""), blocks=8, max_model_len=64)


def test_a_model_that_no_cache_can_be_made_for_is_tried_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise AttributeError("'BloomConfig' object has no attribute 'num_hidden_layers'")

    monkeypatch.setattr(probe, "DynamicCache", fail)
    assert isinstance(cache_runner_for(tiny("bloom")), SingleRunner)


def test_a_model_that_leaks_between_packed_sequences_is_not_paged() -> None:
    """BART calls the interface in every layer, and ignores position ids; only the logits tell."""
    config = transformers.BartConfig(
        vocab_size=320, d_model=64, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64,
        encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, forced_eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model, own = (transformers.BartForCausalLM(config).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    own.load_state_dict(model.state_dict())
    runner = choose_runner(model, ModelSpec("m", ""), blocks=BLOCKS, max_model_len=LENGTH)
    assert (type(runner), runner.batching) == (CacheRunner, "equal")
    check_greedy(runner, own)


@pytest.mark.parametrize("architecture", ["llama", "bloom", "falcon", "t5"])
def test_what_lies_beyond_a_sequence_is_never_read(architecture: str) -> None:
    runner = runner_for(architecture)
    for tensor in runner.kv_tensors:
        tensor.fill_(float("nan"))
    check_greedy(runner, original(architecture))


CHUNKS = st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 7, 300]), st.integers(0, 5000)), max_size=40)


@given(CHUNKS, st.sampled_from(["padded", "equal", "single"]))
def test_chunks_share_a_call_within_bounds(sizes: list[tuple[int, int]], batching: Batching) -> None:
    chunks = [Chunk(str(which), [0] * new, start, (), None) for which, (new, start) in enumerate(sizes)]
    found = groups(chunks, batching)
    if batching == "single":
        assert [(c.request_id, c.start) for [c] in found] == [
            (c.request_id, place) for c in chunks for place in range(c.start, c.end)
        ]
        assert all(len(chunk.tokens) == 1 for [chunk] in found)
        return
    assert sorted(chunk.request_id for group in found for chunk in group) == sorted(c.request_id for c in chunks)
    for group in found:
        assert len({len(chunk.tokens) for chunk in group}) == 1
        assert batching == "padded" or len({chunk.end for chunk in group}) == 1
        width = max(chunk.end for chunk in group)
        assert len(group) == 1 or len(group) * width <= max(SMALL_CALL, MOST_PADDED * sum(c.end for c in group))
    if batching == "padded" and len({new for new, _ in sizes}) == 1:
        total = sum(chunk.end for chunk in chunks)
        assert len(found) == 1 or len(chunks) * max(c.end for c in chunks) > max(SMALL_CALL, MOST_PADDED * total)


def test_the_cache_holds_what_the_probe_saw() -> None:
    runner = runner_for("llama")
    assert [tuple(tensor.shape) for tensor in runner.kv_tensors] == [(64, KV_BLOCK_TOKENS, 2, 32)] * 4
    assert [tuple(tensor.shape) for tensor in runner_for("falcon").kv_tensors] == [(64, KV_BLOCK_TOKENS, 1, 32)] * 4
