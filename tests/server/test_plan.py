"""The plan: arithmetic, limits, devices, what would fit instead, and the two ways it is shown."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console

from quant.config import BitsAndBytesConfig
from quant.errors import CheckpointError, QuantConfigError
from quant.experts import PackedExperts
from quant.linear import PackedLinear
from server.errors import ConfigError, DoesNotFitError, LoadError
from server.memory import devices, ledger, plan, table
from server.memory.activations import MOST_PARTS, activation_bytes
from server.memory.components import exact
from server.memory.facts import Facts, read_facts
from server.memory.machine import Share
from server.memory.nearest import SMALLEST_CONTEXT, SMALLEST_STEP, in_words
from server.memory.needs import Weights, weights_by_device
from server.records import BATCH_TOKENS, CPU_BATCH_TOKENS, Alternative, ModelSpec, Plan, Shortage
from tests.tiny_models import save_tiny

GIB = 2**30
NOTHING = Share(0, 0)
BY_BATCH = {"load_in_8bit": True, "llm_int8_outliers": "batch"}
KV_PER_TOKEN = 512
"""Of the tiny Llama: two layers, two key-value heads of 32, keys and values, two bytes each."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16))


def planned(path: str, available: int = GIB, **fields: Any) -> Plan:
    """A plan whose process takes nothing, so that its figures are the same in each run."""
    return plan.make_plan(ModelSpec("m", path, **fields), available, runtime=NOTHING)


def configured(path: str, alternative: Alternative, **fields: Any) -> dict[str, Any]:
    """The fields of a spec with an alternative's changes."""
    changes = dict(alternative.changes)
    if "kv_cache" in changes:
        changes |= {f"kv_cache_{key}": value for key, value in changes.pop("kv_cache").items()}
    return fields | changes


def test_kv_cache_arithmetic(path: str) -> None:
    made = planned(path, max_model_len=100, kv_cache_tokens=300)
    assert made.kv_bytes_per_token == 2 * 2 * 2 * 32 * 2 == KV_PER_TOKEN
    assert made.components["kv_cache"] == 304 * KV_PER_TOKEN  # whole blocks of 16 tokens
    assert made.max_model_len == 100
    (device,) = made.devices
    assert device.total_bytes == sum(made.components.values()) == device.peak_bytes


def test_the_runtime_is_a_component_of_the_cpu(path: str) -> None:
    without = planned(path, kv_cache_tokens=512)
    having = plan.make_plan(ModelSpec("m", path, kv_cache_tokens=512), GIB, runtime=Share(12345, 678))
    assert (having.components["runtime_context"], having.components["mapped_files"]) == (12345, 678)
    assert having.devices[0].total_bytes == without.devices[0].total_bytes + 12345 + 678
    measured = plan.make_plan(ModelSpec("m", path, kv_cache_tokens=512), GIB)
    assert measured.components["runtime_context"] > 50_000_000  # torch alone is more


def test_loading_may_be_the_peak(path: str) -> None:
    """A cache of one block and steps of one token leave the embedding, read and in the making, as the largest."""
    made = planned(path, max_model_len=16, kv_cache_tokens=16, max_batch_tokens=1, max_sequences=1)
    weights = sum(size for name, size in made.components.items() if name.startswith("unquantized"))
    (device,) = made.devices
    assert device.loading_bytes == 2 * 320 * 128 * 2  # the vocabulary's rows
    assert device.peak_bytes == weights + device.loading_bytes > device.total_bytes


@pytest.mark.parametrize(
    ("dtype", "per_head"), [("auto", 64), ("float32", 128), ("float16", 64), ("bfloat16", 64), ("int8", 32 + 4)]
)
def test_kv_cache_arithmetic_in_every_dtype(path: str, dtype: str, per_head: int) -> None:
    """In int8 a head of 32 takes a scale of four bytes beside its codes."""
    made = planned(path, kv_cache_tokens=512, kv_cache_dtype=dtype)
    assert made.kv_bytes_per_token == 2 * 2 * 2 * per_head
    assert made.components["kv_cache"] == 512 * made.kv_bytes_per_token


