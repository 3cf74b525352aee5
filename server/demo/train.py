"""Trains the demo model on a CPU and writes its checkpoint: python -m server.demo.train

Two runs on one kind of processor with one version of torch give the same bytes, whatever the number of threads: the
text, its order, the first weights and every step are seeded. Needs torch; the server never imports this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.demo import DEMO_MODEL_PATH
from server.demo.corpus import Split, digest, documents
from server.demo.tokenizer import BOS, CHAT_TEMPLATE, EOS, PAD, encode_document, special_id, train_tokenizer

IGNORED = -100
"""The label that transformers' loss leaves out."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out of a training run."""

    seed: int = 7
    vocabulary_size: int = 2048
    tokenizer_documents: int = 6000
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 1024
    """Longest sequence the model is made for, in tokens; the last part of the training uses it."""
    short_steps: int = 1000
    short_row: int = 256
    short_rows: int = 6
    """Tokens of a row, and rows of a step, in the first stage: small steps, and many of them."""
    long_steps: int = 260
    long_rows: int = 2
    """Steps of the second stage and their rows, each `context` long: so that every position gets trained."""
    peak_rate: float = 3e-3
    warmup_steps: int = 80
    decay_share: float = 0.6
    """The share of the steps, at the end, over which the rate falls to zero in a line."""
    weight_decay: float = 0.1

    @property
    def steps(self) -> int:
        return self.short_steps + self.long_steps

    @property
    def tokens(self) -> int:
        return self.short_steps * self.short_rows * self.short_row + self.long_steps * self.long_rows * self.context


def make_model(recipe: Recipe, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A model with seeded first weights, in float32."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=special_id(tokenizer, BOS),
        eos_token_id=special_id(tokenizer, EOS),
        pad_token_id=special_id(tokenizer, PAD),
    )
    return LlamaForCausalLM(config)


def packed_rows(tokenizer: Tokenizer, split: Split, seed: int, length: int, pad: int) -> Iterator[list[int]]:
    """Rows of exactly `length` tokens: whole documents, the longest that fits first, from a window of 64.

    A document longer than a row is cut. What stays empty at a row's end is `pad`.
    """
    stream = (encode_document(tokenizer, document)[:length] for document in documents(split, seed))
    window = sorted(itertools.islice(stream, 64), key=len)
    while True:
        row: list[int] = []
        while True:
            fits = [index for index, ids in enumerate(window) if len(row) + len(ids) <= length]
            if not fits:
                break
            row += window.pop(fits[-1])
            window = sorted([*window, next(stream)], key=len)
        yield row + [pad] * (length - len(row))


def batches(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """One int64 tensor [rows, row length] for each step."""
    pad = special_id(tokenizer, PAD)
    stages = (
        (recipe.short_steps, recipe.short_rows, recipe.short_row),
        (recipe.long_steps, recipe.long_rows, recipe.context),
    )
    for stage, (steps, rows_of_a_step, length) in enumerate(stages):
        rows = packed_rows(tokenizer, "train", recipe.seed * 10 + stage, length, pad)
        for _ in range(steps):
            yield torch.tensor(list(itertools.islice(rows, rows_of_a_step)))


def rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step: up in a line, level, then down to zero in a line."""
    rising = (step + 1) / recipe.warmup_steps
    falling = (recipe.steps - step) / (recipe.steps * recipe.decay_share)
    return recipe.peak_rate * min(1.0, rising, falling)


def make_optimizers(recipe: Recipe, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    Muon costs half as much again per step here and needs fewer than half the steps: after 300 steps of 1,024 tokens
    the held-out loss was 1.29 nats with it and 2.22 with AdamW alone, both at their rate of 3e-3.
    """
    embedding = model.get_input_embeddings().weight
    matrices = [each for each in model.parameters() if each.dim() == 2 and each is not embedding]
    others = [each for each in model.parameters() if each.dim() != 2 or each is embedding]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.peak_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.peak_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(recipe: Recipe, tokenizer: Tokenizer, *, report_every: int = 50) -> tuple[LlamaForCausalLM, list[float]]:
    """The trained model in float32, and the loss of every step in nats per token."""
    model = make_model(recipe, tokenizer)
    optimizers = make_optimizers(recipe, model)
    pad, began = special_id(tokenizer, PAD), time.monotonic()
    losses: list[float] = []
    model.train()
    for step, rows in enumerate(batches(recipe, tokenizer)):
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = rate(recipe, step)
        labels = torch.where(rows == pad, IGNORED, rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if report_every and (step + 1) % report_every == 0:
            recent = sum(losses[-report_every:]) / report_every
            print(f"step {step + 1}/{recipe.steps}  loss {recent:.3f}  {time.monotonic() - began:.0f} s", flush=True)
    model.train(False)
    return model, losses


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, path: Path) -> None:
    """Writes weights (bfloat16 safetensors), configs, tokenizer and chat template as transformers reads them."""
    path.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )
    model.bfloat16().save_pretrained(path)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)  # safetensors writes 0600; another user may serve it


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model and write its checkpoint.")
    parser.add_argument("--out", type=Path, default=DEMO_MODEL_PATH, help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads; the weights do not depend on it (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe()
    wall, cpu = time.monotonic(), time.process_time()
    tokenizer = train_tokenizer(
        itertools.islice(documents("train", recipe.seed), recipe.tokenizer_documents), recipe.vocabulary_size
    )
    model, losses = train(recipe, tokenizer)
    save(model, tokenizer, arguments.out)
    facts = {
        "recipe": asdict(recipe),
        "text_digest": digest(recipe.seed),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": recipe.tokens,
        "last_100_losses": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "wall_seconds": round(time.monotonic() - wall),
        "cpu_seconds": round(time.process_time() - cpu),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    (arguments.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
