"""Which idle models make room for another: the least recently used, by their bytes, and only as many as needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Idle(NamedTuple):
    """A model without open requests."""

    name: str
    used: float
    """When it last had one; larger is later."""
    bytes: int
    """What there is more room for without it."""


def choose(idle: Iterable[Idle], missing: int) -> list[Idle]:
    """The models to evict for so many bytes, least recently used first; none where all together are not enough.

    They are taken in that order until they suffice. Then those without which the rest still suffices are spared, the
    most recently used first: one large model may have come after small ones that are no help.
    """
    chosen: list[Idle] = []
    for model in sorted(idle, key=lambda one: one.used):
        if sum(one.bytes for one in chosen) >= missing:
            break
        chosen.append(model)
    spare = sum(one.bytes for one in chosen) - missing
    if spare < 0:
        return []
    for model in reversed(chosen.copy()):
        if model.bytes <= spare:
            chosen.remove(model)
            spare -= model.bytes
    return chosen
