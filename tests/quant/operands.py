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
