"""The operators as torch sees them: torch.library schemas, and the functions that are the way to call them.

Namespace `halfbyte`. What a call does is in op_kernels.py, what flows back in op_gradients.py.

Not here: layers, checkpoints, choosing between kernels (each operator has one per device).
Letters: N = output features, K = input features, B = blocks. Packed tensors are flat uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

import torch

from quant import formats, op_gradients, op_kernels

_LIBRARY: Final = torch.library.Library("halfbyte", "DEF")  # type: ignore[no-untyped-call]

_STATISTICS: Final = "Tensor? nested_absmax, Tensor? offset, int nested_blocksize, Tensor? bias"
_SCHEMAS: Final = (
    "quantize_4bit(Tensor x, str quant_type, int blocksize) -> (Tensor, Tensor)",
    "encode_4bit(Tensor x, Tensor scales, str quant_type, int blocksize) -> Tensor",
    "search_scales_4bit(Tensor x, str quant_type, int blocksize) -> Tensor",
    "dequantize_4bit(Tensor packed, Tensor absmax, str quant_type, int blocksize, SymInt[] shape, ScalarType dtype)"
    " -> Tensor",
    "quantize_absmax(Tensor absmax, int nested_blocksize) -> (Tensor, Tensor, Tensor)",
    "dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor offset, int nested_blocksize) -> Tensor",
    "linear_4bit(Tensor x, Tensor packed, Tensor absmax, str quant_type, int blocksize, SymInt[] shape,"
    f" {_STATISTICS}) -> Tensor",
    "linear_4bit_int8(Tensor x, Tensor packed, Tensor absmax, str quant_type, int blocksize, SymInt[] shape,"
    f" {_STATISTICS}) -> Tensor",
    "linear_4bit_experts(Tensor x, Tensor ends, Tensor packed, Tensor absmax, str quant_type, int blocksize,"
    f" SymInt[] shape, {_STATISTICS}) -> Tensor",
    "quantize_8bit(Tensor w) -> (Tensor, Tensor)",
    "dequantize_8bit(Tensor CB, Tensor SCB, ScalarType dtype) -> Tensor",
    "linear_8bit(Tensor x, Tensor CB, Tensor SCB, float threshold, str outliers, Tensor? bias) -> Tensor",
    "linear_8bit_experts(Tensor x, Tensor ends, Tensor CB, Tensor SCB, float threshold, str outliers, Tensor? bias)"
    " -> Tensor",
    "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor tables, Tensor offsets, Tensor starts,"
    " float scale, int window, float softcap, Tensor? sinks, Tensor? scales) -> Tensor",
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "argmax(Tensor x) -> Tensor",
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    "rotary(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    "cache_write(Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor(c!)? scales) -> ()",
)
NAMES: Final = tuple(schema.partition("(")[0] for schema in _SCHEMAS)
"""The operators, for tests that go over all of them."""


def quantize_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blockwise 4-bit quantization of the flattened `x`.

    x: any shape, n values, float32 / float16 / bfloat16. quant_type: "nf4" or "fp4". blocksize: one of
    formats.BLOCKSIZES. Returns packed codes uint8 [ceil(n/2)] and absmax float32 [ceil(n/blocksize)]. A block of zeros
    gets the code of zero and absmax 0; a block with a NaN or an infinity has that as its absmax. Raises ShapeError.
    """
    return cast(tuple[torch.Tensor, torch.Tensor], torch.ops.halfbyte.quantize_4bit(x, quant_type, blocksize))


