"""What a checkpoint says it holds, read from safetensors headers alone; no tensor's bytes are touched here.

The layout is the safetensors format's: a little-endian uint64 N, N bytes of JSON that map names to
{dtype, shape, data_offsets}, then the data. A checkpoint is untrusted: every size in it is checked against the file
before anybody allocates by it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quant.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the safetensors library itself
MAX_INDEX_BYTES: Final = 100_000_000
MAX_DIMENSIONS: Final = 8

ADAPTED: Final = ".base_layer."
"""What stands before the tensors of a layer that was saved with an adapter around it."""

ITEM_BITS: Final = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as its file's header describes it; `dtype` is safetensors' name ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    """Of its first byte in the file."""

    @property
    def is_floating_point(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


def read_checkpoint_headers(directory: Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint directory by name: from the index's files, or from the single file.

    Raises CheckpointError where files are missing, truncated or contradict themselves.
    """
    return read_headers(checkpoint_files(directory))


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """The same for the safetensors files that make up a checkpoint."""
    headers: dict[str, TensorHeader] = {}
    for file in files:
        for header in _read_file(file):
            if header.name in headers:
                raise CheckpointError(
                    f"tensor {header.name!r} is in both {headers[header.name].file.name} and {file.name}; "
                    "a checkpoint holds each tensor once"
                )
            headers[header.name] = header
    return headers


def plain_name(name: str) -> str:
    """A tensor's name without the mark of an adapter around its layer."""
    return name.replace(ADAPTED, ".")


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in name order."""
    index = directory / INDEX_FILE
    if index.is_file():
        return [directory / name for name in _indexed_names(index)]
    single = directory / SINGLE_FILE
    if single.is_file():
        return [single]
    raise CheckpointError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; weights are accepted as safetensors only"
    )


def _indexed_names(index: Path) -> list[str]:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{index} is larger than {MAX_INDEX_BYTES} bytes, which no index needs to be")
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f'{index} is not an index: it must be JSON with a "weight_map" of names ({error})'
        ) from error
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names the file {name!r}; only plain file names beside it are accepted")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the file {name!r}, which is not there")
    if not names:
        raise CheckpointError(f"{index} names no file")
    return names


def _read_file(file: Path) -> Iterator[TensorHeader]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file} is {size} bytes long, too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise CheckpointError(f"{file} announces a header of {length} bytes, but the file has {size - 8} after it")
        raw = stream.read(length)
    try:
        content: Any = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a header that is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} has a header that is not a JSON object but a {type(content).__name__}")
    data_bytes = size - 8 - length
    end_of_data = 0
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        begin, end, header = _entry(file, name, entry, 8 + length)
        if end > data_bytes:
            raise CheckpointError(
                f"{file} is truncated: tensor {name!r} ends at byte {end} of the data, but the file holds {data_bytes}"
            )
        if begin < 0:
            raise CheckpointError(f"{file}: tensor {name!r} begins before the data, at byte {begin}")
        end_of_data = max(end_of_data, end)
        yield header
    if end_of_data != data_bytes:
        raise CheckpointError(f"{file} holds {data_bytes} bytes of data, but its tensors end at byte {end_of_data}")


def _entry(file: Path, name: str, entry: Any, data: int) -> tuple[int, int, TensorHeader]:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        begin, end = offsets
        well_typed = isinstance(dtype, str) and all(type(n) is int for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: tensor {name!r} must have dtype, shape and data_offsets ({error!r})") from error
    if not well_typed or len(shape) > MAX_DIMENSIONS or any(n < 0 for n in shape):
        raise CheckpointError(
            f"{file}: tensor {name!r} has shape {shape!r}; "
            f"accepted are {MAX_DIMENSIONS} sizes at most, whole and non-negative"
        )
    if dtype not in ITEM_BITS:
        raise CheckpointError(
            f"{file}: tensor {name!r} has dtype {dtype!r}; accepted are {', '.join(sorted(ITEM_BITS))}"
        )
    nbytes = math.prod(shape) * ITEM_BITS[dtype] // 8
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: tensor {name!r} ({dtype}, shape {shape}) needs {nbytes} bytes, but its offsets span {end - begin}"
        )
    return begin, end, TensorHeader(name, dtype, tuple(shape), nbytes, file, data + begin)
