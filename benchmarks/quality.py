"""What quantization costs in quality: held-out perplexity of the demo model in each format.

    python -m benchmarks.quality [--documents 400] [--model DIR]

Loads server/demo/model once per format through transformers and `quant`, in bfloat16, and predicts the same held-out
documents, which server/demo/corpus makes from a seed and keeps apart from all training text. For each format: the
perplexity per token; how many nats per token are lost against bfloat16, with a standard error taken over documents
(the same documents in both, so the difference is far better known than either side); how often the most probable
token is bfloat16's; bits per weight of what is quantized with all its statistics, and bytes of the whole model. Then
the same with the embedding packed too, which in this model is the output layer as well, and 4 bits with int8
activations.
Results: benchmarks/results/quality.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
import transformers
from tokenizers import Tokenizer

import quant  # noqa: F401 - registers the quantizer
from benchmarks import RESULTS
from benchmarks.hardware import describe
from quant.config import OVERRIDABLE, PRESETS, BitsAndBytesConfig, from_spec
from quant.memory import measure_weights
from quant.packed import PackedModule
from server.demo import DEMO_MODEL_PATH
from server.demo.evaluate import HELDOUT_SEED, Prediction, heldout_ids, perplexity, predict

FORMATS: Final = ("none", *(name for name in PRESETS if name != "none"))
BASELINE: Final = FORMATS[0]
INT8_ACTIVATIONS: Final = ", int8 activations"
"""After a preset's name: its 4-bit layers compute with activations rounded to int8."""
EMBEDDINGS: Final[tuple[tuple[str, str | None], ...]] = (
    *((name, None) for name in FORMATS),
    *((name, name) for name in FORMATS if name != BASELINE),
    ("nf4-dq", "int8"),
    *((name + INT8_ACTIVATIONS, None) for name in ("nf4", "fp4", "nf4-dq")),
)
"""What is measured: the linear layers' format and the embedding's, which is tied to the output; None: not packed."""
SHOWN: Final = {BASELINE: "bf16"}
"""Names in the table, where they differ from the preset's."""


@dataclass(frozen=True)
class Row:
    """One format's result."""

    quantization: str
    embedding: str | None
    perplexity: float
    nats_lost: float
    """Mean negative log likelihood per token, minus bfloat16's."""
    nats_lost_error: float
    """Standard error of `nats_lost` over documents."""
    same_first_choice: float
    """The share of tokens at which the most probable token is bfloat16's."""
    bits_per_weight: float
    """Of the layers and embeddings that are quantized, statistics included."""
    model_bytes: int
    """All parameters and buffers."""
    seconds: float


def bits_per_weight(model: torch.nn.Module) -> float:
    """8 * bytes of weights and statistics / number of weights, over the quantized layers; 16 where there are none."""
    layers = [module for module in model.modules() if isinstance(module, PackedModule)]
    if not layers:
        return 16.0
    stored = sum(
        tensor.nbytes
        for layer in layers
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
        if name != "bias"
    )
    return 8 * stored / sum(math.prod(layer.matrix_shape) for layer in layers)


def config_of(name: str, embedding: str | None) -> BitsAndBytesConfig | None:
    """The config that packs linear layers in one preset's format and the embedding in another's, or not at all."""
    config = from_spec(name.removesuffix(INT8_ACTIVATIONS), compute_dtype=torch.bfloat16)
    if config is not None and name.endswith(INT8_ACTIVATIONS):
        config.bnb_4bit_activations = "int8"
    own = None if embedding is None else from_spec(embedding, compute_dtype=torch.bfloat16)
    if config is None or own is None:
        return config
    given = own.to_dict()
    fields = {key: given[key] for key in OVERRIDABLE if key in given}
    overrides = {} if embedding == name else {"embed_tokens": fields}
    return BitsAndBytesConfig(**(config.to_dict() | {"quantize_embeddings": True, "module_overrides": overrides}))


def run(
    name: str,
    embedding: str | None,
    directory: Path,
    sequences: list[list[int]],
    baseline: list[Prediction] | None,
) -> tuple[Row, list[Prediction]]:
    """Loads one format and predicts every sequence; `baseline` is bfloat16's predictions, None while they are made."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        quantization_config=config_of(name, embedding),
        local_files_only=True,
    )
    started = time.monotonic()
    predictions = [predict(model, ids) for ids in sequences]
    seconds = time.monotonic() - started
    compared = baseline or predictions
    lost = [mine.nats - theirs.nats for mine, theirs in zip(predictions, compared, strict=True)]
    tokens = sum(len(each.guesses) for each in predictions)
    same = sum(
        mine == theirs
        for ours, base in zip(predictions, compared, strict=True)
        for mine, theirs in zip(ours.guesses, base.guesses, strict=True)
    )
    row = Row(
        quantization=SHOWN.get(name, name),
        embedding=embedding,
        perplexity=round(perplexity(predictions), 4),
        nats_lost=round(sum(lost) / tokens, 5),
        nats_lost_error=round(statistics.stdev(lost) * len(lost) ** 0.5 / tokens, 5),
        same_first_choice=round(same / tokens, 4),
        bits_per_weight=round(bits_per_weight(model), 3),
        model_bytes=sum(measure_weights(model).values()),
        seconds=round(seconds, 1),
    )
    return row, predictions


def table(rows: list[Row], documents: int, tokens: int) -> str:
    """The result as Markdown, the machine named below it."""
    lines = [
        "# Quality of the demo model by format",
        "",
        f"Held-out text: {documents} documents, {tokens} predicted tokens, seed {HELDOUT_SEED}. "
        "Made by `python -m benchmarks.quality`.",
        "",
        "| format | embedding | perplexity | nats per token lost | same first choice as bf16 | bits per weight "
        "| model, bytes |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lost = "-" if row.quantization == SHOWN[BASELINE] else f"{row.nats_lost:+.5f} ± {row.nats_lost_error:.5f}"
        lines.append(
            f"| {row.quantization} | {row.embedding or 'bf16'} | {row.perplexity:.4f} | {lost} "
            f"| {row.same_first_choice:.2%} | {row.bits_per_weight:.3f} | {row.model_bytes:,} |"
        )
    lines += ["", "Machine: " + ", ".join(f"{key} {value}" for key, value in describe().items()) + ".", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out perplexity of the demo model in each format.")
    parser.add_argument("--documents", type=int, default=400, help="held-out documents (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_PATH, help="checkpoint (default: the demo)")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    sequences = heldout_ids(Tokenizer.from_file(str(arguments.model / "tokenizer.json")), arguments.documents)
    tokens = sum(len(ids) - 1 for ids in sequences)
    baseline: list[Prediction] | None = None
    rows: list[Row] = []
    for name, embedding in EMBEDDINGS:
        row, predictions = run(name, embedding, arguments.model, sequences, baseline)
        baseline = baseline or predictions
        rows.append(row)
        print(
            f"{row.quantization:8} {embedding or 'bf16':8} perplexity {row.perplexity:.4f}  {row.seconds} s", flush=True
        )
    text = table(rows, len(sequences), tokens)
    print("\n" + text)
    result = {
        "command": "python -m benchmarks.quality",
        "documents": len(sequences),
        "tokens": tokens,
        "heldout_seed": HELDOUT_SEED,
        "machine": describe(),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "quality.md").write_text(text)


if __name__ == "__main__":
    main()
