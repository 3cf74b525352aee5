"""Operands for the operator tests: shapes that are odd in every way, hostile values, fresh seeds.

Not a test. A failing test prints its seed, since pytest shows what `fresh_generator` printed.
"""

from __future__ import annotations

import dataclasses

import torch

from quant import formats, reference

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
class Paged:
    """Sequences in a paged cache: blocks in random order, NaN wherever no row looks, and table entries of nonsense."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def random(
        cls,
        sequences: list[tuple[int, int]],
        heads: tuple[int, int],
        dims: tuple[int, int],
        block_tokens: int,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> Paged:
        """sequences: (first position, rows) each; heads: H and G; dims: D and E."""
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
        return cls(query.to(dtype), keys.to(dtype), values.to(dtype), tables, rows.cumsum(0), starts)

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """What paged_attention takes before its options."""
        return (self.query, self.keys, self.values, self.tables, self.offsets, self.starts)

    def exact(self, scale: float, window: int, softcap: float, sinks: torch.Tensor | None) -> torch.Tensor:
        """The result in float64, one sequence at a time."""
        found = []
        size, kv_heads = self.keys.shape[1:3]
        bounds = self.offsets.tolist()
        for table, begin, end, start in zip(self.tables, bounds, bounds[1:], self.starts.tolist(), strict=False):
            rows = torch.arange(start, start + end - begin)
            seen = torch.arange(max(0, start - window + 1) if window else 0, start + end - begin)
            key, value = (store[table[seen // size], seen % size].double() for store in (self.keys, self.values))
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
