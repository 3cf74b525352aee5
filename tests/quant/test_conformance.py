"""Files that bitsandbytes wrote: read, dequantized bit for bit, written back byte for byte, multiplied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit, PackedWeight
from quant.state import Packed4bit, Packed8bit

FOLDER = Path(os.environ.get("HALFBYTE_CONFORMANCE", Path(__file__).parent / "conformance"))
FILES = sorted(FOLDER.glob("*.safetensors"))
FOUR_BIT = [file for file in FILES if file.name.startswith("4bit")]
EIGHT_BIT = [file for file in FILES if file.name.startswith("8bit")]

# float64 products against ours, whose result is rounded once to x's dtype; relative to the norm of the result.
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
# int8 activations cost about half a code in 127 of a row's largest ordinary value; without a threshold the outliers of
# these inputs (20 standard deviations) set that value.
INT8_ACTIVATIONS = {6.0: 0.015, 0.0: 0.04}


def layer_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("layer."): t for name, t in tensors.items() if name.startswith("layer.")}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def test_every_case_is_there() -> None:
    names = "\n".join(file.name for file in FILES)
    assert len(FILES) == 29
    for case in ("nf4", "fp4", "nf4_dq", "fp4_dq", "bs64", "bs128", "bs256", "bs1024", "8bit"):
        assert f"{case}_" in names
    assert all(f"bs64_{storage}_" in names for storage in ("uint8", "bfloat16", "float16", "float32"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_read_dequantize_write(file: Path) -> None:
    tensors = load_file(file)
    layer = layer_of(tensors)
    packed = PackedWeight.from_checkpoint(layer)
    values = packed.dequantize()
    assert same_bytes(values, tensors["dequantized"])
    written = packed.to_checkpoint()
    assert set(written) == set(layer)
    assert all(same_bytes(written[name], layer[name]) for name in layer)


@pytest.mark.parametrize("file", FOUR_BIT, ids=lambda file: file.stem)
def test_tables_are_not_held_twice(file: Path) -> None:
    packed = PackedWeight.from_checkpoint(layer_of(load_file(file)))
    assert isinstance(packed, Packed4bit)
    assert packed.quant_map is None
    assert packed.nested is None or packed.nested.table is None


@pytest.mark.parametrize("file", FOUR_BIT, ids=lambda file: file.stem)
def test_linear_4bit(file: Path) -> None:
    tensors = load_file(file)
    x = tensors["x"]
    packed = PackedWeight.from_checkpoint(layer_of(tensors))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=x.dtype)
    layer = Linear4bit(packed.shape[1], packed.shape[0], bias=False, config=config, device="meta")
    layer.adopt(packed)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    result = layer(x)
    assert result.dtype == x.dtype
    assert relative_error(result, tensors["y64"]) < ROUNDING[x.dtype]
    assert all(same_bytes(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("outliers", ["value", "batch"])
@pytest.mark.parametrize("file", EIGHT_BIT, ids=lambda file: file.stem)
def test_linear_8bit(file: Path, outliers: str) -> None:
    tensors = load_file(file)
    x = tensors["x"]
    threshold = float(file.stem.split("_t")[1].split("_")[0])
    packed = PackedWeight.from_checkpoint(layer_of(tensors))
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_outliers=outliers)
    layer = Linear8bit(packed.shape[1], packed.shape[0], bias=False, config=config, device="meta")
    layer.adopt(packed)
    result = layer(x)
    assert result.dtype == x.dtype
    assert relative_error(result, tensors["y64"]) < INT8_ACTIVATIONS[threshold]


@pytest.mark.parametrize("file", EIGHT_BIT, ids=lambda file: file.stem)
def test_quantizing_the_source_gives_the_same_int8(file: Path) -> None:
    tensors = load_file(file)
    source = nn.Linear(1, 1)
    source.weight = nn.Parameter(tensors["source"])
    source.bias = None
    packed = Linear8bit.from_float(source, BitsAndBytesConfig(load_in_8bit=True)).packed_weight()
    assert isinstance(packed, Packed8bit)
    assert same_bytes(packed.row_absmax, tensors["layer.SCB"])
    difference = (packed.packed.int() - tensors["layer.weight"].int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference != 0).float().mean()) < 1e-3  # ties, which bitsandbytes' GPU code rounds by itself


@pytest.mark.parametrize("file", FOUR_BIT, ids=lambda file: file.stem)
def test_quantizing_the_source_is_as_good(file: Path) -> None:
    """Codes may differ at near-ties (bitsandbytes divides approximately), the error may not."""
    tensors = load_file(file)
    theirs = PackedWeight.from_checkpoint(layer_of(tensors))
    assert isinstance(theirs, Packed4bit)
    ours = Packed4bit.quantize(
        tensors["source"],
        theirs.quant_type,
        blocksize=theirs.blocksize,
        double_quant=theirs.nested is not None,
        storage=theirs.packed.dtype,
    )
    written, expected = ours.to_checkpoint(), layer_of(tensors)
    assert {name: (t.dtype, t.shape) for name, t in written.items() if "state" not in name} == {
        name: (t.dtype, t.shape) for name, t in expected.items() if "state" not in name
    }
    source = tensors["source"].double()
    error_of = [float((packed.dequantize().double() - source).norm()) for packed in (ours, theirs)]
    assert error_of[0] <= error_of[1] * 1.01  # a slice has a mean of absmax, and so an offset, of its own
