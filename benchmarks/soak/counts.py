"""The client's count beside the server's own: what must be equal, and between which bounds what one side can't know is.

A client that has left doesn't know how the server ended its texts, and one that left before the answer not even whether
they were begun. Of a request that was refused because the engine had died neither side says whether it had reached it;
what the server rejected before that is counted by itself. All else is equal to one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.soak.attempt import REFUSALS, Attempt
from benchmarks.soak.requests import MOST_TEXTS, MOST_TOKENS
from server.metrics import catalog
from server.metrics.catalog import Spec

Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]
REFUSED: Final = ("429", "503")
NOTHING_LEFT: Final = (catalog.KV_USED, catalog.REQUESTS_RUNNING, catalog.REQUESTS_WAITING)
"""Gauges that are 0 when nobody asks for anything."""


@dataclass(frozen=True)
class Count:
    """One quantity: what the server says, and the bounds that follow from what the client knows."""

    what: str
    server: int
    least: int
    most: int

    @property
    def agrees(self) -> bool:
        return self.least <= self.server <= self.most


def read_series(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """A page of metrics as its samples."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(series: Series, spec: Spec, **labels: str) -> float:
    """The sum of a family's samples that have these labels."""
    wanted = set(labels.items())
    return sum(value for (name, own), value in series.items() if name == spec.exposed_name and wanted <= own)


def compare(attempts: Iterable[Attempt], before: Series, after: Series, kills: int) -> list[Count]:
    """Both sides' counts of everything between two scrapes, the second of an idle server."""
    attempts = list(attempts)

    def server(spec: Spec, **labels: str) -> int:
        return round(total(after, spec, **labels) - total(before, spec, **labels))

    ends = Counter(one.end for one in attempts)
    texts = Counter({end: sum(one.request.texts for one in attempts if one.end == end) for end in ends})
    reasons = sum((one.reasons for one in attempts if one.end == "answered"), Counter[str]())
    codes = Counter(one.code for one in attempts if one.end == "refused")
    tokens = sum(one.tokens for one in attempts if one.end == "answered")
    ended = texts["answered"] + texts["timed out"] + texts["left"]
    refused_unseen = sum(server(catalog.HTTP_REQUESTS, status=status) for status in REFUSED) - sum(
        one.status in map(int, REFUSED) for one in attempts
    )
    cut = ends["refused"] + refused_unseen - server(catalog.REQUESTS_REJECTED)
    doubt = MOST_TEXTS * cut + texts["unseen"] - refused_unseen
    gone = server(catalog.HTTP_REQUESTS, status="499")

    def texts_by(reason: str) -> Count:
        known = reasons[reason]
        said = server(catalog.REQUESTS, finish_reason=reason)
        return Count(f"texts ended by {reason}", said, known, known + texts["left"] + doubt)

    def errors(code: str) -> Count:
        said = server(catalog.REQUEST_ERRORS, error=code)
        return Count(f"answers with {code}", said, codes[code], codes[code] + refused_unseen)

    timeouts = server(catalog.REQUESTS, finish_reason="timeout")
    most_tokens = tokens + MOST_TOKENS * (ended - texts["answered"] + doubt)
    return [
        _exactly("HTTP requests", server(catalog.HTTP_REQUESTS, method="POST"), len(attempts)),
        Count("requests whose client left before the answer", gone, 0, ends["unseen"]),
        Count("texts that ended", server(catalog.REQUESTS), ended, ended + doubt),
        *(texts_by(reason) for reason in ("stop", "length")),
        _exactly("texts ended by their deadline", timeouts, texts["timed out"]),
        Count("tokens generated", server(catalog.GENERATION_TOKENS), tokens, most_tokens),
        *(errors(code) for code in sorted(REFUSALS)),
        _exactly("engines started again after a signal", server(catalog.ENGINE_RESTARTS, reason="signal"), kills),
        _exactly("engines started again", server(catalog.ENGINE_RESTARTS), kills),
        *(_exactly(f"{spec.exposed_name} at the end", round(total(after, spec)), 0) for spec in NOTHING_LEFT),
    ]


def _exactly(what: str, server: int, client: int) -> Count:
    return Count(what, server, client, client)
