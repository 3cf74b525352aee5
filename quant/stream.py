"""A checkpoint as a stream of packed tensors: read, converted and renamed one tensor of the model after another.

Names are mapped by transformers' own rules in both directions, and layers pack one weight and are emptied again, so
that what comes out is what from_pretrained and save_pretrained would give without ever holding the model. Not here:
where it is written (convert.py), the formats (state.py), which layers are converted (hf.py).
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.quantizers_utils import get_module_from_name

from quant.config import BitsAndBytesConfig, from_spec
from quant.errors import CheckpointError, QuantConfigError, some
from quant.experts import PackedExperts
from quant.headers import TensorHeader, checkpoint_files, read_checkpoint_headers
from quant.hf import HalfbyteQuantizer
from quant.memory import read_config, refused
from quant.packed import PackedModule
from quant.report import LayerReport, measure_layer, measure_stack

logger = logging.getLogger(__name__)

_FLOATS: Final = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors that come out together, and what was measured of those that were packed."""

    name: str
    tensors: dict[str, torch.Tensor]
    layers: list[LayerReport]
    bytes_read: int


@dataclass(slots=True)
class _Group:
    """The tensors of a file that make up one of the model's, and the converter that joins them, if any."""

    converter: loading.WeightConverter | None = None
    keys: list[tuple[str, str]] = field(default_factory=list)  # name in the file, pattern that it matched


class Source:
    """A checkpoint with its model on the meta device, layers already swapped, and the map between their names."""

    def __init__(
        self,
        directory: Path,
        quantization: str | Mapping[str, Any] | BitsAndBytesConfig,
        dtype: torch.dtype | None,
    ) -> None:
        self.directory = directory
        config = read_config(directory)
        self.headers = read_checkpoint_headers(directory)
        _refuse_quantized(directory, config, self.headers)
        self.dtype = dtype or _own_dtype(config, self.headers)
        self.quantization = _accepted(quantization, self.dtype)
        self.bytes_in_all = sum(header.nbytes for header in self.headers.values())
        _set_dtype(config, self.dtype)
        with refused(f"{directory}: transformers cannot build its model"), torch.device("meta"):
            self.model: Any = _model_class(config)._from_config(config, dtype=self.dtype)
        self.quantizer = HalfbyteQuantizer(self.quantization, pre_quantized=False)
        self.quantizer.preprocess_model(
            model=self.model,
            dtype=self.dtype,
            device_map=None,
            checkpoint_files=checkpoint_files(directory),
            use_kernels=False,
        )
        self.parameters: dict[str, torch.Tensor] = self.model.state_dict()
        self.groups = self._grouped()
        self._settle_ties()
        self._check_complete()

    def pieces(self) -> Iterator[Piece]:
        """The output, one group of tensors after another; a group's input is let go before the next is read."""
        with ExitStack() as stack:

            @functools.cache
            def opened(file: Path) -> Any:
                return stack.enter_context(safe_open(file, framework="pt"))

            for target, group in self.groups.items():
                try:
                    yield self._piece(target, group, lambda header: opened(header.file).get_tensor(header.name))
                except SafetensorError as error:
                    raise CheckpointError(f"{self.directory}: tensor {target} cannot be read: {error}") from error

    def save_configs(self, directory: Path) -> None:
        """config.json and generation_config.json, as save_pretrained writes them."""
        model = self.model
        model.config.dtype = str(self.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.quantization_config = self.quantization
        if model.can_generate():
            generation = model.generation_config
            if (self.directory / "generation_config.json").is_file():
                generation = type(generation).from_pretrained(self.directory, local_files_only=True)
            generation.save_pretrained(directory)
        model.config.save_pretrained(directory)

    def _grouped(self) -> dict[str, _Group]:
        """Every tensor of the files under the name of the model's tensor that it belongs to."""
        own = self.quantizer.renamings
        mapping = [*own, *get_model_conversion_mapping(self.model, None, None)]
        renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix = self.model.base_model_prefix
        groups: dict[str, _Group] = {}
        unknown = []
        for key in sorted(self.headers, key=loading.dot_natural_key):
            name, pattern = loading.rename_source_key(key, renamings, converters, prefix, self.parameters)
            if name not in self.parameters and key in self.parameters:
                name, pattern = key, None
            if name not in self.parameters:
                unknown.append(key)
                continue
            group = groups.setdefault(name, _Group())
            if pattern is not None:
                group.converter = by_pattern[pattern]
            group.keys.append((key, pattern or key))
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        unknown = [key for key in unknown if not any(re.search(entry, key) for entry in ignored)]
        if unknown:
            logger.warning("%s: %d tensors are not the model's: %s", self.directory, len(unknown), some(unknown))
        # What saving has to undo, as transformers keeps it: only what was needed to read these very files.
        self.model._weight_conversions = [entry for entry in mapping if entry.was_used() and entry not in own]
        return {name: group for name, group in groups.items() if not self._is_never_saved(name)}

    def _is_never_saved(self, name: str) -> bool:
        return name in (self.model._keys_to_ignore_on_save or ())

    def _settle_ties(self) -> None:
        """Tied tensors are written once, under their source's name; two that differ in the file are not tied."""
        for tied, source in getattr(self.model, "all_tied_weights_keys", {}).items():
            if tied not in self.groups:
                continue
            if source not in self.groups:
                self.groups[source] = self.groups.pop(tied)
            elif self._equal(self.groups[tied], self.groups[source]):
                del self.groups[tied]

    def _equal(self, one: _Group, other: _Group) -> bool:
        values = []
        for group in (one, other):
            header = self.headers[group.keys[0][0]]
            with safe_open(header.file, framework="pt") as file:
                values.append(file.get_tensor(header.name))
        return torch.equal(values[0], values[1])

    def _check_complete(self) -> None:
        tied: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        there = set(self.groups)
        for name, group in self.groups.items():
            if group.converter is not None:
                first, *more = group.converter.target_patterns
                there |= {name.replace(first, pattern) for pattern in more}
        there |= {name for name, source in tied.items() if source in there}
        optional = self.model._keys_to_ignore_on_load_missing or ()
        missing = [
            name
            for name in self.parameters
            if name not in there
            and not self._is_never_saved(name)
            and not any(re.search(entry, name) for entry in optional)
        ]
        if missing:
            raise CheckpointError(f"{self.directory} lacks {len(missing)} of the model's tensors: {some(missing)}")

    def _piece(self, target: str, group: _Group, read: Callable[[TensorHeader], torch.Tensor]) -> Piece:
        headers = [(self.headers[key], pattern) for key, pattern in group.keys]
        values: Mapping[str, Any]
        if group.converter is None:
            values = {target: read(headers[0][0])}
        else:
            joined = copy.deepcopy(group.converter)
            for header, pattern in headers:
                joined.add_tensor(target, header.name, pattern, functools.partial(read, header))  # type: ignore[arg-type]
            values = joined.convert(target, model=self.model, config=self.model.config)
        tensors: dict[str, torch.Tensor] = {}
        layers: list[LayerReport] = []
        for name, found in values.items():
            self._convert(name, found[0] if isinstance(found, list) else found, tensors, layers)
        written = loading.revert_weight_conversion(self.model, tensors)
        return Piece(target, written, layers, sum(header.nbytes for header, _ in headers))

    def _convert(
        self, name: str, value: torch.Tensor, tensors: dict[str, torch.Tensor], layers: list[LayerReport]
    ) -> None:
        module, leaf = get_module_from_name(self.model, name)
        if leaf == "weight" and isinstance(module, PackedModule):
            _pack(name.removesuffix(".weight"), module, value.to(self.dtype), tensors, layers)
            return
        if isinstance(module, PackedExperts) and leaf in module.projections:
            _pack_stack(name, module, leaf, value.to(self.dtype), tensors, layers)
            return
        meta = self.parameters[name]
        if value.shape != meta.shape:
            raise CheckpointError(f"tensor {name} has shape {list(value.shape)}; {list(meta.shape)} is needed")
        tensors[name] = value.to(self.quantizer.unquantized_dtype(name, meta)) if value.is_floating_point() else value


def _pack(
    name: str,
    layer: PackedModule,
    value: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    layers: list[LayerReport],
) -> None:
    """Packs a weight in its own layer, takes the tensors that the layer would save, and empties it again."""
    weight = value.t() if layer.is_transposed_source else value
    wanted = layer.matrix_shape
    if tuple(weight.shape) != wanted:
        raise CheckpointError(f"tensor {name}.weight has shape {list(weight.shape)}; {list(wanted)} is needed")
    layer.quantize(weight)
    if layer.is_packed:
        layers.append(measure_layer(name, layer.packed_weight(), weight))
    tensors |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items() if key != "bias"}
    layer.quantize(torch.empty(wanted, dtype=weight.dtype, device="meta"))


