"""server/metrics.py: the list is well-formed and documented, and records become the values they stand for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import METRICS, PREFIX, Metrics, ModelMetrics, quantization_label, unaccounted
from server.records import Loaded, LoadProgress, MemoryReport, ModelInfo, SequenceOutput, StepReport

DOCS = Path(__file__).parent.parent.parent / "docs" / "api.md"


def loaded(device: str = "cpu", rss: int | None = 1000) -> Loaded:
    info = ModelInfo(64, 320, (2,), "LlamaForCausalLM", "bfloat16", device, {"load_in_8bit": True})
    process = {} if rss is None else {"rss_anonymous": rss}
    return Loaded(info, MemoryReport(device, {"kv_cache": 90}, {"kv_cache": 100, "absmax": 50}, process), 1.5)


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


def test_names_are_unique_and_follow_prometheus_conventions() -> None:
    names = [spec.name for spec in METRICS]
    assert len(names) == len(set(names))
    for spec in METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", spec.name)
        assert not spec.name.endswith("_total"), "counters get it when exposed, nothing else may have it"
        assert spec.help.endswith(".")
        assert (spec.kind == "histogram") == bool(spec.buckets)
        assert list(spec.buckets) == sorted(set(spec.buckets))


def test_every_metric_is_documented() -> None:
    page = DOCS.read_text()
    for spec in METRICS:
        name = PREFIX + spec.name + ("_total" if spec.kind == "counter" else "")
        assert f"`{name}`" in page, name


def test_records_become_values() -> None:
    now = 100.0
    metrics = Metrics()
    model = ModelMetrics(metrics, "m", clock=lambda: now)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(PREFIX + name, {"model": "m"} | labels)

    assert value("engine_up") == 0
    assert value("requests_total", finish_reason="stop") == 0
    model.loading(LoadProgress("weights", 5, 10))
    assert value("model_load_bytes") == 5
    model.loaded(loaded())
    assert value("engine_up") == 1
    assert value("model_load_seconds") == 1.5
    assert value("memory_bytes", device="cpu", component="kv_cache") == 100
    assert value("memory_planned_bytes", device="cpu", component="kv_cache") == 90
    info = {"architecture": "LlamaForCausalLM", "dtype": "bfloat16", "device": "cpu", "quantization": "int8"}
    assert value("model_info", **info) == 1
    model.step(step(1, 3, queue_seconds=(0.5, 1.5)))
    model.step(step(2, 3, forward_passes=0, kv_blocks_cached=4, prefix_query_tokens=40, prefix_hit_tokens=32))
    assert value("engine_steps_total") == 2
    assert value("engine_forward_passes_total") == 1
    assert value("engine_step_duration_seconds_count") == 1
    assert value("engine_step_sequences_sum") == 3
    assert value("engine_step_tokens_total", phase="prefill") == 20
    assert value("request_queue_seconds_sum") == 2.0
    assert value("requests_waiting") == 2
    assert value("kv_blocks_cached") == 4
    assert value("prefix_cache_query_tokens_total") == 40
    assert value("prefix_cache_hit_tokens_total") == 32
    assert value("kv_cache_usage_ratio") == 0.25
    now = 107.5
    assert value("engine_seconds_since_last_step") == 7.5
    model.died()
    assert value("engine_up") == 0
    assert value("requests_running") == 0


def test_what_is_unaccounted_adds_up_over_the_engines_of_a_device() -> None:
    metrics = Metrics()
    for name, record in (("a", loaded()), ("b", loaded(rss=400)), ("c", loaded("cuda:0"))):
        ModelMetrics(metrics, name).loaded(record)
    assert metrics.registry.get_sample_value("halfbyte_memory_unaccounted_bytes", {"device": "cpu"}) == 850 + 250
    assert metrics.registry.get_sample_value("halfbyte_memory_unaccounted_bytes", {"device": "cuda:0"}) is None
    assert unaccounted(loaded(rss=None).memory) is None


def test_the_page_parses_and_scraping_changes_nothing() -> None:
    metrics = Metrics()
    ModelMetrics(metrics, 'na"me\\').loaded(loaded())
    families = {family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())}
    assert len([name for name in families if name.startswith(PREFIX)]) == len(METRICS)
    (info,) = families["halfbyte_model_info"].samples
    assert info.labels["model"] == 'na"me\\'


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
