"""What a model will need, before anything is loaded: from config.json and safetensors headers alone.

    facts.py -> what the files and the entry of models.yaml say         needs.py -> the arithmetic of one configuration
    devices.py -> which devices the entry names                         nearest.py -> what would fit instead
    kv.py, activations.py, workspace.py -> one component each

`make_plan` is the first step of every load, and what `halfbyte plan` shows. It measures nothing of
the model: ledger.py does, after loading.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec
import torch

from server.errors import ConfigError, DoesNotFitError, LoadError
from server.memory import machine
from server.memory.components import MAPPED_FILES, RUNTIME_CONTEXT
from server.memory.facts import read_facts
from server.memory.machine import Share
from server.memory.nearest import in_words, nearest
from server.memory.needs import Supply, plan_for, weights_by_device
from server.records import CPU, DISK, DevicePlan, ModelSpec, Plan, Planned, Shortage, is_sendable


def make_plan(
    spec: ModelSpec,
    available_bytes: int | None = None,
    *,
    runtime: Share | None = None,
    promised: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of one model as configured; where it does not fit, it says so and names what would.

    `available_bytes` stands in for what the main device has free, `runtime` for what a process takes before it
    loads anything: this one has imported the same libraries by then, so it is the measure. `promised` are bytes by
    device that are free, and not for this model.

    Raises ConfigError for a bad value; the errors of `quant` for a checkpoint or a quantization config that is not
    accepted; LoadError where a config's sizes are no model's.
    """
    facts = read_facts(spec)
    weights = weights_by_device(facts, facts.quantization)
    own = machine.share(os.getpid()) or Share(0, 0)
    free = {device: free_bytes(device) for device in weights.devices}
    free[CPU] += own.anonymous
    if available_bytes is not None:
        free[facts.device] = available_bytes
    supply = Supply(free, promised or {}, runtime or own)
    plan = plan_for(spec, facts, weights, supply)
    if not is_sendable(plan):
        raise LoadError(
            f"model {spec.name!r}: by its config.json it has {plan.parameters} parameters and "
            f"{plan.max_model_len} positions; accepted are numbers of which the bytes can be counted in 64 bits"
        )
    return plan if plan.fits else msgspec.structs.replace(plan, nearest=nearest(spec, facts, weights, supply))


def make_plans(specs: Iterable[ModelSpec]) -> list[Plan]:
    """The plans of models that one server starts with, in their order: each for what those before it leave."""
    plans = []
    promised: Counter[str] = Counter()
    for spec in specs:
        plan = make_plan(spec, promised=promised)
        plans.append(plan)
        if plan.fits:
            own = promise(plan, runtime_of(plan).anonymous)
            promised.update(own.peak if own.is_on_cpu else own.kept)  # on a GPU the next waits until this one is loaded
    return plans


def promise(plan: Plan, held: int) -> Planned:
    """What the plan's engine will take of each device, with what it holds on the CPU now in place of its runtime."""
    peak, kept = {}, {}
    for device in plan.devices:
        if device.device != DISK:
            runtime = device.components.get(RUNTIME_CONTEXT, 0) + device.components.get(MAPPED_FILES, 0)
            now = held if device.device == CPU else 0
            peak[device.device] = device.peak_bytes - runtime + now
            kept[device.device] = device.total_bytes - runtime + now
    return Planned(peak, kept)


def runtime_of(plan: Plan) -> Share:
    """What it counts as the process's own before loading."""
    host = next(device.components for device in plan.devices if device.device == CPU)
    return Share(host[RUNTIME_CONTEXT], host[MAPPED_FILES])


def require_fit(plan: Plan) -> None:
    """Raises DoesNotFitError with the arithmetic, and the nearest configurations that would fit."""
    lacking = next((device for device in plan.devices if not device.fits), None)
    if lacking is not None:
        shortage = Shortage(lacking.device, lacking.peak_bytes, lacking.available_bytes)
        raise DoesNotFitError(_refusal(plan, lacking), shortage)


def free_bytes(device: str) -> int:
    """Bytes a new model may take: a CUDA device's or disk's free ones, or the machine's or control group's."""
    if device == DISK:
        return shutil.disk_usage(tempfile.gettempdir()).free
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    available = machine.available()
    if available is None:
        raise ConfigError("the memory of this machine is unknown: /proc/meminfo has no MemAvailable")
    return available


def _refusal(plan: Plan, lacking: DevicePlan) -> str:
    parts = ", ".join(f"{name} {size:,}" for name, size in lacking.components.items())
    sentence = (
        f"model {plan.model!r} needs {lacking.peak_bytes:,} bytes on {lacking.device} ({parts}, while loading "
        f"{lacking.loading_bytes:,}), but {lacking.available_bytes:,} are free"
    )
    offers = " or ".join(in_words(alternative) for alternative in plan.nearest)
    return sentence + (
        f"; what would fit: {offers}" if offers else "; no smaller cache, context, step or format would fit"
    )
