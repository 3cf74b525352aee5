"""A packed weight and its checkpoint tensors, in bitsandbytes' names and bytes, in both directions.

A checkpoint is untrusted: names, sizes, shapes, dtypes and the JSON are checked here, before anything computes with
them; what is refused is a CheckpointError naming the tensor. Not here: the number formats (formats.py), the arithmetic
(ops.py), and layers, which hold the same tensors as parameter and buffers (linear.py).

4 bits: `weight` (the codes), `weight.absmax`, `weight.quant_map`, with double quantization also
`weight.nested_absmax` and `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__<type>`, which is JSON as
bytes. 8 bits: `weight` (int8), `SCB` (row maxima), and in newer files `weight_format`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

import torch

from quant import formats, native, ops
from quant.errors import CheckpointError, ShapeError
from quant.search import quantize_4bit_plainly, quantize_4bit_searching

MAX_STATE_BYTES: Final = 4096
"""The JSON of a quant_state is about 170 bytes; anything beyond this is refused unread."""
MAX_DIMENSIONS: Final = 8
STATE_PREFIX: Final = "weight.quant_state.bitsandbytes__"
NAMES_4BIT: Final = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *(STATE_PREFIX + name for name in formats.FOUR_BIT),
)
NAMES_8BIT: Final = ("weight", "SCB", "weight_format")
ROW_MAJOR: Final = 0
"""The one int8 layout that is written today; 1 to 3 were layouts of old GPUs' libraries."""
STORAGES: Final = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in formats.VALUE_DTYPES}
_PLAIN_KEYS: Final = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_KEYS: Final = ("nested_blocksize", "nested_dtype", "nested_offset")


