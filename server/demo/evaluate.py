"""How well a model predicts held-out text of the demo's world: perplexity over whole documents. Needs torch.

The held-out text is not a file: a seed makes it, and `corpus` keeps it apart from every training document.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from server.demo.corpus import documents
from server.demo.tokenizer import encode_document

HELDOUT_SEED: Final = 1


def heldout_ids(tokenizer: Tokenizer, count: int, seed: int = HELDOUT_SEED) -> list[list[int]]:
    """The token ids of the first `count` held-out documents, each from <|bos|> to <|eos|>."""
    return [encode_document(tokenizer, made) for made in itertools.islice(documents("heldout", seed), count)]


@torch.inference_mode()
def perplexity(model: Any, sequences: list[list[int]]) -> tuple[float, int]:
    """exp of the mean negative log likelihood in nats per token, and how many tokens were predicted.

    Every token but a sequence's first counts. Sequences run one at a time, unpadded, so that padding cannot matter;
    log likelihoods are summed in float64. `model` is a transformers causal language model.
    """
    total, counted = 0.0, 0
    for ids in sequences:
        inputs = torch.tensor([ids], device=model.device)
        logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, inputs[0, 1:], reduction="none").double().sum())
        counted += len(ids) - 1
    return math.exp(total / counted), counted
