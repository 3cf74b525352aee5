"""The two formats of the page, and which of them a scraper gets: by its Accept header, as RFC 9110 (12.5.1) reads one.

prometheus-client chooses too, and is not asked. Its choice fails on a version that is no number, promises versions that
it does not write, and in OpenMetrics takes the colon out of the samples' names, which vLLM's have.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

Encode = Callable[[Collector], bytes]

_OPENMETRICS: Final = "application/openmetrics-text"
_OPENMETRICS_VERSIONS: Final = ("", "1.0.0")
_TEXT: Final = ("text/plain", "text/*", "*/*")
_WEIGHT: Final = re.compile(r"[01](\.[0-9]{0,3})?")


def choose(accept: str) -> tuple[Encode, str]:
    """What writes the page, and its content type: OpenMetrics 1.0.0 where the header names it and prefers no text to
    it, else Prometheus' text 0.0.4, which every scraper reads.
    """
    wanted = text = 0.0
    for entry in accept.lower().split(","):
        kind, _, rest = entry.partition(";")
        parameters = dict(_parameter(each) for each in rest.split(";"))
        weight = _weight(parameters.get("q", "1"))
        if kind.strip() == _OPENMETRICS and parameters.get("version", "") in _OPENMETRICS_VERSIONS:
            wanted = max(wanted, weight)
        elif kind.strip() in _TEXT:
            text = max(text, weight)
    if wanted and wanted >= text:
        # Every name here is of the classical characters, so none is escaped, whatever scheme the header names.
        return partial(openmetrics.generate_latest, escaping=openmetrics.ALLOWUTF8), openmetrics.CONTENT_TYPE_LATEST
    return generate_latest, CONTENT_TYPE_PLAIN_0_0_4


def _parameter(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name.strip(), value.strip().strip('"')


def _weight(text: str) -> float:
    """Between 0 and 1; 0 for what is no weight."""
    return min(1.0, float(text)) if _WEIGHT.fullmatch(text) else 0.0