def test_an_unknown_kv_cache_dtype_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="kv_cache.dtype is 'int4'; accepted are auto, float32"):
        plan.make_plan(ModelSpec("m", path, kv_cache_dtype="int4"), GIB)


def test_cache_is_bounded_by_sequences_and_by_memory(path: str) -> None:
    roomy = planned(path, 100 * GIB, max_sequences=3)
    assert roomy.kv_tokens == 3 * 512
    others = roomy.devices[0].total_bytes - roomy.components["kv_cache"]
    workspace_of_more = (64 - 3) * (512 // 16 + 2) * 8
    logits_of_more = planned(path, 100 * GIB, max_sequences=64).components["activations"]
    others += workspace_of_more + logits_of_more - roomy.components["activations"]
    tight = planned(path, others + 4 * 1000 * KV_PER_TOKEN, max_sequences=64)
    assert tight.kv_tokens == 1008  # a quarter of the room, in whole blocks of 16
    assert tight.most_sequences == 4000 // 512
    assert tight.longest_context == 512  # the model's own limit
    assert tight.fits


def test_activations_grow_with_the_step_and_not_with_the_cache(path: str) -> None:
    """Of a step of many tokens the MLP is the widest: gate, up, down and two products, beside three residual rows;
    and malloc keeps twice its largest tensor."""
    large, small = planned(path, max_batch_tokens=4096), planned(path, max_batch_tokens=2048)
    assert large.components["activations"] == 4096 * 2 * (192 + 192 + 128 + 2 * 192 + 3 * 128 + 2 * 192)
    assert large.components["activations"] == 2 * small.components["activations"]
    other_cache = planned(path, max_batch_tokens=2048, kv_cache_tokens=4096)
    assert other_cache.components["activations"] == small.components["activations"]


def test_a_step_is_as_large_as_suits_the_device_unless_told(path: str) -> None:
    assert planned(path).max_batch_tokens == CPU_BATCH_TOKENS
    assert planned(path, max_sequences=200).max_batch_tokens == 400, "there is always room beside the sequences"
    assert planned(path, max_sequences=64, max_batch_tokens=100).max_batch_tokens == 100
    assert ModelSpec("m", path).batch_tokens("cuda:0") == BATCH_TOKENS


def test_who_reads_modules_from_disk_in_each_step_takes_large_ones(path: str) -> None:
    places = {"": "cpu", "model.layers.1": "disk"}
    on_disk, in_memory = planned(path, device_map=places), planned(path, device_map={"": "cpu"})
    assert (on_disk.max_batch_tokens, in_memory.max_batch_tokens) == (BATCH_TOKENS, CPU_BATCH_TOKENS)
    large, small = (
        planned(path, device_map=places, max_batch_tokens=size) for size in (BATCH_TOKENS, CPU_BATCH_TOKENS)
    )
    assert on_disk.components == large.components != small.components
    assert planned(path, device_map=places, max_sequences=64, max_batch_tokens=100).max_batch_tokens == 100


def test_no_smaller_step_than_its_sequences_need_is_offered(path: str) -> None:
    asked = {"max_model_len": 16, "kv_cache_tokens": 512, "max_batch_tokens": 2048, "max_sequences": 300}
    needed = planned(path, **asked | {"max_batch_tokens": 300}).devices[0].peak_bytes
    assert planned(path, needed, **asked).nearest[0].changes == {"max_batch_tokens": 300}


def test_activations_of_few_tokens_are_the_logits(path: str) -> None:
    facts = read_facts(ModelSpec("m", path))
    one, two = (activation_bytes(facts.hf_config, facts.widths, torch.bfloat16, rows, rows, 0) for rows in (1, 2))
    assert two == 2 * one > 320 * 4


def test_rows_that_are_scored_or_guessed_have_logits_too(tmp_path: Path) -> None:
    """What a few sequences at a time can ask for, where the vocabulary is most of a step."""
    vocabulary, step = 50_000, 256
    wide = str(save_tiny("llama", tmp_path, vocab_size=vocabulary))

    def activations(**fields: Any) -> int:
        return planned(wide, max_batch_tokens=step, **fields).devices[0].components["activations"]

    alone = activations(max_sequences=1, speculative_tokens=0)
    assert alone >= vocabulary * (step + 1) * 2 * 4, "logits in float32, and those of the rows that are asked for"
    sampled = [activations(max_sequences=12, speculative_tokens=guesses) for guesses in (0, 1, 5, 8)]
    assert sampled[1] - sampled[0] >= 12 * vocabulary * 4
    assert sampled[3] == sampled[2], "a step with guesses has 64 rows at most"
    assert activations(max_sequences=64, speculative_tokens=8) == activations(max_sequences=64, speculative_tokens=0)


def test_an_encoder_decoder_caches_prompt_and_answer(tmp_path: Path) -> None:
    """Three decoder layers, four heads of 32, keys and values, four bytes each; two texts of 100 tokens."""
    path = str(save_tiny("t5", tmp_path, num_decoder_layers=3))
    made = planned(path, max_model_len=100, max_sequences=3)
    assert made.kv_bytes_per_token == 3 * 2 * 4 * 32 * 4
    assert (made.max_model_len, made.sequence_tokens, made.kv_tokens) == (100, 200, 608)
    with pytest.raises(ConfigError, match="which caches up to 200"):
        planned(path, max_model_len=100, kv_cache_tokens=199)
    wide = planned(path, kv_cache_tokens=8192, max_sequences=1)
    tight = planned(path, wide.devices[0].peak_bytes - 4096 * wide.kv_bytes_per_token, kv_cache_tokens=8192)
    assert not tight.fits
    assert tight.nearest
    for alternative in tight.nearest:
        fields = {key: value for key, value in alternative.changes.items() if key != "kv_cache"}
        cache = alternative.changes.get("kv_cache", {}).get("tokens", 8192)
        assert cache >= 2 * fields.get("max_model_len", tight.max_model_len)


def test_what_is_promised_to_others_is_not_free(path: str) -> None:
    spec = ModelSpec("m", path, kv_cache_tokens=512)
    needed = plan.make_plan(spec, GIB, runtime=NOTHING).devices[0].peak_bytes
    for free in (needed, needed - 1, 0):
        promised = {"cpu": GIB - free, "cuda:0": GIB}
        made = plan.make_plan(spec, GIB, runtime=NOTHING, promised=promised)
        assert made.fits == (free == needed)
        if not made.fits:
            with pytest.raises(DoesNotFitError) as caught:
                plan.require_fit(made)
            assert caught.value.shortage == Shortage("cpu", needed, free)
    (device,) = plan.make_plan(spec, promised={"cpu": 2**60}).devices
    assert device.available_bytes == 0


def test_models_that_start_together_leave_each_other_room(path: str) -> None:
    small, huge = (ModelSpec(name, path, kv_cache_tokens=tokens) for name, tokens in (("small", 512), ("huge", 2**40)))
    first, none, second, third = plan.make_plans([small, huge, small, small])
    assert (first.fits, none.fits, second.fits, third.fits) == (True, False, True, True)
    assert first.devices[0].promised_bytes == 0
    runtime = first.components["runtime_context"] + first.components["mapped_files"]
    peak = first.devices[0].peak_bytes - runtime + first.components["runtime_context"]
    assert none.devices[0].promised_bytes == second.devices[0].promised_bytes == peak, "what does not fit takes nothing"
    assert third.devices[0].promised_bytes > 1.9 * peak
    for made in (second, third):
        (device,) = made.devices
        assert device.available_bytes == device.free_bytes - device.promised_bytes


def test_a_promise_has_what_the_process_holds_in_place_of_its_runtime(path: str) -> None:
    made = plan.make_plan(ModelSpec("m", path, kv_cache_tokens=16, max_model_len=16), GIB, runtime=Share(1000, 50))
    (device,) = made.devices
    promised = plan.promise(made, 1007)
    assert promised.peak == {"cpu": device.peak_bytes - 43}
    assert promised.kept == {"cpu": device.total_bytes - 43}
    assert promised.is_on_cpu
    assert plan.runtime_of(made) == Share(1000, 50)


@pytest.mark.parametrize("tokens", [None, 512, 5000])
def test_what_does_not_fit_says_what_would(path: str, tokens: int | None) -> None:
    fields: dict[str, Any] = {"kv_cache_tokens": tokens}
    needed = planned(path, 100 * GIB, max_model_len=512, kv_cache_tokens=tokens or 512).devices[0].peak_bytes
    made = planned(path, needed - 1, **fields)
    assert not made.fits
    assert made.nearest
    for alternative in made.nearest:
        again = planned(path, needed - 1, **configured(path, alternative, **fields))
        assert again.fits, alternative
        assert again.devices[0].peak_bytes == alternative.peak_bytes
    with pytest.raises(DoesNotFitError) as caught:
        plan.require_fit(made)
    for figure in (needed, needed - 1):
        assert f"{figure:,}" in str(caught.value)
    assert in_words(made.nearest[0]) in str(caught.value)


def test_the_nearest_is_the_smallest_step_away(path: str) -> None:
    """One block too few: a context of one block less. Too little for the steps: smaller ones. Then another format."""
    asked = {"kv_cache_tokens": 512, "max_batch_tokens": 2048, "quantization": "int8"}
    whole = planned(path, **asked)
    first = planned(path, whole.devices[0].peak_bytes - 1, **asked).nearest[0]
    assert first.changes == {"max_model_len": 496, "kv_cache": {"tokens": 496}}
    without_steps = whole.devices[0].peak_bytes - whole.components["activations"]
    smaller = planned(path, without_steps + 1_300_000, max_batch_tokens=2048, quantization="int8").nearest[0]
    assert smaller.changes["max_batch_tokens"] == SMALLEST_STEP
    assert "quantization" not in smaller.changes


def test_a_cache_in_8_bits_is_offered_where_it_gives_up_less(path: str) -> None:
    """A head of 32 takes 36 bytes in place of 64: as many tokens as asked, or more than a cache as asked would hold."""
    whole = planned(path, kv_cache_tokens=512).devices[0].peak_bytes
    first, second, *_ = planned(path, whole - 1, kv_cache_tokens=512).nearest
    assert first.changes == {"max_model_len": 496, "kv_cache": {"tokens": 496}}
    assert second.changes == {"kv_cache": {"dtype": "int8"}}
    assert in_words(second) == "kv_cache.dtype int8"
    saved = 512 * (KV_PER_TOKEN - 2 * 2 * 2 * 36)
    first, second, *_ = planned(path, whole - saved - 1, kv_cache_tokens=512).nearest
    assert first.changes["kv_cache"]["tokens"] < second.changes["kv_cache"]["tokens"] < 512
    assert second.changes["kv_cache"]["dtype"] == "int8"


def test_a_cache_in_8_bits_is_offered_only_where_it_is_smaller_and_possible(path: str, tmp_path: Path) -> None:
    def offers(path: str, **fields: Any) -> list[dict[str, Any]]:
        whole = planned(path, 100 * GIB, kv_cache_tokens=512, **fields).devices[0].peak_bytes
        made = planned(path, whole - 1, kv_cache_tokens=512, **fields)
        assert made.nearest
        return [offer.changes for offer in made.nearest]

    def is_in_8_bits(changes: dict[str, Any]) -> bool:
        return "dtype" in changes.get("kv_cache", {})

    assert any(map(is_in_8_bits, offers(path)))
    assert not any(map(is_in_8_bits, offers(path, kv_cache_dtype="int8")))
    small_heads = str(save_tiny("llama", tmp_path / "heads", dtype=torch.bfloat16, head_dim=2))
    assert not any(map(is_in_8_bits, offers(small_heads)))  # two codes and a scale, for two numbers in 16 bits
    config = json.loads((Path(path) / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"layer_types": ["linear_attention", "full_attention"]}))
    assert not any(map(is_in_8_bits, offers(str(other))))