def _pack_stack(
    name: str,
    module: PackedExperts,
    leaf: str,
    stack: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    layers: list[LayerReport],
) -> None:
    """The same for a stack of experts."""
    module.quantize(leaf, stack)
    layers.append(measure_stack(name, module, leaf, stack))
    prefix = name.removesuffix(leaf)
    tensors |= {prefix + key: tensor for key, tensor in module.checkpoint_tensors(leaf).items()}
    module.quantize(leaf, torch.empty(stack.shape, dtype=stack.dtype, device="meta"))


def _accepted(quantization: str | Mapping[str, Any] | BitsAndBytesConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    config = (
        copy.deepcopy(quantization)
        if isinstance(quantization, BitsAndBytesConfig)
        else from_spec(quantization, compute_dtype=dtype)
    )
    if config is None or not (config.load_in_4bit or config.load_in_8bit):
        raise QuantConfigError(f"quantization is {quantization!r}, which quantizes nothing; accepted is any other one")
    return config


def _refuse_quantized(
    directory: Path, config: transformers.PretrainedConfig, headers: Mapping[str, TensorHeader]
) -> None:
    own: Any = getattr(config, "quantization_config", None)
    if own is not None:
        method = own.get("quant_method") if isinstance(own, Mapping) else getattr(own, "quant_method", None)
        raise QuantConfigError(f"{directory} is quantized already ({method}); accepted are unquantized checkpoints")
    for name, header in headers.items():
        if header.dtype not in _FLOATS and name.endswith(".weight"):
            raise QuantConfigError(
                f"{directory} is quantized already (tensor {name} is {header.dtype}); accepted are unquantized "
                "checkpoints"
            )


def _own_dtype(config: transformers.PretrainedConfig, headers: Mapping[str, TensorHeader]) -> torch.dtype:
    """What the config says, or the dtype of the files' first floating-point tensor."""
    own = getattr(config, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    return next((_FLOATS[header.dtype] for header in headers.values() if header.dtype in _FLOATS), torch.float32)


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None:
            part.dtype = dtype


def _model_class(config: transformers.PretrainedConfig) -> Any:
    """The class that the config names, or the causal language model of its type."""
    for name in config.architectures or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise CheckpointError(f"architecture {config.model_type!r} is not a model that transformers knows")
    return mapping[type(config)]
