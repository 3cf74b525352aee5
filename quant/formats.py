"""The number formats: code tables, rounding thresholds, block sizes and nibble order, each spelled once for Python.

Not here: how tensors are stored in a checkpoint (state.py) and how values are computed (reference.py, csrc). The same
tables stand once more in csrc/formats.h for C++ and CUDA; tests/quant/test_formats.py compares the two.

4 bits. A tensor is flattened and cut into blocks of `blocksize` values (the last may be short). A block stores its
largest magnitude, absmax (float32), and one code per value; value = table[code] * absmax. Two codes share a byte, the
first one in the high nibble; an odd count ends with the code of zero in the last low nibble:

    values   v0 v1 v2 v3 v4            bytes  [c0<<4 | c1] [c2<<4 | c3] [c4<<4 | zero]

8 bits, blockwise (for absmax itself, "double quantization"): absmax - offset in blocks of 256, through `DYNAMIC_MAP`.
8 bits, rowwise (LLM.int8): value = code * row_absmax / 127.
8 bits of a KV cache: one scale per token and kv head, for the key and for the value each: value = code * scale (kv.py).

Sources: NF4 from QLoRA (arXiv 2305.14314); the FP4 code order, the thresholds and the dynamic map as bitsandbytes
checkpoints use them.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch

BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Values per 4-bit block that the operators accept."""
DEFAULT_BLOCKSIZE: Final = 64
NESTED_BLOCKSIZE: Final = 256
"""Absmax values per block of the second level; readers accept any positive number, writers use this one."""
HIGH_NIBBLE_SHIFT: Final = 4
"""The first of two codes in a byte is shifted left by this; the second stays in the low bits."""
INT8_MAX: Final = 127
"""The code of +absmax in an int8 row; -128 is never written."""
ACTIVATION_GROUP: Final = 64
"""Columns of a row of activations that are rounded to int8 together."""
VALUE_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of values that operators take and give."""
STORE_DTYPES: Final = (*VALUE_DTYPES, torch.int8)
"""The dtypes in which a cache keeps keys and values."""
SMALLEST_STORED: Final = 2.0**-64
"""A head of a key or value in int8 whose magnitudes are all smaller is kept as zeros: no scale is subnormal."""


@dataclasses.dataclass(frozen=True)
class FourBitFormat:
    """One 4-bit format.

    A normalised value v in [-1, 1] is ranked: the number of `thresholds` that it exceeds strictly. A sign-and-magnitude
    format (`signed_magnitude`) ranks |v| and sets the sign bit 8 where v < 0; `code_of_rank` gives the code.
    """

    name: str
    table: tuple[float, ...]  # [16] value of each code, as a float32
    thresholds: tuple[float, ...]  # ascending
    code_of_rank: tuple[int, ...]  # [len(thresholds) + 1]
    signed_magnitude: bool
    int8_unit: int
    """The int8 code of 1, where the table itself is rounded to int8: up to 127, what gives normally distributed weights
    the smallest squared error."""

    @property
    def int8_table(self) -> tuple[int, ...]:
        """The int8 code of each code."""
        return tuple(round(value * self.int8_unit) for value in self.table)

    @property
    def int8_step(self) -> float:
        """What such a code times an int8 code of an activation stands for, times both maxima; used as a float32."""
        return 1.0 / (INT8_MAX * self.int8_unit)

    @property
    def zero_code(self) -> int:
        """The code that zero gets; it fills the last low nibble of an odd count."""
        return self.code_of_rank[0 if self.signed_magnitude else sum(t < 0.0 for t in self.thresholds)]


# fmt: off
_NF4_TABLE: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
_NF4_THRESHOLDS: Final = (  # the float32 midpoints; four lie halfway between two float32 and are rounded to even
    -0.8480963706970215, -0.6106328964233398, -0.4599952697753906, -0.33967941999435425, -0.23460739850997925,
    -0.13791173696517944, -0.045525018125772476, 0.03979014977812767, 0.120255246758461, 0.2035212516784668,
    0.2920137643814087, 0.3893125355243683, 0.5016634464263916, 0.6427869200706482, 0.8614784479141235,
)
_FP4_MAGNITUDES: Final = (  # by code, not by size
    0.0, 0.005208333488553762, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
)
# fmt: on

NF4: Final = FourBitFormat(
    name="nf4",
    table=_NF4_TABLE,
    thresholds=_NF4_THRESHOLDS,
    code_of_rank=tuple(range(16)),
    signed_magnitude=False,
    int8_unit=112,
)
FP4: Final = FourBitFormat(
    name="fp4",
    table=_FP4_MAGNITUDES + tuple(0.0 - m for m in _FP4_MAGNITUDES),  # code 8 is +0 too, as quant_map says
    thresholds=(0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333),
    code_of_rank=(0, 1, 6, 7, 4, 5, 2, 3),
    signed_magnitude=True,
    int8_unit=120,
)

FOUR_BIT: Final[dict[str, FourBitFormat]] = {NF4.name: NF4, FP4.name: FP4}
"""The 4-bit formats by name (`quant_type`)."""

# The positive magnitudes of the dynamic 8-bit map: decade i (of 7) holds the midpoints of 2^i equal steps from 0.1 to
# 1, times 10^(i-6). Written out because the last bit depends on how a library rounds its linspace.
# fmt: off
_DYNAMIC_MAGNITUDES: Final = (
    5.5000004e-07,
    3.2500002e-06, 7.75e-06,
    2.1249998e-05, 4.375e-05, 6.625e-05, 8.875e-05,
    0.00015625001, 0.00026875004, 0.00038125002, 0.00049375003, 0.0006062501, 0.00071875006, 0.00083125,
    0.0009437501,
    0.0012812499, 0.00184375, 0.00240625, 0.00296875, 0.0035312497, 0.00409375, 0.0046562497, 0.0052187503,
    0.00578125, 0.00634375, 0.00690625, 0.00746875, 0.00803125, 0.00859375, 0.009156249, 0.00971875,
    0.01140625, 0.01421875, 0.01703125, 0.019843752, 0.02265625, 0.02546875, 0.028281251, 0.03109375, 0.03390625,
    0.036718752, 0.03953125, 0.042343747, 0.04515625, 0.04796875, 0.05078125, 0.05359375, 0.05640625, 0.059218753,
    0.06203125, 0.06484375, 0.067656256, 0.070468746, 0.07328125, 0.07609375, 0.07890625, 0.08171876, 0.08453125,
    0.08734375, 0.09015625, 0.092968754, 0.09578126, 0.09859375,
    0.107031256, 0.12109375, 0.13515624, 0.14921875, 0.16328125, 0.17734376, 0.19140625, 0.20546874, 0.21953125,
    0.23359375, 0.24765624, 0.26171875, 0.27578127, 0.28984374, 0.30390626, 0.31796873, 0.33203125, 0.34609374,
    0.36015624, 0.37421876, 0.38828123, 0.40234375, 0.41640624, 0.43046874, 0.44453126, 0.45859373, 0.47265625,
    0.4867187, 0.50078124, 0.5148437, 0.5289062, 0.54296875, 0.5570313, 0.5710938, 0.58515626, 0.5992187, 0.61328125,
    0.6273438, 0.6414063, 0.65546876, 0.6695312, 0.68359375, 0.6976563, 0.7117188, 0.72578126, 0.7398437, 0.75390625,
    0.7679688, 0.78203124, 0.79609376, 0.8101562, 0.82421875, 0.8382813, 0.85234374, 0.86640626, 0.8804687,
    0.89453125, 0.9085938, 0.92265624, 0.93671876, 0.9507812, 0.96484375, 0.9789063, 0.99296874,
)
# fmt: on
DYNAMIC_MAP: Final = (*(-m for m in reversed(_DYNAMIC_MAGNITUDES)), 0.0, *_DYNAMIC_MAGNITUDES, 1.0)
"""[256] ascending values of the dynamic 8-bit codes; -1 is missing, as in every checkpoint."""


def _constant(values: tuple[float, ...]) -> torch.Tensor:
    """A float32 tensor that stays an ordinary CPU tensor whatever mode or default device this module is imported in."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device="cpu")


CODE_TABLES: Final[dict[str, torch.Tensor]] = {name: _constant(f.table) for name, f in FOUR_BIT.items()}
"""float32 [16] per quant_type; shared, never written to."""
DYNAMIC_TABLE: Final = _constant(DYNAMIC_MAP)
"""float32 [256]; shared, never written to."""
with torch.inference_mode(False):
    DYNAMIC_MIDPOINTS: Final = (DYNAMIC_TABLE[:-1] + DYNAMIC_TABLE[1:]) * 0.5
"""float32 [255]: a value gets as its code the number of midpoints that it exceeds."""


def packed_bytes(count: int) -> int:
    """Bytes that `count` 4-bit codes take."""
    return (count + 1) // 2


def block_count(count: int, blocksize: int) -> int:
    """Blocks that `count` values make; the last may be short."""
    return -(-count // blocksize)
