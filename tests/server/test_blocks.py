"""The block pool as a hypothesis state machine beside a set that cannot be wrong."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.engine.blocks import BlockError, BlockPool


class PoolMachine(RuleBasedStateMachine):
    @initialize(total=st.integers(1, 20))
    def start(self, total: int) -> None:
        self.pool = BlockPool(total, block_tokens=4)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 8))
    def take(self, count: int) -> None:
        if count > self.pool.free:
            with pytest.raises(BlockError):
                self.pool.take(count)
        else:
            self.held.append(self.pool.take(count))

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.give_back(blocks)
            assert blocks == []

    @invariant()
    def every_block_is_free_or_held_once(self) -> None:
        held = [block for blocks in self.held for block in blocks]
        assert len(held) == len(set(held)) == self.pool.used
        assert all(0 <= block < self.pool.total for block in held)
        assert self.pool.free + self.pool.used == self.pool.total


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


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
