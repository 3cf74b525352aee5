"""A planning process: `python -P -m server.engine.plan_process`, one PlanModel frame in, one Plan or LoadFailed out.

It exists so that the HTTP process, which imports no torch, can say what a model would need. It reads headers, loads
nothing, and ends.
"""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

from server.engine.process import QUIET, explain
from server.records import (
    LENGTH_PREFIX_BYTES,
    LoadFailed,
    ModelSpec,
    Plan,
    decode_to_planner,
    encode_frame,
    frame_length,
)


def main() -> None:
    """Answers on what was standard output; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ.update(QUIET)
    with answers:
        answers.write(encode_frame(answer(sys.stdin.buffer)))


def answer(requests: BinaryIO) -> Plan | LoadFailed:
    """The plan of the model that the first frame asks for, or why there is none."""
    spec = ModelSpec(name="(none)", path="")
    try:
        record = decode_to_planner(requests.read(frame_length(requests.read(LENGTH_PREFIX_BYTES))))
        spec = record.spec
        from server.memory.plan import make_plan
        from server.model.load import check_path

        check_path(spec)
        return make_plan(spec, promised=record.promised)
    except Exception as error:
        return explain(error, spec)


if __name__ == "__main__":
    main()
