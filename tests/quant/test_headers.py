"""Checkpoint headers: what is accepted, and one sentence for everything that is not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quant.errors import CheckpointError
from quant.headers import INDEX_FILE, SINGLE_FILE, checkpoint_files, read_checkpoint_headers


def write(directory: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = directory / SINGLE_FILE
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return directory


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_agrees_with_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(1, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    headers = read_checkpoint_headers(tmp_path)
    assert {name: (header.shape, header.nbytes) for name, header in headers.items()} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()
    }


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert {name: header.file.name for name, header in read_checkpoint_headers(tmp_path).items()} == weight_map


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("[]", "not an index"),
        ("{", "not an index"),
        ('{"weight_map": {}}', "names no file"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "plain file names"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "not there"),
    ],
)
def test_bad_index(tmp_path: Path, index: str, sentence: str) -> None:
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint_files(tmp_path)


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    with pytest.raises(CheckpointError, match="holds each tensor once"):
        read_checkpoint_headers(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "sentence"),
    [
        (b"{", b"", "not JSON"),
        ([1], b"", "not a JSON object"),
        ({"t": 3}, b"", "must have dtype"),
        ({"t": {"dtype": "F32"}}, b"", "must have dtype"),
        (entry(dtype="F12"), b"\0" * 8, "has dtype 'F12'; accepted"),
        (entry(shape=[-2]), b"\0" * 8, "non-negative"),
        (entry(shape=[2.0]), b"\0" * 8, "non-negative"),
        (entry(shape=[1] * 9), b"\0" * 8, "8 sizes at most"),
        (entry(shape=[2**62, 2**62]), b"\0" * 8, "offsets span 8"),
        (entry(offsets=[0, 4]), b"\0" * 4, "needs 8 bytes"),
        (entry(offsets=[-8, 0]), b"", "before the data"),
        (entry(), b"\0" * 7, "truncated"),
        (entry(), b"\0" * 9, "tensors end at byte 8"),
    ],
)
def test_bad_header(tmp_path: Path, header: object, data: bytes, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint_headers(write(tmp_path, header, data))


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 50) + b"{}"])
def test_short_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"too short|announces a header"):
        read_checkpoint_headers(tmp_path)


def test_a_checkpoint_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match="safetensors only"):
        read_checkpoint_headers(tmp_path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mutation_of_a_file_does_anything_but_load_or_say_why(tmp_path: Path, data: st.DataObject) -> None:
    save_file({"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.int8)}, tmp_path / SINGLE_FILE)
    content = bytearray((tmp_path / SINGLE_FILE).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    (tmp_path / SINGLE_FILE).write_bytes(bytes(content))
    try:
        headers = read_checkpoint_headers(tmp_path)
    except CheckpointError:
        return
    assert sum(header.nbytes for header in headers.values()) <= len(content)
