"""Every metric of the server, once: name, help, labels, buckets. docs/metrics.md is made from this list.

A metric is a constant here and is used by that constant everywhere else, so its name is spelled in this file only.
What sets the values is in model.py and memory.py; how the page is written in registry.py; other servers' names for the
same things in vllm.py.

A help is a plain sentence and says the unit where the name does not. Labels hold only what is bounded by the
configuration: models, devices, components, routes, reasons; never what a client can invent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

PREFIX: Final = "halfbyte_"
MODEL: Final = "model"
"""The label that says whose a series is; all with it go when the model goes."""

# Those of OpenTelemetry's conventions for model servers (gen_ai.server.time_to_first_token, .time_per_output_token,
# .request.duration), continued so that slow machines and long requests are told apart too.
FIRST_TOKEN_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
INTER_TOKEN_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
DURATION_BUCKETS: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 240, 480, 960, 1920, 7680,
)  # fmt: skip
TOKEN_BUCKETS: Final = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000,
)  # fmt: skip
SEQUENCE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Spec:
    """One metric family; `name` is without the prefix, and without the _total that counters get when exposed."""

    kind: ClassVar[Kind]
    name: str
    help: str
    labels: tuple[str, ...] = (MODEL,)

    @property
    def exposed_name(self) -> str:
        """As Prometheus knows it; a histogram's series add _bucket, _sum and _count."""
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")


class CounterSpec(Spec):
    kind = "counter"


class GaugeSpec(Spec):
    kind = "gauge"


@dataclass(frozen=True)
class HistogramSpec(Spec):
    kind = "histogram"
    buckets: tuple[float, ...] = DURATION_BUCKETS


# --- memory: planned from headers before loading, measured after it ---------------------------------------------------

MEMORY: Final = GaugeSpec("memory_bytes", "Measured bytes by component.", (MODEL, "device", "component"))
MEMORY_PEAK: Final = GaugeSpec(
    "memory_peak_bytes",
    "The largest that each component has been; activations, which live only in steps, are only here.",
    (MODEL, "device", "component"),
)
MEMORY_PLANNED: Final = GaugeSpec(
    "memory_planned_bytes", "Bytes by component as planned before loading.", (MODEL, "device", "component")
)
MEMORY_PREDICTION_ERROR: Final = GaugeSpec(
    "memory_prediction_error_bytes",
    "Measured less planned bytes by component; 0 where the plan was right.",
    (MODEL, "device", "component"),
)
MEMORY_UNACCOUNTED: Final = GaugeSpec(
    "memory_unaccounted_bytes", "Bytes engines hold on a device that no component explains.", ("device",)
)
PROCESS_MEMORY: Final = GaugeSpec(
    "engine_process_memory_bytes", "The engine process as the system sees it, after loading.", (MODEL, "kind")
)
DEVICE_CAPACITY: Final = GaugeSpec(
    "device_memory_capacity_bytes",
    "Memory of a device; of the CPU what the machine has, or the control group allows if that is less.",
    ("device",),
)
DEVICE_AVAILABLE: Final = GaugeSpec(
    "device_memory_available_bytes",
    "What is free for a new model: of the CPU's memory at each scrape, of other devices when an engine looked last.",
    ("device",),
)

# --- models: what is served, how it is quantized, what that cost ------------------------------------------------------

QUANTIZATION_FIELDS: Final = (
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_blocksize",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_activations",
    "bnb_4bit_search",
    "llm_int8_threshold",
    "llm_int8_outliers",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
    "quantize_embeddings",
    "module_overrides",
)
"""Fields of the effective quantization config that are labels of model_info; `quantization` says 4 or 8 bits itself."""
MODEL_INFO: Final = GaugeSpec(
    "model_info",
    "Constant 1; what is served and how it is quantized; a field of the other format is empty.",
    (MODEL, "architecture", "dtype", "device", "quantization", *QUANTIZATION_FIELDS),
)
MODEL_MAX_LENGTH: Final = GaugeSpec("model_max_length_tokens", "Longest prompt plus completion.")
LOAD_SECONDS: Final = GaugeSpec("model_load_seconds", "How long the model took to load.")
LOAD_BYTES: Final = GaugeSpec("model_load_bytes", "Bytes of the checkpoint read so far.")
QUANTIZATION_ERROR: Final = GaugeSpec(
    "quantization_relative_error",
    "Root of squared error over squared weights, sampled while the weights were quantized.",
    (MODEL, "group", "format"),
)
QUANTIZATION_OUTLIERS: Final = GaugeSpec(
    "quantization_outlier_ratio",
    "Part of the weights beyond 4 root mean squares of their matrix, sampled likewise.",
    (MODEL, "group", "format"),
)

# --- engines: whether they live and move ------------------------------------------------------------------------------

ENGINE_UP: Final = GaugeSpec("engine_up", "1 while the engine is ready, 0 while it loads or after it died.")
ENGINE_STATE: Final = GaugeSpec("engine_state", "1 for the state a model is in, 0 for the others.", (MODEL, "state"))
ENGINE_RESTARTS: Final = CounterSpec(
    "engine_restarts", "Engines started again, by how the one before ended.", (MODEL, "reason")
)
ENGINE_STALLED: Final = GaugeSpec(
    "engine_stalled_seconds", "Time without a report of an engine that has requests; 0 with none."
)
SECONDS_SINCE_STEP: Final = GaugeSpec(
    "engine_seconds_since_last_step", "Grows while the engine is idle, or stuck if requests are running."
)

