"""What quantizing costs, layer by layer: bits per weight, relative error, outlier share.

Weights are compared slice by slice, so that a layer's values never exist a second time in float32. Not here: which
layers are quantized (hf.py), and a whole checkpoint at a time (convert.py, which measures with this while it writes).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import nn

from quant import formats, ops
from quant.config import BitsAndBytesConfig
from quant.conversion import modules_to_quantize, pack_module
from quant.embedding import embedding_groups
from quant.experts import PackedExperts, Projection, find_experts, pack_matrix
from quant.packed import PackedModule
from quant.state import Packed4bit, Packed8bit, PackedWeight

OUTLIER_RMS: Final = 4.0
"""A weight counts as an outlier beyond this many root mean squares of its matrix: 0.006 % of a normal distribution."""

_SLICE: Final = 1 << 20
"""Values compared at a time; a multiple of every block size."""
_FLOAT32_BYTES: Final = 4


@dataclasses.dataclass(frozen=True, slots=True)
class LayerReport:
    """One quantized layer."""

    name: str
    format: str  # "nf4", "fp4", "nf4-dq", "fp4-dq" or "int8"
    shape: tuple[int, ...]
    weights: int
    bytes: int  # codes and statistics, as they stand in memory; tables are shared by all layers
    relative_error: float | None  # root of (squared error / squared weights); None where the original is not known
    outlier_share: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"bits_per_weight": self.bits_per_weight}


class LayerMeter:
    """Sums up the matrices of one layer: a linear layer has one, a stack of experts one per expert."""

    def __init__(self, name: str, shape: Iterable[int]) -> None:
        self.name = name
        self.shape = tuple(shape)
        self._format = ""
        self._weights = self._bytes = self._outliers = 0
        self._squared_error: float | None = 0.0
        self._squared_weights = 0.0

    def add(self, packed: PackedWeight, original: torch.Tensor | None = None) -> None:
        """One matrix and, where it is known, what it was before (the same shape, any floating dtype)."""
        count = math.prod(packed.shape)
        self._format = format_name(packed)
        self._weights += count
        self._bytes += packed_bytes(packed)
        squares = error = 0.0
        for begin, values in _slices(packed):
            truth = values if original is None else original_values(original, begin, values.numel())
            squares += _squares(truth)
            error += 0.0 if original is None else _squares(truth - values)
        limit = OUTLIER_RMS * math.sqrt(squares / count)
        for begin, values in _slices(packed):
            truth = values if original is None else original_values(original, begin, values.numel())
            self._outliers += int((truth.abs() > limit).sum())
        self._squared_weights += squares
        self._squared_error = None if original is None or self._squared_error is None else self._squared_error + error

    def report(self) -> LayerReport:
        relative = None
        if self._squared_error is not None:
            relative = math.sqrt(self._squared_error / self._squared_weights) if self._squared_weights else 0.0
        return LayerReport(
            name=self.name,
            format=self._format,
            shape=self.shape,
            weights=self._weights,
            bytes=self._bytes,
            relative_error=relative,
            outlier_share=self._outliers / self._weights,
        )


def measure_layer(name: str, packed: PackedWeight, original: torch.Tensor | None = None) -> LayerReport:
    """The report of one packed weight against its `original` [N, K]; without one there is no error to tell."""
    meter = LayerMeter(name, packed.shape)
    meter.add(packed, original)
    return meter.report()


def measure_stack(name: str, module: PackedExperts, leaf: str, original: torch.Tensor | None = None) -> LayerReport:
    """The report of one packed stack of experts; `original` is the stack as transformers holds it."""
    projection = module.projections[leaf]
    meter = LayerMeter(name, projection.shape)
    originals: Iterable[torch.Tensor | None] = (
        [None] * len(projection.file_names()) if original is None else projection.split(original)
    )
    for packed, matrix in zip(module.matrices(leaf), originals, strict=True):
        meter.add(packed, matrix)
    return meter.report()


def _plan_stack(name: str, projection: Projection, stack: torch.Tensor, config: BitsAndBytesConfig) -> LayerReport:
    """The same for a stack that is not packed yet; one matrix is at a time."""
    meter = LayerMeter(name, projection.shape)
    for matrix in projection.split(stack):
        meter.add(pack_matrix(matrix, config), matrix)
    return meter.report()


def report_model(model: nn.Module, config: BitsAndBytesConfig | None = None) -> Iterator[LayerReport]:
    """One report per quantized layer of a model, or per layer that `config` would quantize in an unquantized one.

    The latter packs one layer at a time and keeps none. A loaded packed model no longer knows its originals: its
    relative errors are None. Layers that keep float16 main weights (llm_int8_has_fp16_weight) have nothing packed.
    """
    kinds = {} if config is None else modules_to_quantize(model, config)
    if config is not None and config.quantize_embeddings:  # a table that several share is one layer
        shared = {name for members in embedding_groups(model).values() for name in members[1:]}
        kinds = {name: kind for name, kind in kinds.items() if name not in shared}
    experts = find_experts(model) if kinds else {}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            if module.is_packed:
                yield measure_layer(name, module.packed_weight())
        elif isinstance(module, PackedExperts):
            for leaf in module.projections:
                yield measure_stack(f"{name}.{leaf}", module, leaf)
        elif name in experts and name in kinds and config is not None:
            for projection in experts[name]:
                original = getattr(module, projection.leaf)
                yield _plan_stack(f"{name}.{projection.leaf}", projection, original, config.for_module(name) or config)
        elif name in kinds and config is not None:
            layer = pack_module(module, kinds[name], config.for_module(name) or config)
            original = module.weight.t() if layer.is_transposed_source else module.weight
            yield measure_layer(name, layer.packed_weight(), original)


def summarize(layers: Iterable[LayerReport]) -> dict[str, Any]:
    """All layers in one: weights and bytes summed, the error and the outlier share over all their weights."""
    layers = list(layers)
    weights = sum(layer.weights for layer in layers)
    total = sum(layer.bytes for layer in layers)
    return {
        "layers": len(layers),
        "weights": weights,
        "bytes": total,
        "bits_per_weight": 8 * total / weights if weights else None,
        "largest_relative_error": max((layer.relative_error or 0.0 for layer in layers), default=None),
        "outlier_share": sum(layer.outlier_share * layer.weights for layer in layers) / weights if weights else None,
    }


def packed_bytes(packed: PackedWeight) -> int:
    """Bytes of codes and statistics."""
    if isinstance(packed, Packed8bit):
        return packed.packed.nbytes + packed.row_absmax.nbytes
    if not isinstance(packed, Packed4bit):
        raise TypeError(f"a {type(packed).__name__} has no known size; accepted are Packed4bit and Packed8bit")
    nested = 0 if packed.nested is None else packed.nested.absmax.nbytes + _FLOAT32_BYTES
    return packed.packed.nbytes + packed.absmax.nbytes + nested


def format_name(packed: PackedWeight) -> str:
    """nf4, fp4, nf4-dq, fp4-dq or int8."""
    if not isinstance(packed, Packed4bit):
        return "int8"
    return packed.quant_type if packed.nested is None else f"{packed.quant_type}-dq"


def value_alignment(packed: PackedWeight) -> int:
    """packed_values can begin at multiples of so many values: whole blocks, or whole rows."""
    return packed.blocksize if isinstance(packed, Packed4bit) else packed.shape[-1]


def packed_values(packed: PackedWeight, begin: int, count: int) -> torch.Tensor:
    """`count` values of a packed matrix from flat position `begin`, a multiple of its value_alignment, in float32.

    Fewer where the matrix ends, and with int8 whole rows: what `count` has beyond them is left out, but for the first.
    """
    if isinstance(packed, Packed4bit):
        size = min(count, math.prod(packed.shape) - begin)
        first = begin // packed.blocksize
        absmax = _absmax(packed, first, first + formats.block_count(size, packed.blocksize))
        codes = packed.codes[begin // 2 : begin // 2 + formats.packed_bytes(size)]
        return ops.dequantize_4bit(codes, absmax, packed.quant_type, packed.blocksize, [size], torch.float32)
    if not isinstance(packed, Packed8bit):
        raise TypeError(f"a {type(packed).__name__} has no known values; accepted are Packed4bit and Packed8bit")
    columns = packed.shape[-1]
    rows = slice(begin // columns, begin // columns + max(1, count // columns))
    return ops.dequantize_8bit(packed.packed[rows], packed.row_absmax[rows], torch.float32).flatten()


def _absmax(packed: Packed4bit, first: int, end: int) -> torch.Tensor:
    """The float32 statistics of some blocks; of a second level only the groups that they lie in are decoded."""
    nested = packed.nested
    if nested is None:
        return packed.absmax[first:end]
    group = first // nested.blocksize
    start = group * nested.blocksize
    groups = nested.absmax[group : -(-end // nested.blocksize)]
    return dataclasses.replace(nested, absmax=groups).decode(packed.absmax[start:end])[first - start :]


def original_values(original: torch.Tensor, begin: int, count: int) -> torch.Tensor:
    """`count` values of a matrix from flat position `begin`, in float32; only the rows they lie in are copied."""
    columns = original.shape[-1]
    first, last = begin // columns, (begin + count - 1) // columns
    rows = original.detach()[first : last + 1].to(torch.float32).reshape(-1)
    offset = begin - first * columns
    return rows[offset : offset + count]


def _slices(packed: PackedWeight) -> Iterator[tuple[int, torch.Tensor]]:
    """The weight's values in float32, flat, with the position of each slice's first value."""
    begin = 0
    while begin < math.prod(packed.shape):
        values = packed_values(packed, begin, _SLICE)
        yield begin, values
        begin += values.numel()


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
