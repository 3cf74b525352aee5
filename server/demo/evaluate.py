"""How well a model predicts held-out text of the demo's world: perplexity over whole documents. Needs torch.

The held-out text is not a file: a seed makes it, and `corpus` keeps it apart from every training document.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Prediction:
    """What a model made of one sequence; every token but the first was predicted."""

    nats: float
    """Negative log likelihood of the sequence."""
    guesses: tuple[int, ...]
    """The most probable token at each place, one for each predicted token."""


@torch.inference_mode()
def predict(model: Any, ids: list[int]) -> Prediction:
    """One sequence through a transformers causal language model: alone and unpadded, so that nothing else can matter.

    The likelihood is taken from the logits in float32 and summed in float64.
    """
    inputs = torch.tensor([ids], device=model.device)
    logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
    losses = F.cross_entropy(logits, inputs[0, 1:], reduction="none")
    return Prediction(float(losses.double().sum()), tuple(logits.argmax(-1).tolist()))


def perplexity(predictions: Sequence[Prediction]) -> float:
    """exp of the mean negative log likelihood per predicted token."""
    return math.exp(sum(each.nats for each in predictions) / sum(len(each.guesses) for each in predictions))
