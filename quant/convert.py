"""A checkpoint directory quantized into another one; a model larger than memory will do.

The result is what from_pretrained with the same config and save_pretrained would write, with a report and a manifest.
Everything is written into a directory beside the target, which gets its name when it is complete. Not here: how
tensors are read and packed (stream.py), the layout of the files (shards.py).
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from quant.config import BitsAndBytesConfig
from quant.errors import OutputError
from quant.report import LayerReport, summarize
from quant.shards import DEFAULT_SHARD_BYTES, ShardWriter, WrittenFile, hashed
from quant.stream import Source

REPORT_FILE: Final = "quantization_report.json"
MANIFEST_FILE: Final = "manifest.json"
COPIED: Final = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""What travels beside the weights, as patterns of file names: tokenizer, processors, terms. No code."""

Progress = Callable[[int, int, str], None]
"""Called with bytes read, bytes in all and the tensor just written."""


@dataclass(frozen=True, slots=True)
class Result:
    """What quantize_checkpoint wrote."""

    directory: Path
    layers: tuple[LayerReport, ...]
    files: tuple[WrittenFile, ...]
    unquantized_bytes: int


def quantize_checkpoint(
    model: Path | str,
    out: Path | str,
    quantization: str | Mapping[str, Any] | BitsAndBytesConfig,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Result:
    """Quantizes the checkpoint in `model` (config.json, safetensors) into the new directory `out`.

    quantization: a preset, BitsAndBytesConfig's fields, or a config. dtype: of what is not quantized; None takes the
    checkpoint's own. Raises OutputError where `out` is not free, QuantConfigError for a quantization that is not
    accepted or a checkpoint that is quantized already, CheckpointError for one that cannot be read. On any error
    nothing is left at `out`.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(f"{target} exists and is not an empty directory; accepted is a path that is free")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} is not a directory, so that {target.name} cannot be written there")
    if max_shard_bytes < 1:
        raise OutputError(f"shards of {max_shard_bytes} bytes were asked for; accepted is 1 and more")
    source = Source(Path(model), quantization, dtype)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        result = _write(source, partial, max_shard_bytes, progress)
        partial.replace(target)  # over an empty directory too
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Result(target, result.layers, result.files, result.unquantized_bytes)


def report_checkpoint(
    model: Path | str, quantization: str | Mapping[str, Any] | BitsAndBytesConfig, *, dtype: torch.dtype | None = None
) -> Iterator[LayerReport]:
    """What quantizing a checkpoint would give, layer by layer, without writing it; holds a few tensors at a time."""
    for piece in Source(Path(model), quantization, dtype).pieces():
        yield from piece.layers


def _write(source: Source, directory: Path, max_shard_bytes: int, progress: Progress | None) -> Result:
    layers: list[LayerReport] = []
    unquantized_bytes = done = 0
    with ExitStack() as stack:
        writer = ShardWriter(directory, max_shard_bytes)
        stack.callback(writer.close)
        for piece in source.pieces():
            writer.add(piece.tensors)
            layers.extend(piece.layers)
            unquantized_bytes += 0 if piece.layers else sum(tensor.nbytes for tensor in piece.tensors.values())
            done += piece.bytes_read
            if progress is not None:
                progress(done, source.bytes_in_all, piece.name)
        weights = writer.finish(source.model.num_parameters())
    for path in _companions(source.directory):
        shutil.copyfile(path, directory / path.name)
    report = {
        "quantization": source.quantization.to_dict(),
        "total": summarize(layers) | {"unquantized_bytes": unquantized_bytes},
        "layers": [layer.to_dict() for layer in layers],
    }
    _write_json(directory / REPORT_FILE, report)
    source.save_configs(directory)
    known = {file.name: file for file in weights}
    names = sorted(path.name for path in directory.iterdir())
    files = tuple(known.get(name) or hashed(directory / name) for name in names)
    manifest = {"quantization": source.quantization.to_dict(), "files": [asdict(file) for file in files]}
    _write_json(directory / MANIFEST_FILE, manifest)
    return Result(directory, tuple(layers), (*files, hashed(directory / MANIFEST_FILE)), unquantized_bytes)


def _companions(directory: Path) -> list[Path]:
    found = {path for pattern in COPIED for path in directory.glob(pattern) if path.is_file()}
    return sorted(found)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
