"""The block pool as a hypothesis state machine beside lists that cannot be wrong, and what is evicted first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.engine.blocks import BlockError, BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Beside the pool: who holds what, and which block a name was last seen to lead to."""

    @initialize(total=st.integers(1, 20))
    def start(self, total: int) -> None:
        self.pool = BlockPool(total, block_tokens=4)
        self.held: list[list[int]] = []
        self.named: dict[int, bytes] = {}

    @rule(count=st.integers(0, 8))
    def take(self, count: int) -> None:
        if count > self.pool.free:
            with pytest.raises(BlockError):
                self.pool.take(count)
            return
        cached = self.pool.cached
        taken = self.pool.take(count)
        self.held.append(taken)
        evicted = [block for block in taken if self.named.pop(block, None) is not None]
        assert cached - self.pool.cached == len(evicted)

    @rule(data=st.data(), name=st.integers(0, 5))
    def name(self, data: st.DataObject, name: int) -> None:
        nameless = [block for blocks in self.held for block in blocks if block not in self.named]
        if nameless:
            block, text = data.draw(st.sampled_from(nameless)), b"%d" % name
            self.pool.name(block, text)
            if text not in self.named.values():
                self.named[block] = text

    @rule(names=st.lists(st.integers(0, 5), unique=True, max_size=4))
    def find_and_hold(self, names: list[int]) -> None:
        by_name = {name: block for block, name in self.named.items()}
        known = [by_name.get(b"%d" % name) for name in names]
        expected = known[: known.index(None)] if None in known else known
        found = self.pool.find(b"%d" % name for name in names)
        assert found == expected
        free = self.pool.free
        unheld = self.pool.unheld(found)
        self.pool.hold(found)
        assert free - self.pool.free == unheld
        self.held.append(found)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if self.held:
            blocks = data.draw(st.sampled_from(self.held))
            self.pool.forget(blocks)
            for block in blocks:
                self.named.pop(block, None)

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.give_back(blocks)
            assert blocks == []

    @invariant()
    def every_block_is_blank_cached_or_held_by_its_owners(self) -> None:
        held = Counter(block for blocks in self.held for block in blocks)
        assert [self.pool.owners(block) for block in range(self.pool.total)] == [
            held[block] for block in range(self.pool.total)
        ]
        assert self.pool.used == len(held)
        assert self.pool.cached == len(self.named.keys() - held.keys())
        assert self.pool.free + self.pool.used == self.pool.total


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestPool = PoolMachine.TestCase


def named_pool(names: str) -> BlockPool:
    """A pool of as many blocks, all cached under a letter each, given back one by one."""
    pool = BlockPool(len(names))
    for block, letter in [(block, letter) for letter in names for block in pool.take(1)]:
        pool.name(block, letter.encode())
    for letter in names:
        pool.give_back(pool.find([letter.encode()]))
    return pool


def test_the_least_recently_held_is_evicted_first() -> None:
    pool = named_pool("abcd")
    again = pool.find([b"a"])
    pool.hold(again)
    pool.give_back(again)
    pool.take(1)
    assert [bool(pool.find([name])) for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    pool.take(2)
    assert [bool(pool.find([name])) for name in (b"a", b"b", b"c", b"d")] == [True, False, False, False]


def test_the_end_of_a_text_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3)
    blocks = pool.take(3)
    for block, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.name(block, name)
    pool.give_back(blocks)
    pool.take(1)
    assert len(pool.find([b"a", b"b", b"c"])) == 2


def test_blank_blocks_are_taken_before_anything_is_evicted() -> None:
    pool = BlockPool(3)
    named, other = pool.take(1), pool.take(1)
    pool.name(named[0], b"a")
    pool.give_back(named)
    pool.give_back(other)
    pool.take(2)
    assert pool.find([b"a"])


def test_what_holds_nothing_cannot_be_named_or_shared() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    with pytest.raises(BlockError, match="not out"):
        pool.name(1 - block, b"a")
    with pytest.raises(BlockError, match="holds nothing"):
        pool.hold([1 - block])
    pool.name(block, b"a")
    with pytest.raises(BlockError, match="has a name"):
        pool.name(block, b"b")


def test_a_block_is_given_back_once() -> None:
    pool = BlockPool(3)
    blocks = pool.take(2)
    pool.give_back(list(blocks))
    with pytest.raises(BlockError, match="not out"):
        pool.give_back(list(blocks))
    with pytest.raises(BlockError, match="not out"):
        pool.give_back([3])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(1, block_tokens=16).blocks_for(tokens) == blocks


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(BlockError, match="0 blocks"):
        BlockPool(0)
