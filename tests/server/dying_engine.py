"""The real engine process, which kills itself with SIGKILL at a given point of loading. Not a test.

Points are counted as the process passes them: after each record it sends on the way to Loaded, and after each turn of
the loop that loads tensors, whether a record tells of that turn or not. A process that passes fewer lives on.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from server.engine import process
from server.records import Loaded, LoadProgress, Record

ROOT = Path(__file__).parent.parent.parent
TENSOR = "tensor"
LITTER = "left.bin"
"""A temporary file that is there from the start."""
_START = "import tests.server.dying_engine as engine; engine.main(*sys.argv[1:])"


def command(number: int, notes: Path) -> Callable[[int], list[str]]:
    """How a test starts this engine: the `command` of EngineClient and create_app."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {_START}"
    return lambda descriptor: [sys.executable, "-P", "-c", code, str(number), str(notes), str(descriptor)]


def main(number: str, notes: str, descriptor: str) -> None:
    """Runs the engine on an open socket; writes into `notes` at which point it died, and what it had on disk then."""
    (Path(tempfile.gettempdir()) / LITTER).write_bytes(b"as a module would be that goes to disk")
    _count_points(int(number), Path(notes))
    process.main(int(descriptor))


def _count_points(last: int, notes: Path) -> None:
    """Has every point counted from now on; at the last one the process dies."""
    passed = 0
    is_loading = True
    send, turn = process.Connection.send, process._Progress.__call__

    def pass_point(name: str) -> None:
        nonlocal passed
        passed += is_loading
        if is_loading and passed == last:
            files = [file.name for file in Path(tempfile.gettempdir()).rglob("*")]
            notes.write_text("\n".join([name, *files]))
            os.kill(os.getpid(), signal.SIGKILL)

    def send_and_count(connection: process.Connection, record: Record) -> None:
        nonlocal is_loading
        is_loading &= not isinstance(record, Loaded)
        send(connection, record)
        name = record.phase if isinstance(record, LoadProgress) else type(record).__name__
        if name != "weights":  # its turns are points already
            pass_point(name)

    def turn_and_count(progress: process._Progress, loaded: int, total: int) -> None:
        turn(progress, loaded, total)
        pass_point(TENSOR)

    process.Connection.send = send_and_count  # type: ignore[method-assign]
    process._Progress.__call__ = turn_and_count  # type: ignore[method-assign]
