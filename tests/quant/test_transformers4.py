"""Mixtures of experts that transformers 4 and bitsandbytes wrote: experts were linear layers then, routers packed too.

How the files in transformers4/ were made says make.py there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from quant import BitsAndBytesConfig, PackedWeight, memory
from quant.experts import PackedExperts
from quant.linear import PackedLinear

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "transformers4").glob("*/expected.safetensors"))
TOLERANCE = {"nf4": 5e-6, "nf4-dq": 5e-6, "int8": 0.025}
"""Of the logits' norm. In int8 bitsandbytes passes through float16 and rounds the router's inputs too."""


def test_every_case_is_there() -> None:
    assert [folder.name for folder in FOLDERS] == ["mixtral-int8", "mixtral-nf4", "qwen3_moe-int8", "qwen3_moe-nf4-dq"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_and_bytes(folder: Path, tmp_path: Path) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    (experts,) = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert {projection.experts for projection in experts.projections.values()} == {4}
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 4  # attention

    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model(input_ids=expected["ids"]).logits
    error = float((logits - expected["logits"]).norm() / expected["logits"].norm())
    assert error < TOLERANCE[folder.name.partition("-")[2]]

    tensors = load_file(folder / "model.safetensors")
    router = next(name for name in tensors if name.endswith(".gate.weight")).removesuffix("weight")
    packed = {name.removeprefix(router): tensor for name, tensor in tensors.items() if name.startswith(router)}
    values = next(p for name, p in model.named_parameters() if name.endswith(".gate.weight"))
    assert torch.equal(values, PackedWeight.from_checkpoint(packed).dequantize(torch.float32))

    config = BitsAndBytesConfig.from_dict(memory.read_config(folder).quantization_config)
    assert memory.predict_weights(folder, config, torch.float32) == memory.measure_weights(model)

    model.save_pretrained(tmp_path)  # the same but for the router, which is values now
    written = load_file(tmp_path / "model.safetensors")
    assert set(tensors) - set(written) == {router + name for name in packed} - {f"{router}weight"}
    for name, tensor in written.items():
        if not name.startswith(router):
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor, tensors[name]), name
