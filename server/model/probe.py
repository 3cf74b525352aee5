"""Which runner serves a model, found out by trying: a few tokens through it before any request comes.

Some architectures never call the attention they are set to and say nothing; their answers would be wrong without an
error. So nothing is believed by name. A recorder counts the calls and notes each layer's shapes; then two short
sequences go through the candidate runner (proof.py), and their logits must be those of the model's own attention on
each sequence alone.

Before the runners are tried, and after the model's own logits are known, fuse.py puts kernels of our own into it: what
it changed is proven by the same comparison.

    every layer calls us, and the logits agree     -> PagedRunner
    else, where a cache over pages can stand in    -> CacheRunner, rows of any lengths side by side
    else, where it can without padding             -> CacheRunner, rows of one length at a time
    else, where transformers' own caches agree     -> SingleRunner
    else                                           -> refused, by name, with what was seen

Encoder-decoders have a probe and a runner of their own (encoder_probe.py).

On a GPU the paged runner then records its steps of single rows (graphs.py), and has to pass the same comparison again.
What does not is served without recordings.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from server.errors import LoadError
from server.memory.kv import kv_dtype, other_layers
from server.model.attention import ATTENTION_NAME, CONTEXT_ARGUMENT, Call, register
from server.model.batch import Batch, Chunk, Draw
from server.model.cache_runner import CacheRunner, batchings, cache_argument
from server.model.encoder_probe import choose_encoder_decoder_runner
from server.model.fuse import fuse
from server.model.gather import cached_shapes
from server.model.graphs import CudaRecorder, Recorder
from server.model.last_layer import find_last_layer
from server.model.paged_cache import LayerShape, PagedCache
from server.model.proof import (
    LARGEST_DIFFERENCE,
    Proof,
    allowed_difference,
    architecture_of,
    first_proven,
    relative,
)
from server.model.runner import PagedRunner, input_device
from server.model.shortcut import find_shortcut
from server.model.single_runner import SingleRunner
from server.model.steady import UnsteadyError
from server.records import KV_BLOCK_TOKENS, ModelSpec, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ModelRunner = PagedRunner | CacheRunner | SingleRunner


class NotPagedError(Exception):
    """Why a model cannot be served by the paged runner: half a sentence that follows the architecture's name."""


def choose_runner(
    model: PreTrainedModel, spec: ModelSpec, *, blocks: int, max_model_len: int, block_tokens: int = KV_BLOCK_TOKENS
) -> ModelRunner:
    """The runner that gives this model's own logits, proven; its cache is allocated here.

    Raises LoadError for an architecture that none can serve.
    """
    if model.config.is_encoder_decoder:
        return choose_encoder_decoder_runner(
            model, spec, blocks=blocks, block_tokens=block_tokens, max_model_len=max_model_len
        )
    own_attention = model.config._attn_implementation
    proof = Proof.of(model, blocks=blocks, block_tokens=block_tokens, max_model_len=max_model_len)
    fuse(model)
    try:
        return _paged_runner(model, spec, proof, blocks, max_model_len)
    except NotPagedError as error:
        log.info("%s %s; transformers' cache classes serve it", type(model).__name__, error)
    model.set_attn_implementation(own_attention)
    return choose_cache_runner(model, spec, proof, blocks=blocks)


def warm_up(runner: ModelRunner) -> None:
    """One small step that draws: what is set up at a first use (threads, kernels, the sampler) is set up now. From then
    on the model is the runner's alone: nobody changes any of its modules."""
    draw = Draw(SamplingParams(max_tokens=1, top_p=0.9), seed=0, index=0)
    beginning = runner.decoder_prompt
    runner.step(Batch((Chunk("warm-up", (0, *beginning), 0, (0,), draw, encoder_tokens=1 if beginning else 0),)))
    runner.release("warm-up")
    if isinstance(runner, PagedRunner):
        runner.seal()


