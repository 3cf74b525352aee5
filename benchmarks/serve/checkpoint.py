"""The checkpoint that all measured servers load: 1.1 billion random parameters in TinyLlama's shape, with a tokenizer.

A model of random weights might end a text at any token, or emit pieces of characters, which servers hold back. So the
output head's rows of the end mark and of single bytes are zero: their logits are 0, and the largest of 32,000 random
ones is not. Greedy answers are then as long as asked for, and every token is a word.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import torch
import transformers

from benchmarks import load_memory
from benchmarks.model_speed import LLAMA_CPP_SIDE
from benchmarks.serve.prompts import END, tokenizer

NOT_WORDS: Final = 257
"""The end mark and the bytes: the first tokens of prompts.tokenizer."""


def make_checkpoint(directory: Path) -> Path:
    """Writes it once, in bfloat16."""
    target = directory / "llama-1b-serve"
    if not (target / "tokenizer.json").is_file():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            load_memory.make_checkpoint(directory), dtype=torch.bfloat16
        )
        with torch.no_grad():
            model.lm_head.weight[:NOT_WORDS] = 0
        for config in (model.config, model.generation_config):
            config.bos_token_id, config.eos_token_id = None, 0
        model.save_pretrained(target)
        made = tokenizer(load_memory.VOCABULARY)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)  # type: ignore[no-untyped-call]
        fast.save_pretrained(target)
    return target


def make_gguf(checkpoint: Path, kind: str, python: Path) -> Path:
    """The same for llama.cpp, written by an interpreter that has gguf and numpy."""
    file = checkpoint.with_name(f"{checkpoint.name}-{kind}.gguf")
    if not file.is_file():
        partial = file.with_suffix(".partial")
        subprocess.run([python, LLAMA_CPP_SIDE, "write", checkpoint, partial, kind], check=True)
        partial.rename(file)
    return file
