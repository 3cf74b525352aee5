"""What quantizing costs a model, by groups of layers, measured on samples while it is loaded.

    with measured() as meter:
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    meter.groups()

After loading the originals are gone, so this is the only time when it can be known; a checkpoint that was quantized
before has none. Of each matrix at most SAMPLE values are decoded again, in CHUNKS runs spread over it, whatever its
size. Not here: every value of a layer (report.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import torch

from quant.experts import PackedExperts
from quant.report import OUTLIER_RMS, format_name, original_values, packed_values, value_alignment
from quant.state import PackedWeight

SAMPLE: Final = 1 << 16
"""Values of a matrix that are looked at, at most."""
CHUNKS: Final = 4
"""Runs of neighbouring values that the sample is made of."""
MATRICES: Final = 4
"""Experts of one stack that are looked at, at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class GroupReport:
    """The layers with the same place in their block and the same format; the fields are those of a LayerReport."""

    group: str
    format: str
    layers: int
    relative_error: float
    outlier_share: float


class QualityMeter:
    """Takes in matrices as they are packed."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], _Sums] = defaultdict(_Sums)

    def add(self, name: str, packed: PackedWeight, original: torch.Tensor) -> None:
        """One matrix of the tensor `name` and what it was before: the same shape, any floating dtype."""
        sums = self._sums[group_of(name), format_name(packed)]
        sums.names.add(name)
        truths, values = [], []
        for begin, size in chunks(math.prod(packed.shape), value_alignment(packed)):
            decoded = packed_values(packed, begin, size)
            values.append(decoded)
            truths.append(original_values(original, begin, decoded.numel()))
        truth, value = torch.cat(truths), torch.cat(values)
        squares = truth.square().mean()
        outliers = (truth.square() > OUTLIER_RMS**2 * squares).sum()
        # One transfer from the device instead of one per figure.
        error, squares_sum, outlier_sum = torch.stack(
            [(truth - value).square().sum(), squares * truth.numel(), outliers.to(truth.dtype)]
        ).tolist()
        # Each matrix counts by its own size, not by its sample's.
        weight = math.prod(packed.shape) / truth.numel()
        sums.squared_error += weight * error
        sums.squared_weights += weight * squares_sum
        sums.outliers += weight * outlier_sum
        sums.weights += math.prod(packed.shape)

    def add_stack(self, name: str, module: PackedExperts, leaf: str, original: torch.Tensor) -> None:
        """Some matrices of a stack of experts; `original` is the stack as transformers holds it."""
        projection = module.projections[leaf]
        chosen = _spread(len(projection.file_names()), MATRICES)
        pairs = zip(module.matrices(leaf), projection.split(original), strict=True)
        for index, (packed, matrix) in enumerate(pairs):
            if index in chosen:
                self.add(name, packed, matrix)

    def groups(self) -> list[GroupReport]:
        """What came in so far, in the order of its coming."""
        return [
            GroupReport(
                group=group,
                format=form,
                layers=len(sums.names),
                relative_error=math.sqrt(sums.squared_error / sums.squared_weights) if sums.squared_weights else 0.0,
                outlier_share=sums.outliers / sums.weights,
            )
            for (group, form), sums in self._sums.items()
            if sums.weights
        ]


@dataclasses.dataclass(slots=True)
class _Sums:
    names: set[str] = dataclasses.field(default_factory=set)
    weights: int = 0
    outliers: float = 0.0
    squared_error: float = 0.0
    squared_weights: float = 0.0


def group_of(name: str) -> str:
    """The place in its block that a tensor has: model.layers.3.self_attn.q_proj.weight is self_attn.q_proj."""
    parts = name.removesuffix(".weight").split(".")
    last_number = max((place for place, part in enumerate(parts) if part.isdigit()), default=-1)
    inner = parts[last_number + 1 :] or parts[-1:]
    return ".".join(inner[-2:]) if last_number >= 0 else inner[-1]


def chunks(count: int, align: int) -> Iterator[tuple[int, int]]:
    """Beginnings and sizes of at most CHUNKS runs, spread evenly over `count` values; all of them where they are few.

    Beginnings are multiples of `align`, and so are sizes but for the last values of all.
    """
    units = -(-count // align)
    each = max(1, SAMPLE // CHUNKS // align)
    if units <= each * CHUNKS:
        yield 0, count
        return
    for begin in _spread(units - each + 1, CHUNKS):
        yield begin * align, min(each * align, count - begin * align)


def _spread(count: int, most: int) -> Sequence[int]:
    """At most so many of the numbers below `count`, the first and the last among them, evenly spread."""
    return range(count) if count <= most else [(count - 1) * place // (most - 1) for place in range(most)]


_meter: ContextVar[QualityMeter | None] = ContextVar("quality_meter", default=None)


@contextmanager
def measured() -> Iterator[QualityMeter]:
    """A meter that every from_pretrained inside the block reports to."""
    meter = QualityMeter()
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)


def current_meter() -> QualityMeter | None:
    """The meter of the block around this call."""
    return _meter.get()
