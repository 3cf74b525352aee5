"""transformers' own greedy answer to a prompt, and how narrowly each of its tokens was chosen. Not a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import transformers


class Greedy(NamedTuple):
    sequence: torch.Tensor
    """What `generate` gives: with the prompt, or what a decoder begins after."""
    logits: torch.Tensor
    """Of each new token's step, [new tokens, vocabulary]."""

    @property
    def gaps(self) -> torch.Tensor:
        """Between the two best logits of each step, in standard deviations of all. Where that is small the order of a
        sum may decide."""
        best = self.logits.topk(2).values
        return (best[:, 0] - best[:, 1]) / self.logits.std(dim=1)


def greedy(model: transformers.PreTrainedModel, prompt: Sequence[int], count: int) -> Greedy:
    """`generate` of `count` new tokens."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Greedy(output.sequences[0], torch.cat(output.logits))
