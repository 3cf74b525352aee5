"""The KV cache's blocks as numbers: who holds how many, and which still hold something worth finding again.

A block is a fixed run of token positions; block number b of every layer's store belongs together. No torch, no
memory: the runner owns the tensors. A block is in one of three states:

    held     by one sequence, or by several that begin with the same tokens; owners are counted
    cached   by nobody, but full of tokens that have a name (prefix.py): found again under it, or taken as if it were
             free, the least recently used first
    blank    by nobody, and nothing worth finding

Names are given and looked up by the scheduler; this file guarantees that no number is handed out twice, that none is
given back more often than it was handed out, and that a name leads to one block or to none.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable

from server.records import KV_BLOCK_TOKENS


class BlockError(Exception):
    """Blocks were asked for that are not there, or given back that were not out: a bug of the caller."""


class BlockPool:
    """`total` blocks of `block_tokens` positions each; blank ones go last-in first-out, so that warm memory is used."""

    def __init__(self, total: int, block_tokens: int = KV_BLOCK_TOKENS) -> None:
        if total < 1 or block_tokens < 1:
            raise BlockError(f"a pool of {total} blocks of {block_tokens} tokens was asked for; both must be positive")
        self.total = total
        self.block_tokens = block_tokens
        self._owners = [0] * total
        self._blank = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Least recently held first."""
        self._names: list[bytes | None] = [None] * total
        self._by_name: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that `take` can give: blank ones, and cached ones that nobody holds."""
        return len(self._blank) + len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.free

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and that would be found again."""
        return len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-tokens // self.block_tokens)

    def owners(self, block: int) -> int:
        """How many hold this block."""
        return self._owners[block]

    def take(self, count: int) -> list[int]:
        """`count` blocks that nobody holds; raises BlockError, and takes none, where fewer are free."""
        if count < 0 or count > self.free:
            raise BlockError(f"{count} blocks were asked for and {self.free} are free")
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in taken:
            self._owners[block] = 1
        return taken

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of these names in order, up to the first name that leads nowhere; holds none of them yet."""
        found: list[int] = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def unheld(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody holds: holding them makes so many fewer free."""
        return sum(1 for block in blocks if not self._owners[block])

    def hold(self, blocks: Iterable[int]) -> None:
        """One more owner for each of these blocks; raises BlockError for one that is neither held nor cached."""
        for block in blocks:
            if not self._owners[block]:
                if block not in self._cached:
                    raise BlockError(f"block {block} was to be shared and holds nothing")
                del self._cached[block]
            self._owners[block] += 1

    def name(self, block: int, name: bytes) -> None:
        """Says what a held block is full of; the first block of a name keeps it, another of the same content has none.

        Raises BlockError for a block that nobody holds or that has a name.
        """
        if not self._owners[block] or self._names[block] is not None:
            raise BlockError(f"block {block} was to be named and is not out, or has a name")
        if self._by_name.setdefault(name, block) == block:
            self._names[block] = name

    def forget(self, blocks: Iterable[int]) -> None:
        """Takes the names of held blocks away: nobody finds them again, whoever holds them keeps them."""
        for block in blocks:
            self._drop_name(block)

    def give_back(self, blocks: list[int] | array[int]) -> None:
        """One owner less for each block, and the caller's list is empty; raises BlockError for one that is not out.

        The last blocks first: what begins a text is found more often than what ends it, and is evicted later.
        """
        for block in reversed(blocks):
            if not 0 <= block < self.total or not self._owners[block]:
                raise BlockError(f"block {block} was given back and is not out; the pool has {self.total} blocks")
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if self._names[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None
        del blocks[:]

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._drop_name(block)
        return block

    def _drop_name(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            self._names[block] = None
            del self._by_name[name]