def test_no_room_for_steps_is_no_reason_for_a_cache_in_8_bits(path: str) -> None:
    asked = {"max_model_len": 16, "max_batch_tokens": 2048}
    whole = planned(path, **asked)
    without_steps = whole.devices[0].peak_bytes - whole.components["activations"]
    offers = planned(path, without_steps + 1_300_000, **asked).nearest
    assert offers[0].changes == {"max_batch_tokens": SMALLEST_STEP}
    assert not any("kv_cache" in offer.changes for offer in offers)


def test_a_format_is_offered_where_less_is_not_enough(path: str) -> None:
    least = {"max_model_len": SMALLEST_CONTEXT, "max_batch_tokens": SMALLEST_STEP, "max_sequences": 4}
    needs = planned(path, quantization="int8", kv_cache_tokens=SMALLEST_CONTEXT, **least)
    (offer,) = planned(path, needs.devices[0].peak_bytes).nearest
    assert offer.changes == {"quantization": "int8"} | {key: least[key] for key in offer.changes if key in least}
    assert planned(path, 1000).nearest == ()
    with pytest.raises(DoesNotFitError, match="no smaller cache, context, step or format would fit"):
        plan.require_fit(planned(path, 1000))


def test_a_format_that_a_model_cannot_have_is_not_offered(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models have embeddings of a kind that cannot be packed; nobody has asked for that."""

    def weights(facts: Facts, config: BitsAndBytesConfig | None) -> Weights:
        if config is not None and config.quantize_embeddings:
            raise QuantConfigError("quantize_embeddings is True, but its embedding is of no known kind")
        return weights_by_device(facts, config)

    monkeypatch.setattr("server.memory.nearest.weights_by_device", weights)
    assert planned(path, 1000).nearest == ()


def test_quantized_files_are_offered_in_no_other_format(path: str, tmp_path: Path) -> None:
    from quant.convert import quantize_checkpoint

    quantize_checkpoint(Path(path), tmp_path / "nf4", "nf4")
    made = planned(str(tmp_path / "nf4"))
    assert made.quantization == "nf4"
    offers = planned(str(tmp_path / "nf4"), made.devices[0].peak_bytes - made.components["kv_cache"]).nearest
    assert all("quantization" not in offer.changes for offer in offers)


def test_offers_in_words() -> None:
    embeddings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quantize_embeddings": True}
    cases = {
        "max_model_len 512": {"max_model_len": 512},
        "quantization int8 with max_model_len 9 and kv_cache.tokens 16": {
            "quantization": "int8",
            "max_model_len": 9,
            "kv_cache": {"tokens": 16},
        },
        "quantization nf4 and its quantize_embeddings true": {"quantization": embeddings},
    }
    assert [in_words(Alternative(changes, 1)) for changes in cases.values()] == list(cases)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"max_model_len": 513}, ConfigError, "made for 512"),
        ({"max_model_len": 100, "kv_cache_tokens": 99}, ConfigError, "too few"),
        ({"dtype": "int4"}, ConfigError, "int4"),
        ({"device": "tpu"}, ConfigError, "tpu"),
        ({"batch_invariant": True, "quantization": BY_BATCH}, ConfigError, "accepted are value and all"),
        (
            {
                "batch_invariant": True,
                "quantization": {"load_in_4bit": True, "module_overrides": {"lm_head": BY_BATCH}},
            },
            ConfigError,
            "accepted are value and all",
        ),
        ({"device": "cuda:77"}, ConfigError, "device is 'cuda:77', but .* here; use "),
        ({"device_map": "everywhere"}, ConfigError, "everywhere"),
        ({"device_map": "disk"}, ConfigError, "device_map is 'disk'; accepted are auto, "),
        ({"device_map": "cuda:77"}, ConfigError, "device_map is 'cuda:77'; accepted are auto, "),
        ({"device_map": {"": 77}}, ConfigError, "all that it does not name on 77; here are cpu, "),
        ({"device_map": {"": -1}}, ConfigError, "on -1; here are cpu, "),
        ({"device_map": {"": "cpu", "lm_head": "meta"}}, ConfigError, "puts 'lm_head' on 'meta'; here are cpu, "),
        ({"device_map": {"": "cpu", "no.such": "disk"}}, ConfigError, "'no.such', which LlamaForCausalLM does not"),
        ({"device_map": {"model.layers": "cpu"}}, ConfigError, "where 'model.embed_tokens.weight' goes"),
        ({"device_map": {}}, ConfigError, "does not say where"),
        (
            {"device_map": {"": "cpu", "model.norm": "disk"}, "quantization": "nf4"},
            QuantConfigError,
            "fp32_cpu_offload",
        ),
        ({"quantization": "nf5"}, QuantConfigError, "nf5"),
        ({"path": "/nowhere"}, CheckpointError, "config.json"),
    ],
)
def test_bad_values(path: str, changes: dict[str, object], error: type[Exception], words: str) -> None:
    fields: dict[str, object] = {"name": "m", "path": path} | changes
    with pytest.raises(error, match=words):
        plan.make_plan(ModelSpec(**fields), GIB)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("mamba", "'mamba' cannot be served; accepted are models whose layers keep keys and values of one size"),
        ("mamba2", "'mamba2' cannot be served; accepted are models whose layers keep"),
        ("falcon_mamba", "'falcon_mamba' cannot be served; accepted are models whose layers keep"),
        ("rwkv", "'rwkv' cannot be served; accepted are models whose layers keep"),
        ("xlstm", "'xlstm' cannot be served; accepted are models whose layers keep"),
        ("reformer", "'reformer' is not a causal language model that transformers can build from this config: Assert"),
        ("lfm2_moe", "'lfm2_moe' is not a causal language model that transformers can build from this config: TypeE"),
        ("vit", "'vit' is not a causal language model that transformers can build from this config: Unrecognized"),
    ],
)
def test_an_architecture_that_cannot_be_served_is_refused_by_name(
    tmp_path: Path, architecture: str, words: str
) -> None:
    """A config that says nothing else is that of the architecture's own defaults."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
    with pytest.raises(CheckpointError, match=f"^architecture {words}") as caught:
        plan.make_plan(ModelSpec("m", str(tmp_path)), GIB)
    assert len(str(caught.value)) < 500, "transformers may list every architecture that it has"


@pytest.mark.parametrize("positions", [10**30, 2**63])
def test_sizes_that_no_machine_counts_are_refused(path: str, tmp_path: Path, positions: int) -> None:
    """No frame could bring such a plan to the HTTP process."""
    config = json.loads((Path(path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    with pytest.raises(LoadError, match=f"and {positions} positions; accepted are numbers of which the bytes"):
        plan.make_plan(ModelSpec("m", str(tmp_path)), GIB)


@pytest.mark.parametrize("quantization", [None, "nf4-dq", "int8"])
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}])
def test_device_maps_of_one_device_change_nothing(path: str, device_map: Any, quantization: str | None) -> None:
    if torch.cuda.is_available():
        pytest.skip("with an accelerator transformers uses it")
    assert planned(path, device_map=device_map, quantization=quantization) == planned(path, quantization=quantization)


def test_a_map_is_worked_out_for_the_modules_that_will_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that is not packed yet, the experts too."""
    seen = []

    def worked_out(model: torch.nn.Module, *rest: object) -> dict[str, str]:
        seen.append([module for module in model.modules() if isinstance(module, PackedLinear | PackedExperts)])
        return {"": "cpu"}

    monkeypatch.setattr("transformers.integrations.accelerate._get_device_map", worked_out)
    planned(str(save_tiny("mixtral", tmp_path)), device_map="auto", quantization="nf4")
    (packed,) = seen
    assert [type(module) for module in packed].count(PackedExperts) == 2
    assert len(packed) == 2 + 2 * 4


@pytest.fixture
def two_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by the plan alone."""
    monkeypatch.setattr(devices, "known_devices", lambda: ["cpu", "cuda:0", "cuda:1"])
    monkeypatch.setattr(plan, "free_bytes", lambda device: GIB)


@pytest.mark.usefixtures("two_accelerators")
def test_the_first_device_of_a_map_is_the_main_one(path: str) -> None:
    for device_map, main in {"cuda:1": "cuda:1", "cuda": "cuda:0", "cpu": "cpu"}.items():
        assert planned(path, device_map=device_map).device == planned(path, device_map={"": device_map}).device == main
    assert planned(path, device="cuda:1").device == "cuda:1"
    assert planned(path).device == "cuda:0"
    with pytest.raises(ConfigError, match="device is 'cuda:2', but that is not here; use auto, cpu, cuda:0, cuda:1"):
        planned(path, device="cuda:2")
    with pytest.raises(ConfigError, match="batch_invariant is true, and the device is 'cuda:0'"):
        planned(path, device_map={"": 0}, batch_invariant=True)


@pytest.mark.usefixtures("two_accelerators")
def test_recorded_steps_hold_logits_and_a_step_of_single_rows(path: str) -> None:
    """On one GPU alone, and only if they are wanted."""
    with_them, without = (planned(path, cuda_graphs=wanted, max_sequences=8) for wanted in (True, False))
    workspace, activations = (
        with_them.devices[0].components[name] - without.devices[0].components[name]
        for name in ("workspace", "activations")
    )
    vocabulary, hidden, inner = 320, 128, 192
    assert workspace == 8 * vocabulary * 2
    largest = 8 * max(3 * hidden + 2 * inner + hidden + 2 * inner, hidden + vocabulary) * 2
    assert activations == largest + MOST_PARTS
    for other in (
        {"device": "cpu"},
        {"device_map": {"": 0, "model.layers.1": 1}},
        {"device_map": {"": 0, "lm_head": "cpu"}},
    ):
        assert (
            planned(path, cuda_graphs=True, **other).components == planned(path, cuda_graphs=False, **other).components
        )


@pytest.mark.usefixtures("two_accelerators")
def test_two_accelerators_are_planned_apart(path: str) -> None:
    """Each has its layers' weights and cache; the process lives on the CPU, where one layer waits in float32."""
    spread = {"": 0, "model.layers.1": 1}
    made = planned(path, device_map=spread, kv_cache_tokens=512)
    first, second, host = made.devices
    assert (first.device, second.device, host.device) == ("cuda:0", "cuda:1", "cpu")
    assert first.components["kv_cache"] == second.components["kv_cache"] == 512 * KV_PER_TOKEN // 2
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 192 + 2 * 128
    assert exact(second.components) == {"unquantized_bfloat16": 2 * layer, "kv_cache": 512 * KV_PER_TOKEN // 2}
    assert host.components == {"runtime_context": 0, "mapped_files": 0}

    away = {"": "cuda:0", "model.layers.1": "cpu"}
    fields = {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}
    main, host = planned(path, device_map=away, kv_cache_tokens=512, quantization=fields).devices
    assert exact(host.components) == {"unquantized_float32": 4 * layer}
    assert main.components["kv_cache"] == 512 * KV_PER_TOKEN


@pytest.mark.usefixtures("two_accelerators")
def test_the_first_device_that_lacks_room_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda device: 1000 if device == "cuda:1" else GIB)
    made = planned(path, device_map={"": 0, "model.layers.1": 1})
    with pytest.raises(DoesNotFitError, match="on cuda:1"):
        plan.require_fit(made)


def test_json_and_table_carry_the_same_figures(path: str) -> None:
    for available in (GIB, 700_000):
        made = planned(path, available, quantization="nf4-dq")
        (entry,) = json.loads(table.plan_json([made]))["models"]
        (device,) = entry["devices"]
        assert device["components"] == made.components
        assert device["total_bytes"] == made.devices[0].total_bytes
        assert (entry["quantization"], entry["fits"]) == ("nf4-dq", made.fits)
        assert [offer["changes"] for offer in entry["nearest"]] == [offer.changes for offer in made.nearest]
        console = Console(width=120, record=True, quiet=False, file=Path("/dev/null").open("w"))  # noqa: SIM115
        table.print_plan(made, console)
        text = console.export_text()
        console.file.close()
        for size in (*made.components.values(), device["total_bytes"], device["peak_bytes"]):
            assert f"{size:,}" in text
        assert ("does not fit" in text) != made.fits
        assert all(in_words(offer) in text for offer in made.nearest)


def test_a_plan_survives_the_boundary(path: str) -> None:
    made = planned(path, 700_000)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Plan) == made


def test_process_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    page, size = bytes(range(256)) * 4096, 64 * 2**20
    before = ledger.process_memory()["rss_anonymous"]
    # From the kernel itself: malloc may hand out pages that an earlier test has freed and that are resident still.
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        for _ in range(size // len(page)):
            held.write(page)
        after = ledger.process_memory()["rss_anonymous"]
    assert after - before == pytest.approx(size, rel=0.1)
    assert ledger.process_memory(tmp_path / "absent") == {}


def test_free_bytes_is_no_more_than_the_machine_has() -> None:
    available = plan.free_bytes("cpu")
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available <= total
