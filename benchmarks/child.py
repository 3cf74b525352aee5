"""A contender of a benchmark in a process of its own, which answers a line with a line. Not a benchmark."""

from __future__ import annotations

import subprocess
import tempfile
from typing import IO


class Child:
    """A contender's process; made, it has said that it is ready.

    Raises RuntimeError, with its complaints, where it fails.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        # A file: a pipe that nobody reads would hold up who warns a lot. It lives as long as the process.
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True, env=environment
        )
        self._expect("ready")

    def ask(self, question: str) -> str:
        """The line that it answers with. Raises RuntimeError where it ends instead."""
        pipe(self.process.stdin).write(question + "\n")
        pipe(self.process.stdin).flush()
        return self._expect(None)

    def _expect(self, wanted: str | None) -> str:
        line = pipe(self.process.stdout).readline().strip()
        if not line or (wanted is not None and line != wanted):
            self.process.kill()
            self.complaints.seek(0)
            raise RuntimeError(f"a contender failed: {self.complaints.read()[-2000:]}")
        return line

    def end(self) -> None:
        pipe(self.process.stdin).close()
        self.process.wait()


def pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("a contender was started without the pipes that were asked for")
    return stream
