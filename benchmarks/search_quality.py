"""What the search for scales and signs gains at the same size: squared error, and the demo model's perplexity.

    python -m benchmarks.search_quality [--documents 150] [--model DIR]

Squared error: 2^22 values drawn from a normal distribution and from Student's t with 5 degrees of freedom, which has
the heavier tails of trained weights, in blocks of 64. Perplexity: held-out documents through server/demo/model in
bfloat16 and in 4 bits with and without `bnb_4bit_search`, the same documents in each; nats lost per token against
bfloat16 with a standard error over documents. Results: benchmarks/results/search_quality.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
import transformers
from tokenizers import Tokenizer

from benchmarks import RESULTS
from benchmarks.hardware import describe
from quant import BitsAndBytesConfig
from quant.state import Packed4bit
from server.demo import DEMO_MODEL_PATH
from server.demo.evaluate import HELDOUT_SEED, Prediction, heldout_ids, perplexity, predict

VALUES: Final = 1 << 22
SEED: Final = 0
DISTRIBUTIONS: Final = {"normal": torch.distributions.Normal(0.0, 1.0), "Student t5": torch.distributions.StudentT(5.0)}
FORMATS: Final = tuple((quant_type, nested) for quant_type in ("nf4", "fp4") for nested in (False, True))


@dataclass(frozen=True)
class ErrorRow:
    """Mean squared errors relative to the mean square of the values."""

    distribution: str
    format: str
    plain: float
    searched: float
    search_seconds: float
    search_processor_seconds: float


@dataclass(frozen=True)
class ModelRow:
    """One way to pack the demo model."""

    format: str
    perplexity: float
    nats_lost: float
    nats_lost_error: float


def name_of(quant_type: str, nested: bool) -> str:
    return quant_type + ("-dq" if nested else "")


def errors() -> list[ErrorRow]:
    """Every distribution in every format."""
    rows = []
    for distribution, source in DISTRIBUTIONS.items():
        torch.manual_seed(SEED)
        values = source.sample((VALUES,))
        for quant_type, nested in FORMATS:
            relative = []
            for search in (False, True):
                started, processor = time.perf_counter(), time.process_time()
                packed = Packed4bit.quantize(values, quant_type, double_quant=nested, search=search)
                seconds, processor = time.perf_counter() - started, time.process_time() - processor
                relative.append(float((packed.dequantize() - values).square().sum() / values.square().sum()))
            rows.append(
                ErrorRow(
                    distribution,
                    name_of(quant_type, nested),
                    relative[0],
                    relative[1],
                    round(seconds, 4),
                    round(processor, 4),
                )
            )
    return rows


def predict_all(directory: Path, config: BitsAndBytesConfig | None, sequences: list[list[int]]) -> list[Prediction]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=config, local_files_only=True
    )
    return [predict(model, ids) for ids in sequences]


def perplexities(directory: Path, sequences: list[list[int]]) -> list[ModelRow]:
    """bfloat16, then each format without and with the search."""
    baseline = predict_all(directory, None, sequences)
    rows = [ModelRow("bf16", perplexity(baseline), 0.0, 0.0)]
    tokens = sum(len(each.guesses) for each in baseline)
    for quant_type, nested in FORMATS:
        for search in (False, True):
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant_type,
                bnb_4bit_use_double_quant=nested,
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_search=search,
            )
            predictions = predict_all(directory, config, sequences)
            lost = [mine.nats - theirs.nats for mine, theirs in zip(predictions, baseline, strict=True)]
            rows.append(
                ModelRow(
                    name_of(quant_type, nested) + (" searched" if search else ""),
                    perplexity(predictions),
                    sum(lost) / tokens,
                    statistics.stdev(lost) * len(lost) ** 0.5 / tokens,
                )
            )
            print(f"{rows[-1].format:18} perplexity {rows[-1].perplexity:.4f}", flush=True)
    return rows


def table(error_rows: list[ErrorRow], model_rows: list[ModelRow], documents: int) -> str:
    """Both results as Markdown."""
    lines = [
        "# The search for scales and signs, `bnb_4bit_search`",
        "",
        f"Squared error relative to the values' own square, {VALUES} values, blocks of 64. "
        "Made by `python -m benchmarks.search_quality`.",
        "",
        "| distribution | format | plain | searched | change |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in error_rows:
        change = row.searched / row.plain - 1
        lines.append(f"| {row.distribution} | {row.format} | {row.plain:.5f} | {row.searched:.5f} | {change:+.1%} |")
    lines += [
        "",
        f"The demo model on {documents} held-out documents (seed {HELDOUT_SEED}).",
        "",
        "| format | perplexity | nats per token lost |",
        "| --- | ---: | ---: |",
    ]
    for each in model_rows:
        lost = "-" if each.format == "bf16" else f"{each.nats_lost:+.5f} ± {each.nats_lost_error:.5f}"
        lines.append(f"| {each.format} | {each.perplexity:.4f} | {lost} |")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines += [
        "",
        f"Seconds per million weights, medians, {torch.get_num_threads()} threads "
        f"(load averages over 1, 5 and 15 minutes: {load}; above about {torch.get_num_threads()} others were using the "
        "machine, for which processor time does not count):",
        "",
        "| format | seconds | processor seconds of all threads |",
        "| --- | ---: | ---: |",
    ]
    for quant_type, nested in FORMATS:
        group = [row for row in error_rows if row.format == name_of(quant_type, nested)]
        seconds = statistics.median(row.search_seconds for row in group) / VALUES * 1e6
        processor = statistics.median(row.search_processor_seconds for row in group) / VALUES * 1e6
        lines.append(f"| {name_of(quant_type, nested)} searched | {seconds:.3f} | {processor:.3f} |")
    lines += [
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in describe().items()) + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and writes the two result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=150, help="held-out documents (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_PATH, help="checkpoint (default: the demo)")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    sequences = heldout_ids(Tokenizer.from_file(str(arguments.model / "tokenizer.json")), arguments.documents)
    error_rows, model_rows = errors(), perplexities(arguments.model, sequences)
    text = table(error_rows, model_rows, len(sequences))
    print("\n" + text)
    content = {
        "machine": describe(),
        "documents": len(sequences),
        "errors": [asdict(row) for row in error_rows],
        "model": [asdict(row) for row in model_rows],
    }
    (RESULTS / "search_quality.json").write_text(json.dumps(content, indent=2) + "\n")
    (RESULTS / "search_quality.md").write_text(text)


if __name__ == "__main__":
    main()
