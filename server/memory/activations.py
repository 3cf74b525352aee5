"""How much memory a step takes while it runs, at the configured limits: an estimate from the shapes of a meta model.

A step's largest moment is in one block of a layer (its attention, its MLP, its experts) or at the logits. In a block,
what its linear layers give lives beside the residual stream, and beside those what the widest of them is given. At the
logits every sequence has a row of the vocabulary, in the model's dtype and in what the sampler makes of it, guesses
have rows beside those, and so have prompt tokens whose logprobs are wanted. To that comes what an allocator keeps of it
for the next step.
docs/memory.md holds the estimate beside what was measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.experts import find_experts
from server.records import SCORED_SLICE_ROWS

RESIDUALS: Final = 3
"""Rows of the hidden size beside a block's own: the residual stream, the block's input, and its norm's."""
PRODUCTS: Final = 2
"""How often a block's widest input is there at once: as it is made (an activation times a gate), and as it is used."""
MOST_RETAINED: Final = 64 << 20
"""Freed and kept beside what is in use at the largest moment: about two of the largest blocks, of which malloc's heap
has none above 32 MiB (allocator.py)."""
MOST_PARTS: Final = 64 << 20
"""What attention of single rows puts together, at most (csrc/cuda/attention_plan.h)."""
SAMPLING_BYTES: Final = 48
"""Per logit of a row that is sampled with top_p: scores, probabilities and their order in float32, int64 and float64
(server/model/sampler.py, filters.py)."""
SCORING_BYTES: Final = 8
"""Per logit of a slice of rows whose tokens get logprobs: the logit and its logarithm in float32
(server/model/logprobs.py)."""


Widths = Mapping[str, tuple[int, int]]
"""Per module with linear layers of its own: numbers per token of all they give, and of the widest input."""


def activation_bytes(
    config: transformers.PretrainedConfig, widths: Widths, dtype: torch.dtype, tokens: int, rows: int, scored: int
) -> int:
    """Bytes of a step of `tokens` tokens at its largest moment, where `rows` of them have logits that are sampled, and
    `scored` have logits that say how likely a prompt's tokens are."""
    text = config.get_text_config(decoder=True)
    widest_input = max((taken for _, taken in widths.values()), default=0)
    at_logits = tokens * int(text.hidden_size) * dtype.itemsize
    sampling = rows * int(text.vocab_size) * SAMPLING_BYTES
    scoring = logits_bytes(config, dtype, rows + scored)  # the rows of those who ask, which may be all
    scoring += min(SCORED_SLICE_ROWS, rows + scored) * int(text.vocab_size) * SCORING_BYTES
    at_logits += logits_bytes(config, dtype, rows + scored) + max(sampling, scoring)
    largest = tokens * widest_input * dtype.itemsize
    return max(_in_blocks(config, widths, dtype, tokens), at_logits) + min(MOST_RETAINED, 2 * largest)


def recorded_bytes(config: transformers.PretrainedConfig, widths: Widths, dtype: torch.dtype, rows: int) -> int:
    """Bytes that recordings of up to `rows` rows hold for what they compute in between (server/model/graphs.py): the
    largest moment of a step of so many tokens, without sampling, and attention's parts."""
    hidden = rows * int(config.get_text_config(decoder=True).hidden_size) * dtype.itemsize
    return max(_in_blocks(config, widths, dtype, rows), hidden + logits_bytes(config, dtype, rows)) + MOST_PARTS


def logits_bytes(config: transformers.PretrainedConfig, dtype: torch.dtype, rows: int) -> int:
    return rows * int(config.get_text_config(decoder=True).vocab_size) * dtype.itemsize


def _in_blocks(config: transformers.PretrainedConfig, widths: Widths, dtype: torch.dtype, tokens: int) -> int:
    widest = max((given + PRODUCTS * taken for given, taken in widths.values()), default=0)
    residuals = RESIDUALS * int(config.get_text_config(decoder=True).hidden_size)
    return tokens * (residuals + widest) * dtype.itemsize


def block_widths(model: transformers.PreTrainedModel) -> Widths:
    """Those of a model on the meta device; the head is none of them."""
    outputs: dict[str, int] = defaultdict(int)
    inputs: dict[str, int] = defaultdict(int)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for name, module in model.named_modules():
        if module is head:
            continue
        shape = _shape(module)
        if shape is not None:
            block = name.rpartition(".")[0]
            outputs[block] += shape[0]
            inputs[block] = max(inputs[block], shape[1])
    chosen = _experts_per_token(model.config.get_text_config(decoder=True))
    for name, projections in find_experts(model).items():
        widths = [len(projection.names) * projection.rows for projection in projections]
        outputs[name] = chosen * sum(widths)
        inputs[name] = chosen * max(projection.columns for projection in projections)
    return {block: (outputs[block], inputs[block]) for block in outputs}


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """[outputs, inputs] of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return None


def _experts_per_token(text: Any) -> int:
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    return 1
