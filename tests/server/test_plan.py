"""The plan: arithmetic, limits, refusals with the numbers, and the two ways it is shown."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import torch
from rich.console import Console

from quant.errors import CheckpointError, QuantConfigError
from server.errors import ConfigError, DoesNotFitError
from server.memory import ledger, plan, table
from server.records import ModelSpec, Shortage
from tests.tiny_models import save_tiny

GIB = 2**30


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16))


def test_kv_cache_arithmetic(path: str) -> None:
    """Two layers, two key-value heads of 32, keys and values, two bytes each: 512 bytes a token."""
    made = plan.make_plan(ModelSpec("m", path, max_model_len=100, kv_cache_tokens=300), GIB)
    assert made.kv_bytes_per_token == 2 * 2 * 2 * 32 * 2
    assert made.components["kv_cache"] == 304 * 512  # whole blocks of 16 tokens
    assert made.max_model_len == 100
    assert made.total_bytes == sum(made.components.values())


def test_cache_is_bounded_by_sequences_and_by_memory(path: str) -> None:
    roomy = plan.make_plan(ModelSpec("m", path, max_sequences=3), 100 * GIB)
    assert roomy.kv_tokens == 3 * 512
    weights = sum(size for name, size in roomy.components.items() if name != "kv_cache")
    tight = plan.make_plan(ModelSpec("m", path, max_sequences=64), weights + roomy.loading_bytes + 4 * 1000 * 512)
    assert tight.kv_tokens == 1008  # whole blocks of 16


def test_what_does_not_fit_says_what_would(path: str) -> None:
    whole = plan.make_plan(ModelSpec("m", path, kv_cache_tokens=512), GIB)
    with pytest.raises(DoesNotFitError, match="max_model_len") as caught:
        plan.make_plan(ModelSpec("m", path, kv_cache_tokens=512), whole.peak_bytes - 1)
    assert f"{whole.peak_bytes:,}" in str(caught.value)
    assert f"{whole.peak_bytes - 1:,}" in str(caught.value)


def test_what_is_promised_to_others_is_not_free(path: str) -> None:
    spec = ModelSpec("m", path, kv_cache_tokens=512)
    whole = plan.make_plan(spec, GIB)
    assert plan.make_plan(spec, GIB, promised={"cpu": GIB - whole.peak_bytes, "cuda:0": GIB}).components
    with pytest.raises(DoesNotFitError) as caught:
        plan.make_plan(spec, GIB, promised={"cpu": GIB - whole.peak_bytes + 1})
    assert caught.value.shortage == Shortage("cpu", whole.peak_bytes, whole.peak_bytes - 1)
    with pytest.raises(DoesNotFitError) as none:
        plan.make_plan(spec, promised={"cpu": 2**60})
    assert none.value.shortage == Shortage("cpu", whole.peak_bytes, 0)


def test_a_format_is_offered_where_a_shorter_context_is_not_enough(path: str) -> None:
    needs = plan.make_plan(ModelSpec("m", path, quantization="int8", max_model_len=256, kv_cache_tokens=256), GIB)
    with pytest.raises(DoesNotFitError, match="quantization int8"):
        plan.make_plan(ModelSpec("m", path), needs.peak_bytes)
    with pytest.raises(DoesNotFitError, match="no other configuration"):
        plan.make_plan(ModelSpec("m", path), 1000)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"max_model_len": 513}, ConfigError, "made for 512"),
        ({"max_model_len": 100, "kv_cache_tokens": 99}, ConfigError, "too few"),
        ({"dtype": "int4"}, ConfigError, "int4"),
        ({"device": "tpu"}, ConfigError, "tpu"),
        ({"quantization": "nf5"}, QuantConfigError, "nf5"),
        ({"path": "/nowhere"}, CheckpointError, "config.json"),
    ],
)
def test_bad_values(path: str, changes: dict[str, object], error: type[Exception], words: str) -> None:
    fields: dict[str, object] = {"name": "m", "path": path} | changes
    with pytest.raises(error, match=words):
        plan.make_plan(ModelSpec(**fields), GIB)  # type: ignore[arg-type]


def test_json_and_table_carry_the_same_figures(path: str) -> None:
    made = plan.make_plan(ModelSpec("m", path, quantization="nf4-dq"), GIB)
    (entry,) = json.loads(table.plan_json([made]))["models"]
    assert entry["components"] == made.components
    assert entry["quantization"] == "nf4-dq"
    console = Console(width=120, record=True, quiet=False, file=Path("/dev/null").open("w"))  # noqa: SIM115
    table.print_plan(made, console)
    text = console.export_text()
    console.file.close()
    for size in (*made.components.values(), made.total_bytes):
        assert f"{size:,}" in text


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
