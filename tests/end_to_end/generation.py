"""transformers' own greedy answer to a prompt, and how narrowly each of its tokens was chosen. Not a test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers


def greedy_with_gaps(
    model: transformers.PreTrainedModel, prompt: Sequence[int], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`generate` of `count` new tokens: the sequence that it gives, and per new token the gap between the two best
    logits, in standard deviations of all. Where that is small the order of a sum may decide.
    """
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(output.logits)
    best = logits.topk(2).values
    return output.sequences[0], (best[:, 0] - best[:, 1]) / logits.std(dim=1)
