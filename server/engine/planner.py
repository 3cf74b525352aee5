"""Plans for the HTTP process: each is made by a short-lived process of its own, because planning needs torch.

One at a time: a plan reads headers and builds a model without memory, which takes a core for a few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import Final

import msgspec

from server.errors import LoadError, load_failure
from server.records import (
    LENGTH_PREFIX_BYTES,
    LoadFailed,
    ModelSpec,
    Plan,
    PlanModel,
    decode_from_planner,
    encode_frame,
    frame_length,
)

PLAN_SECONDS: Final = 120.0
"""How long a plan may take; with a cold disk, importing torch is most of it."""


def planner_command() -> list[str]:
    """The command of a planning process; `-P` keeps modules in the working directory from being found first."""
    return [sys.executable, "-P", "-m", "server.engine.plan_process"]


class Planner:
    """Asks for plans, one after the other."""

    def __init__(self, command: list[str] | None = None, seconds: float = PLAN_SECONDS) -> None:
        self._command = command or planner_command()
        self._seconds = seconds
        self._turn = asyncio.Lock()

    async def plan(self, spec: ModelSpec, promised: Callable[[], dict[str, int]] = dict) -> Plan:
        """The plan of a model that is not loaded; it may say that the model does not fit.

        `promised` says when the turn comes what of each device is free and somebody else's, and may raise.
        Raises that, what a LoadFailed record stands for, and LoadError where the process gives no answer in time.
        """
        async with self._turn:
            question = encode_frame(PlanModel(spec, promised()))
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the server
            )
            try:
                output, _ = await asyncio.wait_for(process.communicate(question), self._seconds)
            except TimeoutError:
                raise LoadError(f"planning model {spec.name!r} took longer than {self._seconds:g} seconds") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()  # also when whoever asked is gone
                await process.wait()
        return _read(output, spec, process.returncode)


def _read(output: bytes, spec: ModelSpec, code: int | None) -> Plan:
    try:
        body = output[LENGTH_PREFIX_BYTES:]
        if len(output) < LENGTH_PREFIX_BYTES or frame_length(output[:LENGTH_PREFIX_BYTES]) != len(body):
            raise ValueError("no whole frame")
        record = decode_from_planner(body)
    except (ValueError, msgspec.DecodeError) as error:
        raise LoadError(f"the process that plans model {spec.name!r} ended with code {code} and no plan") from error
    if isinstance(record, LoadFailed):
        raise load_failure(record)
    return record
