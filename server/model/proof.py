"""What a runner has to show before it serves: on two short prompts, the logits that the model's own forward call gives.

The prompts go through the runner side by side, cut so that chunks of several tokens, and single ones, share a step with
others of their kind that belong to a sequence of another length. Which runners are tried is probe.py's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import torch
from torch import nn

from quant.experts import PackedExperts
from quant.packed4 import Weight4bit
from quant.packed8 import Weight8bit
from server.errors import LoadError
from server.model.batch import Batch, Chunk, Draw
from server.model.runner import input_device
from server.records import Batching, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_DIFFERENCE: Final = 0.08
"""Of probe logits, as |difference| / |expected|, whatever is rounded; `allowed_difference` mostly allows less. On tiny
random models rounding in bfloat16, and int8 rows that round the other way, give up to 0.01, float32 5e-7; positions
that are ignored 0.04 (BigBird-Pegasus) to 0.58 (BART), looking ahead (BERT) 0.55."""
_ALLOWED_IN_16_BITS: Final = 0.03
_ALLOWED_IN_FLOAT32: Final = 1e-3
DRAW: Final = Draw(SamplingParams(max_tokens=1, temperature=0.0), seed=0, index=0)
_LENGTHS: Final = (5, 9)
_CHUNK: Final = 4
Candidate = TypeVar("Candidate", bound="Provable")

log = logging.getLogger(__name__)


class Provable(Protocol):
    batching: Batching

    def logits(self, batch: Batch) -> torch.Tensor:
        """[wanted rows, vocabulary], in the order of the batch; until the next call."""
        ...

    def release(self, request_id: str) -> None: ...


def allowed_difference(model: nn.Module, kv_cache_dtype: str) -> float:
    """How far a right runner's logits may be from the model's own, by the coarsest rounding on the way."""
    if kv_cache_dtype == "int8" or any(map(_rounds_to_int8, model.modules())):
        return LARGEST_DIFFERENCE
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    dtypes |= {module.compute_dtype for module in model.modules() if isinstance(module, (Weight4bit, PackedExperts))}
    is_exact = dtypes <= {torch.float32, torch.float64} and kv_cache_dtype in ("auto", "float32")
    return _ALLOWED_IN_FLOAT32 if is_exact else _ALLOWED_IN_16_BITS


def _rounds_to_int8(module: nn.Module) -> bool:
    if isinstance(module, PackedExperts):
        return module.options.load_in_8bit or module.options.bnb_4bit_activations == "int8"
    return isinstance(module, Weight8bit) or (isinstance(module, Weight4bit) and module.activations == "int8")


@dataclass(frozen=True, slots=True)
class Proof:
    prompts: list[list[int]]
    expected: torch.Tensor
    """The last token's logits of each prompt alone, without any cache: [prompts, vocabulary] float32."""
    block_tokens: int

    @classmethod
    def of(cls, model: PreTrainedModel, *, blocks: int, block_tokens: int, max_model_len: int) -> Proof:
        """Runs the model as transformers does, on prompts that fit the cache and the context.

        Raises LoadError where later tokens change the logits of earlier ones: such a model has no next token.
        """
        prompts = probe_prompts(model, max_model_len)
        if blocks < len(prompts) * -(-max(map(len, prompts)) // block_tokens):
            prompts = prompts[-1:]  # a cache too small for two: the longer one alone
        _refuse_unless_causal(model, prompts[-1])
        return cls(prompts, _own_logits(model, prompts), block_tokens)

    @property
    def batch(self) -> Batch:
        """The prompts as a whole, side by side."""
        return Batch(tuple(Chunk(f"probe-{i}", each, 0, self.table(i), DRAW) for i, each in enumerate(self.prompts)))

    def table(self, which: int) -> range:
        """The blocks of a prompt: each has as many as the longest needs."""
        needed = -(-max(map(len, self.prompts)) // self.block_tokens)
        return range(which * needed, (which + 1) * needed)

    def difference(self, runner: Provable) -> float:
        """How far a runner's logits are from the model's own, |difference| / |expected|."""
        steps: list[list[Chunk]] = [[], [], []]
        for which, prompt in enumerate(self.prompts):
            table = self.table(which)
            last = len(prompt) - 1
            for step, (start, end) in zip(steps, pairwise((0, max(0, last - _CHUNK), last, last + 1)), strict=True):
                if start < end:
                    draw = DRAW if start == last else None
                    step.append(Chunk(f"probe-{which}", prompt[start:end], start, table, draw))
        return relative(logits_of(runner, steps), self.expected)


def first_proven(
    model: PreTrainedModel,
    candidates: Sequence[Callable[[], Candidate]],
    difference_of: Callable[[Candidate], float],
    allowed: float,
) -> Candidate:
    """The first candidate whose logits are the model's own; raises LoadError, with what was seen of the last one."""
    name = architecture_of(model)
    refusal = LoadError(f"{name} cannot be served")
    for candidate in candidates:
        runner = candidate()
        try:
            difference = difference_of(runner)
        except Exception as error:
            log.warning("%s failed in its probe with batching %r", name, runner.batching, exc_info=error)
            refusal = LoadError(f"{name} cannot be served: its probe failed ({type(error).__name__}: {error})")
            continue
        if difference <= allowed:
            return runner
        log.warning("%s has other logits with batching %r (difference %.2g)", name, runner.batching, difference)
        refusal = LoadError(
            f"{name} cannot be served: computed in chunks over a cache, its logits differ from the model's own "
            f"(relative difference {difference:.2g}); accepted are models that transformers can cache"
        )
    raise refusal


def architecture_of(model: PreTrainedModel) -> str:
    """How refusals call a model: its type in config.json, and its class."""
    return f"architecture {model.config.model_type!r} ({type(model).__name__})"


def logits_of(runner: Provable, steps: Sequence[Sequence[Chunk]]) -> torch.Tensor:
    """Runs steps one after the other and forgets their sequences; all wanted rows, [rows, vocabulary] float32."""
    found = [runner.logits(Batch(tuple(step))).clone() for step in steps if step]
    for request_id in {chunk.request_id for step in steps for chunk in step}:
        runner.release(request_id)
    return torch.cat(found).float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; 0 where the expected ones are not finite, which proves nothing either way."""
    if not bool(torch.isfinite(expected).all()):
        return 0.0
    return float((found - expected.to(found.device)).norm() / expected.norm().clamp_min(1e-12))


def probe_prompts(model: PreTrainedModel, longest: int) -> list[list[int]]:
    """Two prompts of different lengths over the whole vocabulary, the same in every start."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    lengths = [min(length, longest) for length in _LENGTHS]
    return [[(31 * place + 17 * which + 7) * 101 % vocabulary for place in range(n)] for which, n in enumerate(lengths)]


@torch.inference_mode()
def _refuse_unless_causal(model: PreTrainedModel, prompt: list[int]) -> None:
    ids = torch.tensor([prompt], device=input_device(model))
    short, whole = (model(input_ids=ids[:, :end], use_cache=False).logits[0, 0].float() for end in (1, None))
    difference = relative(short, whole)
    if difference > LARGEST_DIFFERENCE:
        raise LoadError(
            f"{architecture_of(model)} cannot be served: later tokens change "
            f"the logits of earlier ones (relative difference {difference:.2g}); accepted are causal language models"
        )


@torch.inference_mode()
def _own_logits(model: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    device = input_device(model)
    rows = [model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits[0, -1] for prompt in prompts]
    return torch.stack(rows).float()
