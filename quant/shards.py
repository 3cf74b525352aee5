"""Writes safetensors files tensor by tensor: bytes go to disk as they come, each file is put in order when it is full.

A safetensors file wants its tensors sorted by alignment and without gaps, and its header first, which nobody knows
while tensors still come. So they are spilled to a file beside, and copied in order when a shard is complete; the
result is byte for byte what the safetensors library writes for the same tensors. Not here: what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch

from quant.errors import CheckpointError
from quant.headers import INDEX_FILE, SINGLE_FILE

DEFAULT_SHARD_BYTES: Final = 5_000_000_000
_METADATA: Final = {"format": "pt"}
_COPY_BYTES: Final = 1 << 22

# In safetensors' own order, which is the order within a file: later ones first.
_DTYPES: Final = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_RANK: Final = {name: rank for rank, name in enumerate(_DTYPES.values())}


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A finished file."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Spilled:
    name: str
    dtype: str
    shape: list[int]
    begin: int
    nbytes: int


class ShardWriter:
    """Collects tensors into model.safetensors, or into numbered shards and an index where they exceed the limit.

    Call add() for each tensor and finish() once; the memory it needs does not grow with the model.
    """

    def __init__(self, directory: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self._directory = directory
        self._limit = max_shard_bytes
        self._spill_path = directory / ".spill"
        self._spill: IO[bytes] | None = None
        self._pending: list[_Spilled] = []
        self._pending_bytes = 0
        self._shards: list[tuple[WrittenFile, list[str]]] = []
        self._names: set[str] = set()
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Tensors that belong together; a shard is closed before those that would exceed its limit."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._limit:
            self._close_shard()
        for name, tensor in tensors.items():
            if name in self._names:
                raise CheckpointError(f"tensor {name} would be written twice; a checkpoint holds each tensor once")
            self._names.add(name)
            self._write(name, tensor)

    def finish(self, parameters: int) -> list[WrittenFile]:
        """Closes the last shard, gives the files their names and writes the index where there are several.

        `parameters` is what the index tells of the model's size, as transformers writes it.
        """
        if self._pending or not self._shards:
            self._close_shard()
        if len(self._shards) == 1:
            return [self._rename(self._shards[0][0], SINGLE_FILE)]
        files = []
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self._shards, start=1):
            files.append(self._rename(file, f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"))
            weight_map |= dict.fromkeys(names, files[-1].name)
        index = {
            "metadata": {"total_parameters": parameters, "total_size": self._total_bytes},
            "weight_map": weight_map,
        }
        (self._directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return [*files, hashed(self._directory / INDEX_FILE)]

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in _DTYPES:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise CheckpointError(f"tensor {name} is {tensor.dtype}; accepted are {accepted}")
        if self._spill is None:
            self._spill = self._spill_path.open("w+b")
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel():
            self._spill.write(tensor.view(-1).view(torch.uint8).numpy().data)
        entry = _Spilled(name, _DTYPES[tensor.dtype], list(tensor.shape), self._pending_bytes, tensor.nbytes)
        self._pending.append(entry)
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _close_shard(self) -> None:
        self._pending.sort(key=lambda entry: (-_RANK[entry.dtype], entry.name.encode()))
        header: dict[str, Any] = {"__metadata__": _METADATA}
        end = 0
        for entry in self._pending:
            offsets = [end, end + entry.nbytes]
            header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
            end += entry.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        path = self._directory / f".shard-{len(self._shards)}"
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for part in self._parts(struct.pack("<Q", len(text)) + text):
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        written = WrittenFile(path.name, path.stat().st_size, digest.hexdigest())
        self._shards.append((written, [entry.name for entry in self._pending]))
        self._pending, self._pending_bytes = [], 0
        if self._spill is not None:
            self._spill.close()
            self._spill = None
            self._spill_path.unlink()

    def _parts(self, head: bytes) -> Any:
        yield head
        for entry in self._pending:
            if self._spill is None:
                return
            self._spill.seek(entry.begin)
            left = entry.nbytes
            while left:
                part = self._spill.read(min(left, _COPY_BYTES))
                if not part:
                    raise CheckpointError(f"tensor {entry.name} could not be read back from {self._spill_path}")
                left -= len(part)
                yield part

    def close(self) -> None:
        """Lets go of the spill file; for the end of a run that failed."""
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    def _rename(self, file: WrittenFile, name: str) -> WrittenFile:
        (self._directory / file.name).rename(self._directory / name)
        return WrittenFile(name, file.bytes, file.sha256)


def hashed(path: Path) -> WrittenFile:
    """The size and SHA-256 of a file on disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return WrittenFile(path.name, path.stat().st_size, digest.hexdigest())
