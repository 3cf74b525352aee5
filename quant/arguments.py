"""Checks of operator arguments: what does not belong together is refused before any kernel sees a pointer.

Not a dispatcher: op_kernels.py calls these before a kernel, and before it tells what one would give. Every function
raises ShapeError with one sentence that names the argument, its value and what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from quant import formats
from quant.errors import ShapeError

OUTLIER_RULES = ("value", "batch", "all")
"""Who decides that an activation is an outlier of LLM.int8(): the value alone, or its column over all rows; or all of
them are, so that none is rounded and the weight alone is in 8 bits."""

ACTIVATIONS = ("float", "int8")
"""What activations are when they meet a 4-bit weight: values, or rounded to int8 in groups of a row's columns."""


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Values that operators compute with: float32, float16 or bfloat16."""
    if tensor.dtype not in formats.VALUE_DTYPES:
        raise ShapeError(f"{name} has dtype {tensor.dtype}; accepted are float32, float16 and bfloat16.")


def check_value_dtype(dtype: torch.dtype) -> None:
    """A dtype asked for as a result."""
    if dtype not in formats.VALUE_DTYPES:
        raise ShapeError(f"dtype is {dtype}; accepted are float32, float16 and bfloat16.")


def check_format(quant_type: str, blocksize: int) -> None:
    """A 4-bit format and its block size."""
    if quant_type not in formats.FOUR_BIT:
        raise ShapeError(f"quant_type is {quant_type!r}; accepted are {' and '.join(map(repr, formats.FOUR_BIT))}.")
    if blocksize not in formats.BLOCKSIZES:
        raise ShapeError(f"blocksize is {blocksize}; accepted are {', '.join(map(str, formats.BLOCKSIZES))}.")


def check_nested_blocksize(nested_blocksize: int) -> None:
    """The block size of the second level."""
    if nested_blocksize < 1:
        raise ShapeError(f"nested_blocksize is {nested_blocksize}; accepted is any positive number.")


def check_vector(name: str, tensor: torch.Tensor, dtype: torch.dtype, length: int, meaning: str) -> None:
    """A flat tensor of exactly this dtype and length."""
    if tensor.dtype != dtype:
        raise ShapeError(f"{name} has dtype {tensor.dtype}; it must be {dtype}.")
    if tensor.dim() != 1 or tensor.shape[0] != length:
        raise ShapeError(f"{name} has shape {list(tensor.shape)}; it must be [{length}] ({meaning}).")


def check_same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Tensors of one call live on one device."""
    if tensor.device != other.device:
        raise ShapeError(f"{name} is on {tensor.device} but {other_name} is on {other.device}; move one of them.")


def element_count(shape: Sequence[int]) -> int:
    """The number of values of a shape; refuses negative sizes."""
    count = 1
    for size in shape:
        if size < 0:
            raise ShapeError(f"shape is {list(shape)}; sizes must not be negative.")
        count *= size
    return count


def check_packed(packed: torch.Tensor, count: int) -> None:
    """Packed codes of `count` values."""
    check_vector("packed", packed, torch.uint8, formats.packed_bytes(count), f"{count} codes, two in a byte")


def check_nested(codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor, nested_blocksize: int) -> None:
    """The two levels of a double-quantized absmax."""
    check_nested_blocksize(nested_blocksize)
    if codes.dtype != torch.uint8 or codes.dim() != 1:
        raise ShapeError(f"absmax codes are {codes.dtype} {list(codes.shape)}; they must be uint8 with one dimension.")
    blocks = formats.block_count(codes.shape[0], nested_blocksize)
    check_vector("nested_absmax", nested_absmax, torch.float32, blocks, f"blocks of {nested_blocksize} absmax codes")
    if offset.dtype != torch.float32 or offset.dim() != 0:
        raise ShapeError(f"offset is {offset.dtype} {list(offset.shape)}; it must be one float32 without dimensions.")
    check_same_device("nested_absmax", nested_absmax, "the absmax codes", codes)
    check_same_device("offset", offset, "the absmax codes", codes)


