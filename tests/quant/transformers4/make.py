"""Writes the checkpoints beside it: tiny random mixtures of experts that transformers 4 and bitsandbytes quantized.

Not a test. Run in an environment of its own:

    pip install "transformers==4.57.6" "bitsandbytes==0.50.2" "torch==2.13.0" accelerate
    python tests/quant/transformers4/make.py

Each folder holds what save_pretrained wrote, and in expected.safetensors token ids with the logits that the saved
model, loaded again by the same libraries on a CPU, gives for them in float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, Any] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True},
}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
CASES = (("mixtral", "nf4"), ("mixtral", "int8"), ("qwen3_moe", "nf4-dq"), ("qwen3_moe", "int8"))


def make(architecture: str, form: str, source: Path, target: Path) -> None:
    """Quantizes the model in `source` and saves it, with what it computes."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    how = {"device_map": "cpu", "dtype": torch.float32}
    load(source, quantization_config=transformers.BitsAndBytesConfig(**FORMATS[form]), **how).save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    # bitsandbytes' CPU kernel for inference refuses a router of four rows; in training it dequantizes.
    model = load(target, **how).train(form != "int8")
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    save_file({"ids": ids, "logits": logits.contiguous()}, target / "expected.safetensors")


def main() -> None:
    for architecture, form in CASES:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(architecture, **SHAPE, **MODELS[architecture])
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(6.0)  # logits far from ties
        with tempfile.TemporaryDirectory() as source:
            model.save_pretrained(source)
            make(architecture, form, Path(source), Path(__file__).parent / f"{architecture}-{form}")


if __name__ == "__main__":
    main()
