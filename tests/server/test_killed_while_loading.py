"""An engine that is killed at any point of loading leaves no file, no process, no memory, and a free name.

The process is the real one, with a real model of which a part goes to disk, so that there are files to be left. It
kills itself with SIGKILL, which no process can answer, at a point that is counted: so each point is met exactly.
"""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from quant.headers import read_checkpoint_headers
from server.api.fleet import Fleet
from server.config import KvCacheConfig, ModelConfig, ServerConfig
from server.errors import LoadError
from server.metrics import Metrics
from tests.server.dying_engine import LITTER, TENSOR, command
from tests.tiny_models import save_tiny

BEFORE_TENSORS = ["start", "plan", "RoomWanted", "Planned"]
AFTER_TENSORS = ["cache", "warmup", "ready"]
ON_CPU = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
OFFLOADED = "halfbyte-offload-"
KILLED = "the engine of model 'm' was killed by signal 9 (SIGKILL) while loading"
AT_ONCE = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process, and so every engine's own directory, has its temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


class Watched(Fleet):
    """A fleet that remembers the processes it started."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.processes: list[int] = []

    async def try_to_load(self, entry: ModelConfig) -> str:
        """The sentence that says why it did not load; empty where it did."""
        task = asyncio.create_task(self.load(entry))
        while not task.done():
            model = self.models.get(entry.name)
            pid = None if model is None else model.client.process_id
            if pid is not None and pid not in self.processes:
                self.processes.append(pid)
            await asyncio.wait([task], timeout=0.01)
        try:
            await task
        except LoadError as error:
            return str(error)
        return ""


def entry(path: Path) -> ModelConfig:
    """The only layer waits on disk, all else is on the CPU."""
    device_map: dict[str, str | int] = dict.fromkeys(ON_CPU, "cpu") | {"model.layers.0": "disk"}
    return ModelConfig(
        name="m", path=path, device="cpu", device_map=device_map, kv_cache=KvCacheConfig(tokens=512), threads=1
    )


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


async def loaded_and_killed(number: int, path: Path, notes: Path) -> str:
    """Loads with an engine that dies at that point; checks that nothing is left. The sentence, or "" if it lived."""
    metrics = Metrics()
    fleet = Watched(ServerConfig(models=()), metrics, command(number, notes))
    sentence = await fleet.try_to_load(entry(path))
    if not sentence:
        await fleet.unload("m", 0)
    (pid,) = fleet.processes
    assert not Path(f"/proc/{pid}").exists(), "not even a zombie: its memory is the system's again"
    assert not any(str(pid) in file.name for file in Path("/dev/shm").iterdir())
    assert fleet.models == {}, "its name is free"
    assert fleet._room._claims == {}, "what it was promised is free for others"
    assert b'model="m"' not in metrics.page()[0]
    await fleet.shutdown()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
    return sentence


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_left_of_an_engine_that_is_killed_while_it_loads(
    model: Path, temporary: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One engine for each point; the last one passes them all, and serves."""
    tensors = [TENSOR] * (1 + len(read_checkpoint_headers(model)) + 1)  # one turn before the first, and one after all
    points = [*BEFORE_TENSORS, *tensors, *AFTER_TENSORS]
    notes = tmp_path_factory.mktemp("notes")
    before = open_files()

    def load(number: int) -> str:
        return asyncio.run(loaded_and_killed(number, model, notes / str(number)))

    numbers = range(1, len(points) + 1)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sentences = list(pool.map(load, [*numbers, len(points) + 1]))
    assert sentences == [KILLED] * len(points) + [""]
    told = [(notes / str(number)).read_text().splitlines() for number in numbers]
    assert [point for point, *_ in told] == points
    assert all(LITTER in files for _, *files in told), "there was a file to be left"
    on_disk = [any(file.startswith(OFFLOADED) for file in files) for _, *files in told]
    assert on_disk == [point not in BEFORE_TENSORS for point in points], "and modules that wait on disk"
    assert list(temporary.iterdir()) == []
    assert open_files() == before
