"""Our series a second time under the names that vLLM gave the same things, for tools that know only those.

Only names whose meaning agrees are here: the same event, counted at the same moment, in the same unit. vLLM has more,
which we do not measure or measure otherwise; giving a name to something else would mislead who relies on it. Buckets
are ours. Off unless the setting `vllm_metrics` is on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from server.metrics import catalog as c
from server.metrics.registry import Metrics

VLLM_PREFIX: Final = "vllm:"
ENGINE: Final = {"engine": "0"}
"""vLLM numbers the engines of a model; here each model has one."""


@dataclass(frozen=True)
class Alias:
    """One of ours, and vLLM's name for it, without the prefix and without the _total of counters."""

    spec: c.CounterSpec | c.GaugeSpec | c.HistogramSpec
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that vLLM names otherwise, beside the model's."""
    only: tuple[str, ...] = ()
    """Values of the renamed label that vLLM knows; empty for all."""


ALIASES: Final = (
    Alias(c.REQUESTS_RUNNING, "num_requests_running"),
    Alias(c.REQUESTS_WAITING, "num_requests_waiting"),
    Alias(c.KV_USAGE, "kv_cache_usage_perc"),
    Alias(c.KV_INFO, "cache_config_info", {"num_blocks": "num_gpu_blocks"}),
    Alias(c.PREFIX_QUERIES, "prefix_cache_queries"),
    Alias(c.PREFIX_HITS, "prefix_cache_hits"),
    Alias(c.PREEMPTIONS, "num_preemptions"),
    Alias(c.DRAFT_TOKENS, "spec_decode_num_draft_tokens"),
    Alias(c.DRAFT_ACCEPTED, "spec_decode_num_accepted_tokens"),
    Alias(c.PROMPT_TOKENS, "prompt_tokens"),
    Alias(c.GENERATION_TOKENS, "generation_tokens"),
    Alias(c.REQUESTS, "request_success", {"finish_reason": "finished_reason"}, ("stop", "length", "abort", "error")),
    Alias(c.FIRST_TOKEN, "time_to_first_token_seconds"),
    Alias(c.INTER_TOKEN, "inter_token_latency_seconds"),
    Alias(c.TIME_PER_TOKEN, "request_time_per_output_token_seconds"),
    Alias(c.REQUEST_DURATION, "e2e_request_latency_seconds"),
    Alias(c.REQUEST_QUEUE, "request_queue_time_seconds"),
    Alias(c.REQUEST_PROMPT_TOKENS, "request_prompt_tokens"),
    Alias(c.REQUEST_GENERATION_TOKENS, "request_generation_tokens"),
)


class VllmNames(Collector):
    """Adds the aliases to the page of a registry."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        metrics.registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """The families without their samples, so that registering does not collect."""
        return [Metric(VLLM_PREFIX + alias.name, alias.spec.help, alias.spec.kind) for alias in ALIASES]

    def collect(self) -> Iterator[Metric]:
        for alias, family in zip(ALIASES, self.describe(), strict=True):
            for ours in self._metrics.of(alias.spec).collect():
                family.samples += [_renamed(sample, alias) for sample in ours.samples if _known(sample, alias)]
            yield family


def _known(sample: Sample, alias: Alias) -> bool:
    return not alias.only or any(sample.labels[label] in alias.only for label in alias.labels)


def _renamed(sample: Sample, alias: Alias) -> Sample:
    names = {c.MODEL: "model_name", **alias.labels}
    labels = {names.get(label, label): value for label, value in sample.labels.items()}
    suffix = sample.name.removeprefix(c.PREFIX + alias.spec.name)
    return sample._replace(name=VLLM_PREFIX + alias.name + suffix, labels=labels | ENGINE)
