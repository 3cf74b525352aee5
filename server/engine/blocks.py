"""The KV cache's blocks as numbers: which are free, and nothing else.

A block is a fixed run of token positions; block number b of every layer's store belongs together. No torch, no
memory: the runner owns the tensors. Who holds a block is known by the holder (a sequence's list); this file only
guarantees that no number is handed out twice and that none is given back twice.
"""

from __future__ import annotations

from server.records import KV_BLOCK_TOKENS


class BlockError(Exception):
    """Blocks were asked for that are not there, or given back that were not out: a bug of the caller."""


class BlockPool:
    """`total` blocks of `block_tokens` positions each, handed out last-in first-out so that warm memory is reused."""

    def __init__(self, total: int, block_tokens: int = KV_BLOCK_TOKENS) -> None:
        if total < 1 or block_tokens < 1:
            raise BlockError(f"a pool of {total} blocks of {block_tokens} tokens was asked for; both must be positive")
        self.total = total
        self.block_tokens = block_tokens
        self._free = list(range(total - 1, -1, -1))
        self._is_free = [True] * total

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-tokens // self.block_tokens)

    def take(self, count: int) -> list[int]:
        """`count` blocks that nobody holds; raises BlockError, and takes none, where fewer are free."""
        if count < 0 or count > len(self._free):
            raise BlockError(f"{count} blocks were asked for and {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_free[block] = False
        return taken

    def give_back(self, blocks: list[int]) -> None:
        """Returns blocks and empties the caller's list; raises BlockError for one that is not out."""
        for block in blocks:
            if not 0 <= block < self.total or self._is_free[block]:
                raise BlockError(f"block {block} was given back and is not out; the pool has {self.total} blocks")
            self._is_free[block] = True
            self._free.append(block)
        blocks.clear()
