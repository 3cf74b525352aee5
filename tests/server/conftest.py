"""A real uvicorn on a free loopback port, in a thread, in front of scripted engines (scripted_engine.py)."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from server.api.service import Service
from server.app import bind, create_app
from server.config import ModelConfig, ServerConfig
from server.errors import ServerError
from tests.server.scripted_engine import command
from tests.tiny_models import byte_tokenizer


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that passes for a model: a config and a tokenizer with one token per byte, no weights."""
    path = tmp_path_factory.mktemp("text-only")
    byte_tokenizer().save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "scripted"}))
    return path


class RunningApp:
    """The app, its base URL, and what it reported as a failure to load."""

    def __init__(self, config: ServerConfig) -> None:
        self.failures: list[ServerError] = []
        self.app = create_app(config, command=command, on_failure=self.failures.append)
        self.service: Service = self.app.state.service
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=2))
        self._socket: socket.socket = bind("127.0.0.1", 0)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._socket])

    def __enter__(self) -> RunningApp:
        self._thread.start()
        wait_for(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._socket.close()
        assert not self._thread.is_alive()

    def call(self, work: Callable[[], object]) -> None:
        """Runs something in the server's own loop, where all its state changes; returns when it is done."""

        async def called() -> None:
            work()

        asyncio.run_coroutine_threadsafe(called(), self._loop).result(20)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **options)

    def metric(self, name: str, **labels: str) -> float:
        """A sample of the registry; 0 where there is none yet."""
        return self.service.metrics.registry.get_sample_value("halfbyte_" + name, labels) or 0.0


def wait_for(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.01)


ServeScript = Callable[..., Any]


@pytest.fixture(scope="session")
def serve_scripts(model_path: Path) -> ServeScript:
    """serve_scripts({name: script, ...}, **server settings) is a context manager that gives a RunningApp; models are in
    `path`, or all in model_path.
    """

    @contextmanager
    def serve(
        scripts: dict[str, dict[str, Any]],
        *,
        wait: bool = True,
        max_sequences: int = 64,
        path: Path = model_path,
        **settings: Any,
    ) -> Iterator[RunningApp]:
        models = tuple(
            ModelConfig(name=name, path=path, quantization=script, max_sequences=max_sequences)
            for name, script in scripts.items()
        )
        with RunningApp(ServerConfig(models=models, **settings)) as running:
            if wait:
                wait_for(lambda: running.service.started)
            yield running

    return serve


@pytest.fixture(scope="module")
def echo(serve_scripts: ServeScript) -> Iterator[RunningApp]:
    """One model, "echo", that repeats its prompt; its context holds 256 tokens."""
    with serve_scripts({"echo": {"max_model_len": 256, "step_seconds": 0.001}}) as running:
        yield running
