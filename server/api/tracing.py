"""When a request came, and which trace its client records it in, as the W3C's traceparent header says.

The server records no spans. The trace's id goes to the histograms of request times as an exemplar, from where a
dashboard leads to the trace.
"""

from __future__ import annotations

import re
from typing import Final

from starlette.requests import Request

from server.engine.stream import Origin

_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-.*)?")
_SAMPLED: Final = 0x01


def origin_of(request: Request) -> Origin:
    """Of a request that has just been read; called first thing, because time runs."""
    return Origin(trace_id=trace_id(request.headers.get("traceparent", "")))


def trace_id(traceparent: str) -> str | None:
    """The id of the trace, where the header is well-formed and says that the trace is recorded at all."""
    found = _TRACEPARENT.fullmatch(traceparent.strip())
    if found is None or not int(found[2], 16) & _SAMPLED:
        return None
    return found[1]
