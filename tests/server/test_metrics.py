"""server/metrics: the list is well-formed and documented, and records become the values they stand for."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from server.errors import EngineFaultError, OverloadedError, RequestError
from server.metrics import Metrics, ModelMetrics, Watched, quantization_label, unaccounted
from server.metrics.catalog import (
    DURATION_BUCKETS,
    FIRST_TOKEN_BUCKETS,
    INTER_TOKEN_BUCKETS,
    METRICS,
    MODEL,
    PREFIX,
    QUANTIZATION_FIELDS,
    HistogramSpec,
)
from server.metrics.labels import quantization_labels
from server.metrics.table import metrics_table, vllm_table
from server.metrics.vllm import ALIASES, VLLM_PREFIX, VllmNames
from server.records import GroupQuality, Loaded, LoadProgress, MemoryReport, ModelInfo, SequenceOutput, StepReport

DOCS = Path(__file__).parent.parent.parent / "docs" / "metrics.md"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


PEAK = {"kv_cache": 100, "absmax": 50, "activations": 30}


def loaded(device: str = "cpu", rss: int | None = 1000, **changes: object) -> Loaded:
    info = ModelInfo(64, 320, (2,), "LlamaForCausalLM", "bfloat16", device, {"load_in_8bit": True})
    process = {} if rss is None else {"pss": rss}
    fields: dict[str, object] = {
        "info": info,
        "memory": MemoryReport(
            device, {"kv_cache": 90, "absmax": 50}, {"kv_cache": 100, "absmax": 50}, process, peak=PEAK
        ),
        "load_seconds": 1.5,
        "kv_blocks": 12,
        "quality": (GroupQuality("self_attn.q_proj", "int8", 0.01, 0.0002),),
    }
    return Loaded(**(fields | changes))  # type: ignore[arg-type]


def step(number: int, outputs: int, **changes: object) -> StepReport:
    fields: dict[str, object] = {
        "step": number,
        "outputs": tuple(SequenceOutput(f"r{i}", (1,)) for i in range(outputs)),
        "running": outputs,
        "waiting": 2,
        "prefill_tokens": 10,
        "decode_tokens": outputs,
        "seconds": 0.25,
        "kv_blocks_used": 3,
        "kv_blocks_total": 12,
    }
    return StepReport(**(fields | changes))  # type: ignore[arg-type]


class Page:
    """A registry with one model in it, and how to read a value of it."""

    def __init__(self, model: str = "m") -> None:
        self.now = 100.0
        self.owed = 0
        self.state = "loading"
        self.metrics = Metrics()
        self.model = ModelMetrics(self.metrics, model, clock=lambda: self.now)
        watched = Watched(state=lambda: self.state, stalled=lambda: 2.5, owed=lambda: self.owed)
        self.model.watch(watched, ("loading", "ready"), ("exit", "load"))

    def value(self, name: str, prefix: str = PREFIX, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(prefix + name, {"model": "m"} | labels)

    def live(self) -> None:
        """Everything that can happen to a model happens."""
        self.model.loading(LoadProgress("weights", 5, 10))
        self.model.loaded(loaded())
        self.model.step(step(1, 3, queue_seconds=(0.5, 1.5), preemptions=1))
        self.model.first_token(0.2, 7, TRACE)
        self.model.next_tokens(0.3, 3)
        self.model.generated(4)
        self.model.finished("stop", 7, 4, 0.5, TRACE)
        self.model.paced(0.1, TRACE)
        refusal = OverloadedError("full", retry_after=1)
        self.model.rejected(refusal)
        self.model.failed(refusal)
        self.model.restarted("exit")


@pytest.fixture
def page() -> Page:
    return Page()


def test_names_are_unique_and_follow_prometheus_conventions() -> None:
    names = [spec.name for spec in METRICS]
    assert len(names) == len(set(names))
    for spec in METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", spec.name)
        assert not spec.name.endswith("_total"), "counters get it when exposed, nothing else may have it"
        assert spec.help.endswith(".")
        if isinstance(spec, HistogramSpec):
            assert list(spec.buckets) == sorted(set(spec.buckets))


def test_the_page_of_the_docs_is_made_from_the_list() -> None:
    page = DOCS.read_text()
    assert metrics_table() in page, "python -m server.metrics.table prints what docs/metrics.md should hold"
    assert vllm_table() in page, "python -m server.metrics.table prints what docs/metrics.md should hold"
    for name in re.findall(r"`halfbyte_([a-z_]+)`", page):
        known = {spec.exposed_name.removeprefix(PREFIX) for spec in METRICS}
        assert name in known, f"docs/metrics.md speaks of halfbyte_{name}, which is not in the list"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FIRST_TOKEN_BUCKETS, (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)),
        (INTER_TOKEN_BUCKETS, (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)),
        (
            DURATION_BUCKETS,
            (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
        ),
    ],
)
def test_buckets_hold_those_of_opentelemetry(ours: tuple[float, ...], theirs: tuple[float, ...]) -> None:
    assert set(theirs) <= set(ours)


def test_records_become_values(page: Page) -> None:
    value, model = page.value, page.model
    assert value("engine_up") == 0
    assert value("requests_total", finish_reason="stop") == 0
    assert value("request_errors_total", error="engine_error") == 0
    assert value("engine_restarts_total", reason="load") == 0
    assert value("engine_state", state="loading") == 1
    assert value("engine_state", state="ready") == 0
    model.loading(LoadProgress("weights", 5, 10))
    assert value("model_load_bytes") == 5
    model.loaded(loaded())
    assert value("engine_up") == 1
    assert value("model_load_seconds") == 1.5
    assert value("kv_blocks_capacity") == 12
    assert value("kv_cache_info", block_size="16", num_blocks="12") == 1
    assert value("memory_bytes", device="cpu", component="kv_cache") == 100
    assert value("memory_planned_bytes", device="cpu", component="kv_cache") == 90
    assert value("memory_prediction_error_bytes", device="cpu", component="kv_cache") == 10
    assert value("memory_prediction_error_bytes", device="cpu", component="absmax") == 0
    assert value("quantization_relative_error", group="self_attn.q_proj", format="int8") == 0.01
    assert value("quantization_outlier_ratio", group="self_attn.q_proj", format="int8") == 0.0002
    model.step(step(1, 3, queue_seconds=(0.5, 1.5)))
    model.step(step(2, 3, forward_passes=0, kv_blocks_cached=4, prefix_query_tokens=40, prefix_hit_tokens=32))
    model.step(step(3, 3, preemptions=2, draft_tokens=7, accepted_draft_tokens=5))
    assert value("engine_steps_total") == 3
    model.step(step(3, 3, prefill_tokens=0, decode_tokens=0, forward_passes=0))
    assert value("engine_steps_total") == 3, "a report of aborts alone"
    assert value("engine_forward_passes_total") == 2
    assert value("engine_step_duration_seconds_count") == 2
    assert value("engine_step_sequences_sum") == 6
    assert value("engine_step_tokens_total", phase="prefill") == 30
    assert value("engine_preemptions_total") == 2
    assert value("draft_tokens_total") == 7
    assert value("draft_tokens_accepted_total") == 5
    assert value("request_queue_seconds_sum") == 2.0
    assert value("prefix_cache_query_tokens_total") == 40
    assert value("prefix_cache_hit_tokens_total") == 32
    assert value("kv_cache_usage_ratio") == 0.25
    page.owed = 8  # three of them run
    assert value("requests_waiting") == 5
    page.owed = 2  # the report that says so has not been read yet
    assert value("requests_waiting") == 0
    page.now = 107.5
    assert value("engine_seconds_since_last_step") == 7.5
    assert value("engine_stalled_seconds") == 2.5


def test_requests_become_values(page: Page) -> None:
    value, model = page.value, page.model
    model.first_token(0.2, 7)
    model.next_tokens(0.3, 3)
    model.generated(4)
    model.finished("stop", 7, 4, 0.5)
    model.paced(0.1)
    model.failed(RequestError("no"))
    model.failed(EngineFaultError("broken"))
    refusal = OverloadedError("full", retry_after=1)
    model.rejected(refusal)
    assert value("prompt_tokens_total") == 7
    assert value("inter_token_latency_seconds_count") == 3
    assert value("inter_token_latency_seconds_sum") == pytest.approx(0.3)
    assert value("inter_token_latency_seconds_bucket", le="0.1") == 3
    assert value("generation_tokens_total") == 4
    assert value("requests_total", finish_reason="stop") == 1
    assert value("request_prompt_tokens_sum") == 7
    assert value("request_time_per_output_token_seconds_count") == 1
    assert value("request_errors_total", error="invalid_request_error") == 1
    assert value("request_errors_total", error="engine_error") == 1
    assert value("request_errors_total", error="overloaded") == 0
    assert value("requests_rejected_total", reason="overloaded") == 1


def test_a_dead_engine_holds_no_memory_and_the_next_one_reports_anew(page: Page) -> None:
    page.live()
    page.model.died()
    assert page.value("engine_up") == 0
    assert page.value("requests_running") == 0
    assert page.value("memory_bytes", device="cpu", component="kv_cache") is None
    assert page.metrics.registry.get_sample_value("halfbyte_memory_unaccounted_bytes", {"device": "cpu"}) is None
    assert page.value("requests_total", finish_reason="stop") == 1, "counters count on"
    smaller = MemoryReport("cpu", {"kv_cache": 80}, {"kv_cache": 80}, {"pss": 100})
    page.model.loaded(loaded(memory=smaller, kv_blocks=10, quality=()))
    assert page.value("memory_bytes", device="cpu", component="kv_cache") == 80
    assert page.value("memory_bytes", device="cpu", component="absmax") is None
    assert page.value("kv_cache_info", block_size="16", num_blocks="12") is None
    assert page.value("quantization_relative_error", group="self_attn.q_proj", format="int8") is None


def test_all_series_of_a_model_vanish_with_it_and_no_others(page: Page) -> None:
    other = ModelMetrics(page.metrics, "other")
    other.loaded(loaded(rss=400))
    before = series(page.metrics)
    page.live()
    with_model = [spec for spec in METRICS if MODEL in spec.labels]
    shown = {family.name for family in page.metrics.registry.collect() for s in family.samples if "m" in model_of(s)}
    assert shown == {PREFIX + spec.name for spec in with_model}, "something was not brought to life by the test"
    page.model.forget()
    assert {one for one in before if '"m"' not in one} == series(page.metrics)
    page.live()  # what was under way goes nowhere
    page.model.died()
    page.model.forget()
    assert {one for one in before if '"m"' not in one} == series(page.metrics)
    assert page.metrics.registry.get_sample_value("halfbyte_memory_unaccounted_bytes", {"device": "cpu"}) == 250
    again = ModelMetrics(page.metrics, "m")
    again.generated(2)
    assert page.value("generation_tokens_total") == 2


def model_of(sample: object) -> list[str]:
    labels: dict[str, str] = getattr(sample, "labels", {})
    return [value for name, value in labels.items() if name == MODEL]


def series(metrics: Metrics) -> set[str]:
    lines = metrics.page()[0].decode().splitlines()
    return {line.rpartition(" ")[0] for line in lines if line.startswith(PREFIX)}


def test_predictions_of_what_comes_and_goes_are_held_against_its_peak(page: Page) -> None:
    planned = {"kv_cache": 100, "activations": 50}
    page.model.loaded(loaded(memory=MemoryReport("cpu", planned, {"kv_cache": 100}, {"pss": 120}, peak=PEAK)))
    assert page.value("memory_prediction_error_bytes", device="cpu", component="activations") == 30 - 50
    assert page.value("memory_prediction_error_bytes", device="cpu", component="kv_cache") == 0
    assert page.value("memory_peak_bytes", device="cpu", component="activations") == 30
    assert page.value("memory_bytes", device="cpu", component="activations") is None
    page.model.memory_changed(MemoryReport("cpu", planned, {"kv_cache": 90}, {"pss": 110}, peak=PEAK))
    assert page.value("memory_bytes", device="cpu", component="kv_cache") == 90
    assert page.metrics.registry.get_sample_value("halfbyte_memory_unaccounted_bytes", {"device": "cpu"}) == 20


def test_what_is_unaccounted_adds_up_over_the_engines_of_a_device() -> None:
    metrics = Metrics()
    for name, record in (("a", loaded()), ("b", loaded(rss=400)), ("c", loaded("cuda:0"))):
        ModelMetrics(metrics, name).loaded(record)
    assert metrics.registry.get_sample_value("halfbyte_memory_unaccounted_bytes", {"device": "cpu"}) == 850 + 250
    assert metrics.registry.get_sample_value("halfbyte_memory_unaccounted_bytes", {"device": "cuda:0"}) is None
    assert unaccounted(loaded(rss=None).memory) is None


def test_devices_say_how_much_they_have() -> None:
    metrics = Metrics()
    figures: list[int | None] = [100]
    metrics.watch_machine(lambda: 500, lambda: figures[-1])
    model, other = ModelMetrics(metrics, "m"), ModelMetrics(metrics, "other")
    model.loaded(loaded(memory=MemoryReport("cuda:0", {}, {}, {}, device_capacity=80, device_free=30)))
    other.loaded(loaded(memory=MemoryReport("cuda:0", {}, {}, {}, device_capacity=80, device_free=20)))

    def value(name: str, device: str) -> float | None:
        return metrics.registry.get_sample_value(f"{PREFIX}device_memory_{name}_bytes", {"device": device})

    assert (value("capacity", "cpu"), value("available", "cpu"), value("capacity", "cuda:0")) == (500, 100, 80)
    figures.append(60)
    assert value("available", "cpu") == 60
    figures.append(None)
    assert math.isnan(value("available", "cpu") or 0)

    assert value("available", "cuda:0") == 20
    other.died()
    model.memory_changed(MemoryReport("cuda:0", {}, {}, {}, device_capacity=80, device_free=50))
    assert value("available", "cuda:0") == 50
    model.forget()
    assert (value("capacity", "cuda:0"), value("available", "cuda:0")) == (None, None), "nobody looks at it any more"
    assert value("capacity", "cpu") == 500


def test_the_page_parses_and_is_openmetrics_where_that_is_accepted() -> None:
    page = Page('na"me\\')
    page.live()
    text, content_type = page.metrics.page("text/plain")
    assert content_type.startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    assert {name for name in families if name.startswith(PREFIX)} == {PREFIX + spec.name for spec in METRICS}
    (info,) = families["halfbyte_model_info"].samples
    assert info.labels["model"] == 'na"me\\'
    assert "trace_id" not in text.decode()

    text, content_type = page.metrics.page(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    opened = {family.name: family for family in openmetrics.text_string_to_metric_families(text.decode())}
    for name in ("time_to_first_token_seconds", "request_duration_seconds", "request_time_per_output_token_seconds"):
        exemplars = [s.exemplar for s in opened[PREFIX + name].samples if s.exemplar is not None]
        assert [exemplar.labels for exemplar in exemplars] == [{"trace_id": TRACE}]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
def test_promtool_has_nothing_to_complain_about() -> None:
    page = Page()
    VllmNames(page.metrics)
    page.live()
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=page.metrics.page()[0], capture_output=True, check=False
    )
    output = (result.stdout + result.stderr).decode().splitlines()
    # vLLM's own names are what they are: a colon is for recording rules.
    assert [line for line in output if not line.startswith(VLLM_PREFIX)] == []


def test_vllms_names_have_our_values() -> None:
    page = Page()
    page.live()
    page.owed = 5
    plain = series(page.metrics)
    assert not any(VLLM_PREFIX in line for line in page.metrics.page()[0].decode().splitlines())
    VllmNames(page.metrics)
    assert series(page.metrics) == plain
    families = {f.name: f for f in text_string_to_metric_families(page.metrics.page()[0].decode())}
    theirs = {name: family for name, family in families.items() if name.startswith(VLLM_PREFIX)}
    assert set(theirs) == {VLLM_PREFIX + alias.name for alias in ALIASES}
    for alias in ALIASES:
        ours, other = families[PREFIX + alias.spec.name], theirs[VLLM_PREFIX + alias.name]
        assert ours.type == other.type
        for sample in other.samples:
            assert sample.labels["model_name"] == "m"
            assert sample.labels["engine"] == "0"
            back = {"model_name": MODEL} | {there: here for here, there in alias.labels.items()}
            labels = {back.get(name, name): text for name, text in sample.labels.items() if name != "engine"}
            name = PREFIX + alias.spec.name + sample.name.removeprefix(VLLM_PREFIX + alias.name)
            assert page.metrics.registry.get_sample_value(name, labels) == sample.value
    reasons = {sample.labels["finished_reason"] for sample in theirs["vllm:request_success"].samples}
    assert reasons == {"stop", "length", "abort", "error"}
    (info,) = theirs["vllm:cache_config_info"].samples
    assert (info.labels["block_size"], info.labels["num_gpu_blocks"]) == ("16", "12")
    page.model.forget()
    assert not any(line.startswith(VLLM_PREFIX) for line in page.metrics.page()[0].decode().splitlines())


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({}, "none"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}, "fp4-dq"),
    ],
)
def test_quantization_labels(config: dict[str, object], label: str) -> None:
    assert quantization_label(config) == label


def test_the_fields_of_a_config_are_labels_where_they_apply() -> None:
    config = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_blocksize": 64,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head", "router"],
        "quantize_embeddings": False,
        "module_overrides": {"down_proj": {"bnb_4bit_blocksize": 32}},
    }
    four = dict(zip(QUANTIZATION_FIELDS, quantization_labels(config | {"load_in_4bit": True}), strict=True))
    assert four["bnb_4bit_use_double_quant"] == "true"
    assert four["bnb_4bit_blocksize"] == "64"
    assert four["llm_int8_threshold"] == ""
    assert four["llm_int8_skip_modules"] == "lm_head,router"
    assert four["quantize_embeddings"] == "false"
    assert four["module_overrides"] == '{"down_proj":{"bnb_4bit_blocksize":32}}'
    eight = dict(zip(QUANTIZATION_FIELDS, quantization_labels(config | {"load_in_8bit": True}), strict=True))
    assert (eight["llm_int8_threshold"], eight["bnb_4bit_quant_type"]) == ("6.0", "")
    assert set(quantization_labels({})) == {""}
