"""The ledger: each component against what a test made of it, and the whole against the kernel's figure."""

from __future__ import annotations

import gc
import mmap
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from quant import pages
from quant.memory import measure_layers, measure_weights
from server.engine.blocks import BlockPool
from server.engine.loop import EngineLoop
from server.engine.scheduler import Scheduler
from server.memory import allocator, machine
from server.memory.components import ESTIMATED
from server.memory.ledger import Baseline, Ledger
from server.memory.plan import make_plan
from server.memory.upkeep import SHARE, SMALLEST_PAUSE, Upkeep
from server.model.batch import Batch, Chunk
from server.model.load import load_model
from server.model.probe import choose_runner, warm_up
from server.model.proof import DRAW
from server.model.runner import PagedRunner
from server.records import Generate, MemoryChanged, ModelSpec, Record, SamplingParams, Shutdown, StepReport
from tests.server.scripted import ScriptedRunner
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="the kernel has no such figures")
MEGABYTE = 2**20


class Engine:
    """A loaded tiny model with its ledger."""

    def __init__(self, path: Path, quantization: str) -> None:
        limits = {"kv_cache_tokens": 4096, "max_batch_tokens": 512}
        self.spec = ModelSpec("m", str(path), quantization=quantization, device="cpu", **limits)
        self.plan = make_plan(self.spec)
        baseline = Baseline.take("cpu")
        self.model = load_model(self.spec, lambda done, total: None).model
        runner = choose_runner(self.model, self.spec, blocks=256, max_model_len=self.plan.max_model_len)
        assert isinstance(runner, PagedRunner)
        self.runner = runner
        warm_up(runner)
        self.ledger = Ledger(self.model, runner, "cpu", self.plan.components, baseline)
        self.ledger.begin()

    def step(self, tokens: int) -> None:
        chunk = Chunk("r", [3 + index % 300 for index in range(tokens)], 0, list(range(tokens // 16 + 1)), DRAW)
        self.runner.step(Batch((chunk,)))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(save_tiny("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16), "nf4-dq")


def test_weights_and_cache_are_what_was_planned(engine: Engine) -> None:
    report = engine.ledger.report()
    for name, size in engine.plan.components.items():
        if name not in ESTIMATED:
            assert report.measured[name] == size == report.peak[name], name
    assert report.planned == engine.plan.components
    assert report.measured["workspace"] >= engine.plan.components["workspace"]


def test_each_component_sees_its_own(engine: Engine) -> None:
    """What somebody else takes of malloc is heap, and moves nothing else."""
    gc.collect()  # what other tests have left is not to go in between
    before = engine.ledger.report().measured
    held = [torch.ones(100 * MEGABYTE, dtype=torch.uint8)]
    after = engine.ledger.report().measured
    assert after["heap"] - before["heap"] == pytest.approx(100 * MEGABYTE, rel=0.05)
    held.clear()
    again = engine.ledger.report().measured
    assert abs(again["heap"] - before["heap"]) < 5 * MEGABYTE
    for name in before.keys() - {"heap", "mapped_files", "allocator_slack"}:
        assert before[name] == after[name] == again[name]
    for other in (after, again):  # malloc keeps some pages of its heap, more or fewer
        assert abs(other["allocator_slack"] - before["allocator_slack"]) < 5 * MEGABYTE


def test_what_malloc_keeps_for_the_next_step_is_slack_until_it_is_given_back(engine: Engine) -> None:
    """Blocks too small for mappings of their own, freed below one that is not: their pages stay in the heap."""
    engine.ledger.settle()
    before = engine.ledger.report().measured
    blocks = [torch.ones(64 * 1024, dtype=torch.uint8) for _ in range(640)]
    held = torch.ones(64 * 1024, dtype=torch.uint8)
    blocks.clear()
    kept = engine.ledger.report().measured
    assert kept["allocator_slack"] - before["allocator_slack"] == pytest.approx(40 * MEGABYTE, rel=0.25)
    assert abs(kept["heap"] - before["heap"]) < 5 * MEGABYTE
    engine.ledger.settle()
    assert engine.ledger.report().measured["allocator_slack"] - before["allocator_slack"] < 10 * MEGABYTE
    assert held.nbytes == 64 * 1024


def test_heaps_of_threads_are_not_taken_for_the_main_one() -> None:
    """Else what threads hold would hide what malloc keeps. In a process of its own, where a thread gets a heap of its
    own: in one that has had many threads, malloc lets them share."""
    grown = subprocess.run([sys.executable, "-c", GROW_IN_A_THREAD], capture_output=True, text=True, check=True)
    main, everywhere = map(int, grown.stdout.split())
    assert abs(main) < MEGABYTE
    assert everywhere > 20 * MEGABYTE


GROW_IN_A_THREAD = """
from concurrent.futures import ThreadPoolExecutor
from server.memory import allocator
with ThreadPoolExecutor(1) as thread:
    thread.submit(int).result()
    before = allocator.in_main_heap(), allocator.in_use()
    blocks = thread.submit(lambda: [bytes(32 * 1024) for _ in range(640)]).result()
    print(allocator.in_main_heap() - before[0], allocator.in_use() - before[1])
"""


def test_activations_are_the_peak_of_steps(engine: Engine) -> None:
    engine.step(8)
    engine.ledger.settle()
    small = engine.ledger.report().peak["activations"]
    engine.step(500)
    engine.ledger.settle()
    large = engine.ledger.report().peak["activations"]
    assert large >= small
    assert "activations" not in engine.ledger.report().measured
    assert engine.ledger.report().peak["activations"] == large, "a peak does not go down"


def test_layers_add_up_to_the_weights(engine: Engine) -> None:
    layers = measure_layers(engine.model)
    assert {(layer, form) for layer, form, _ in layers} >= {
        ("model.embed_tokens", "bfloat16"),
        ("model.layers.0", "nf4-dq"),
        ("model.layers.1", "bfloat16"),
        ("lm_head", "bfloat16"),
    }
    total: dict[str, int] = {}
    for _, _, sizes in layers:
        for component, size in sizes.items():
            total[component] = total.get(component, 0) + size
    assert total == dict(measure_weights(engine.model))


def test_the_arena_has_slack_and_no_more_than_its_chunks() -> None:
    tensor = pages.empty((1000, 1000), torch.uint8, torch.device("cpu"))
    tensor.fill_(1)
    inside = [(start, end) for start, end in pages.ranges() if start <= tensor.data_ptr() < end]
    assert len(inside) == 1
    resident = allocator.resident_bytes(inside)
    assert tensor.nbytes <= resident <= inside[0][1] - inside[0][0]


def test_resident_bytes_are_those_that_were_written() -> None:
    with mmap.mmap(-1, 8 * MEGABYTE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            held.madvise(mmap.MADV_NOHUGEPAGE)
        held[: 2 * MEGABYTE] = bytes(2 * MEGABYTE)
        view = torch.frombuffer(held, dtype=torch.uint8)
        address = view.data_ptr()
        del view
        assert allocator.resident_bytes([(address, address + 8 * MEGABYTE)]) == 2 * MEGABYTE
        assert allocator.resident_bytes([(address + 1, address + 2)]) == mmap.PAGESIZE
    assert allocator.resident_bytes([]) == 0


def test_shares_add_up_to_the_kernels_sum() -> None:
    share, process = machine.share(os.getpid()), machine.process_bytes(os.getpid())
    assert share is not None
    assert process is not None
    assert share.all == pytest.approx(process.pss, rel=0.02)
    assert machine.share(2**30) is None


def test_malloc_counts_what_it_has_handed_out() -> None:
    before = allocator.in_use()
    assert before is not None
    held = torch.empty(5 * MEGABYTE, dtype=torch.uint8)
    during = allocator.in_use()
    assert during is not None
    assert 5 * MEGABYTE <= during - before < 6 * MEGABYTE
    del held
    allocator.give_back()
    after = allocator.in_use()
    assert after is not None
    assert after - before < MEGABYTE


RESIDENT = """
import os, sys, threading
from server.memory import allocator
from server.memory.machine import anonymous_bytes
if sys.argv[1] == "little":
    allocator.keep_little()
bytearray(20 * 2**20)  # a large block that is freed: glibc now keeps as much at the end of every heap
before = anonymous_bytes(os.getpid())
def work():
    held = [bytearray(4000) for _ in range(5000)]
    del held
    done.set()
    leave.wait()
done, leave = threading.Event(), threading.Event()
threading.Thread(target=work).start()
done.wait()
allocator.give_back()
print(anonymous_bytes(os.getpid()) - before)
leave.set()
"""


def test_a_process_that_keeps_little_gives_the_end_of_every_heap_back() -> None:
    """Twenty megabytes freed in another thread's heap, where asking alone changes nothing."""
    grown = {}
    for kind in ("little", "much"):
        result = subprocess.run([sys.executable, "-c", RESIDENT, kind], capture_output=True, text=True, check=True)
        grown[kind] = int(result.stdout)
    assert grown["little"] < 4 * MEGABYTE
    if grown["much"] < 15 * MEGABYTE:
        pytest.skip("this C library keeps little by itself")


class Counting:
    """An upkeep that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.rested = threading.Event()

    def at_rest(self) -> None:
        self.told.append("rest")
        self.rested.set()

    def after_step(self) -> None:
        self.told.append("step")


def test_the_loop_tells_of_steps_and_once_of_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.loop.REST_SECONDS", 0.01)
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    reports: queue.SimpleQueue[StepReport] = queue.SimpleQueue()
    scheduler = Scheduler(BlockPool(8), max_batch_tokens=64, max_sequences=4, max_model_len=64)
    upkeep = Counting()
    loop = EngineLoop(scheduler, ScriptedRunner(), inbox, reports.put, vocab_size=320, upkeep=upkeep)  # type: ignore[arg-type]
    inbox.put(Generate("r", (5, 6), SamplingParams(max_tokens=3, temperature=0.0)))
    thread = threading.Thread(target=loop.run)
    thread.start()
    assert upkeep.rested.wait(20)
    inbox.put(Shutdown())
    thread.join(20)
    assert upkeep.told == ["step", "step", "step", "rest"]


def test_a_working_engine_looks_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never before the pause is over; after a look of a second not for a thousand."""
    now = [0.0]
    monkeypatch.setattr("server.memory.upkeep.time.monotonic", lambda: now[0])
    sent: list[Record] = []

    class Slow:
        def settle(self) -> None:
            pass

        def report(self) -> object:
            now[0] += 1.0
            return None

    upkeep = Upkeep(Slow(), sent.append)  # type: ignore[arg-type]
    upkeep.after_step()
    assert sent == []
    now[0] = SMALLEST_PAUSE
    upkeep.after_step()
    assert [type(record) for record in sent] == [MemoryChanged]
    now[0] += 1 / SHARE - 1.0
    upkeep.after_step()
    assert len(sent) == 1
    now[0] += 2.0
    upkeep.after_step()
    assert len(sent) == 2
    upkeep.at_rest()
    assert len(sent) == 3


def test_what_no_component_explains_is_little(tmp_path: Path) -> None:
    """In a process of its own, as an engine is: the kernel's figure and the sum of the components differ by little."""
    path = save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    code = f"""
from pathlib import Path
from server.metrics import unaccounted
from tests.server.test_ledger import Engine
engine = Engine(Path({str(path)!r}), "nf4-dq")
before = unaccounted(engine.ledger.report())
for tokens in (1, 500, 20):
    engine.step(tokens)
engine.ledger.settle()
print(before, unaccounted(engine.ledger.report()))
"""
    root = Path(__file__).parent.parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stderr
    for figure in map(int, result.stdout.split()):
        assert abs(figure) < 25_000_000