# --- requests ---------------------------------------------------------------------------------------------------------

REQUESTS: Final = CounterSpec(
    "requests", "Texts that were admitted and ended, by how; n choices count n times.", (MODEL, "finish_reason")
)
REQUESTS_REJECTED: Final = CounterSpec(
    "requests_rejected", "Requests that were refused before they ran.", (MODEL, "reason")
)
REQUEST_ERRORS: Final = CounterSpec(
    "request_errors",
    "Requests for text that were answered with an error, by the code of the error's body or else its type.",
    (MODEL, "error"),
)
PROMPT_TOKENS: Final = CounterSpec("prompt_tokens", "Prompt tokens of texts that got their first token.")
GENERATION_TOKENS: Final = CounterSpec("generation_tokens", "Generated tokens.")
REQUESTS_RUNNING: Final = GaugeSpec("requests_running", "Sequences that share the engine's steps.")
REQUESTS_WAITING: Final = GaugeSpec(
    "requests_waiting", "Texts that the engine has been sent and that are not among the running."
)
FIRST_TOKEN: Final = HistogramSpec(
    "time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=FIRST_TOKEN_BUCKETS
)
INTER_TOKEN: Final = HistogramSpec(
    "inter_token_latency_seconds",
    "Between one token and the next; tokens of one step share its time.",
    buckets=INTER_TOKEN_BUCKETS,
)
TIME_PER_TOKEN: Final = HistogramSpec(
    "request_time_per_output_token_seconds",
    "Mean time per token after the first, one value per complete text.",
    buckets=INTER_TOKEN_BUCKETS,
)
REQUEST_DURATION: Final = HistogramSpec("request_duration_seconds", "From a request's arrival to its end.")
REQUEST_QUEUE: Final = HistogramSpec(
    "request_queue_seconds", "From the engine's receiving a request to its first step."
)
REQUEST_PROMPT_TOKENS: Final = HistogramSpec(
    "request_prompt_tokens", "Prompt tokens per text that ended.", buckets=TOKEN_BUCKETS
)
REQUEST_GENERATION_TOKENS: Final = HistogramSpec(
    "request_generation_tokens", "Generated tokens per text that ended.", buckets=TOKEN_BUCKETS
)

# --- engine steps and the KV cache ------------------------------------------------------------------------------------

STEPS: Final = CounterSpec("engine_steps", "Engine steps.")
FORWARD_PASSES: Final = CounterSpec("engine_forward_passes", "Forward passes of the model.")
STEP_DURATION: Final = HistogramSpec("engine_step_duration_seconds", "One engine step.", buckets=INTER_TOKEN_BUCKETS)
STEP_SEQUENCES: Final = HistogramSpec(
    "engine_step_sequences", "Sequences that got a token in a step: the batch size.", buckets=SEQUENCE_BUCKETS
)
STEP_TOKENS: Final = CounterSpec("engine_step_tokens", "Tokens computed, by phase; without guesses.", (MODEL, "phase"))
PREEMPTIONS: Final = CounterSpec(
    "engine_preemptions", "Running sequences that gave their KV cache blocks up and were computed again later."
)
KV_USAGE: Final = GaugeSpec("kv_cache_usage_ratio", "Used part of the KV cache, 0 to 1.")
KV_USED: Final = GaugeSpec("kv_blocks_used", "KV cache blocks in use.")
KV_CAPACITY: Final = GaugeSpec("kv_blocks_capacity", "KV cache blocks there are.")
KV_CACHED: Final = GaugeSpec(
    "kv_blocks_cached", "KV cache blocks that nobody uses, kept because they may be found again."
)
KV_INFO: Final = GaugeSpec(
    "kv_cache_info", "Constant 1; tokens in a block, and blocks.", (MODEL, "block_size", "num_blocks")
)
PREFIX_QUERIES: Final = CounterSpec("prefix_cache_query_tokens", "Prompt tokens that were looked for in the KV cache.")
PREFIX_HITS: Final = CounterSpec(
    "prefix_cache_hit_tokens", "Prompt tokens that were found in the KV cache and not computed."
)
DRAFT_TOKENS: Final = CounterSpec("draft_tokens", "Tokens that were guessed by lookup and checked.")
DRAFT_ACCEPTED: Final = CounterSpec("draft_tokens_accepted", "Guessed tokens that came true and were given out.")

# --- HTTP -------------------------------------------------------------------------------------------------------------

HTTP_REQUESTS: Final = CounterSpec("http_requests", "HTTP requests by route and status.", ("method", "route", "status"))
HTTP_IN_FLIGHT: Final = GaugeSpec("http_requests_in_flight", "HTTP requests being answered.", ())
HTTP_DURATION: Final = HistogramSpec(
    "http_request_duration_seconds", "HTTP requests, streams to their end.", ("method", "route")
)

METRICS: Final = tuple(spec for spec in list(globals().values()) if isinstance(spec, Spec))
"""All of the above, in their order."""
