"""The other process of test_bitsandbytes.py: reads and writes files with bitsandbytes itself, and never imports ours.

Not a test. Usage: python bitsandbytes_side.py FOLDER, with what the test has put there; see main().
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from bitsandbytes import functional
from safetensors.torch import load_file, save_file

DTYPE = torch.float16
"""Of the models: bitsandbytes' int8 rounds activations to it anyway."""


def main(folder: Path) -> None:
    """Weights: `ours.safetensors` is read, `sources.safetensors` quantized. Models: `ours-*`, `source`.

    plan.json holds {"cases": {name: arguments of quantize_4bit}, "models": {name: arguments of BitsAndBytesConfig}}.
    """
    transformers.utils.logging.disable_progress_bar()
    plan = json.loads((folder / "plan.json").read_text())
    save_file(read_back(load_file(folder / "ours.safetensors"), plan["cases"]), folder / "ours_seen.safetensors")
    sources = load_file(folder / "sources.safetensors")
    save_file(quantize(sources, plan["cases"]), folder / "theirs.safetensors")
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    for name, arguments in plan["models"].items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / f"ours-{name}", dtype=DTYPE)
        save_file(seen(model, tokens), folder / f"ours-{name}" / "seen.bin")
        config = transformers.BitsAndBytesConfig(**arguments)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "source", dtype=DTYPE, quantization_config=config
        )
        model.save_pretrained(folder / f"theirs-{name}")
        save_file(seen(model, tokens), folder / f"theirs-{name}" / "seen.bin")


def read_back(tensors: dict[str, torch.Tensor], cases: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What bitsandbytes makes of packed tensors: the values, and the tensors that it would write itself."""
    result = {}
    for case in cases:
        own = {key.removeprefix(f"{case}/"): value for key, value in tensors.items() if key.startswith(f"{case}/")}
        weight = own.pop("weight")
        parameter = bnb.nn.Params4bit.from_prequantized(
            weight, {key.removeprefix("weight."): value for key, value in own.items()}, device="cpu"
        )
        result |= written(case, parameter.data, parameter.quant_state)
    return result


def quantize(sources: dict[str, torch.Tensor], cases: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    result = {}
    for case, arguments in cases.items():
        storage = getattr(torch, arguments["quant_storage"])
        packed, state = functional.quantize_4bit(sources[case], **(arguments | {"quant_storage": storage}))
        result |= written(case, packed, state)
    return result


def written(case: str, packed: torch.Tensor, state: Any) -> dict[str, torch.Tensor]:
    tensors = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    tensors["dequantized"] = functional.dequantize_4bit(packed, state)
    return {f"{case}/{key}": value.clone() for key, value in tensors.items()}


@torch.no_grad()
def seen(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The dequantized 4-bit weights, the products of int8 layers with a random input, and the logits."""
    result = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):  # before a forward pass, which repacks the weight on a CPU
            result[name] = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            x = torch.randn(5, module.in_features, dtype=DTYPE)
            x[1:3, 7] = 9.0
            result[f"{name}.x"], result[f"{name}.y"] = x, module(x)
    return result | {"logits": model(tokens).logits.contiguous()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
