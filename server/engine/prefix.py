"""Names for what full cache blocks hold, so that a sequence finds what another has computed of the same beginning.

Keys and values at a position depend on every token up to it, so a block's name is a hash over its own tokens and the
name of the block before it; the first follows from the tenant's salt:

    salt -> n0     n0, t0 .. t15 -> n1     n1, t16 .. t31 -> n2     ...

The hash is BLAKE2b (RFC 7693) with 32 bytes, keyed with a secret that this process draws and nobody else sees. Tokens
are not compared again: that two different beginnings among 2^40 blocks share a name has a chance below 2^-176, and
without the key nobody can look for two that do. A salt is part of every name that follows from it, so who does not
know it can neither use what its tenant has cached, nor learn from the time of an answer that it is there.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from typing import Final

_BYTES: Final = 32


class PrefixNames:
    """One secret; chains of names that can be compared with each other."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._secret = secrets.token_bytes(_BYTES)

    def start(self, salt: str, *, switched: bool = False) -> list[bytes]:
        """The chain of a sequence of which nothing is named yet; `salt` is empty where no tenant is meant.

        switched: it is computed in another way than shorter ones (scheduler.py): the same tokens leave something else.
        """
        return [self._digest(b"switched" if switched else b"salt", salt.encode())]

    def extend(self, chain: list[bytes], tokens: list[int], blocks: int) -> None:
        """Adds names until the chain has those of the first `blocks` blocks of the tokens: chain[1], chain[2], ..."""
        size = self._block_tokens
        for block in range(len(chain) - 1, blocks):
            content = array("q", tokens[block * size : (block + 1) * size]).tobytes()
            chain.append(self._digest(b"block", chain[-1] + content))

    def _digest(self, kind: bytes, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=_BYTES, key=self._secret, person=kind).digest()