def check_statistics(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    count: int,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_blocksize: int,
) -> None:
    """The packed codes and the absmax of one weight, plain or double-quantized."""
    check_packed(packed, count)
    check_same_device("absmax", absmax, "packed", packed)
    if (nested_absmax is None) != (offset is None):
        raise ShapeError("nested_absmax and offset belong together: give both (double quantization) or none.")
    nested = nested_absmax is not None
    blocks = formats.block_count(count, blocksize)
    meaning = f"blocks of {blocksize} values" + (", double-quantized" if nested else "")
    check_vector("absmax", absmax, torch.uint8 if nested else torch.float32, blocks, meaning)
    if nested_absmax is not None and offset is not None:
        check_nested(absmax, nested_absmax, offset, nested_blocksize)


def check_linear(x: torch.Tensor, shape: Sequence[int], bias: torch.Tensor | None, other: torch.Tensor) -> None:
    """Activations [..., K] and bias [N] against a weight of shape [N, K] whose data is `other`."""
    check_values("x", x)
    if len(shape) != 2:
        raise ShapeError(f"the weight's shape is {list(shape)}; a linear layer's weight has two dimensions, [N, K].")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ShapeError(f"x has shape {list(x.shape)}; its last size must be {shape[1]}, as in the weight's [N, K].")
    check_same_device("x", x, "the weight", other)
    if bias is not None:
        check_values("bias", bias)
        if bias.dim() != 1 or bias.shape[0] != shape[0]:
            raise ShapeError(f"bias has shape {list(bias.shape)}; it must be [{shape[0]}], as in the weight's [N, K].")
        check_same_device("bias", bias, "x", x)


def check_experts(
    x: torch.Tensor,
    ends: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_blocksize: int,
    bias: torch.Tensor | None,
) -> None:
    """Rows [M, K] and the packed matrices [E, P] of experts, each of `shape` [N, K]; where rows end is for who reads
    it."""
    check_values("x", x)
    if len(shape) != 2:
        raise ShapeError(f"the shape of an expert's matrix is {list(shape)}; it has two dimensions, [N, K].")
    count = element_count(shape)
    if x.dim() != 2 or x.shape[1] != shape[1]:
        raise ShapeError(f"x has shape {list(x.shape)}; it must be [rows, {shape[1]}], as in the matrices' [N, K].")
    if packed.dtype != torch.uint8 or packed.dim() != 3 or packed.shape[2] < formats.packed_bytes(count):
        raise ShapeError(
            f"packed is {packed.dtype} {list(packed.shape)}; it must be uint8 [experts, matrices, at least "
            f"{formats.packed_bytes(count)}] ({count} codes of a matrix, two in a byte)."
        )
    E, P = packed.shape[:2]
    check_vector("ends", ends, torch.int64, E, "where each expert's rows end")
    if (nested_absmax is None) != (offset is None):
        raise ShapeError("nested_absmax and offset belong together: give both (double quantization) or none.")
    blocks = formats.block_count(count, blocksize)
    wanted: dict[str, tuple[torch.Tensor | None, torch.dtype, tuple[int, ...]]] = {
        "absmax": (absmax, torch.float32 if nested_absmax is None else torch.uint8, (E, P, blocks)),
        "offset": (offset, torch.float32, (E, P)),
    }
    if nested_absmax is not None:
        check_nested_blocksize(nested_blocksize)
        nested_blocks = formats.block_count(blocks, nested_blocksize)
        wanted["nested_absmax"] = (nested_absmax, torch.float32, (E, P, nested_blocks))
    if bias is not None:
        check_values("bias", bias)
        wanted["bias"] = (bias, bias.dtype, (E, P * shape[0]))
    for name, (tensor, dtype, sizes) in wanted.items():
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != sizes):
            raise ShapeError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {dtype} {list(sizes)}.")
    for name, tensor in (("ends", ends), ("packed", packed), *((name, parts[0]) for name, parts in wanted.items())):
        if tensor is not None:
            check_same_device(name, tensor, "x", x)


def check_int8(CB: torch.Tensor, SCB: torch.Tensor) -> None:
    """An int8 weight and its row maxima."""
    if CB.dtype != torch.int8 or CB.dim() != 2:
        raise ShapeError(f"CB is {CB.dtype} {list(CB.shape)}; it must be int8 with two dimensions, [N, K].")
    check_vector("SCB", SCB, torch.float32, CB.shape[0], "one maximum per row of CB")
    check_same_device("SCB", SCB, "CB", CB)


