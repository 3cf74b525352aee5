"""What a model's files and its entry in models.yaml say together: read once, used for every candidate configuration.

The loading uses the same functions for dtype, quantization and device, so that a plan and a load can't differ in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from quant import memory as weights
from quant.config import BitsAndBytesConfig, from_spec
from quant.errors import CheckpointError
from quant.headers import INDEX_FILE, SINGLE_FILE, TensorHeader, checkpoint_files, read_checkpoint_headers
from quant.tied import untie_what_differs
from server.errors import ConfigError
from server.memory.activations import Widths, block_widths
from server.memory.devices import main_device, resolve_device, resolve_map
from server.memory.kv import kv_layers
from server.records import DISK, ModelSpec

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Facts:
    """The same model under any quantization, context and cache."""

    device: str
    """The main one, which computes."""
    device_map: Mapping[str, Any] | None
    """As transformers would work it out; None where all is on the main device."""
    dtype: torch.dtype
    hf_config: transformers.PretrainedConfig
    quantization: BitsAndBytesConfig | None
    meta: transformers.PreTrainedModel
    parameters: int
    """Numbers in the weights, tied ones once."""
    widths: Widths
    """Of what its linear layers take and give."""
    headers: dict[str, TensorHeader]
    """Empty where there is only a config.json: shapes are known all the same."""
    checkpoint_bytes: int
    prequantized: bool

    def batch_tokens(self, spec: ModelSpec) -> int:
        """How many tokens a step of this entry computes at most."""
        reads_disk = self.device_map is not None and DISK in self.device_map.values()
        return spec.batch_tokens(self.device, reads_disk=reads_disk)


def read_facts(spec: ModelSpec) -> Facts:
    """Raises ConfigError for a value of the spec, and the errors of `quant` for files that are not accepted."""
    directory = Path(spec.path)
    hf_config = weights.read_config(directory)
    dtype = model_dtype(spec, hf_config)
    quantization = effective_quantization(spec, hf_config, dtype)
    has_weights = (directory / INDEX_FILE).exists() or (directory / SINGLE_FILE).exists()
    files = checkpoint_files(directory) if has_weights else []
    headers = read_checkpoint_headers(directory) if has_weights else {}
    meta = weights.meta_model(hf_config, dtype)
    with weights.refused(f"architecture {hf_config.model_type!r} cannot be planned from this config"):
        widths = block_widths(meta)
        _refuse_what_is_empty(hf_config)
    untie_what_differs(meta, headers)
    device_map = resolve_map(spec, hf_config, dtype, quantization, files, meta)
    device = resolve_device(spec) if device_map is None else main_device(spec, device_map)
    if spec.batch_invariant:
        _refuse_what_varies(spec, device, quantization)
    return Facts(
        device=device,
        device_map=device_map,
        dtype=dtype,
        hf_config=hf_config,
        quantization=quantization,
        meta=meta,
        parameters=sum(parameter.numel() for parameter in meta.parameters()),
        widths=widths,
        headers=headers,
        checkpoint_bytes=sum(file.stat().st_size for file in files),
        prequantized=weights.is_packed(hf_config),
    )


def _refuse_what_is_empty(config: transformers.PretrainedConfig) -> None:
    """Raises CheckpointError for a model without layers or tokens: there is nothing to serve, or to try it with."""
    sizes = {"num_hidden_layers": kv_layers(config), "vocab_size": config.get_text_config(decoder=True).vocab_size}
    for name, size in sizes.items():
        if size < 1:
            raise CheckpointError(
                f"architecture {config.model_type!r} cannot be served: {name} is {size}; accepted is 1 or more"
            )


def model_dtype(spec: ModelSpec, config: transformers.PretrainedConfig) -> torch.dtype:
    """The dtype of what is not quantized: the spec's, or with "auto" the checkpoint's own (float32 if it has none)."""
    if spec.dtype == "auto":
        own = getattr(config, "dtype", None)
        return own if isinstance(own, torch.dtype) else torch.float32
    if spec.dtype not in DTYPES:
        raise ConfigError(f"model {spec.name!r}: dtype is {spec.dtype!r}; accepted are auto, {', '.join(DTYPES)}")
    return DTYPES[spec.dtype]


def effective_quantization(
    spec: ModelSpec, config: transformers.PretrainedConfig, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """The spec's quantization, or the checkpoint's own where the spec has none; a preset computes in `dtype`.

    A checkpoint that is quantized already cannot be quantized again; asking for it is refused.
    """
    own = getattr(config, "quantization_config", None)
    if own is None:
        return from_spec(spec.quantization, compute_dtype=dtype)
    if spec.quantization is not None:
        raise ConfigError(
            f"model {spec.name!r} is quantized in its files already, and quantization is {spec.quantization!r}; "
            "leave quantization out to serve what the files hold"
        )
    fields = own if isinstance(own, dict) else own.to_dict()
    config_in_files: BitsAndBytesConfig = BitsAndBytesConfig.from_dict(fields)
    return config_in_files


def _refuse_what_varies(spec: ModelSpec, device: str, quantization: BitsAndBytesConfig | None) -> None:
    """Raises ConfigError where a row's bits would depend on the rows beside it."""
    if device != "cpu":
        raise ConfigError(
            f"model {spec.name!r}: batch_invariant is true, and the device is {device!r}; accepted is the CPU"
        )
    if quantization is None:
        return
    rules: list[Any] = [quantization.llm_int8_outliers] if quantization.load_in_8bit else []
    rules += [fields.get("llm_int8_outliers") for fields in quantization.module_overrides.values() if fields]
    if "batch" in rules:
        raise ConfigError(
            f"model {spec.name!r}: batch_invariant is true, and llm_int8_outliers is 'batch', by which rows look at "
            "each other; accepted are value and all"
        )


def describe(config: BitsAndBytesConfig | None) -> str:
    """A quantization in a word: the preset's name it equals in format, or "none"."""
    if config is None:
        return "none"
    if config.load_in_8bit:
        return "int8"
    return f"{config.bnb_4bit_quant_type}{'-dq' if config.bnb_4bit_use_double_quant else ''}"
