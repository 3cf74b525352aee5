"""What a step makes of its logits on a GPU: one wait, at its end, and no copy but by way of pinned memory.

There need not be a GPU. Tensors on torch's meta device have no contents, so whatever would wait for contents raises,
and so does a copy to that device that doesn't come by `on_device`, which is replaced here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from server.model import edits, filters, readout, sampler
from server.model.batch import Chunk, Draw, Score, StepResult
from server.model.history import History
from server.model.transfer import on_device
from server.records import SamplingParams

VOCABULARY = 50
GPU = "meta"
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.4},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "presence_penalty": {"presence_penalty": 0.3},
    "frequency_penalty": {"frequency_penalty": 0.3},
    "logit_bias": {"logit_bias": ((3, 1.0),)},
    "allowed_token_ids": {"allowed_token_ids": (1, 2)},
    "bad_words": {"bad_words": ((3,), (1, 2))},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (1,)},
    "logprobs": {"logprobs": 2},
}


class TransferError(Exception):
    """The step has come to its transfer."""


class PretendedGpu(TorchFunctionMode):
    """Refuses copies from the host to the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made_there = func in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")) == GPU
        if made_there or (func is torch.Tensor.to and args[0].device.type == "cpu"):
            raise CopyError(f"{func} copies")
        return func(*args, **kwargs)


class CopyError(Exception):
    pass


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    def sent(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(np.shape(values), dtype=dtype, device=device)

    def brought(*_: object) -> None:
        raise TransferError

    for module in (edits, filters, readout, sampler):
        monkeypatch.setattr(module, "on_device", sent)
    monkeypatch.setattr(readout, "_bring", brought)
    return PretendedGpu()


def chunk(name: str, *, drafted: int = 0, scored: int = 0, **settings: Any) -> Chunk:
    params = SamplingParams(max_tokens=10, **settings)
    draw = Draw(params, 1, 2, History.needed(params, [1, 2, 3]))
    score = Score(list(range(scored)), 3) if scored else None
    return Chunk(name, [1, 2, 3, 4, 5, 6], 10, [0], draw, score, drafted=drafted)


def reads(chunks: list[Chunk], gpu: PretendedGpu) -> None:
    with gpu, torch.inference_mode():
        logits = torch.empty(sum(one.wanted for one in chunks), VOCABULARY, device=GPU, dtype=torch.bfloat16)
        readout.read_logits(chunks, logits, StepResult())


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_waits_before_the_transfer(name: str, pretended_gpu: PretendedGpu) -> None:
    with pytest.raises(TransferError):
        reads([chunk("a", **SETTINGS[name])], pretended_gpu)


def test_nor_does_a_batch_of_everything_at_once(pretended_gpu: PretendedGpu) -> None:
    chunks = [chunk(name, **settings) for name, settings in SETTINGS.items()]
    chunks += [chunk("scored", scored=4, logprobs=3), chunk("drafted", drafted=3, logprobs=1, top_k=2)]
    with pytest.raises(TransferError):
        reads(chunks, pretended_gpu)


def test_the_pretended_gpu_tells_who_waits_or_copies(pretended_gpu: PretendedGpu) -> None:
    with pretended_gpu:
        logits = torch.empty(2, 3, device=GPU)
        for wait in (lambda: logits.max().item(), logits.tolist, logits.nonzero, lambda: bool(logits.max() > 0)):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()
        for copy in (lambda: torch.tensor([1, 2], device=GPU), lambda: torch.zeros(2).to(GPU)):
            with pytest.raises(CopyError):
                copy()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_numbers_arrive_as_they_are(device: str) -> None:
    for values, dtype in [([1, 2**40], torch.int64), ([0.1, 3.0], torch.float64), ([True, False], torch.bool)]:
        found = on_device(values, torch.device(device), dtype)
        assert found.device.type == device
        assert found.tolist() == values
    array = np.array([[1, 2], [3, 4]])
    assert on_device(array, torch.device(device)).tolist() == array.tolist()
    assert on_device([], torch.device(device)).shape == (0,)
