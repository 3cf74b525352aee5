"""Which runner serves a model, found out by trying: a few tokens through it before any request comes.

Some architectures never call the attention they are set to and say nothing; their answers would be wrong without an
error. So nothing is believed by name. A recorder counts the calls and notes each layer's shapes; then two short
sequences go through the candidate runner, packed and in chunks, and their logits must be those of the model's own
attention on each sequence alone.

Before the runners are tried, and after the model's own logits are known, fuse.py puts kernels of our own into it: what
it changed is proven by the same comparison.

    every layer calls us, and the logits agree     -> PagedRunner
    else, where the logits agree                   -> CacheRunner
    else                                           -> refused, by name, with what was seen
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import torch

from server.errors import LoadError
from server.model.attention import ATTENTION_NAME, CONTEXT_ARGUMENT, Call, LayerShape, PagedCache, register
from server.model.batch import Batch, Chunk, Draw
from server.model.cache_runner import CacheRunner
from server.model.fuse import fuse
from server.model.runner import PagedRunner, input_device
from server.records import KV_BLOCK_TOKENS, ModelSpec, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ModelRunner = PagedRunner | CacheRunner

LARGEST_DIFFERENCE: Final = 0.08
"""Of probe logits, as |difference| / |expected|. On tiny random models: rounding in bfloat16, and int8 rows that
round the other way, give up to 0.01; wrong positions (BART) 0.58, looking ahead (BERT) 0.55."""
PAGED_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
_LENGTHS: Final = (5, 9)
_SPLIT: Final = 4


class NotPagedError(Exception):
    """Why a model cannot be served by the paged runner: half a sentence that follows the architecture's name."""


def choose_runner(
    model: PreTrainedModel, spec: ModelSpec, *, blocks: int, max_model_len: int, block_tokens: int = KV_BLOCK_TOKENS
) -> ModelRunner:
    """The runner that gives this model's own logits, proven; the paged one's cache is allocated here.

    Raises LoadError for an architecture that neither can serve.
    """
    own_attention = model.config._attn_implementation
    prompts = _prompts(model, max_model_len)
    _refuse_unless_causal(model, prompts[-1])
    expected = _own_logits(model, prompts)
    fuse(model)
    try:
        layers = _probe_layers(model, prompts[-1])
        fuse(model)  # once more: attention can be fused now that it is ours
        runner = PagedRunner(
            model,
            PagedCache(layers, blocks, block_tokens),
            max_batch_tokens=spec.max_batch_tokens,
            max_sequences=spec.max_sequences,
            max_model_len=max_model_len,
        )
        difference = _difference(runner, prompts, expected, block_tokens, blocks)
        if difference <= LARGEST_DIFFERENCE:
            return runner
        raise NotPagedError(f"gives other logits in packed batches (relative difference {difference:.2g})")
    except NotPagedError as error:
        log.info("%s %s; transformers' cache classes serve it", type(model).__name__, error)
    model.set_attn_implementation(own_attention)
    return _proven_cache_runner(model, prompts, expected, block_tokens, blocks)


def warm_up(runner: ModelRunner) -> None:
    """One small step that draws: what is set up at a first use (threads, kernels, the sampler) is set up now."""
    draw = Draw(SamplingParams(max_tokens=1, top_p=0.9), seed=0, index=0)
    runner.step(Batch((Chunk("warm-up", (0,), 0, (0,), draw),)))
    runner.release("warm-up")


def _proven_cache_runner(
    model: PreTrainedModel, prompts: list[list[int]], expected: torch.Tensor, block_tokens: int, blocks: int
) -> CacheRunner:
    runner = CacheRunner(model)
    name = f"architecture {model.config.model_type!r} ({type(model).__name__})"
    try:
        difference = _difference(runner, prompts, expected, block_tokens, blocks)
    except Exception as error:
        log.exception("%s failed in its probe", name)
        raise LoadError(f"{name} cannot be served: its probe failed ({type(error).__name__}: {error})") from error
    if difference > LARGEST_DIFFERENCE:
        raise LoadError(
            f"{name} cannot be served: computed in chunks over a cache, its logits differ from the model's own "
            f"(relative difference {difference:.2g}); accepted are causal models that transformers can cache"
        )
    return runner


