"""What crosses the boundary between the HTTP process and an engine process.

Every message is one frozen msgspec struct, encoded as MessagePack in a length-prefixed frame over a socketpair.
Nothing here is ever pickled, and nothing here imports torch: both processes import this file.

    HTTP -> engine    LoadModel, RoomGranted for each RoomWanted, then any of Generate, Abort, Shutdown
    engine -> HTTP    LoadProgress*, RoomWanted and Planned among them, then LoadFailed or Loaded,
                      then StepReport* and MemoryChanged*
    HTTP -> planner   PlanModel, answered by LoadFailed or Plan
"""

from __future__ import annotations

import struct
from itertools import chain
from typing import Any, Final, Literal

import msgspec

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
_LENGTH: Final = struct.Struct("<I")
LENGTH_PREFIX_BYTES: Final = _LENGTH.size
SCRATCH_PREFIX: Final = "halfbyte-engine-"
"""How the name of an engine's temporary directory begins. The HTTP process makes it, and whoever sees the other one go
removes it: a process that is killed can't."""
KV_BLOCK_TOKENS: Final = 16
"""Tokens in one block of the KV cache: the plan counts whole blocks, the engine hands them out."""
SCORED_ROWS: Final = 256
"""Prompt rows that one forward call scores at most: the logits of all of them are there at the same time."""
SCORED_SLICE_ROWS: Final = 64
"""How many of them are made into logprobs at once."""
GUESSED_ROWS: Final = 64
"""Rows of a step at most that has guesses among them. In larger ones a guess must be right in 94 of 100 cases to pay,
with AMX in 73."""
CPU: Final = "cpu"
"""What the machine's own memory is called among the devices."""
DISK: Final = "disk"
"""Where a device map may put what is brought for each forward pass."""
PSS: Final = "pss"
DEVICE_USED: Final = "device_used"
"""Keys of a MemoryReport's `process` that hold the device's own figure: on a CPU, on CUDA."""
ELSEWHERE: Final = "weights_elsewhere"
"""Key of `process`: bytes of weights in mapped files that are not in the figure: not read yet, dropped by the kernel,
or the share of another process that maps the same file."""
MAX_SEQUENCES: Final = 64
SPECULATIVE_TOKENS: Final = 4
"""What a model has where its config says nothing: see ModelSpec."""
CPU_BATCH_TOKENS: Final = 256
BATCH_TOKENS: Final = 2048
"""Tokens of a step, on a CPU and on other devices: where more of them stop making each one cheaper, and only let
everybody wait longer for the end of the step. What a step reads from the disk makes it one for many, on a CPU too."""
MAX_TIMEOUT_SECONDS: Final = 86400.0
"""The longest time that a request may be given, or ask for."""
MAX_TOP_LOGPROBS: Final = 20
"""Likeliest tokens that come with a token's logprob at most; the number is OpenAI's."""

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
LoadPhase = Literal["start", "plan", "weights", "cache", "warmup", "ready"]
Batching = Literal["packed", "padded", "equal", "single"]
"""How sequences share a forward call: "packed" one behind the other, of any lengths and with prompts; "padded" side by
side where they compute as many tokens; "equal" only where they are also equally long; "single" never."""
SamplingDefaults = Literal["model", "openai"]
FailureKind = Literal["config", "checkpoint", "does_not_fit", "internal"]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The root of every record; `tag=True` writes the class name beside the fields."""


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model as the operator configured it; `quantization` is validated by `quant` in the engine process."""

    name: str
    path: str
    quantization: str | dict[str, Any] | None = None
    """A preset's name, the fields of BitsAndBytesConfig, or None for what the checkpoint itself says."""
    dtype: str = "auto"
    """dtype of what is not quantized: auto (the checkpoint's own), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    device_map: str | dict[str, str | int] | None = None
    max_model_len: int | None = None
    """Longest prompt plus completion, in tokens (an encoder-decoder's: longest of each); None takes the model's own
    limit."""
    kv_cache_tokens: int | None = None
    """Tokens the KV cache holds over all sequences; None lets the plan choose."""
    kv_cache_dtype: str = "auto"
    """What the KV cache keeps keys and values in: auto (as the model computes them), float32, bfloat16, float16 or
    int8."""
    max_batch_tokens: int | None = None
    """Tokens one step computes at most (prefill chunks and decodes together); None takes what suits the device."""
    max_sequences: int = MAX_SEQUENCES
    """Sequences that share a step at most."""
    prefix_caching: bool = True
    """Whether a sequence uses the cache blocks that another left of the same beginning."""
    speculative_tokens: int = SPECULATIVE_TOKENS
    """How many tokens of a sequence a step guesses and checks at most; 0 for none."""
    batch_invariant: bool = False
    """Whether a row's logits have the same bits in a batch of any size, at some cost."""
    cuda_graphs: bool = True
    """Whether steps of single rows are recorded on a GPU, where they can be."""
    sampling_defaults: SamplingDefaults = "model"
    """Whose defaults a request's open fields take: the checkpoint's recommendations, or those of OpenAI's API."""
    threads: int | None = None
    """CPU threads this engine may use; None takes its share of the machine."""

    def batch_tokens(self, device: str, *, reads_disk: bool = False) -> int:
        """max_batch_tokens, with the model on this device; reads_disk: every step brings some of it from the disk.

        Room beside a token of each sequence is always left.
        """
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        is_small = device == CPU and not reads_disk
        return max(CPU_BATCH_TOKENS if is_small else BATCH_TOKENS, 2 * self.max_sequences)


class LoadModel(Record, frozen=True):
    spec: ModelSpec


class PlanModel(Record, frozen=True):
    """Sent to a planning process, which loads nothing."""

    spec: ModelSpec
    promised: dict[str, int] = {}
    """By device: bytes that are free and that somebody else is going to take."""


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are chosen; temperature 0 is greedy. Every default but temperature's asks for nothing.

    What each field does to the logits, and in which order, is in server/model/sampler.py.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each once, and what is added to their logits."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that may be drawn; None allows all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences whose last token is never drawn after the others."""
    min_tokens: int = 0
    """Until so many tokens have been drawn, none of `stop_token_ids` is."""
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    """Ends the sequence (finish_reason "stop"); the token itself is still reported.

    The engine adds none of its own: who wants the model's end-of-sequence to end the text puts
    ModelInfo.eos_token_ids here.
    """
    logprobs: int | None = None
    """So many of the likeliest tokens come with each token and its logprob; None: no logprobs."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens after the first. They need the logits of the whole prompt: a request that asks
    for them must not be given a cached prefix."""

    @property
    def listed_tokens(self) -> int:
        """How many token ids these parameters are made of, however often they name one."""
        words = sum(map(len, self.bad_words))
        return words + len(self.logit_bias) + len(self.allowed_token_ids or ()) + len(self.stop_token_ids)

    @property
    def edited_token_ids(self) -> frozenset[int]:
        """Every token id that the sampler will look up in a row of logits because these parameters name it."""
        stops = self.stop_token_ids if self.min_tokens else ()
        biased = (token for token, _ in self.logit_bias)
        return frozenset([*biased, *(self.allowed_token_ids or ()), *chain(*self.bad_words), *stops])


class Generate(Record, frozen=True):
    request_id: str
    prompt: tuple[int, ...]
    """Token ids; 1 <= len(prompt), max_tokens <= ModelInfo.room(len(prompt))."""
    sampling: SamplingParams
    priority: int = 0
    """Lower is served earlier."""
    deadline: float | None = None
    """When the request ends at the latest, by time.monotonic, which the processes of a machine share."""
    cache_salt: str = ""
    """Whose cached beginnings may be used, and who may use this one's: a tenant, a salt, both as "tenant:salt", or
    nothing. All who have the same share theirs."""
    encoder_tokens: int = 0
    """How many tokens of the prompt an encoder reads, the first ones: the answer continues the others alone. The engine
    sets it."""


class Abort(Record, frozen=True):
    """Ends a request early; its blocks are free at the next step. Unknown ids are ignored: it may just have ended."""

    request_id: str


class Shutdown(Record, frozen=True):
    """Ends the engine process with exit code 0 after the current step."""


class LoadProgress(Record, frozen=True):
    phase: LoadPhase
    bytes_loaded: int = 0
    bytes_total: int = 0


class Shortage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan needs of a device and what there is for it, in bytes."""

    device: str
    needed: int
    available: int
    """What is free, without what is promised to others."""


class RoomWanted(Record, frozen=True):
    """Sent before a plan is made; the answer is RoomGranted."""

    shortage: Shortage | None = None
    """Why the plan did not fit that was made of the answer before."""


class RoomGranted(Record, frozen=True):
    promised: dict[str, dict[str, int]]
    """By device and model: bytes that are free and that somebody else is going to take."""
    more: bool
    """Whether it is worth asking again with a shortage."""


class Planned(Record, frozen=True):
    """The plan fits, and is carried out from now on. Bytes by device, those the process has taken already included."""

    peak: dict[str, int]
    """At most, while loading."""
    kept: dict[str, int]
    """Afterwards."""

    @property
    def is_on_cpu(self) -> bool:
        """Whether what has been taken of it shows from outside, as a process's memory does."""
        return set(self.peak) == {CPU}


class LoadFailed(Record, frozen=True):
    kind: FailureKind
    message: str
    """One sentence: what was wrong, with the value, and what would be accepted."""
    shortage: Shortage | None = None
    """Where it does not fit."""


class ModelInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the HTTP process must know of a loaded model."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    architecture: str
    dtype: str
    device: str
    quantization: dict[str, Any]
    """The effective quantization config as its JSON dictionary; empty where nothing is quantized."""
    prefix_caching: bool = False
    """Whether beginnings are found in the cache: it was configured, and the model's runner can."""
    batching: Batching = "packed"
    speculative_tokens: int = 0
    """How many tokens a step guesses at most, as configured; 0 where the model's runner can't check any."""
    decoder_prompt_tokens: int = 0
    """0 where answers continue their prompt. An encoder-decoder's begin after so many tokens that nobody sees, and
    prompt and answer have `max_model_len` each."""
    sampling_defaults: dict[str, int | float] = {}
    """What the checkpoint recommends, by the names and in the types of SamplingParams' fields: for requests that leave
    them open."""

    @property
    def is_encoder_decoder(self) -> bool:
        return self.decoder_prompt_tokens > 0

    def room(self, prompt_tokens: int) -> int:
        """How many tokens may be generated after a prompt; 0 or less where it is too long for any."""
        if self.is_encoder_decoder and prompt_tokens <= self.max_model_len:
            return self.max_model_len - self.decoder_prompt_tokens
        return self.max_model_len - prompt_tokens


class MemoryReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes by component. `planned` comes from headers and config, `measured` from tensors and the system."""

    device: str
    planned: dict[str, int]
    measured: dict[str, int]
    process: dict[str, int]
    """The engine process as the system sees it: rss_anonymous, rss_file, peak_rss, ... in bytes. Under PSS (on a CPU)
    or DEVICE_USED (on CUDA) is the device's own figure of all that `measured` is to explain."""
    device_capacity: int = 0
    """All memory of a CUDA device; 0 for the CPU, whose memory the HTTP process sees itself."""
    device_free: int = 0
    """What of it nobody had taken; likewise."""
    peak: dict[str, int] = {}
    """The largest that each component has been; "activations", what steps take while they run, is only here."""


class GroupQuality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What quantizing cost the layers that have the same place in their block, sampled while they were loaded."""

    group: str
    """Such as self_attn.q_proj."""
    format: str
    """nf4, nf4-dq, fp4, fp4-dq or int8."""
    relative_error: float
    """Root of squared error over squared weights."""
    outlier_share: float
    """Part of the weights that are outliers of their matrix, 0 to 1."""


class LayerMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one layer's weights take in one format."""

    layer: str
    """Such as model.layers.3; what belongs to no numbered layer has its module's name."""
    format: str
    """nf4, nf4-dq, fp4, fp4-dq, int8, or the dtype of what is not quantized."""
    components: dict[str, int]


class MemoryChanged(Record, frozen=True):
    """What the engine has found on looking again, at rest or now and then while it works."""

    memory: MemoryReport


class DevicePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model will need of one device ("cpu", "cuda:0", "disk"), in bytes."""

    device: str
    components: dict[str, int]
    """While it serves at its configured limits; the names are those of server/memory/components.py."""
    loading_bytes: int
    """Held at most beside weights and runtime while loading, and given back before the cache is allocated."""
    peak_bytes: int
    """The larger of the two: loading, and serving at the limits."""
    free_bytes: int
    """What the device has free. What the planning process itself holds counts as free: an engine's runtime context,
    which is among the components, takes its place."""
    promised_bytes: int = 0
    """How much of that others are going to take: models that have been planned and have not touched all of it."""

    @property
    def available_bytes(self) -> int:
        """What is left for the model."""
        return max(0, self.free_bytes - self.promised_bytes)

    @property
    def total_bytes(self) -> int:
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.available_bytes


class Alternative(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A configuration near the planned one that fits."""

    changes: dict[str, Any]
    """Keys of models.yaml and their values."""
    peak_bytes: int
    """On the main device."""


class Plan(Record, frozen=True):
    """What one model will need, before anything is loaded."""

    model: str
    architecture: str
    parameters: int
    """Numbers in the weights, tied ones once."""
    quantization: str
    dtype: str
    devices: tuple[DevicePlan, ...]
    """The main device first: the one that computes."""
    checkpoint_bytes: int
    """Of its files; 0 where there is only a config.json."""
    max_model_len: int
    sequence_tokens: int
    """How many tokens the longest sequence caches: max_model_len, or of an encoder-decoder twice as many."""
    max_sequences: int
    max_batch_tokens: int
    kv_tokens: int
    kv_bytes_per_token: int
    """Over all layers and devices."""
    longest_context: int
    """Tokens of the longest sequence that fits beside all but the cache, up to the model's own limit; 0: none."""
    most_sequences: int
    """Sequences of max_model_len tokens that fit in the same room at once."""
    nearest: tuple[Alternative, ...] = ()
    """Where it does not fit: the nearest configurations that would."""

    @property
    def fits(self) -> bool:
        return all(device.fits for device in self.devices)

    @property
    def device(self) -> str:
        return self.devices[0].device

    @property
    def components(self) -> dict[str, int]:
        """Those of the main device."""
        return self.devices[0].components

    def document(self) -> dict[str, Any]:
        """As JSON shows it: its fields, and what follows from them."""
        devices = [
            msgspec.to_builtins(device)
            | {"available_bytes": device.available_bytes, "total_bytes": device.total_bytes, "fits": device.fits}
            for device in self.devices
        ]
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return fields | {"devices": devices, "nearest": msgspec.to_builtins(self.nearest), "fits": self.fits}


class Loaded(Record, frozen=True):
    info: ModelInfo
    memory: MemoryReport
    load_seconds: float
    kv_blocks: int = 0
    """Blocks of KV_BLOCK_TOKENS tokens that the cache has."""
    layers: tuple[LayerMemory, ...] = ()
    """The weights once more, by layer and format."""
    quality: tuple[GroupQuality, ...] = ()
    """Empty where nothing was quantized here: no quantization, or a checkpoint that was quantized before."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One token's natural log of its probability, and the likeliest tokens in its place, likeliest first.

    They are those of the model's own distribution: no penalty, temperature or filter has touched it (vLLM calls them
    raw_logprobs).
    """

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class SequenceOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one step gave one request: new tokens, logprobs of its prompt, the end, or several of them."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    """A sentence, exactly when finish_reason is "error" or "timeout"."""
    refused: bool = False
    """With an error: the request was at fault, not the engine."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token of `token_ids`, where the request asks for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt's tokens that follow those of earlier outputs; the first of all belongs to the second token."""
    cached_tokens: int = 0
    """With the first token: how many of the prompt's were found in the cache."""


class StepReport(Record, frozen=True):
    """One engine step: who got tokens, and the numbers that the metrics need."""

    step: int
    outputs: tuple[SequenceOutput, ...]
    running: int
    waiting: int
    prefill_tokens: int
    decode_tokens: int
    seconds: float
    kv_blocks_used: int
    kv_blocks_total: int
    forward_passes: int = 1
    """Model forward calls in this step: 1 for packed batches, 0 where nothing ran."""
    queue_seconds: tuple[float, ...] = ()
    """How long the requests that took part in a step for the first time had waited in the engine."""
    kv_blocks_cached: int = 0
    """Blocks that nobody uses and that are kept because they may be found again."""
    prefix_query_tokens: int = 0
    """Prompt tokens of requests that took part for the first time and were looked for in the cache."""
    prefix_hit_tokens: int = 0
    """How many of those were found, and not computed."""
    preemptions: int = 0
    """Sequences that gave up their blocks for this step and wait again."""
    draft_tokens: int = 0
    """Guesses that were checked; computed beside the prefill and decode tokens."""
    accepted_draft_tokens: int = 0
    """How many of those came true, and were given out."""


ToEngine = LoadModel | RoomGranted | Generate | Abort | Shutdown
FromEngine = LoadProgress | RoomWanted | Planned | LoadFailed | Loaded | StepReport | MemoryChanged

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_to_planner: msgspec.msgpack.Decoder[PlanModel] = msgspec.msgpack.Decoder(PlanModel)
_from_planner: msgspec.msgpack.Decoder[Plan | LoadFailed] = msgspec.msgpack.Decoder(Plan | LoadFailed)


def encode_frame(record: Record) -> bytes:
    """One frame: a little-endian uint32 length, then that many bytes of MessagePack."""
    body = _encoder.encode(record)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes was about to be sent; at most {MAX_FRAME_BYTES} are accepted")
    return _LENGTH.pack(len(body)) + body


def is_sendable(value: object) -> bool:
    """Whether a frame can hold this value, which comes from JSON or YAML: both allow more than MessagePack does."""
    try:
        _encoder.encode(value)
    except (UnicodeEncodeError, OverflowError, RecursionError):
        return False
    return True


def frame_length(prefix: bytes) -> int:
    """The body length that a frame's first LENGTH_PREFIX_BYTES announce; raises ValueError beyond MAX_FRAME_BYTES."""
    (length,) = _LENGTH.unpack(prefix)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame announces {length} bytes; at most {MAX_FRAME_BYTES} are accepted")
    return int(length)


def decode_to_engine(body: bytes) -> ToEngine:
    """The record in a frame's body, read on the engine's side; raises msgspec.DecodeError."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> FromEngine:
    """The record in a frame's body, read on the HTTP side; raises msgspec.DecodeError."""
    return _from_engine.decode(body)


def decode_to_planner(body: bytes) -> PlanModel:
    """The record in a frame's body, as a planning process is asked; raises msgspec.DecodeError."""
    return _to_planner.decode(body)


def decode_from_planner(body: bytes) -> Plan | LoadFailed:
    """The record in a frame's body, as a planning process answers; raises msgspec.DecodeError."""
    return _from_planner.decode(body)