def encode_4bit(x: torch.Tensor, scales: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    """Codes of the flattened `x` at scales that are given: what quantize_4bit gives where they are its absmax.

    x: as for quantize_4bit. scales: float32 [ceil(n/blocksize)], of either sign; a block whose scale is 0 gets the code
    of zero. Returns packed codes uint8 [ceil(n/2)]. Raises ShapeError.
    """
    return cast(torch.Tensor, torch.ops.halfbyte.encode_4bit(x, scales, quant_type, blocksize))


def search_scales_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    """The scale of each block, of either sign, with the smallest squared error that a search finds.

    x: as for quantize_4bit. Returns float32 [ceil(n/blocksize)] for encode_4bit, in the place of quantize_4bit's
    absmax, which it is where nothing better is found and where a block holds a NaN or an infinity. Every device gives
    the same bits. Raises ShapeError.
    """
    return cast(torch.Tensor, torch.ops.halfbyte.search_scales_4bit(x, quant_type, blocksize))


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Values of 4-bit codes, bit for bit what bitsandbytes gives: dtype(float32 table[code] * float32 absmax).

    packed: uint8 [ceil(n/2)]; absmax: float32 [ceil(n/blocksize)]; shape: n values. Returns `shape` in `dtype`
    (float32 / float16 / bfloat16). Raises ShapeError.
    """
    return cast(
        torch.Tensor, torch.ops.halfbyte.dequantize_4bit(packed, absmax, quant_type, blocksize, list(shape), dtype)
    )


def quantize_absmax(
    absmax: torch.Tensor, nested_blocksize: int = formats.NESTED_BLOCKSIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization of absmax.

    absmax: float32 [B]. Returns codes uint8 [B], nested_absmax float32 [ceil(B/nested_blocksize)] and the offset, a
    float32 without dimensions (the mean of absmax). Raises ShapeError.
    """
    result = torch.ops.halfbyte.quantize_absmax(absmax, nested_blocksize)
    return cast(tuple[torch.Tensor, torch.Tensor, torch.Tensor], result)


def dequantize_absmax(
    codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    offset: torch.Tensor,
    nested_blocksize: int = formats.NESTED_BLOCKSIZE,
) -> torch.Tensor:
    """float32 [B] from double-quantized absmax, the product and the sum each rounded. Raises ShapeError."""
    return cast(torch.Tensor, torch.ops.halfbyte.dequantize_absmax(codes, nested_absmax, offset, nested_blocksize))


def linear_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    nested_absmax: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    nested_blocksize: int = formats.NESTED_BLOCKSIZE,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer on a 4-bit weight of `shape` [N, K], which is never built.

    x: [..., K] float32 / float16 / bfloat16. absmax: float32 [B], or uint8 [B] with nested_absmax and offset when it is
    double-quantized. bias: [N], any of the three dtypes. Returns [..., N] in x's dtype: float32 sums of exact float32
    weights, bias added in float32, rounded once. A row's result does not depend on the other rows, and on their number
    only as `native.set_batch_invariant` allows.
    Gradients flow to x and bias. Raises ShapeError.
    """
    return cast(
        torch.Tensor,
        torch.ops.halfbyte.linear_4bit(
            x, packed, absmax, quant_type, blocksize, list(shape), nested_absmax, offset, nested_blocksize, bias
        ),
    )


def linear_4bit_int8(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    nested_absmax: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    nested_blocksize: int = formats.NESTED_BLOCKSIZE,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """linear_4bit with both sides rounded to int8: faster on a CPU, and less accurate.

    Arguments and result as there. Each row of x is rounded in groups of formats.ACTIVATION_GROUP columns against the
    group's largest magnitude, and the weight's table is rounded to int8. Their products are exact; times absmax and the
    group's scale in float32 they are added up in the order of the columns, each operation rounded, so that every level
    and the reference give the same bits. A group with a NaN or an infinity makes its row NaN; values below 1e-36 count
    as zeros where nothing in their group is larger. A row's result does not depend on the other rows. Gradients flow to
    x and bias as if nothing had been rounded. Raises ShapeError.
    """
    return cast(
        torch.Tensor,
        torch.ops.halfbyte.linear_4bit_int8(
            x, packed, absmax, quant_type, blocksize, list(shape), nested_absmax, offset, nested_blocksize, bias
        ),
    )


def linear_4bit_experts(
    x: torch.Tensor,
    ends: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    nested_absmax: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    nested_blocksize: int = formats.NESTED_BLOCKSIZE,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows sorted by expert times the 4-bit matrices of their experts, side by side: a grouped matmul in one call.

    x: [M, K] float32 / float16 / bfloat16. ends: int64 [E], rising from 0 to M: expert e has the rows up to ends[e]
    that no expert before it has; rows behind the last end give zeros. packed: uint8 [E, P, at least ceil(N K / 2)], the
    codes of P matrices of `shape` [N, K] (P at most native.MAX_GROUP). absmax: float32 [E, P, B], or uint8 [E, P, B]
    with nested_absmax float32 [E, P, ceil(B / nested_blocksize)] and offset float32 [E, P]. bias: [E, P N].
    Returns [M, P N] in x's dtype, for each expert and matrix what linear_4bit gives, bit for bit on one device where
    the kernel for Hopper is not asked for. An expert without rows is not touched. Gradients flow to x and bias. Raises
    ShapeError; NativeError where ends are on a CPU and fall or leave x (on CUDA nothing waits for them: such ends give
    some rows wrong values).
    """
    return cast(
        torch.Tensor,
        torch.ops.halfbyte.linear_4bit_experts(
            x, ends, packed, absmax, quant_type, blocksize, list(shape), nested_absmax, offset, nested_blocksize, bias
        ),
    )


def quantize_8bit(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rowwise int8 quantization of a weight, as LLM.int8() checkpoints have it.

    w: [N, K] float32 / float16 / bfloat16; values pass through float16 first, as bitsandbytes does, except those that
    would become infinite there, which stay as they are. Returns CB int8 [N, K] and SCB float32 [N], the row maxima
    (not divided by 127). A row of zeros gets zeros. Raises ShapeError.
    """
    return cast(tuple[torch.Tensor, torch.Tensor], torch.ops.halfbyte.quantize_8bit(w))


def dequantize_8bit(CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dtype(CB * SCB / 127), computed in float32. CB: int8 [N, K]; SCB: float32 [N]. Raises ShapeError."""
    return cast(torch.Tensor, torch.ops.halfbyte.dequantize_8bit(CB, SCB, dtype))


def linear_8bit(
    x: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float,
    outliers: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer on an int8 weight: LLM.int8().

    x: [..., K] float32 / float16 / bfloat16, not passed through float16. CB: int8 [N, K]; SCB: float32 [N].
    Activations with |x| >= threshold (0: none) are outliers and meet the dequantized weight in float32, added up in
    column order; the others are rounded to int8 against their row's largest ordinary value and multiplied exactly.
    outliers: "value" decides for each value alone, so that rows do not see each other; "batch" takes every column that
    holds an outlier in any row, as bitsandbytes does; "all" rounds no activation, whatever the threshold: the weight
    alone is in 8 bits, and float32 sums are in an order of the kernel's own. bias: [N]. Returns [..., N] in x's dtype,
    rounded once. Gradients flow to x and bias. Raises ShapeError.
    """
    return cast(torch.Tensor, torch.ops.halfbyte.linear_8bit(x, CB, SCB, threshold, outliers, bias))


def linear_8bit_experts(
    x: torch.Tensor,
    ends: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float,
    outliers: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows sorted by expert times the int8 matrix of their expert: a grouped matmul in one call.

    x: [M, K] float32 / float16 / bfloat16. ends: int64 [E], as for linear_4bit_experts. CB: int8 [E, N, K]; SCB:
    float32 [E, N]; several matrices of an expert are one, row under row. threshold and outliers: as for linear_8bit,
    "batch" over the rows of one expert. bias: [E, N]. Returns [M, N] in x's dtype, for each expert what linear_8bit
    gives, bit for bit on one device; rows behind the last end give zeros. An expert without rows is not touched.
    Gradients flow to x and bias. Raises ShapeError; NativeError where ends are on a CPU and fall or leave x (on CUDA
    nothing waits for them: such ends give some rows wrong values).
    """
    return cast(torch.Tensor, torch.ops.halfbyte.linear_8bit_experts(x, ends, CB, SCB, threshold, outliers, bias))


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    offsets: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a packed batch over a paged cache that holds the batch's own keys and values already.

    query: [T, H, D] float32 / float16 / bfloat16, any strides. keys: [blocks, block_tokens, G, D] and values:
    [blocks, block_tokens, G, E], of one dtype, float32 / float16 / bfloat16, or int8 with scales: float32 [blocks,
    block_tokens, G, 2], as cache_write makes them. Head h reads kv head h // (H // G). Sequence s owns rows offsets[s]
    to offsets[s + 1] (int64 [S + 1]), the first of them at position starts[s] (int64 [S]), and its position p lies in
    block tables[s, p // block_tokens] (int64 [S, n]); entries of positions that no row sees may hold anything. A row
    sees the positions up to its own, or the last `window` of them. softcap c turns a score x into c * tanh(x / c);
    0 for none. sinks: [H], one more score per head that takes its share and gives nothing. Returns [T, H, E] in
    query's dtype. A row's result does not depend on other rows or sequences, nor, as long as its own sequence's values
    are finite, on how a prompt was cut into chunks. No gradients. Raises ShapeError; NativeError where the tables name
    a block that is not there. On CUDA, which reads tables on the device alone, the rows that see such a block become
    NaN instead.
    """
    return cast(
        torch.Tensor,
        torch.ops.halfbyte.paged_attention(
            query, keys, values, tables, offsets, starts, scale, window, softcap, sinks, scales
        ),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square normalisation over the last dimension, rounded as Llama's is.

    x: [..., K] float32 / float16 / bfloat16; weight: [K] in x's dtype. x / sqrt(mean(x^2) + eps) in float32, rounded to
    x's dtype, then times weight. Returns x's shape and dtype. A row does not depend on others. No gradients. Raises
    ShapeError.
    """
    return cast(torch.Tensor, torch.ops.halfbyte.rms_norm(x, weight, eps))


def argmax(x: torch.Tensor) -> torch.Tensor:
    """The place of the greatest value over the last dimension, the first of equals.

    x: [..., K] float32 / float16 / bfloat16. Returns int64 [...]: -1 where the greatest value is not finite or a value
    is NaN, and for K = 0. No gradients. Raises ShapeError.
    """
    return cast(torch.Tensor, torch.ops.halfbyte.argmax(x))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, silu computed in float32 and rounded to the dtype before it is multiplied.

    gate, up: one shape and dtype, float32 / float16 / bfloat16; so is the result. No gradients. Raises ShapeError.
    """
    return cast(torch.Tensor, torch.ops.halfbyte.swiglu(gate, up))


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embeddings of queries and keys, with transformers' own rounding, bit for bit.

    query: [T, H, D], key: [T, G, D], cos, sin: [T, D], all float32 / float16 / bfloat16; D is even. x * cos + y * sin,
    where y is x with its halves exchanged and the first then negated; products and sum are rounded to the dtype.
    Returns two new tensors. No gradients. Raises ShapeError. (RoFormer, Su et al. 2021, as GPT-NeoX and Llama have it.)
    """
    return cast(tuple[torch.Tensor, torch.Tensor], torch.ops.halfbyte.rotary(query, key, cos, sin))


def cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """New rows of keys and values to their places in a paged cache, which is changed.

    key: [T, G, D], value: [T, G, E], float32 / float16 / bfloat16; keys: [blocks, block_tokens, G, D] and values:
    [.., E], contiguous, of one dtype, which rows are rounded to: one of those, or int8 with scales: contiguous float32
    [blocks, block_tokens, G, 2], where each head's scale goes, the key's and the value's (quant/kv.py says how). slots:
    int64 [T], block * block_tokens + place, all different unless their rows are equal. A row whose slot is not in the
    cache is left out. No gradients. Raises ShapeError.
    """
    torch.ops.halfbyte.cache_write(key, value, keys, values, slots, scales)


def _register() -> None:
    """Schemas, kernels for every backend (op_kernels.py chooses by device), fakes, gradients."""
    for schema in _SCHEMAS:
        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    for name in NAMES:
        _LIBRARY.impl(name, op_kernels.call_of(name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"halfbyte::{name}", op_kernels.fake_of(name), lib=_LIBRARY)
    for name in op_gradients.DIFFERENTIABLE:
        backward, setup = (getattr(op_gradients, f"{part}_{name}") for part in ("backward", "setup"))
        torch.library.register_autograd(f"halfbyte::{name}", backward, setup_context=setup, lib=_LIBRARY)


_register()