class PackedWeight(ABC):
    """One quantized weight: Packed4bit or Packed8bit."""

    shape: tuple[int, ...]
    """The weight's own shape, [N, K] for a linear layer."""

    @staticmethod
    def from_checkpoint(tensors: Mapping[str, torch.Tensor], *, name: str = "") -> PackedWeight:
        """The packed weight in one layer's tensors, named as bitsandbytes names them with the layer's prefix stripped.

        `name` is the layer's own, for messages. Tensors are kept, not copied, where they are contiguous. Raises
        CheckpointError for whatever is missing, unknown, of the wrong size, shape or dtype, or not readable.
        """
        for key, tensor in tensors.items():
            if key not in NAMES_4BIT and key not in NAMES_8BIT:
                raise _refused(name, key, f"is not part of a packed weight; known are {', '.join(_KNOWN)}")
            if tensor.layout is not torch.strided or tensor.is_quantized:
                raise _refused(name, key, f"is not a plain tensor but {tensor.layout} {tensor.dtype}")
            if tensor.is_meta:
                raise _refused(name, key, "has no data; a tensor with storage is needed")
        states = [key for key in tensors if key.startswith(STATE_PREFIX)]
        if "SCB" in tensors:
            return Packed8bit._read(tensors, name)
        if len(states) != 1:
            found = ", ".join(sorted(tensors)) or "nothing"
            raise _refused(
                name, "weight", f"comes with {found}; a packed weight has either SCB or one {STATE_PREFIX}* beside it"
            )
        return Packed4bit._read(tensors, states[0], name)

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as values, in its own shape."""

    @abstractmethod
    def to_checkpoint(self) -> dict[str, torch.Tensor]:
        """The tensors that from_checkpoint read, byte for byte."""

    @abstractmethod
    def to(self, device: torch.device | str) -> PackedWeight:
        """The same bytes on another device."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SecondLevel:
    """Double quantization: absmax itself as 8-bit codes in blocks. absmax = table[code] * block's absmax + offset."""

    absmax: torch.Tensor  # float32 [ceil(blocks / blocksize)]
    offset: torch.Tensor  # float32 [], on the same device
    blocksize: int
    table: torch.Tensor | None = None  # float32 [256] where the file's differs from formats.DYNAMIC_TABLE

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [B] -> float32 [B]."""
        if self.table is None:
            return ops.dequantize_absmax(codes, self.absmax, self.offset, self.blocksize)
        groups = torch.arange(codes.numel(), device=codes.device) // self.blocksize
        return self.table.to(codes.device)[codes.long()] * self.absmax[groups] + self.offset


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Packed4bit(PackedWeight):
    """NF4 or FP4 codes with the statistics that turn them into values."""

    packed: torch.Tensor  # the codes in their storage dtype, usually uint8 [ceil(n / 2), 1]
    absmax: torch.Tensor  # float32 [B], or uint8 [B] codes where there is a second level; B = ceil(n / blocksize)
    quant_type: str
    blocksize: int
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the values before quantization, and of dequantize()
    nested: SecondLevel | None = None
    quant_map: torch.Tensor | None = None  # float32 [16] where the file's differs from the format's; readers ignore it
    state: bytes  # the JSON as it stands in the file

    @classmethod
    def quantize(
        cls,
        weight: torch.Tensor,
        quant_type: str,
        *,
        blocksize: int = formats.DEFAULT_BLOCKSIZE,
        double_quant: bool = False,
        storage: torch.dtype = torch.uint8,
        search: bool = False,
    ) -> Packed4bit:
        """Packs a float32, float16 or bfloat16 weight of any shape on its own device.

        `search` spends time on a smaller error (search.py) in the same format and size.
        """
        if weight.dtype not in formats.VALUE_DTYPES:
            raise ShapeError(f"a {weight.dtype} weight cannot be quantized; accepted are {', '.join(_DTYPES)}")
        weight = weight.detach()
        quantize = quantize_4bit_searching if search else quantize_4bit_plainly
        codes, absmax, nested_absmax, offset = quantize(weight, quant_type, blocksize, double_quant=double_quant)
        nested = None
        if nested_absmax is not None and offset is not None:
            nested = SecondLevel(absmax=nested_absmax, offset=offset, blocksize=formats.NESTED_BLOCKSIZE)
        content: dict[str, Any] = {
            "quant_type": quant_type,
            "blocksize": blocksize,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "shape": list(weight.shape),
        }
        if nested is not None:
            # A float32 written as Python writes the double of that value; on meta there is no value yet.
            offset_value = 0.0 if weight.is_meta else float(nested.offset)
            content |= dict(zip(_NESTED_KEYS, (nested.blocksize, "float32", offset_value), strict=True))
        return cls(
            packed=_in_storage(codes, storage),
            absmax=absmax,
            quant_type=quant_type,
            blocksize=blocksize,
            shape=tuple(weight.shape),
            dtype=weight.dtype,
            nested=nested,
            state=json.dumps(content).encode(),
        )

    @property
    def codes(self) -> torch.Tensor:
        """The codes as operators take them: flat uint8 [ceil(n / 2)], sharing the storage."""
        return flat_codes(self.packed, math.prod(self.shape))

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        absmax = self.absmax if self.nested is None else self.nested.decode(self.absmax)
        return ops.dequantize_4bit(
            self.codes, absmax, self.quant_type, self.blocksize, list(self.shape), dtype or self.dtype
        )

    def to_checkpoint(self) -> dict[str, torch.Tensor]:
        device = self.packed.device
        table = formats.CODE_TABLES[self.quant_type] if self.quant_map is None else self.quant_map
        tensors = {"weight": self.packed, "weight.absmax": self.absmax, "weight.quant_map": _own(table, device)}
        if self.nested is not None:
            nested_table = formats.DYNAMIC_TABLE if self.nested.table is None else self.nested.table
            tensors["weight.nested_absmax"] = self.nested.absmax
            tensors["weight.nested_quant_map"] = _own(nested_table, device)
        state = torch.frombuffer(bytearray(self.state), dtype=torch.uint8)
        tensors[STATE_PREFIX + self.quant_type] = state.to(device)
        return tensors

    def to(self, device: torch.device | str) -> Packed4bit:
        nested = self.nested and dataclasses.replace(
            self.nested, absmax=self.nested.absmax.to(device), offset=self.nested.offset.to(device)
        )
        return dataclasses.replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device), nested=nested)

    @classmethod
    def _read(cls, tensors: Mapping[str, torch.Tensor], state_key: str, name: str) -> Packed4bit:
        raw = _tensor(tensors, name, state_key, (torch.uint8,), dimensions=1)
        if raw.numel() > MAX_STATE_BYTES:
            raise _refused(name, state_key, f"has {raw.numel()} bytes; at most {MAX_STATE_BYTES} are accepted")
        state = bytes(raw.tolist())
        fields = _StateFields.parse(state, name, state_key)
        for key in tensors:
            if key.startswith("weight.nested_") and not fields.is_nested:
                raise _refused(name, key, f"stands beside a {state_key} without {' and '.join(_NESTED_KEYS)}")
        count = math.prod(fields.shape)
        packed = _tensor(tensors, name, "weight", STORAGES)
        expected = -(-formats.packed_bytes(count) // packed.itemsize) * packed.itemsize
        if packed.nbytes != expected:
            raise _refused(
                name, "weight", f"has {packed.nbytes} bytes; its shape {list(fields.shape)} needs {expected}"
            )
        blocks = formats.block_count(count, fields.blocksize)
        absmax_dtype = torch.uint8 if fields.is_nested else torch.float32
        absmax = _vector(tensors, name, "weight.absmax", absmax_dtype, blocks)
        table = _vector(tensors, name, "weight.quant_map", torch.float32, len(formats.CODE_TABLES[fields.quant_type]))
        nested = None
        if fields.is_nested:
            groups = formats.block_count(blocks, fields.nested_blocksize)
            nested_absmax = _vector(tensors, name, "weight.nested_absmax", torch.float32, groups)
            nested_table = _vector(tensors, name, "weight.nested_quant_map", torch.float32, len(formats.DYNAMIC_TABLE))
            nested = SecondLevel(
                absmax=nested_absmax,
                offset=torch.tensor(fields.nested_offset, dtype=torch.float32, device=packed.device),
                blocksize=fields.nested_blocksize,
                table=_if_unlike(nested_table, formats.DYNAMIC_TABLE),
            )
        _one_device(name, packed, absmax, nested.absmax if nested else None)
        return cls(
            packed=packed,
            absmax=absmax,
            quant_type=fields.quant_type,
            blocksize=fields.blocksize,
            shape=fields.shape,
            dtype=fields.dtype,
            nested=nested,
            quant_map=_if_unlike(table, formats.CODE_TABLES[fields.quant_type]),
            state=state,
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Packed8bit(PackedWeight):
    """LLM.int8() rows: value = code * row's absmax / 127."""

    packed: torch.Tensor  # int8 [N, K]
    row_absmax: torch.Tensor  # float32 [N]
    has_format: bool = True  # files before bitsandbytes 0.38 have no weight_format

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Packed8bit:
        """Packs a float32, float16 or bfloat16 weight [N, K]."""
        if weight.dim() != 2 or weight.dtype not in formats.VALUE_DTYPES:
            raise ShapeError(
                f"a {weight.dtype} weight of shape {list(weight.shape)} cannot be quantized to int8; accepted are "
                f"two dimensions of {', '.join(_DTYPES)}"
            )
        codes, row_absmax = ops.quantize_8bit(weight.detach())
        return cls(packed=codes, row_absmax=row_absmax)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.packed.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return ops.dequantize_8bit(self.packed, self.row_absmax, dtype or torch.float32)

    def to_checkpoint(self) -> dict[str, torch.Tensor]:
        tensors = {"weight": self.packed, "SCB": self.row_absmax}
        if self.has_format:
            tensors["weight_format"] = torch.tensor(ROW_MAJOR, dtype=torch.uint8, device=self.packed.device)
        return tensors

    def to(self, device: torch.device | str) -> Packed8bit:
        return dataclasses.replace(self, packed=self.packed.to(device), row_absmax=self.row_absmax.to(device))

    @classmethod
    def _read(cls, tensors: Mapping[str, torch.Tensor], name: str) -> Packed8bit:
        for key in tensors:
            if key not in NAMES_8BIT:
                raise _refused(name, key, f"belongs to a 4-bit weight; an int8 one has {', '.join(NAMES_8BIT)}")
        packed = _tensor(tensors, name, "weight", (torch.int8,), dimensions=2)
        row_absmax = _vector(tensors, name, "SCB", torch.float32, packed.shape[0])
        if "weight_format" in tensors:
            layout = _tensor(tensors, name, "weight_format", (torch.uint8,), dimensions=0)
            if int(layout) != ROW_MAJOR:
                raise _refused(
                    name,
                    "weight_format",
                    f"is {int(layout)}; only {ROW_MAJOR} (row-major) is accepted, as others were layouts of one GPU",
                )
        _one_device(name, packed, row_absmax)
        return cls(packed=packed, row_absmax=row_absmax, has_format="weight_format" in tensors)


