"""A real server under load and a real Prometheus that scrapes it, with the configuration of deploy/. Not a test.

The load has a bit of everything that the dashboards and alerts look at: long and short texts, streams that are left,
beginnings that were seen before, more requests than the queue takes, deadlines that pass, requests that are wrong, and
a KV cache that is too small for all of them.
"""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deploy.boards import PROMETHEUS
from tests.end_to_end.server import Server, free_port, serve, start

TRACEPARENT = "00-{:032x}-{:016x}-01"
STATUSES = frozenset({200, 400, 429, 503, 504})
"""What the load may be answered; anything else is a fault."""
PAUSE_SECONDS = {"_late": 3.0, "_wrong": 6.0, "_left": 1.0}
"""How long a client of that kind thinks between two requests, on average; others a quarter of a second."""
REFUSED_SECONDS = 2.0
"""The same after a 503."""


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expression: str, **at: float) -> list[dict[str, Any]]:
        """Series with a value now (or at `time`); those that are not numbers are left out."""
        found = self._get("query", query=expression, **at)["result"]
        return [one for one in found if not math.isnan(float(one["value"][1]))]

    def range(self, expression: str, begin: float, end: float, step: float) -> list[dict[str, Any]]:
        """Series with their values between two times."""
        found: list[dict[str, Any]] = self._get("query_range", query=expression, start=begin, end=end, step=step)[
            "result"
        ]
        return found

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, what: str, **params: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{what}", params=params, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]


@contextlib.contextmanager
def prometheus(target: Server, directory: Path, *, interval: str = "1s") -> Iterator[Prometheus]:
    """Prometheus with deploy/prometheus/prometheus.yml, but for the targets' addresses and how often it looks."""
    port = free_port()
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    addresses = {"halfbyte": target.url.removeprefix("http://"), "prometheus": f"127.0.0.1:{port}"}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [addresses[job["job_name"]]]}]
    shutil.copytree(PROMETHEUS / "rules", directory / "rules")
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    ]
    with start(command, port) as process:
        wait_for(lambda: _is_ready(process), "Prometheus is not ready", lambda: process.log)
        yield Prometheus(process.url)


def _is_ready(process: Server) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(process.url + "/-/ready").status_code == 200
    return False


@contextlib.contextmanager
def server(models: list[dict[str, Any]], directory: Path, **settings: Any) -> Iterator[Server]:
    """`halfbyte serve` with these entries of models.yaml."""
    path = directory / "models.yaml"
    path.write_text(yaml.safe_dump({"models": models, **settings}))
    with serve("--config", path) as running:
        yield running


@contextlib.contextmanager
def load(running: Server, models: list[str], *, longest: int, seed: int = 1) -> Iterator[None]:
    """Clients that keep asking until the block ends; a status that is not expected is raised at its end."""
    stop = threading.Event()
    faults: list[str] = []
    clients = [
        _Client(running, model, longest, random.Random(f"{seed} {model} {number}"), kind, stop, faults)
        for model in models
        for number, kind in enumerate((_text, _text, _shared_beginning, _many, _many, _left, _late, _wrong))
    ]
    threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not faults, faults[:3]


@dataclass
class _Client:
    """One client of one kind: `kind` gives the bodies, and how many pieces of the answer are read."""

    running: Server
    model: str
    longest: int
    random: random.Random
    kind: Callable[[_Client], tuple[dict[str, Any], int | None]]
    stop: threading.Event
    faults: list[str]

    def words(self, count: int) -> str:
        return " ".join(self.random.choice(("harbour", "lantern", "rope", "salt", "tide", "oak")) for _ in range(count))

    def run(self) -> None:
        with self.running.client() as client:
            while not self.stop.is_set():
                body, pieces = self.kind(self)
                trace = TRACEPARENT.format(self.random.getrandbits(128) | 1, self.random.getrandbits(64) | 1)
                try:
                    status = self.ask(client, {"model": self.model, "temperature": 0.8} | body, pieces, trace)
                except httpx.TransportError as error:
                    status = 0
                    self.faults.append(repr(error))
                if status not in STATUSES:
                    self.faults.append(f"{self.kind.__name__}: {status}")
                pause = REFUSED_SECONDS if status == 503 else PAUSE_SECONDS.get(self.kind.__name__, 0.25)
                self.stop.wait(self.random.expovariate(1 / pause))

    def ask(self, client: httpx.Client, body: dict[str, Any], pieces: int | None, trace: str) -> int:
        if pieces is None:
            return client.post("/v1/completions", json=body, headers={"traceparent": trace}).status_code
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            for _, _ in zip(range(pieces), response.iter_lines(), strict=False):
                pass
            return response.status_code


def _text(client: _Client) -> tuple[dict[str, Any], int | None]:
    words, tokens = client.random.randint(1, 4), client.random.randint(client.longest // 4, client.longest // 2)
    return {"prompt": client.words(words), "max_tokens": tokens}, None


def _shared_beginning(client: _Client) -> tuple[dict[str, Any], int | None]:
    beginning = "The harbour master keeps the keys of every boat in a drawer. "
    return {"prompt": beginning + client.words(1), "max_tokens": client.longest // 4}, None


def _many(client: _Client) -> tuple[dict[str, Any], int | None]:
    return {"prompt": client.words(2), "max_tokens": client.longest // 2, "n": 6}, None


def _left(client: _Client) -> tuple[dict[str, Any], int | None]:
    return {"prompt": client.words(2), "max_tokens": client.longest // 2, "ignore_eos": True}, 4


def _late(client: _Client) -> tuple[dict[str, Any], int | None]:
    return {"prompt": client.words(3), "max_tokens": client.longest // 2, "ignore_eos": True, "timeout": 0.02}, None


def _wrong(client: _Client) -> tuple[dict[str, Any], int | None]:
    return {"prompt": client.words(2), "max_tokens": 10 * client.longest}, None


def wait_for(condition: Callable[[], object], what: str, detail: Callable[[], object], seconds: float = 90) -> None:
    """Looks again and again; after so many seconds an AssertionError says `what`, and what `detail` knows."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {detail()}"
        time.sleep(0.25)
