"""The sampler's tokens on the host. Not a test."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.model.batch import Draw
from server.model.sampler import sample


def sampled(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token per row, or what stands for a fault: the same by torch's maximum and by quant's."""
    tokens: list[int] = sample(logits, draws).tolist()
    with torch.inference_mode():
        assert sample(logits, draws).tolist() == tokens
    return tokens
