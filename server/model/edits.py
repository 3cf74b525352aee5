"""What changes logits before temperature: biases, penalties, and tokens that are ruled out; rows with a History only.

In this order, which is transformers' (`_get_logits_processor`) and, as far as the order matters, vLLM's (`Sampler`):

    logit_bias            x + bias
    repetition_penalty    x / penalty where x > 0, else x * penalty      tokens of the prompt and generated ones
    frequency_penalty     x - penalty * how often it was generated       generated tokens (OpenAI's definition)
    presence_penalty      x - penalty, if it was generated at all        generated tokens (OpenAI's definition)
    allowed_token_ids     -inf for every other token
    bad_words             -inf for the last token of a word whose others came just before (prompt included)
    min_tokens            -inf for the stop ids, while too few tokens have been generated

No loop goes over the vocabulary, nor over a row's tokens: all rows' entries are joined into one index (row, token),
which is gathered, changed and scattered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from server.model.history import History, Tokens
from server.model.transfer import on_device

Index = tuple[torch.Tensor, torch.Tensor]
"""Rows and tokens, both int64 of the same length."""


def edit(scores: torch.Tensor, histories: Sequence[History]) -> None:
    """Changes scores [rows, vocabulary] float32 in place, each row by its own history."""
    _bias(scores, histories)
    _penalise(scores, histories)
    _allow(scores, histories)
    _ban(scores, histories)


def _bias(scores: torch.Tensor, histories: Sequence[History]) -> None:
    index = _index([history.biased for history in histories], scores.device)
    if index is not None:
        biases = on_device(np.concatenate([history.biases for history in histories]), scores.device, torch.float32)
        scores[index] += biases  # each token is there once per row


def _penalise(scores: torch.Tensor, histories: Sequence[History]) -> None:
    counted = [(row, history.params, history.counts) for row, history in enumerate(histories) if history.counts]
    if not counted:
        return
    rows, params, counts = zip(*counted, strict=True)
    index = _index([each.tokens for each in counts], scores.device, rows)
    if index is None:
        return

    def per_entry(values: list[float]) -> torch.Tensor:
        """A value per row as a value per entry of the index."""
        return on_device(np.repeat(np.array(values, dtype=np.float32), lengths), scores.device, torch.float32)

    lengths = [len(each.tokens) for each in counts]
    generated = on_device(np.concatenate([each.generated for each in counts]), scores.device)
    repetition = per_entry([each.repetition_penalty for each in params])
    frequency = per_entry([each.frequency_penalty for each in params])
    presence = per_entry([each.presence_penalty for each in params])
    found = scores[index]
    found = torch.where(found > 0, found / repetition, found * repetition)
    found -= frequency * generated
    found -= presence * (generated > 0)
    scores[index] = found


def _allow(scores: torch.Tensor, histories: Sequence[History]) -> None:
    limited = [(row, history.allowed) for row, history in enumerate(histories) if history.allowed is not None]
    if not limited:
        return
    rows, allowed = zip(*limited, strict=True)
    index = _index(list(allowed), scores.device, rows)
    ruled_out = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    ruled_out[on_device(rows, scores.device)] = True
    if index is not None:
        ruled_out[index] = False
    scores.masked_fill_(ruled_out, -torch.inf)


def _ban(scores: torch.Tensor, histories: Sequence[History]) -> None:
    index = _index([np.array(history.banned(), dtype=np.int64) for history in histories], scores.device)
    if index is not None:
        scores[index] = -torch.inf


def _index(tokens: Sequence[Tokens], device: torch.device, rows: Sequence[int] | None = None) -> Index | None:
    """Each row's tokens as one index, None where there are none; `rows` numbers the rows if they are not all."""
    lengths = [len(each) for each in tokens]
    if not any(lengths):
        return None
    numbers = np.arange(len(tokens)) if rows is None else np.array(rows)
    both = on_device(np.stack([np.repeat(numbers, lengths), np.concatenate(tokens)]), device)
    return both[0], both[1]