@torch.inference_mode()
def _refuse_unless_causal(model: PreTrainedModel, prompt: list[int]) -> None:
    """Raises LoadError where later tokens change the logits of earlier ones: such a model has no next token."""
    ids = torch.tensor([prompt], device=input_device(model))
    short, whole = (model(input_ids=ids[:, :end], use_cache=False).logits[0, 0].float() for end in (1, None))
    difference = _relative(short, whole)
    if difference > LARGEST_DIFFERENCE:
        raise LoadError(
            f"architecture {model.config.model_type!r} ({type(model).__name__}) cannot be served: later tokens change "
            f"the logits of earlier ones (relative difference {difference:.2g}); accepted are causal language models"
        )


@torch.inference_mode()
def _own_logits(model: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    """The last token's logits of each prompt alone, without any cache: [prompts, vocabulary] float32."""
    device = input_device(model)
    rows = [model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits[0, -1] for prompt in prompts]
    return torch.stack(rows).float()


def _prompts(model: PreTrainedModel, max_model_len: int) -> list[list[int]]:
    """Two prompts of different lengths over the whole vocabulary, the same in every start."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    lengths = [min(length, max_model_len) for length in _LENGTHS]
    return [[(31 * place + 17 * which + 7) * 101 % vocabulary for place in range(n)] for which, n in enumerate(lengths)]


@torch.inference_mode()
def _probe_layers(model: PreTrainedModel, prompt: list[int]) -> list[LayerShape]:
    """Sets the model to our attention and sees every layer call it; raises NotPagedError where one does not."""
    text = model.config.get_text_config()
    types = getattr(text, "layer_types", None) or []
    foreign = sorted(set(types) - PAGED_LAYER_TYPES)
    if foreign:
        raise NotPagedError(f"has layers of type {', '.join(foreign)}")
    register()
    recorder = _Recorder()
    ids = torch.tensor([prompt], device=input_device(model))
    positions = torch.arange(len(prompt), device=ids.device)[None]
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        model(input_ids=ids, position_ids=positions, use_cache=False, **{CONTEXT_ARGUMENT: recorder})
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise NotPagedError(f"does not take our attention ({error})") from error
    if len(recorder.calls) != text.num_hidden_layers:
        raise NotPagedError(
            f"calls the attention interface {len(recorder.calls)} times in {text.num_hidden_layers} layers"
        )
    windowed = [kind == "sliding_attention" for kind in types]
    if not types:
        windowed = [bool(getattr(text, "sliding_window", None))] * len(recorder.calls)
    if windowed != [call.window is not None for call in recorder.calls]:
        raise NotPagedError("does not pass the sliding window of its layers to the attention interface")
    return [_shape(call) for call in recorder.calls]


class _Recorder:
    """A context that notes every call and answers zeros: the forward goes on, and its result is thrown away."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def attend(self, call: Call) -> torch.Tensor:
        self.calls.append(call)
        heads, rows, _ = call.query.shape
        return call.value.new_zeros(rows, heads, call.value.shape[-1])


def _shape(call: Call) -> LayerShape:
    heads, _, key_dim = call.key.shape
    return LayerShape(heads, key_dim, call.value.shape[-1], call.key.dtype, call.key.device)


def _difference(
    runner: ModelRunner, prompts: list[list[int]], expected: torch.Tensor, block_tokens: int, blocks: int
) -> float:
    """How far a runner's logits are from the model's own: the first prompt at once, the second in chunks beside it."""
    needed = -(-max(map(len, prompts)) // block_tokens)
    if blocks < 2 * needed:  # a cache too small for two: the longer one alone
        prompts, expected = prompts[-1:], expected[-1:]
    steps: list[list[Chunk]] = [[], []]
    draw = Draw(SamplingParams(max_tokens=1, temperature=0.0), seed=0, index=0)
    for which, prompt in enumerate(prompts):
        table = list(range(which * needed, (which + 1) * needed))
        name = f"probe-{which}"
        if which < len(prompts) - 1 or len(prompt) <= _SPLIT:
            steps[0].append(Chunk(name, prompt, 0, table, draw))
        else:
            steps[0].append(Chunk(name, prompt[:_SPLIT], 0, table, None))
            steps[1].append(Chunk(name, prompt[_SPLIT:], _SPLIT, table, draw))
    found = [runner.logits(Batch(tuple(chunks))) for chunks in steps if chunks]
    for which in range(len(prompts)):
        runner.release(f"probe-{which}")
    logits = torch.cat(found).float()
    return _relative(logits, expected.to(logits.device))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; 0 where the expected ones are not finite, which proves nothing either way."""
    if not bool(torch.isfinite(expected).all()):
        return 0.0
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
