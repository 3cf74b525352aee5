"""What the engines of this machine have been promised of its memory, and whose turn it is to ask for more.

An engine plans in a second, takes minutes to touch what it planned, and may never touch the last block of its cache. So
what is free says too little: the same bytes could be promised twice. Before it plans, every engine asks here, one at a
time and in the order in which they were started, and is told what others have been promised and have not taken yet.
To plan, it needs torch, which takes some hundred megabytes; so a process for that is not even started without room.
The planning itself, and what is free, are the engine's business (server/memory); which models make room for others is
the fleet's. This file knows no HTTP and starts no process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from server.memory.machine import anonymous_bytes
from server.records import CPU, MemoryReport, Planned, RoomGranted, Shortage

log = logging.getLogger(__name__)
MakeRoom = Callable[[str, Shortage], Awaitable[bool]]
"""Called with the model that asks and what it lacks; says whether there is more room now."""


class Room:
    """All claims of one server, and the line of those that have not planned yet."""

    def __init__(self, make_room: MakeRoom | None = None) -> None:
        self.make_room = make_room
        self.process_bytes = 0
        """The most that an engine's process held on the CPU when it had planned; 0 until one has."""
        self._claims: dict[str, Claim] = {}
        self._line: list[Claim] = []

    def claim(self, model: str) -> Claim:
        """A model's claim; it has none yet."""
        found = self._claims[model] = Claim(self, model)
        return found

    def process_shortage(self, available: int, claim: Claim | None = None) -> Shortage | None:
        """What one more process that plans lacks of the CPU's available bytes; with a claim, that of its engine."""
        others = self.promised_to_others(claim).get(CPU, {})
        left = max(0, available - sum(others.values()))
        return Shortage(CPU, self.process_bytes, left) if left < self.process_bytes else None

    def promised_bytes(self) -> dict[str, int]:
        """By device: what has been promised to any model and is not taken yet."""
        return {device: sum(models.values()) for device, models in self.promised_to_others(None).items()}

    def promised_to_others(self, claim: Claim | None) -> dict[str, dict[str, int]]:
        """By device and model: what has been promised and is not taken yet. Only what is not zero."""
        found: dict[str, dict[str, int]] = {}
        for other in self._claims.values():
            if other is not claim:
                for device in other.promised:
                    if (open_bytes := other.open_bytes(device)) > 0:
                        found.setdefault(device, {})[other.model] = open_bytes
        return found

    def join(self, claim: Claim) -> None:
        self.leave(claim)
        self._line.append(claim)
        self._next()

    def leave(self, claim: Claim) -> None:
        if claim in self._line:
            self._line.remove(claim)
            self._next()

    def forget(self, claim: Claim) -> None:
        self.leave(claim)
        if self._claims.get(claim.model) is claim:
            del self._claims[claim.model]

    def _next(self) -> None:
        if self._line:
            self._line[0].turn.set()


class Claim:
    """What one model has been promised, from one of its engines to the next: it keeps its room while it restarts."""

    def __init__(self, room: Room, model: str) -> None:
        self._room = room
        self.model = model
        self.promised: Mapping[str, int] = {}
        """Bytes by device: the peak while an engine loads, then what it keeps."""
        self.turn = asyncio.Event()
        self._process_id: int | None = None
        self._planned: Planned | None = None
        self._taken: dict[str, int] = {}

    def enter(self, available: int) -> Shortage | None:
        """To be called before the first engine is started: promises it the room of its process, or says what lacks."""
        shortage = self._room.process_shortage(available, self)
        if shortage is None and self._room.process_bytes:
            self.promised = {CPU: self._room.process_bytes}
        return shortage

    def begin(self, process_id: int) -> None:
        """An engine was started: it stands in line."""
        self._process_id = process_id
        self._planned, self._taken = None, {}
        self.turn.clear()
        self._room.join(self)

    async def ask(self, shortage: Shortage | None) -> RoomGranted:
        """Waits for the engine's turn, and says what is others'; with a shortage, after an attempt to end it."""
        await self.turn.wait()
        more = True
        if shortage is not None:
            try:
                more = self._room.make_room is not None and await self._room.make_room(self.model, shortage)
            except Exception:  # the engine waits for an answer, whatever went wrong
                log.exception("no room could be made for model %r", self.model)
                more = False
        return RoomGranted(self._room.promised_to_others(self), more)

    def planned(self, record: Planned) -> None:
        """The engine takes what it planned. The turn is over where its progress shows from outside: else, on a GPU,
        nobody could tell what it has taken until it is loaded.
        """
        self._planned = record
        self.promised = record.peak
        self._room.process_bytes = max(self._room.process_bytes, self._taken_of(CPU))
        if record.is_on_cpu:
            self._room.leave(self)

    def loaded(self, memory: MemoryReport) -> None:
        """What was needed only while loading is given back."""
        if self._planned is not None:
            self.promised = self._planned.kept
            self._taken = {memory.device: sum(memory.measured.values())}
        self._room.leave(self)

    def ended(self) -> None:
        """The engine is gone, and with it what it had taken; another may follow, and will need as much."""
        self._process_id = None
        self._taken = {}
        self._room.leave(self)

    def drop(self) -> None:
        """No engine follows."""
        self.promised = {}
        self._room.forget(self)

    def open_bytes(self, device: str) -> int:
        """Promised on a device and not taken yet."""
        return max(0, self.promised.get(device, 0) - self._taken_of(device))

    def held_bytes(self, device: str) -> int:
        """What a device has more room for once this is dropped: what was taken, and what was kept free for it."""
        return max(self.promised.get(device, 0), self._taken_of(device))

    def _taken_of(self, device: str) -> int:
        if device != CPU:
            return self._taken.get(device, 0)
        return 0 if self._process_id is None else anonymous_bytes(self._process_id) or 0
