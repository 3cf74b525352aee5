"""torch's own products and activations with the same bits in a batch of any size: what `batch_invariant` asks of them.

quant's kernels add up every row alike. torch's do not: a product of one row, of five and of sixteen goes different
ways through MKL and oneDNN. But at one shape a row has the same bits wherever it stands and whatever stands beside it.
So inside `Steady`, dense products (a head that is not quantized, a router, a whole model in 16 bits) are computed ROWS
rows at a time, the last ones filled up with zeros:

    [37, K] @ [K, N]      [16, K] @ [K, N], [16, K] @ [K, N], [5 + 11 of zeros, K] @ [K, N]

An activation's threads each compute a share, and the last few values of a share go another way than the others. Here
they get rows in pieces that one thread computes. What is not known to be steady, as a product of batches of matrices,
raises UnsteadyError; whoever meets one while it probes a model chooses another way to serve it. Norms and softmax
are computed row by row anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ROWS: Final = 16
"""Of one product; as many as a tile of AMX or a few vectors of AVX-512 take at the price of reading the weight."""
ALONE: Final = 16384
"""Values of an activation that torch computes in one thread: half of at::internal::GRAIN_SIZE, as GELU has it."""
VECTORS: Final = 64
"""Values that torch computes at once, in two vectors of 16-bit values at most; a rest goes another way."""


class UnsteadyError(Exception):
    """A model calls something whose last bits depend on the rows beside one."""


class Steady(TorchFunctionMode):
    """While it is entered, calls of torch in this thread are steady, or raise UnsteadyError."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        way = _WAYS.get(function)
        if way is None:
            return function(*args, **(kwargs or {}))
        return way(function, *args, **(kwargs or {}))


def _linear(function: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _in_blocks(x, lambda rows: function(rows, weight, bias))


def _addmm(function: Any, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, **scales: Any) -> torch.Tensor:
    """transformers' Conv1D."""
    if scales:
        raise UnsteadyError(f"{function.__name__} with {', '.join(scales)}")
    return _in_blocks(x, lambda rows: function(bias, rows, weight))


def _matmul(function: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape[-1] == 1:
        return function(a, b)  # type: ignore[no-any-return]  # nothing is added up: rotary angles
    if b.dim() != 2:
        raise UnsteadyError(f"{function.__name__} of {list(a.shape)} and {list(b.shape)}")
    return _in_blocks(a, lambda rows: function(rows, b))


def _in_blocks(x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """x: [..., K] -> [..., N], ROWS rows at a time, each time in memory that is aligned as new memory is."""
    rows = x.reshape(-1, x.shape[-1])
    whole = product(_filled_up(rows[:ROWS]))[: len(rows)]
    if len(rows) > ROWS:
        first, whole = whole, whole.new_empty(len(rows), whole.shape[1])
        whole[:ROWS] = first
        for start in range(ROWS, len(rows), ROWS):
            some = rows[start : start + ROWS]
            whole[start : start + ROWS] = product(_filled_up(some))[: len(some)]
    return whole.view(*x.shape[:-1], whole.shape[1])


def _filled_up(rows: torch.Tensor) -> torch.Tensor:
    """[up to ROWS, K] -> [ROWS, K] in new memory."""
    block = rows.new_zeros(ROWS, rows.shape[1])
    block[: len(rows)] = rows
    return block


def _activation(function: Any, x: torch.Tensor, *options: Any, **named: Any) -> torch.Tensor:
    width = x.shape[-1] if x.dim() else 1
    together = max(1, ALONE // max(width, 1)) if width % VECTORS == 0 else 1
    rows = x.reshape(-1, width).contiguous()
    if len(rows) <= together:
        return function(x.contiguous(), *options, **named)  # type: ignore[no-any-return]
    pieces = [function(some, *options, **named) for some in torch.split(rows, together)]
    return torch.cat(pieces).view(x.shape)


def _refused(function: Any, *_: Any, **__: Any) -> torch.Tensor:
    raise UnsteadyError(function.__name__)


_WAYS: Final[dict[Any, Callable[..., torch.Tensor]]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul),
    **dict.fromkeys(
        (F.silu, F.gelu, torch.sigmoid, torch.Tensor.sigmoid, torch.tanh, torch.Tensor.tanh, F.softplus, F.mish),
        _activation,
    ),
    **dict.fromkeys(
        (
            torch.bmm,
            torch.Tensor.bmm,
            torch.baddbmm,
            torch.Tensor.baddbmm,
            torch.einsum,
            torch.Tensor.__rmatmul__,
            torch.Tensor.addmm,
            F.grouped_mm,
            torch._grouped_mm,
            F.scaled_dot_product_attention,
            F.bilinear,
            F.conv1d,
            F.conv2d,
        ),
        _refused,
    ),
}
