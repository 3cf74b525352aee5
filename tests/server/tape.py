"""A recorder for models on the CPU that obeys the rules of CUDA graphs: so that graphs.py can be tried.

While something is recorded, every call that reaches torch's dispatcher is noted: the operator, tensors as they are and
where they are, all other arguments as they are now. Replayed are these calls, in their order, and no Python of whoever
made them. A tensor that a call made is made anew by its replay, so its contents do not outlive one; a call that would
make the host wait for a device is an error, and so is one that draws a random number. Not a test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
WAITING: Final = frozenset(
    {
        _aten._local_scalar_dense.default,
        _aten.item.default,
        _aten.nonzero.default,
        _aten.masked_select.default,
        _aten.equal.default,
        _aten._unique2.default,
        _aten.repeat_interleave.Tensor,
    }
)
"""On CUDA the host waits for what these give, or for how much it is."""


class _Noted(NamedTuple):
    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: Any


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Noted] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in WAITING:
            raise RuntimeError(f"{func} waits for the device")
        is_idle = func is _aten.dropout.default and not args[2]  # as in a model that is not being trained
        if torch.Tag.nondeterministic_seeded in func.tags and not is_idle:
            raise RuntimeError(f"{func} draws a random number")
        made = func(*args, **(kwargs or {}))
        self._calls.append(_Noted(func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        now: dict[int, torch.Tensor] = {}

        def current(value: Any) -> Any:
            return now.get(id(value), value) if isinstance(value, torch.Tensor) else value

        with torch.inference_mode():
            for noted in self._calls:
                made = noted.operator(*tree_map(current, noted.args), **tree_map(current, noted.kwargs))
                for before, after in zip(tree_leaves(noted.made), tree_leaves(made), strict=True):
                    if isinstance(before, torch.Tensor):
                        now[id(before)] = after


class TapeRecorder:
    """graphs.Recorder on the CPU; it counts how often what it recorded is replayed."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        tape = _Tape()
        with tape:
            work()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay
