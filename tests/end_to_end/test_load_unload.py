"""Models loaded and unloaded again and again, by a real server with real engines: everything must be as it was before.

What a leak would cost is made large and known: the model's tokenizer has a hundred thousand tokens, so that keeping one
of twenty alive would cost the HTTP process more than all else that twenty cycles may leave in its heap.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from server.memory.machine import ProcessBytes, process_bytes
from tests.end_to_end.server import Server, alive, children, serve
from tests.tiny_models import save_tiny

ADMIN = {"Authorization": "Bearer secret-admin-key"}
CYCLES = 20
SPARE_TOKENS = 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has many tokens that no text ever gives."""
    path = save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([f"<spare token {number}>" for number in range(SPARE_TOKENS)])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The demo, with a temporary directory of its own."""
    with serve(HALFBYTE_ADMIN_KEY="secret-admin-key", TMPDIR=str(tmp_path)) as server:
        yield server


def load(client: httpx.Client, path: Path, /, name: str = "tiny", **entry: Any) -> dict[str, Any]:
    answer = client.post("/admin/models", json={"name": name, "path": str(path)} | entry, headers=ADMIN)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def unload(client: httpx.Client, name: str = "tiny") -> dict[str, Any]:
    answer = client.delete(f"/admin/models/{name}", headers=ADMIN)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def held(server: Server) -> ProcessBytes:
    found = process_bytes(server.process.pid)
    assert found is not None
    return found


def traces(server: Server, client: httpx.Client, temporary: Path) -> dict[str, Any]:
    """Everything of a server that a model could leave behind, but for memory."""
    descriptors = Path(f"/proc/{server.process.pid}/fd")
    return {
        "children": children(server.process.pid),
        "files": sorted(path.relative_to(temporary) for path in temporary.rglob("*")),
        "series": [line for line in client.get("/metrics").text.splitlines() if 'model="tiny"' in line],
        "models": client.get("/v1/models").json()["data"],
        "probe": client.get("/readyz").json()["status"],
        "descriptors": len(list(descriptors.iterdir())),  # the client's own connection is open by now
    }


@pytest.mark.timeout(900)
def test_twenty_cycles_return_to_the_baseline(server: Server, model: Path, tmp_path: Path) -> None:
    engines: list[int] = []
    with server.client() as client:
        before, held_before = traces(server, client, tmp_path), held(server)
        assert len(before["files"]) == 1, "the demo's engine has a directory of its own"
        cost = 0
        for _ in range(CYCLES):
            loaded = load(client, model, quantization="nf4-dq")
            exact = {kind: loaded["measured"][kind] for kind in ("packed_weights", "kv_cache")}
            assert exact.items() <= loaded["planned"].items()
            (engine,) = set(children(server.process.pid)) - set(before["children"])
            engines.append(engine)
            cost = cost or held(server).rss - held_before.rss
            body = {"model": "tiny", "prompt": [10, 20, 30], "max_tokens": 8}
            assert client.post("/v1/completions", json=body).status_code == 200
            returned = unload(client)
            assert returned["cut"] == {"requests": 0, "tokens": 0}
            # The weights and the cache are anonymous memory of the process, and that is gone.
            assert returned["process"]["anonymous"] >= sum(exact.values())
            assert not alive(engine)
            assert traces(server, client, tmp_path) == before
        held_after = held(server)
    assert cost > 10 * SPARE_TOKENS, "a token costs more than ten bytes, or this test sees nothing"
    for kind in ("pss", "rss", "anonymous"):
        grown = getattr(held_after, kind) - getattr(held_before, kind)
        assert grown < cost, f"{kind} grew by {grown:,} bytes in {CYCLES} cycles; one model takes {cost:,}"
    assert len(set(engines)) == CYCLES
    shared = [entry.name for entry in Path("/dev/shm").iterdir()]
    assert [name for name in shared for engine in engines if str(engine) in name] == []
    assert server.stop() == 0
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in server.log
