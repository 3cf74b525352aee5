"""The demo's text: an endless, seeded stream of stories and conversations from a small harbour village.

Pure Python, no torch. Documents are made up from the tables in `world` by the grammar in `telling`; nothing is copied
from anywhere. The same seed gives the same documents on every machine. A document belongs to the training or to the
held-out split by a hash of its text, so the two are disjoint whatever the seeds are.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final, Literal

from server.demo.corpus.chats import Turn, conversation
from server.demo.corpus.stories import plain_text

Split = Literal["train", "heldout"]
HELDOUT_OF_256: Final = 16
"""How many of the 256 values of the hash's first byte mean "held out"."""
PLAIN_SHARE: Final = 0.42
"""The share of documents that are plain text; the rest are conversations."""


@dataclass(frozen=True)
class Document:
    """Plain text, or the turns of a conversation; exactly one of the two is not empty."""

    text: str = ""
    turns: tuple[Turn, ...] = ()

    def words(self) -> str:
        """All its text in one string, roles left out."""
        return self.text or "\n".join(text for _, text in self.turns)

    def split(self) -> Split:
        digest = hashlib.blake2b(repr((self.text, self.turns)).encode(), digest_size=1).digest()
        return "heldout" if digest[0] < HELDOUT_OF_256 else "train"


def document(seed: int, index: int) -> Document:
    """The document at this place of this seed's stream, whichever split it belongs to."""
    rng = random.Random(f"{seed}/{index}")
    if rng.random() < PLAIN_SHARE:
        return Document(text=plain_text(rng))
    return Document(turns=tuple(conversation(rng)))


def digest(seed: int, count: int = 1000) -> str:
    """A hash of the first documents of a seed, so that weights can say which text they were trained on."""
    text = "\n".join(repr(document(seed, index)) for index in range(count))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def documents(split: Split, seed: int) -> Iterator[Document]:
    """The documents of one split, in order, without end."""
    for index in count():
        made = document(seed, index)
        if made.split() == split:
            yield made
