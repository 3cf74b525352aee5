"""Files that go both ways between this package and bitsandbytes itself, which runs in a process of its own.

Needs bitsandbytes, which is no dependency: install it beside torch, or with `pip install --no-deps --target DIR
bitsandbytes` and HALFBYTE_BITSANDBYTES=DIR. Without it these tests skip; test_conformance.py reads files it once wrote.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quant import BitsAndBytesConfig, PackedWeight, formats
from quant.linear import Linear4bit, Linear8bit
from quant.state import Packed4bit
from tests.quant.test_conformance import relative_error, same_bytes
from tests.tiny_models import save_tiny

FOLDER = os.environ.get("HALFBYTE_BITSANDBYTES")
pytestmark = pytest.mark.skipif(
    FOLDER is None and importlib.util.find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes (installed, or in the folder that HALFBYTE_BITSANDBYTES names)",
)

STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
CASES: dict[str, dict[str, object]] = {
    f"{quant_type}-{'dq' if nested else 'plain'}-{blocksize}-{storage}-{dtype}": {
        "quant_type": quant_type,
        "compress_statistics": nested,
        "blocksize": blocksize,
        "quant_storage": storage,
    }
    for quant_type, nested, blocksize, storage, dtype in itertools.product(
        ("nf4", "fp4"), (False, True), formats.BLOCKSIZES, STORAGES, ("float32", "float16", "bfloat16")
    )
}
MODELS: dict[str, dict[str, object]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4-dq-bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "nf4-32": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_blocksize": 32},  # theirs: 64
    "int8": {"load_in_8bit": True},
}
INT8_LAYER = 1e-3
"""Relative difference of one int8 product, which both sides round to float16 (measured: 3 to 4e-4)."""
LOGITS = {"4bit": 2e-2, "int8": 5e-2}
"""Relative difference of a float16 model's logits (measured: 0.9e-2 and 2.2e-2). bitsandbytes' CPU code rounds weights
to bfloat16; an int8 activation that rounds to the next code moves by 1/127 of its row, and these weights are large."""


def load(path: Path, **how: object) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything both sides made: one run of the other process, as it starts slowly."""
    folder = tmp_path_factory.mktemp("exchange")
    ours, sources = {}, {}
    for case, how in CASES.items():
        blocksize = int(str(how["blocksize"]))
        # bitsandbytes' CPU kernel reads wrong maxima where a row is no multiple of the block.
        source = torch.randn(3, max(blocksize, 128)).to(getattr(torch, case.rpartition("-")[2]))
        packed = Packed4bit.quantize(
            source,
            str(how["quant_type"]),
            blocksize=blocksize,
            double_quant=bool(how["compress_statistics"]),
            storage=getattr(torch, str(how["quant_storage"])),
        )
        ours |= {f"{case}/{name}": tensor for name, tensor in packed.to_checkpoint().items()}
        sources[case] = source
    save_file(ours, folder / "ours.safetensors")
    save_file(sources, folder / "sources.safetensors")
    save_file({"tokens": torch.randint(3, 259, (2, 9))}, folder / "tokens.safetensors")
    save_tiny("llama", folder / "source")
    for name, arguments in MODELS.items():
        model = load(folder / "source", dtype=torch.float16, quantization_config=BitsAndBytesConfig(**arguments))
        model.save_pretrained(folder / f"ours-{name}")
    (folder / "plan.json").write_text(json.dumps({"cases": CASES, "models": MODELS}))
    other_side = [sys.executable, str(Path(__file__).with_name("bitsandbytes_side.py")), str(folder)]
    environment = os.environ | ({"PYTHONPATH": FOLDER} if FOLDER else {})
    run = subprocess.run(other_side, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return folder


def by_case(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    result: dict[str, dict[str, torch.Tensor]] = {case: {} for case in CASES}
    for name, tensor in load_file(file).items():
        case, _, key = name.partition("/")
        result[case][key] = tensor
    return result


def assert_same(case: str, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b), case
    assert all(same_bytes(a[name], b[name]) for name in a), case


def test_weights_packed_here_are_read_and_written_there(folder: Path) -> None:
    ours, seen = by_case(folder / "ours.safetensors"), by_case(folder / "ours_seen.safetensors")
    for case, tensors in seen.items():
        assert same_bytes(tensors.pop("dequantized"), PackedWeight.from_checkpoint(ours[case]).dequantize()), case
        assert_same(case, tensors, ours[case])


def test_weights_packed_there_are_read_and_written_here(folder: Path) -> None:
    for case, tensors in by_case(folder / "theirs.safetensors").items():
        values = tensors.pop("dequantized")
        packed = PackedWeight.from_checkpoint(tensors)
        assert same_bytes(packed.dequantize(), values), case
        assert_same(case, packed.to_checkpoint(), tensors)


@pytest.mark.parametrize("side", ["ours", "theirs"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models(folder: Path, name: str, side: str) -> None:
    path = folder / f"{side}-{name}"
    seen = load_file(path / "seen.bin")
    model = load(path, dtype=torch.float16)
    expected = seen.pop("logits")
    for key, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            assert same_bytes(layer.dequantize(), seen.pop(key)), key
        elif isinstance(layer, Linear8bit):
            layer.outliers = "batch"
            assert relative_error(layer(seen.pop(f"{key}.x")), seen.pop(f"{key}.y").double()) < INT8_LAYER, key
    assert not seen
    logits = model(load_file(folder / "tokens.safetensors")["tokens"]).logits
    assert relative_error(logits, expected.double()) < LOGITS["int8" if name == "int8" else "4bit"]
    model.save_pretrained(folder / f"again-{side}-{name}")
    written, read = (load_file(where / "model.safetensors") for where in (folder / f"again-{side}-{name}", path))
    assert_same(name, written, read)
