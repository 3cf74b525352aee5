"""The requests of a soak, each a function of the seed and its number: what is asked, and whether its client stays."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.serve.prompts import prompt

KINDS: Final = {
    "whole": 30,
    "stream": 25,
    "stop strings": 10,
    "own end": 10,
    "choices": 5,
    "echo": 5,
    "deadline": 3,
    "disconnect": 7,
    "abort": 5,
}
"""How often each kind comes, in parts of 100.

whole           not streamed, of exactly as many tokens as asked for
stream          the same, streamed
stop strings    streamed, until one of some frequent letters
own end         whole, until the model ends it, or the limit does
choices         streamed, two or three texts for one prompt
echo            whole, with its own prompt before the text
deadline        streamed, with a time that is often too short
disconnect      streamed; its client leaves after some pieces
abort           whole; its client leaves at some moment, so that nobody knows how far it had come
"""
STREAMED: Final = frozenset({"stream", "stop strings", "choices", "deadline", "disconnect"})
EXACT: Final = frozenset({"whole", "stream", "choices", "echo"})
"""Kinds whose texts all have `max_tokens` tokens."""
MOST_WORDS: Final = 60
MOST_TOKENS: Final = 48
MOST_TEXTS: Final = 3
SHARED: Final = 0.2
"""Part of the prompts that begin like others'."""
LONGEST_STAY: Final = 0.5
"""Seconds after which the client of an abort has left."""


@dataclass(frozen=True)
class Request:
    number: int
    kind: str
    body: dict[str, Any]
    texts: int = 1
    leaves_after_pieces: int | None = None
    """None: its client stays."""
    leaves_after_seconds: float | None = None

    @property
    def stays(self) -> bool:
        return self.leaves_after_pieces is None and self.leaves_after_seconds is None


def make_request(model: str, seed: int, number: int) -> Request:
    """The request of that number."""
    chance = random.Random(f"{seed} {number}")
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    texts = chance.randint(2, MOST_TEXTS) if kind == "choices" else 1
    body: dict[str, Any] = {
        "model": model,
        "prompt": _prompt(chance, f"{seed} {number}"),
        "max_tokens": chance.randint(1, MOST_TOKENS),
        "temperature": chance.choice((0, 0.7, 1.5)),
        "seed": number,
        "priority": chance.choice((0, 0, 0, -1, 5)),
        "ignore_eos": kind != "own end",
    }
    if kind in STREAMED:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    match kind:
        case "choices":
            body |= {"n": texts, "temperature": 1}
        case "stop strings":
            body |= {"stop": chance.sample(["e", "a", " t", "ing", "."], k=2), "min_tokens": 1}
        case "echo":
            body |= {"echo": True}
        case "deadline":
            body |= {"timeout": chance.uniform(0.005, 0.5)}
    if chance.random() < 0.1:
        body["cache_salt"] = chance.choice(("one", "other"))
    return Request(
        number,
        kind,
        body,
        texts,
        leaves_after_pieces=chance.randint(1, 6) if kind == "disconnect" else None,
        leaves_after_seconds=chance.uniform(0, LONGEST_STAY) if kind == "abort" else None,
    )


def _prompt(chance: random.Random, name: str) -> str:
    own = prompt(chance.randint(1, MOST_WORDS), name)
    return prompt(20, "everybody's") + own if chance.random() < SHARED else own
