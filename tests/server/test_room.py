"""engine/room.py and api/eviction.py: whose turn it is, what others have been promised, and who makes room."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Awaitable, Callable
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.eviction import Idle, choose
from server.engine.room import Claim, Room
from server.memory.machine import anonymous_bytes, machine_available, process_bytes
from server.records import CPU, MemoryReport, Planned, Shortage

NOBODY = 2**22 + 1
"""A process id that Linux gives to no process."""
GPU = "cuda:0"


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


def started(room: Room, *names: str) -> list[Claim]:
    """Claims of models whose engines were started in this order."""
    claims = [room.claim(name) for name in names]
    for claim in claims:
        claim.begin(NOBODY)
    return claims


def report(device: str, **measured: int) -> MemoryReport:
    return MemoryReport(device, {}, measured, {})


def test_turns_come_in_the_order_of_the_starts_and_see_what_was_promised_before() -> None:
    async def test() -> None:
        room = Room()
        first, second, third = started(room, "first", "second", "third")
        waiting = [asyncio.create_task(claim.ask(None)) for claim in (third, second)]
        assert (await first.ask(None)).promised == {}
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        first.planned(Planned({CPU: 70}, {CPU: 50}))
        assert (await waiting[1]).promised == {CPU: {"first": 70}}
        assert not waiting[0].done()
        second.planned(Planned({CPU: 7}, {CPU: 7}))
        assert (await waiting[0]).promised == {CPU: {"first": 70, "second": 7}}
        first.loaded(report(CPU, packed_weights=40))
        second.drop()
        assert (await third.ask(None)).promised == {CPU: {"first": 50}}, "what loading needed is given back"
        third.planned(Planned({CPU: 5, GPU: 9}, {CPU: 5, GPU: 9}))
        assert room.promised_bytes() == {CPU: 55, GPU: 9}

    run(test)


def test_a_process_is_not_started_without_room_for_what_others_took_to_plan() -> None:
    room = Room()
    first, second, third, fourth = (room.claim(name) for name in ("first", "second", "third", "fourth"))
    assert first.enter(0) is None, "nobody knows yet"
    assert first.promised == {}
    first.begin(os.getpid())
    first.planned(Planned({GPU: 5}, {GPU: 5}))
    size = room.process_bytes
    held = anonymous_bytes(os.getpid())
    assert held is not None
    assert size == pytest.approx(held, rel=0.1)
    assert second.enter(size) is None
    assert room.promised_bytes() == {CPU: size, GPU: 5}
    assert third.enter(2 * size - 1) == Shortage(CPU, size, size - 1), "the second is about to take as much"
    assert third.promised == {}
    assert second.enter(size) is None, "its own promise is not another's"
    assert third.enter(2 * size) is None
    assert fourth.enter(size) == Shortage(CPU, size, 0)
    assert room.process_shortage(3 * size) is None
    assert room.process_shortage(3 * size - 1) == Shortage(CPU, size, size - 1)
    second.drop()
    assert fourth.enter(2 * size) is None


def test_whoever_ends_leaves_the_line_and_keeps_its_promise_until_it_is_dropped() -> None:
    async def test() -> None:
        room = Room()
        first, second = started(room, "first", "second")
        waiting = asyncio.create_task(second.ask(None))
        first.ended()
        assert (await waiting).promised == {}
        second.planned(Planned({CPU: 5}, {CPU: 5}))
        second.ended()
        first.begin(NOBODY)
        assert (await first.ask(None)).promised == {CPU: {"second": 5}}, "its next engine needs as much again"
        second.begin(NOBODY)
        first.planned(Planned({CPU: 1}, {CPU: 1}))
        assert (await second.ask(None)).promised == {CPU: {"first": 1}}, "its own promise is not another's"
        second.drop()
        second.drop()
        assert (await first.ask(None)).promised == {}

    run(test)


def test_what_is_taken_is_promised_no_longer() -> None:
    """On a CPU it is what the process has touched: here, this test's own."""

    async def test() -> None:
        room = Room()
        claim, other = room.claim("m"), room.claim("other")
        claim.begin(os.getpid())
        before = anonymous_bytes(os.getpid())
        assert before is not None
        size = 64 * 2**20
        claim.planned(Planned({CPU: before + 2 * size}, {CPU: before + 2 * size}))
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            untouched = room.promised_to_others(other)[CPU]["m"]
            held.write(bytes(range(256)) * (size // 256))
            touched = untouched - room.promised_to_others(other)[CPU]["m"]
            # The bytes that are written exist once more on the heap while they are written, and may stay there.
            assert size <= touched <= 2 * size
        assert claim.held_bytes(CPU) >= before + 2 * size
        claim.ended()
        assert room.promised_to_others(other) == {CPU: {"m": before + 2 * size}}

    run(test)


def test_on_a_gpu_the_turn_lasts_until_all_is_loaded() -> None:
    async def test() -> None:
        room = Room()
        first, second = started(room, "first", "second")
        await first.ask(None)
        first.planned(Planned({GPU: 100, CPU: 5}, {GPU: 80, CPU: 5}))
        waiting = asyncio.create_task(second.ask(None))
        await asyncio.sleep(0)
        assert not waiting.done(), "nobody outside can see what it has taken"
        first.loaded(report(GPU, packed_weights=50, kv_cache=20))
        assert (await waiting).promised == {GPU: {"first": 10}, CPU: {"first": 5}}
        assert first.held_bytes(GPU) == 80

    run(test)


def test_a_shortage_is_answered_after_an_attempt_to_end_it() -> None:
    asked: list[tuple[str, Shortage]] = []
    shortage = Shortage(CPU, 5, 3)

    async def test() -> None:
        async def make_room(model: str, lacking: Shortage) -> bool:
            asked.append((model, lacking))
            return len(asked) == 1

        room = Room(make_room)
        (claim,) = started(room, "m")
        assert [(await claim.ask(one)).more for one in (None, shortage, shortage)] == [True, True, False]
        (alone,) = started(Room(), "m")
        assert [(await alone.ask(one)).more for one in (None, shortage)] == [True, False]

    run(test)
    assert asked == [("m", shortage), ("m", shortage)]


def test_where_making_room_fails_what_others_were_promised_is_still_said(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async def make_room(model: str, lacking: Shortage) -> bool:
            raise RuntimeError("an unload went wrong")

        room = Room(make_room)
        first, second = started(room, "first", "second")
        first.promised = {"cuda:0": 7}
        room.leave(first)
        granted = await second.ask(Shortage("cuda:0", 5, 3))
        assert (granted.promised, granted.more) == ({"cuda:0": {"first": 7}}, False)

    run(test)
    assert "no room could be made for model 'second'" in caplog.text


def test_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    idle = [Idle("new", 9, 100), Idle("old", 1, 10), Idle("middle", 5, 60)]

    def chosen(missing: int) -> list[str]:
        return [one.name for one in choose(idle, missing)]

    assert chosen(5) == ["old"]
    assert chosen(10) == ["old"]
    assert chosen(11) == ["middle"], "the older one is no help beside it"
    assert chosen(70) == ["old", "middle"]
    assert chosen(71) == ["new"]
    assert chosen(170) == ["old", "middle", "new"]
    assert chosen(171) == [], "in vain none is evicted"
    assert choose([], 1) == []


@given(sizes=st.lists(st.integers(1, 50), max_size=7), missing=st.integers(1, 200))
def test_what_is_chosen_suffices_and_nothing_of_it_is_spare(sizes: list[int], missing: int) -> None:
    idle = [Idle(str(place), place, size) for place, size in enumerate(sizes)]
    chosen = choose(reversed(idle), missing)
    assert [one.used for one in chosen] == sorted(one.used for one in chosen)
    if sum(sizes) < missing:
        assert chosen == []
        return
    total = sum(one.bytes for one in chosen)
    assert total >= missing
    assert all(total - one.bytes < missing for one in chosen), "one of them was evicted for nothing"
    latest = max(one.used for one in chosen)
    older = [one for one in idle if one.used < latest]
    assert sum(one.bytes for one in older) < missing, "a model was evicted although older ones were enough"
    assert any(set(chosen) == set(subset) for subset in combinations(idle, len(chosen)))


def test_what_the_system_does_not_say_is_none(tmp_path: Path) -> None:
    assert process_bytes(NOBODY) is None
    assert anonymous_bytes(NOBODY) is None
    assert machine_available(tmp_path / "meminfo") is None
    (tmp_path / "meminfo").write_text("MemTotal:  5 kB\nMemAvailable:       3 kB\nHugePages_Total:       0\n")
    assert machine_available(tmp_path / "meminfo") == 3 * 1024
    own = process_bytes(os.getpid())
    assert own is not None
    assert 0 < own.anonymous <= own.rss
    assert own.pss <= own.rss