def choose_cache_runner(
    model: PreTrainedModel, spec: ModelSpec, proof: Proof, *, blocks: int
) -> CacheRunner | SingleRunner:
    """The same for a model that attends by itself, over a cache of transformers' kind."""
    layers = _cached_layers(model, proof.prompts[-1], spec)
    allowed = allowed_difference(model, spec.kv_cache_dtype)
    if not layers:
        if spec.kv_cache_dtype != "auto":
            raise LoadError(
                f"{architecture_of(model)} keeps more than keys and values, "
                f"as it computes them; kv_cache.dtype is {spec.kv_cache_dtype!r}, accepted is auto"
            )
        log.warning("%s keeps more than keys and values: its sequences run one at a time", type(model).__name__)
        candidate = partial(SingleRunner, model, batch_invariant=spec.batch_invariant)
        return first_proven(model, [candidate], proof.difference, allowed)
    cache = PagedCache(layers, blocks, proof.block_tokens)
    candidates = [partial(CacheRunner, model, cache, way) for way in batchings(spec)]
    return first_proven(model, candidates, proof.difference, allowed)


def _paged_runner(
    model: PreTrainedModel, spec: ModelSpec, proof: Proof, blocks: int, max_model_len: int
) -> PagedRunner:
    """The paged runner, proven; raises NotPagedError where it is not this model's."""
    layers = _probe_layers(model, proof.prompts[-1], spec)
    fuse(model)  # once more: attention can be fused now that it is ours
    runner = PagedRunner(
        model,
        PagedCache(layers, blocks, proof.block_tokens),
        max_batch_tokens=spec.batch_tokens(model.device.type),
        max_sequences=spec.max_sequences,
        max_model_len=max_model_len,
        batch_invariant=spec.batch_invariant,
    )
    try:
        difference = proof.difference(runner)
    except UnsteadyError as error:
        raise NotPagedError(f"is to be batch-invariant and calls {error}, which is not") from error
    if difference > allowed_difference(model, spec.kv_cache_dtype):
        raise NotPagedError(f"gives other logits in packed batches (relative difference {difference:.2g})")
    find_last_layer(runner, proof)
    find_shortcut(runner, proof)
    if spec.cuda_graphs and runner.device.type == "cuda" and can_be_recorded(model, runner):
        record_steps(runner, proof, CudaRecorder(runner.device))
    return runner


def can_be_recorded(model: PreTrainedModel, runner: PagedRunner) -> bool:
    """Whether one device has all of a model, and computes every sequence in one way."""
    tensors = chain(model.parameters(), model.buffers())
    return runner.switch_length is None and all(tensor.device == runner.device for tensor in tensors)


def record_steps(runner: PagedRunner, proof: Proof, recorder: Recorder) -> None:
    """Records a runner's steps of single rows. Each has to give what calling the model gives, and batches of them the
    model's own logits; where that fails all stays as it was."""
    try:
        runner.record(recorder)
        difference = max(relative(found.float(), called.float()) for found, called in runner.replayed_and_called())
        difference = max(difference, proof.difference(runner))
        reason = f"replayed, its logits differ from the model's own (relative difference {difference:.2g})"
    except Exception as error:  # whatever it is, the model can be served without
        log.info("what was raised while steps were recorded", exc_info=error)
        difference = math.inf
        reason = " ".join(str(error).split())
    if difference > LARGEST_DIFFERENCE:
        runner.forget_recordings()
        log.warning("%s's steps are not recorded: %s", type(runner.model).__name__, reason)


@torch.inference_mode()
def _probe_layers(model: PreTrainedModel, prompt: list[int], spec: ModelSpec) -> list[LayerShape]:
    """Sets the model to our attention and sees every layer call it; raises NotPagedError where one does not."""
    text = model.config.get_text_config()
    types = getattr(text, "layer_types", None) or []
    if foreign := other_layers(text):
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
    shapes = [_shape(call) for call in recorder.calls]
    return [shape.stored_as(kv_dtype(spec, shape.computed)) for shape in shapes]


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


@torch.inference_mode()
def _cached_layers(model: PreTrainedModel, prompt: list[int], spec: ModelSpec) -> list[LayerShape]:
    """What our cache keeps per token of each layer of transformers' own; none where one keeps anything else."""
    ids = torch.tensor([prompt], device=input_device(model))
    try:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
        shapes = cached_shapes(cache, len(prompt))
    except Exception as error:
        log.warning("%s failed with a cache", type(model).__name__, exc_info=error)
        return []
    return [shape.stored_as(kv_dtype(spec, shape.computed)) for shape in shapes]
