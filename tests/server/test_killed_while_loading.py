"""An engine that is killed at any point of loading leaves no file, no process, no memory, and a free name.

The process is the real one, with a real model of which a part goes to disk, so that there are files to be left. It
kills itself with SIGKILL, which no process can answer, at a point that is counted: so each point is met exactly.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.api.fleet import Fleet
from server.config import KvCacheConfig, ModelConfig, ServerConfig
from server.errors import LoadError
from server.metrics import Metrics
from tests.server.dying_engine import LITTER, command
from tests.tiny_models import save_tiny

RECORDS = ["start", "plan", "room wanted", "planned", "weights", "weights", "cache", "warmup", "ready", "loaded"]
"""What a load sends at least; how many records tell of weights depends on the time they take."""
ON_CPU = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
KILLED = "the engine of model 'm' was killed by signal 9 (SIGKILL) while loading"
AT_ONCE = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


class Watched(Fleet):
    """A fleet that remembers the processes it started, and the directories it gave them."""

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


async def killed_at(point: str, number: int, path: Path, notes: Path) -> str:
    """Loads with an engine that dies there, and checks that nothing is left; the sentence, or "" if it lived."""
    metrics = Metrics()
    fleet = Watched(ServerConfig(models=()), metrics, command(point, number, notes))
    sentence = await fleet.try_to_load(entry(path))
    if not sentence:
        await fleet.unload("m", 0)
    (pid,) = fleet.processes
    assert not Path(f"/proc/{pid}").exists(), "not even a zombie"
    if sentence == KILLED:
        assert LITTER in notes.read_text().split(), "there was a file to be left"
    assert fleet.models == {}
    assert fleet._room._claims == {}, "its promise is free for others"
    assert b'model="m"' not in metrics.page()[0]
    assert not any(str(pid) in file.name for file in Path("/dev/shm").iterdir())
    await fleet.shutdown()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
    return sentence


@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", ["record", "tensor"])
@pytest.mark.usefixtures("temporary")
def test_nothing_is_left_of_an_engine_that_is_killed_while_it_loads(
    point: str, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Goes on to later points until the engine survives, which is when there are no more."""
    before = open_files()

    def die(number: int) -> str:
        return asyncio.run(killed_at(point, number, model, tmp_path_factory.mktemp("notes") / "files"))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        sentences: list[str] = []
        while set(sentences) <= {KILLED}:
            sentences += pool.map(die, range(len(sentences) + 1, len(sentences) + 1 + AT_ONCE))
    points = sentences.count(KILLED)
    assert sentences == [KILLED] * points + [""] * (len(sentences) - points)
    assert points >= (len(RECORDS) if point == "record" else 12), "so many there are at least"
    assert open_files() == before
