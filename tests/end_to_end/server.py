"""A real `halfbyte serve` in a process of its own, on a free loopback port. Not a test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx

HALFBYTE = Path(sys.executable).parent / "halfbyte"
READY_SECONDS = 120.0
STOP_SECONDS = 30.0


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def clean_environment(**changes: str) -> dict[str, str]:
    """This environment without any HALFBYTE_ setting, plus `changes`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HALFBYTE_")}
    return kept | {"HF_HUB_OFFLINE": "1"} | changes


def run_halfbyte(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that is expected to end by itself."""
    return subprocess.run(
        [str(HALFBYTE), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=READY_SECONDS,
        env=clean_environment(**environment),
        check=False,
    )


def children(pid: int) -> list[int]:
    """All living descendants of a process, by its session's tree in /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(entry.name)] = int(fields[1])
    found: list[int] = []
    frontier = [pid]
    while frontier:
        parent = frontier.pop()
        below = [child for child, its_parent in parents.items() if its_parent == parent]
        found += below
        frontier += below
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Server:
    """A started server; `log` holds what it wrote to stdout and stderr."""

    process: subprocess.Popen[bytes]
    url: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)  # type: ignore[arg-type]

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/readyz", timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready after {READY_SECONDS} s:\n{self.log}")

    def engines(self) -> list[int]:
        """Process ids of the engine processes."""
        return [pid for pid in children(self.process.pid) if b"server.engine.process" in _command_line(pid)]

    def stop(self, number: int = signal.SIGINT) -> int:
        """Sends the signal and waits; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=STOP_SECONDS)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def serve(*arguments: str | Path, wait: bool = True, **environment: str) -> Iterator[Server]:
    """Runs `halfbyte serve` with these arguments; waits until it is ready unless told otherwise."""
    port = free_port()
    command = [str(HALFBYTE), "serve", *map(str, arguments), "--port", str(port)]
    with start(command, port, **environment) as server:
        if wait:
            server.wait_until_ready()
        yield server


@contextlib.contextmanager
def start(command: list[str], port: int, **environment: str) -> Iterator[Server]:
    """Runs any command that serves on `port`, in a session of its own, with its output in a file."""
    with tempfile.TemporaryDirectory() as directory:
        log_file = Path(directory) / "log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=clean_environment(**environment), start_new_session=True
            )
        with Server(process, f"http://127.0.0.1:{port}", log_file) as server:
            yield server
