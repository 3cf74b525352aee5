"""The real engine process, which kills itself with SIGKILL at a given point of loading. Not a test.

Points are counted as the process passes them: `record N` is right after the Nth record was sent, `tensor N` right after
the Nth turn of the loading loop, whether a record tells of it or not. A process that passes fewer lives on.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.engine import process

ROOT = Path(__file__).parent.parent.parent
_START = "import tests.server.dying_engine as engine; engine.main(*sys.argv[1:])"
LITTER = "left.bin"


def command(point: str, number: int, notes: Path) -> Callable[[int], list[str]]:
    """How a test starts this engine: the `command` of EngineClient and create_app."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {_START}"
    return lambda descriptor: [sys.executable, "-P", "-c", code, point, str(number), str(notes), str(descriptor)]


def main(point: str, number: str, notes: str, descriptor: str) -> None:
    """Runs the engine on an open socket; writes into `notes` which temporary files there were when it died."""
    scratch = Path(tempfile.gettempdir())
    (scratch / LITTER).write_bytes(b"as a module would be that goes to disk")
    where: type[Any] = {"record": process.Connection, "tensor": process._Progress}[point]
    method = {"record": "send", "tensor": "__call__"}[point]
    passing = getattr(where, method)
    passed = 0

    def pass_and_die(*arguments: Any) -> None:
        nonlocal passed
        passing(*arguments)
        passed += 1
        if passed == int(number):
            Path(notes).write_text("\n".join(file.name for file in scratch.rglob("*")))
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(where, method, pass_and_die)
    process.main(int(descriptor))
