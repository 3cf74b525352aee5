"""Which devices a model's entry names, and whether they are here: what `device` and `device_map` mean on this machine.

A map is checked before anything is read by it. Loading would find most of its mistakes too, but late, and in words of
other libraries; what it would not find it ignores. How much is free on a device is plan.py's; which tensor goes where,
needs.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from quant import memory as weights
from quant.config import BitsAndBytesConfig
from quant.hf import HalfbyteQuantizer, require_offload_allowed
from quant.offload import entry_for, is_offloaded, spelled
from server.errors import ConfigError
from server.records import CPU, DISK, ModelSpec

WORKED_OUT: Final = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that transformers works out from the memory it finds."""


def known_devices() -> list[str]:
    """What computes here, as torch spells it."""
    return [CPU, *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def resolve_device(spec: ModelSpec) -> str:
    """auto is the first CUDA device where there is one, else the CPU. Raises ConfigError for one that is not here."""
    known = known_devices()
    if spec.device == "auto":
        return known[1] if len(known) > 1 else CPU
    if spec.device.partition(":")[0] not in (CPU, "cuda"):
        raise ConfigError(f"model {spec.name!r}: device is {spec.device!r}; accepted are auto, cpu, cuda and cuda:N")
    device = spelled(spec.device)
    if device not in known:
        lacking = "no CUDA device is here" if len(known) == 1 else "that is not here"
        accepted = "cpu or auto" if len(known) == 1 else ", ".join(["auto", *known])
        raise ConfigError(f"model {spec.name!r}: device is {spec.device!r}, but {lacking}; use {accepted}")
    return device


def main_device(spec: ModelSpec, device_map: Mapping[str, Any]) -> str:
    """The first device of a map that is not merely where weights wait."""
    lies_away = is_offloaded(device_map)
    main = next((spelled(device) for name, device in device_map.items() if not lies_away(name)), None)
    return resolve_device(spec) if main is None else main


def resolve_map(
    spec: ModelSpec,
    hf_config: transformers.PretrainedConfig,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
    files: list[Path],
    meta: transformers.PreTrainedModel,
) -> Mapping[str, Any] | None:
    """The entry's map, a name of one as transformers works it out; None where all is on the main device.

    Raises ConfigError for a map that names what is not here, or not all that is; QuantConfigError where it puts
    modules beside the main device and the quantization does not allow it.
    """
    given = spec.device_map
    if given is None:
        return None
    if not isinstance(given, str):
        _check_names(spec, given, meta)
        found = {name: _known(spec, name, device) for name, device in given.items()}
    elif given in WORKED_OUT:
        found = dict(_worked_out(given, hf_config, dtype, quantization, files))
    elif spelled(given) in known_devices():
        found = {"": spelled(given)}
    else:
        accepted = ", ".join([*WORKED_OUT, *known_devices()])
        raise ConfigError(
            f"model {spec.name!r}: device_map is {given!r}; accepted are {accepted}, or a mapping of modules to devices"
        )
    if quantization is not None:
        require_offload_allowed(quantization, found)
    return found


def _known(spec: ModelSpec, name: str, device: object) -> str:
    places = [*known_devices(), DISK]
    if spelled(device) not in places:
        what = repr(name) if name else "all that it does not name"
        raise ConfigError(f"model {spec.name!r}: device_map puts {what} on {device!r}; here are {', '.join(places)}")
    return spelled(device)


def _check_names(spec: ModelSpec, device_map: Mapping[str, Any], meta: transformers.PreTrainedModel) -> None:
    """Every entry is a module or tensor of the model, and every tensor is under one of them."""
    names = {name for name, _ in (*meta.named_modules(), *meta.named_parameters(), *meta.named_buffers())}
    for entry in device_map:
        if entry not in names:  # "" is the model itself
            raise ConfigError(
                f"model {spec.name!r}: device_map names {entry!r}, which {type(meta).__name__} does not have; "
                "accepted are its modules, and '' for all that is not named"
            )
    entry_of = entry_for(device_map)
    left_out = next((name for name in meta.state_dict() if entry_of(name) is None), None)
    if left_out is not None:
        raise ConfigError(
            f"model {spec.name!r}: device_map does not say where {left_out!r} goes; accepted is an entry for every "
            "module, and '' for all that is not named"
        )


def _worked_out(
    name: str,
    hf_config: transformers.PretrainedConfig,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
    files: list[Path],
) -> Mapping[str, Any]:
    from transformers.integrations.accelerate import _get_device_map  # accelerate takes a while to import

    model = weights.meta_model(hf_config, dtype)
    quantizer = None
    if quantization is not None:
        # By default a quantizer takes the files for packed ones.
        quantizer = HalfbyteQuantizer(quantization, pre_quantized=weights.is_packed(hf_config))
        quantizer.preprocess_model(
            model=model, dtype=dtype, device_map=name, checkpoint_files=list(map(str, files)), use_kernels=False
        )
    found: Mapping[str, Any] = _get_device_map(model, name, None, quantizer)
    return found