def check_experts8(
    x: torch.Tensor, ends: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Rows [M, K] and the int8 matrices of experts, [E, N, K]; where rows end is for who reads it."""
    check_values("x", x)
    if CB.dtype != torch.int8 or CB.dim() != 3:
        raise ShapeError(f"CB is {CB.dtype} {list(CB.shape)}; it must be int8 with three dimensions, [E, N, K].")
    E, N, K = CB.shape
    if x.dim() != 2 or x.shape[1] != K:
        raise ShapeError(f"x has shape {list(x.shape)}; it must be [rows, {K}], as in CB's [E, N, K].")
    check_vector("ends", ends, torch.int64, E, "where each expert's rows end")
    if bias is not None:
        check_values("bias", bias)
    for name, tensor, dtype in (("SCB", SCB, torch.float32), ("bias", bias, None if bias is None else bias.dtype)):
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != (E, N)):
            raise ShapeError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {dtype} {[E, N]}.")
    for name, tensor in (("ends", ends), ("CB", CB), ("SCB", SCB), ("bias", bias)):
        if tensor is not None:
            check_same_device(name, tensor, "x", x)


def check_outliers(threshold: float, outliers: str) -> None:
    """The outlier rule of LLM.int8()."""
    if outliers not in OUTLIER_RULES:
        raise ShapeError(f"outliers is {outliers!r}; accepted are {', '.join(map(repr, OUTLIER_RULES))}.")
    if not threshold >= 0:
        raise ShapeError(f"threshold is {threshold}; accepted are 0 (no outliers) and any positive number.")


def check_paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    offsets: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> None:
    """Shapes, dtypes and options of attention over a paged cache; what the tables say is for who reads them."""
    check_values("query", query)
    if query.dim() != 3 or min(query.shape[1:]) < 1:
        raise ShapeError(f"query has shape {list(query.shape)}; it must be [T, H, D] with at least one head.")
    for name, store in (("keys", keys), ("values", values)):
        if store.dim() != 4 or min(store.shape[1:]) < 1:
            raise ShapeError(f"{name} have shape {list(store.shape)}; they must be [blocks, block_tokens, G, size].")
        check_same_device(name, store, "query", query)
    if keys.shape[:3] != values.shape[:3] or keys.shape[3] != query.shape[2]:
        raise ShapeError(
            f"query, keys and values have shapes {list(query.shape)}, {list(keys.shape)} and {list(values.shape)}; "
            "they must be [T, H, D], [blocks, block_tokens, G, D] and [blocks, block_tokens, G, E]."
        )
    check_stores(keys, values, scales)
    if query.shape[1] % keys.shape[2]:
        raise ShapeError(f"query has {query.shape[1]} heads; it must be a multiple of the keys' {keys.shape[2]}.")
    if tables.dim() != 2 or tables.dtype != torch.int64:
        raise ShapeError(f"tables are {tables.dtype} {list(tables.shape)}; they must be int64 [sequences, blocks].")
    sequences = tables.shape[0]
    check_vector("offsets", offsets, torch.int64, sequences + 1, "where each sequence's rows begin, and T")
    check_vector("starts", starts, torch.int64, sequences, "one position per sequence")
    for name, tensor in (("tables", tables), ("offsets", offsets), ("starts", starts)):
        check_same_device(name, tensor, "query", query)
    if not math.isfinite(scale):
        raise ShapeError(f"scale is {scale}; it must be finite.")
    if window < 0:
        raise ShapeError(f"window is {window}; accepted are 0 (none) and any positive number of positions.")
    if not 0 <= softcap < math.inf:
        raise ShapeError(f"softcap is {softcap}; accepted are 0 (none) and any positive number.")
    if sinks is not None:
        check_values("sinks", sinks)
        if sinks.dim() != 1 or sinks.shape[0] != query.shape[1]:
            raise ShapeError(f"sinks have shape {list(sinks.shape)}; they must be [{query.shape[1]}], one per head.")
        check_same_device("sinks", sinks, "query", query)


def check_stores(keys: torch.Tensor, values: torch.Tensor, scales: torch.Tensor | None) -> None:
    """The dtypes of a cache's keys [blocks, block_tokens, G, D] and values, and the scales beside them in int8."""
    if keys.dtype not in formats.STORE_DTYPES:
        accepted = ", ".join(str(dtype) for dtype in formats.STORE_DTYPES)
        raise ShapeError(f"keys have dtype {keys.dtype}; accepted are {accepted}.")
    if values.dtype != keys.dtype:
        raise ShapeError(f"values have dtype {values.dtype} but keys have {keys.dtype}; they must have one.")
    if (keys.dtype == torch.int8) != (scales is not None):
        found = "are missing" if scales is None else "are given"
        raise ShapeError(f"scales {found} and keys have dtype {keys.dtype}; int8 has scales, no other dtype does.")
    if scales is None:
        return
    shape = [*keys.shape[:3], 2]
    if scales.dtype != torch.float32 or list(scales.shape) != shape:
        raise ShapeError(f"scales are {scales.dtype} {list(scales.shape)}; they must be torch.float32 {shape}.")
    check_same_device("scales", scales, "keys", keys)


def check_rows(x: torch.Tensor) -> None:
    """Rows of values, x [..., K]."""
    check_values("x", x)
    if x.dim() == 0:
        raise ShapeError("x has no dimensions; it must be [..., K].")


def check_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Rows to normalise and their weight."""
    check_rows(x)
    check_vector("weight", weight, x.dtype, x.shape[-1], "as x's last size")
    check_same_device("weight", weight, "x", x)
    if not 0 <= eps < math.inf:
        raise ShapeError(f"eps is {eps}; accepted are 0 and any positive number.")


def check_swiglu(gate: torch.Tensor, up: torch.Tensor) -> None:
    """The two halves of a gated linear unit."""
    check_values("gate", gate)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ShapeError(
            f"gate is {gate.dtype} {list(gate.shape)} and up is {up.dtype} {list(up.shape)}; they must be alike."
        )
    check_same_device("up", up, "gate", gate)


def check_rotary(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Raises ShapeError unless these are [T, H, D], [T, G, D] with an even D, and twice [T, D], in one dtype."""
    check_values("query", query)
    if query.dim() != 3 or query.shape[2] % 2:
        raise ShapeError(f"query has shape {list(query.shape)}; [tokens, heads, an even head size] is needed")
    T, _, D = query.shape
    if key.dim() != 3 or (key.shape[0], key.shape[2]) != (T, D):
        raise ShapeError(f"key has shape {list(key.shape)}; [{T}, heads, {D}] is needed beside this query")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tuple(tensor.shape) != (T, D):
            raise ShapeError(f"{name} has shape {list(tensor.shape)}; [{T}, {D}] is needed beside this query")
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        if tensor.dtype != query.dtype:
            raise ShapeError(f"{name} has dtype {tensor.dtype}; the query's, {query.dtype}, is needed")
        check_same_device(name, tensor, "query", query)


def check_cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """Raises ShapeError unless these are [T, G, D], [T, G, E], stores for them, int64 [T], and int8's scales."""
    check_values("key", key)
    if key.dim() != 3 or key.stride(2) != 1:
        raise ShapeError(f"key has shape {list(key.shape)}; [tokens, heads, head size] with adjacent values is needed")
    T, G, _ = key.shape
    if value.dim() != 3 or tuple(value.shape[:2]) != (T, G) or value.stride(2) != 1:
        raise ShapeError(f"value has shape {list(value.shape)}; [{T}, {G}, head size] with adjacent values is needed")
    for name, store, rows in (("keys", keys, key), ("values", values, value)):
        if store.dim() != 4 or store.shape[2:] != rows.shape[1:] or not store.is_contiguous():
            raise ShapeError(
                f"{name} has shape {list(store.shape)}; a contiguous [blocks, size, {G}, {rows.shape[2]}] is needed"
            )
    if values.shape[:2] != keys.shape[:2]:
        raise ShapeError(f"values has shape {list(values.shape)}; it must have the blocks of keys, {list(keys.shape)}")
    if slots.dtype != torch.int64 or tuple(slots.shape) != (T,) or not slots.is_contiguous():
        raise ShapeError(f"slots is {slots.dtype} {list(slots.shape)}; a contiguous int64 [{T}] is needed")
    if value.dtype != key.dtype:
        raise ShapeError(f"value has dtype {value.dtype}; the key's, {key.dtype}, is needed")
    check_stores(keys, values, scales)
    if scales is not None and not scales.is_contiguous():
        raise ShapeError("scales are not contiguous; what is written must be")
    for name, tensor in (("value", value), ("keys", keys), ("values", values), ("slots", slots)):
        check_same_device(name, tensor, "key", key)
