"""Operands for the operator tests: shapes that are odd in every way, hostile values, fresh seeds.

Not a test. A failing test prints its seed, since pytest shows what `fresh_generator` printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from quant import formats, kv, ops, reference

SHAPES = [(1, 1), (1, 64), (7, 33), (5, 129), (64, 96), (3, 4100), (33, 250), (160, 288)]
"""[N, K] with N = 1, K % blocksize != 0, N*K odd, blocks that cross rows, one short block."""


def fresh_generator() -> torch.Generator:
    """A generator with a new seed in every run."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator


def hostile_values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal values with a block of zeros, negative zeros, subnormals and a large outlier among them."""
    x = torch.randn(shape, generator=generator)
    flat = x.view(-1)
    if flat.numel() > 300:
        flat[64:128] = 0.0
        flat[130] = -0.0
        flat[128:160] *= 1e-41
        flat[200] = 1000.0
    return x.to(dtype)


Linear4 = Callable[[torch.Tensor, "Weight4", torch.Tensor | None], torch.Tensor]
"""x, weight, bias -> the product."""


@dataclasses.dataclass(frozen=True)
class Weight4:
    """A 4-bit weight with random codes and absmax, some negative."""

    packed: torch.Tensor
    absmax: torch.Tensor  # float32, or uint8 with the two below
    quant_type: str
    blocksize: int
    shape: list[int]
    nested_absmax: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    nested_blocksize: int = formats.NESTED_BLOCKSIZE

    @classmethod
    def random(
        cls, shape: tuple[int, int], quant_type: str, blocksize: int, nested: int | None, generator: torch.Generator
    ) -> Weight4:
        """Any bytes are valid codes. `nested` is the second level's block size or None."""
        count = shape[0] * shape[1]
        packed = torch.randint(0, 256, (formats.packed_bytes(count),), generator=generator, dtype=torch.uint8)
        absmax = torch.randn(formats.block_count(count, blocksize), generator=generator)
        if nested is None:
            return cls(packed, absmax, quant_type, blocksize, list(shape))
        codes, nested_absmax, offset = reference.quantize_absmax(absmax, nested)
        return cls(packed, codes, quant_type, blocksize, list(shape), nested_absmax, offset, nested)

    def arguments(self, bias: torch.Tensor | None = None) -> tuple[object, ...]:
        """What linear_4bit takes after x."""
        layout = (self.packed, self.absmax, self.quant_type, self.blocksize, self.shape)
        return (*layout, self.nested_absmax, self.offset, self.nested_blocksize, bias)

    def plain_absmax(self) -> torch.Tensor:
        """float32 absmax."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        return reference.dequantize_absmax(self.absmax, self.nested_absmax, self.offset, self.nested_blocksize)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the codes stand for, by the reference."""
        return reference.dequantize_4bit(
            self.packed, self.plain_absmax(), self.quant_type, self.blocksize, self.shape, dtype
        )

    def to(self, device: str) -> Weight4:
        """The same weight on another device."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True)
class Experts4:
    """The 4-bit matrices [E][P] of experts, alike in everything but their values, and the rows that each expert has."""

    matrices: list[list[Weight4]]
    ends: torch.Tensor
    padding: int  # bytes behind a matrix's codes

    @classmethod
    def random(
        cls,
        rows: Sequence[int],
        matrices: int,
        shape: tuple[int, int],
        quant_type: str,
        blocksize: int,
        nested: int | None,
        generator: torch.Generator,
        padding: int = 0,
    ) -> Experts4:
        """rows: of each expert. The rest as for Weight4."""
        made = [
            [Weight4.random(shape, quant_type, blocksize, nested, generator) for _ in range(matrices)] for _ in rows
        ]
        return cls(made, torch.tensor(rows, dtype=torch.int64).cumsum(0), padding)

    def arguments(self, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
        """What linear_4bit_experts takes after x."""
        first = self.matrices[0][0]
        packed = torch.nn.functional.pad(self._stacked("packed"), (0, self.padding), value=0xEE)
        nested = [None if first.offset is None else self._stacked(name) for name in ("nested_absmax", "offset")]
        layout = (packed, self._stacked("absmax"), first.quant_type, first.blocksize, first.shape)
        return (self.ends, *layout, *nested, first.nested_blocksize, bias)

    def _stacked(self, field: str) -> torch.Tensor:
        return torch.stack([torch.stack([getattr(w, field) for w in expert]) for expert in self.matrices])

    def one_by_one(self, x: torch.Tensor, bias: torch.Tensor | None, linear: Linear4) -> torch.Tensor:
        """The same result by products with one matrix after another; rows behind the last end give zeros."""
        height = self.matrices[0][0].shape[0]
        out = x.new_zeros(len(x), len(self.matrices[0]) * height)
        bounds = [0, *self.ends.tolist()]
        for expert, weights in enumerate(self.matrices):
            rows = slice(bounds[expert], bounds[expert + 1])
            for index, weight in enumerate(weights):
                columns = slice(index * height, (index + 1) * height)
                if rows.stop > rows.start:
                    own = None if bias is None else bias[expert, columns]
                    out[rows, columns] = linear(x[rows], weight, own)
        return out


@dataclasses.dataclass(frozen=True)
class Operands8:
    """A product with an int8 weight, any code among them: x [M, K], CB [N, K], SCB and bias [N]."""

    x: torch.Tensor
    CB: torch.Tensor
    SCB: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def random(
        cls, shape: tuple[int, int], rows: int, dtype: torch.dtype, scale: float, generator: torch.Generator
    ) -> Operands8:
        CB = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        x = (torch.randn(rows, shape[1], generator=generator) * scale).to(dtype)
        return cls(x, CB, torch.rand(shape[0], generator=generator), torch.randn(shape[0], generator=generator))

    def multiply(self, device: str, threshold: float, outliers: str) -> torch.Tensor:
        x, CB, SCB, bias = (tensor.to(device) for tensor in (self.x, self.CB, self.SCB, self.bias))
        return ops.linear_8bit(x, CB, SCB, threshold, outliers, bias).cpu()

    def reference(self, threshold: float, outliers: str) -> torch.Tensor:
        return reference.linear_8bit(self.x, self.CB, self.SCB, threshold, outliers, self.bias)

    def shifted(self) -> Iterator[Operands8]:
        """The same with x, then with the codes, at an address that no wide copy can be made from."""
        for name in ("x", "CB"):
            values: torch.Tensor = getattr(self, name)
            moved = torch.cat([values.new_zeros(1), values.view(-1)])[1:].view(values.shape)
            yield dataclasses.replace(self, **{name: moved})


@dataclasses.dataclass(frozen=True)
class Experts8:
    """Rows x [M, K] sorted by expert and the int8 matrices of experts, any code among them: CB [E, N, K], SCB and bias
    [E, N]."""

    x: torch.Tensor
    ends: torch.Tensor
    CB: torch.Tensor
    SCB: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def random(
        cls, rows: Sequence[int], shape: tuple[int, int], behind: int, dtype: torch.dtype, generator: torch.Generator
    ) -> Experts8:
        """rows: of each expert; behind: of none."""
        experts, (N, K) = len(rows), shape
        CB = torch.randint(-128, 128, (experts, N, K), generator=generator, dtype=torch.int8)
        x = torch.randn(sum(rows) + behind, K, generator=generator).to(dtype)
        ends = torch.tensor(rows, dtype=torch.int64).cumsum(0)
        SCB, bias = torch.rand(experts, N, generator=generator), torch.randn(experts, N, generator=generator)
        return cls(x, ends, CB, SCB, bias)

    def arguments(self, threshold: float, outliers: str, with_bias: bool = True) -> tuple[Any, ...]:
        """What linear_8bit_experts takes."""
        return (self.x, self.ends, self.CB, self.SCB, threshold, outliers, self.bias if with_bias else None)

    def multiply(self, device: str, threshold: float, outliers: str, with_bias: bool = True) -> torch.Tensor:
        given = self.arguments(threshold, outliers, with_bias)
        moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in given]
        return ops.linear_8bit_experts(*moved).cpu()

    def reference(self, threshold: float, outliers: str, with_bias: bool = True) -> torch.Tensor:
        return reference.linear_8bit_experts(*self.arguments(threshold, outliers, with_bias))


@dataclasses.dataclass(frozen=True)
class Paged:
    """Sequences in a paged cache: blocks in random order, NaN wherever no row looks, and table entries of nonsense.

    In int8 that NaN is the scale of codes that are anything.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def random(
        cls,
        sequences: list[tuple[int, int]],
        heads: tuple[int, int],
        dims: tuple[int, int],
        block_tokens: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        store_dtype: torch.dtype | None = None,
    ) -> Paged:
        """sequences: (first position, rows) each; heads: H and G; dims: D and E; the cache's dtype if it is another."""
        blocks = [-(-(start + rows) // block_tokens) for start, rows in sequences]
        free = torch.randperm(sum(blocks) + 3, generator=generator).tolist()
        shape = (len(free), block_tokens, heads[1])
        keys, values = (torch.full((*shape, dim), torch.nan) for dim in dims)
        tables = torch.full((len(sequences), max(blocks) + 2), 2**40)
        for which, (start, rows) in enumerate(sequences):
            for index in range(blocks[which]):
                tables[which, index] = block = free.pop()
                filled = min(block_tokens, start + rows - index * block_tokens)
                for store in (keys, values):
                    store[block, :filled] = torch.randn(filled, *store.shape[2:], generator=generator)
        rows = torch.tensor([0] + [rows for _, rows in sequences])
        query = torch.randn(heads[0], int(rows.sum()), dims[0], generator=generator).transpose(0, 1) * 2
        starts = torch.tensor([start for start, _ in sequences])
        tensors = (tables, rows.cumsum(0), starts)
        if store_dtype != torch.int8:
            return cls(query.to(dtype), *(store.to(store_dtype or dtype) for store in (keys, values)), *tensors, None)
        coded, scales = zip(*(kv.quantize_heads(store) for store in (keys, values)), strict=True)
        for codes, of_heads in zip(coded, scales, strict=True):
            anything = torch.randint(-128, 128, codes.shape, generator=generator, dtype=torch.int8)
            codes[of_heads.isnan()] = anything[of_heads.isnan()]
        return cls(query.to(dtype), *coded, *tensors, torch.stack(scales, dim=-1))

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """What paged_attention takes before its options."""
        return (self.query, self.keys, self.values, self.tables, self.offsets, self.starts)

    def on(self, device: str) -> tuple[torch.Tensor, ...]:
        """The same on another device."""
        return tuple(tensor.to(device) for tensor in self.arguments())

    def scales_on(self, device: str) -> torch.Tensor | None:
        return None if self.scales is None else self.scales.to(device)

    def stores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as what they stand for, in float64."""
        if self.scales is None:
            return self.keys.double(), self.values.double()
        keys, values = (
            x.double() * self.scales[..., i : i + 1].double() for i, x in enumerate((self.keys, self.values))
        )
        return keys, values

    def exact(self, scale: float, window: int, softcap: float, sinks: torch.Tensor | None) -> torch.Tensor:
        """The result in float64, one sequence at a time."""
        found = []
        size, kv_heads = self.keys.shape[1:3]
        stores = self.stores()
        bounds = self.offsets.tolist()
        for table, begin, end, start in zip(self.tables, bounds, bounds[1:], self.starts.tolist(), strict=False):
            rows = torch.arange(start, start + end - begin)
            seen = torch.arange(max(0, start - window + 1) if window else 0, start + end - begin)
            key, value = (store[table[seen // size], seen % size] for store in stores)
            query = self.query[begin:end].double().reshape(end - begin, kv_heads, -1, self.query.shape[2])
            scores = torch.einsum("rgjd,kgd->rgjk", query, key) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            distance = rows[:, None, None, None] - seen
            scores = scores.masked_fill((distance < 0) | (distance >= (window or len(seen) + start)), -torch.inf)
            if sinks is not None:
                share = sinks.double().view(1, kv_heads, -1, 1).expand(end - begin, -1, -1, -1)
                scores = torch.cat([scores, share], dim=-1)
            weights = torch.softmax(scores, dim=-1)[..., : len(seen)]
            found.append(torch.einsum("rgjk,kge->rgje", weights, value).flatten(1, 2))
        return torch.cat(found)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes, dtypes and bytes; any NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        nan = a.isnan()
        if not torch.equal(nan, b.isnan()):
            return False
        a, b = a.masked_fill(nan, 0), b.masked_fill(nan, 0)
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