@dataclasses.dataclass(frozen=True)
class _StateFields:
    """What the JSON of a quant_state says, checked."""

    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_nested: bool
    nested_blocksize: int = 0
    nested_offset: float = 0.0

    @classmethod
    def parse(cls, state: bytes, name: str, key: str) -> _StateFields:
        try:
            content = json.loads(state.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _refused(name, key, f"is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise _refused(name, key, f"is a JSON {type(content).__name__}; an object is needed")
        is_nested = any(entry in content for entry in _NESTED_KEYS)
        needed = _PLAIN_KEYS + (_NESTED_KEYS if is_nested else ())
        if set(content) != set(needed):
            odd = sorted(set(content) ^ set(needed))
            raise _refused(name, key, f"has missing or unknown keys {', '.join(map(repr, odd))}")

        def check(entry: str, accepted: bool, expected: str) -> None:
            if not accepted:
                raise _refused(name, key, f"has {entry} {content[entry]!r:.80}; accepted is {expected}")

        quant_type, shape, dtype = content["quant_type"], content["shape"], content["dtype"]
        check("quant_type", quant_type == key.removeprefix(STATE_PREFIX), repr(key.removeprefix(STATE_PREFIX)))
        check("blocksize", _is_size(content["blocksize"], formats.BLOCKSIZES), f"one of {formats.BLOCKSIZES}")
        check("dtype", isinstance(dtype, str) and dtype in _DTYPES, f"one of {', '.join(_DTYPES)}")
        is_shape = isinstance(shape, list) and 1 <= len(shape) <= MAX_DIMENSIONS and all(map(_is_size, shape))
        check("shape", is_shape and math.prod(shape) <= native.MAX_ELEMENTS, f"1 to {MAX_DIMENSIONS} positive sizes")
        fields: dict[str, Any] = {}
        if is_nested:
            offset = content["nested_offset"]
            check("nested_blocksize", _is_size(content["nested_blocksize"]), f"1 to {native.MAX_ELEMENTS}")
            check("nested_dtype", content["nested_dtype"] == "float32", "'float32'")
            check("nested_offset", isinstance(offset, float), "a number with a decimal point")
            fields = {"nested_blocksize": content["nested_blocksize"], "nested_offset": offset}
        return cls(quant_type, content["blocksize"], _DTYPES[dtype], tuple(shape), is_nested, **fields)


def layer_tensor(tensors: Mapping[str, torch.Tensor], name: str, prefix: str = "") -> torch.Tensor:
    """One tensor of a packed weight by a layer's name for it (`absmax`), from a checkpoint's (`<prefix>weight.absmax`).

    KeyError where there is none.
    """
    if name != "nested_offset":
        return tensors[prefix + (name if name in NAMES_8BIT else f"weight.{name}")]
    known = (key for key in NAMES_4BIT if key.startswith(STATE_PREFIX) and prefix + key in tensors)
    key = next(known, STATE_PREFIX)
    state = tensors[prefix + key]
    fields = _StateFields.parse(bytes(state.tolist()), prefix.removesuffix("."), key)
    return torch.tensor(fields.nested_offset, dtype=torch.float32, device=state.device)


def flat_codes(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The bytes of `count` codes in a tensor of any storage dtype, as flat uint8 [ceil(count / 2)] without a copy."""
    flat = packed.view(-1)
    codes = flat if flat.dtype is torch.uint8 else flat.view(torch.uint8)  # which torch.jit cannot trace
    return codes[: formats.packed_bytes(count)]


_KNOWN: Final = tuple(dict.fromkeys(NAMES_4BIT + NAMES_8BIT))


def _in_storage(codes: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """uint8 [P] -> the same bytes as [P / itemsize, 1] of the storage dtype, zero bytes filling the last item."""
    missing = -codes.numel() % storage.itemsize
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    return codes.view(storage).unsqueeze(1)


def _is_size(value: object, accepted: tuple[int, ...] | None = None) -> bool:
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return value in accepted if accepted is not None else 1 <= value <= native.MAX_ELEMENTS


def _tensor(
    tensors: Mapping[str, torch.Tensor],
    name: str,
    key: str,
    dtypes: tuple[torch.dtype, ...],
    dimensions: int | None = None,
) -> torch.Tensor:
    if key not in tensors:
        raise _refused(name, key, "is missing")
    tensor = tensors[key].detach()
    if tensor.dtype not in dtypes:
        raise _refused(name, key, f"is {tensor.dtype}; accepted is {' or '.join(map(str, dtypes))}")
    if dimensions is not None and tensor.dim() != dimensions:
        raise _refused(name, key, f"has shape {list(tensor.shape)}; {dimensions} dimensions are needed")
    return tensor if tensor.is_meta else native.ready(tensor)


def _vector(tensors: Mapping[str, torch.Tensor], name: str, key: str, dtype: torch.dtype, length: int) -> torch.Tensor:
    tensor = _tensor(tensors, name, key, (dtype,), dimensions=1)
    if tensor.numel() != length:
        raise _refused(name, key, f"has {tensor.numel()} values; {length} are needed")
    return tensor


def _if_unlike(table: torch.Tensor, ours: torch.Tensor) -> torch.Tensor | None:
    """A file's own table where its bits differ from ours, which need not be held twice."""
    return None if torch.equal(table.cpu().view(torch.int32), ours.view(torch.int32)) else table


def _own(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy, so that nobody writes into a shared table and safetensors sees no shared storage."""
    return table.to(device, copy=True)


def _one_device(name: str, *tensors: torch.Tensor | None) -> None:
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise _refused(name, "weight", f"has its tensors on {' and '.join(sorted(devices))}; one device is needed")


def _refused(name: str, key: str, reason: str) -> CheckpointError:
    return CheckpointError(f"tensor {f'{name}.{key}' if name else key} {reason}")
