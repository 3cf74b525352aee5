"""What happens to each tensor of a file while transformers loads it: it is packed, or adopted from a packed file.

transformers turns whatever an operation raises into a report of its own; so that the reader gets our sentence,
operations keep the first error in the quantizer and pack nothing from then on. Not here: the quantizer (hf.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import get_module_from_name

from quant.errors import CheckpointError, QuantError
from quant.experts import PackedExperts
from quant.headers import TensorHeader, plain_name, read_headers
from quant.linear import Linear8bit
from quant.packed import PackedModule
from quant.quality import QualityMeter
from quant.state import PackedWeight

if TYPE_CHECKING:
    from quant.hf import HalfbyteQuantizer


class _Operation(ConversionOps):
    """An operation on the tensors of one weight that keeps the first QuantError for the end of loading."""

    def __init__(self, hf_quantizer: HalfbyteQuantizer) -> None:
        # transformers asks for this very attribute; without it float32 statistics would be cast to the model's dtype.
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # transformers copies an operation for each weight; they all must report to the one quantizer.
        return type(self)(self.hf_quantizer)

    def _guarded(
        self, name: str, module: nn.Module, missing_keys: set[str] | None, work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        quantizer = self.hf_quantizer
        if quantizer.failure is None or not isinstance(module, PackedModule | PackedExperts):
            try:
                return work()
            except QuantError as error:
                text = str(error)
                quantizer.failure = error if name in text else type(error)(f"{name}: {text}")
        if missing_keys is not None and not quantizer.is_spread:
            missing_keys.discard(name)  # the error says it; a table of all that is missing since would hide it
        return {}


class Quantize(_Operation):
    """An unquantized tensor of a layer of ours: packed where it is, as soon as it is there."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model: nn.Module = kwargs["model"]
        results: dict[str, Any] = {}
        for name, values in input_dict.items():
            value = values[0] if isinstance(values, list) else values
            module, leaf = get_module_from_name(model, name)
            work = functools.partial(_pack, name, value, module, self.hf_quantizer.meter)
            if isinstance(module, PackedExperts):
                work = functools.partial(self._pack_stack, name, value, module, leaf)
            results |= self._guarded(name, module, kwargs.get("missing_keys"), work)
        return results

    def _pack_stack(self, name: str, value: torch.Tensor, module: PackedExperts, leaf: str) -> dict[str, Any]:
        module.quantize(leaf, value)
        if self.hf_quantizer.meter is not None:
            self.hf_quantizer.meter.add_stack(name, module, leaf, value)
        return {name: getattr(module, leaf)}


class Deserialize(_Operation):
    """The tensors of one packed weight; a weight that is not packed passes through in the model's dtype."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model: nn.Module = kwargs["model"]
        name: str = kwargs["full_layer_name"]
        tensors = {key: values[0] if isinstance(values, list) else values for key, values in input_dict.items()}
        module, _ = get_module_from_name(model, name)
        work = functools.partial(self._adopt, name, tensors, module, model)
        return self._guarded(name, module, kwargs.get("missing_keys"), work)

    def _adopt(
        self, name: str, tensors: dict[str, torch.Tensor], module: nn.Module, model: nn.Module
    ) -> dict[str, Any]:
        if not isinstance(module, PackedModule):
            return {name: self._unquantized(name, tensors, module, model)}
        has_fp16 = isinstance(module, Linear8bit) and module.has_fp16_weight
        if has_fp16 and "SCB" not in tensors:
            module.quantize(tensors["weight"])
        elif set(tensors) == {"weight"} and _holds_values(tensors["weight"], module):
            if not self.hf_quantizer.quantization_config.llm_int8_enable_fp32_cpu_offload:
                raise CheckpointError(
                    f"tensor {name} is stored in floating point in a packed checkpoint; accepted is that where "
                    "llm_int8_skip_modules names its module, or in safetensors files that are read without key_mapping"
                )
            # The module was offloaded when the file was written.
            _pack(name, tensors["weight"].to(self.hf_quantizer.dtype), module, self.hf_quantizer.meter)
        else:
            module.adopt(PackedWeight.from_checkpoint(tensors, name=name.removesuffix(".weight")))
        module._is_hf_initialized = False  # type: ignore[assignment]
        return {name: module.weight}

    def _unquantized(self, name: str, tensors: dict[str, torch.Tensor], module: nn.Module, model: Any) -> torch.Tensor:
        meta = model.get_parameter_or_buffer(name)
        dtype = self.hf_quantizer.unquantized_dtype(name, meta)
        if len(tensors) == 1:
            (value,) = tensors.values()
            return value.to(dtype) if value.is_floating_point() else value
        is_linear = isinstance(module, nn.Linear | Conv1D)  # routers were linear layers once, and packed with them
        if is_linear and not self.hf_quantizer.quantization_config.llm_int8_enable_fp32_cpu_offload:
            raise _not_to_be_packed(name)
        # A packed file, and a module that is to stay unquantized because it is offloaded.
        weight = PackedWeight.from_checkpoint(tensors, name=name.removesuffix(".weight")).dequantize(dtype)
        return weight.t().contiguous() if isinstance(module, Conv1D) else weight


class DeserializeExperts(_Operation):
    """The packed tensors of every expert of one stack; a stack that is not packed is joined as transformers would."""

    def __init__(
        self, hf_quantizer: HalfbyteQuantizer, original: WeightConverter | None, sources: tuple[str, ...]
    ) -> None:
        super().__init__(hf_quantizer)
        self.original = original
        self.sources = sources

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self.hf_quantizer, self.original, self.sources)

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model: nn.Module = kwargs["model"]
        name: str = kwargs["full_layer_name"]
        module, leaf = get_module_from_name(model, name)
        if not isinstance(module, PackedExperts):
            return self._join(name, input_dict, model, kwargs)
        parts = [
            {
                key: input_dict[source.removesuffix("weight") + key]
                for key in self.hf_quantizer.serialized_names["weight"]
                if source.removesuffix("weight") + key in input_dict
            }
            for source in self.sources
        ]
        work = functools.partial(self._adopt, name, module, leaf, parts)
        return self._guarded(name, module, kwargs.get("missing_keys"), work)

    def _adopt(
        self, name: str, module: PackedExperts, leaf: str, parts: list[dict[str, list[torch.Tensor]]]
    ) -> dict[str, Any]:
        projection = module.projections[leaf]
        prefix = name.removesuffix(leaf)
        for part, lists in enumerate(parts):
            for key in ("weight", *lists):
                found = len(lists.get(key, ()))
                if found != projection.experts:
                    wanted = projection.names[part].format(expert="*")
                    raise CheckpointError(
                        f"{name}: the file has {found} tensors {prefix}{wanted}.{key}; {projection.experts} are needed"
                    )
        matrices = [
            PackedWeight.from_checkpoint(
                {key: tensors[expert] for key, tensors in lists.items()}, name=prefix + own.format(expert=expert)
            )
            for expert in range(projection.experts)
            for own, lists in zip(projection.names, parts, strict=True)
        ]
        module.adopt(leaf, matrices)
        return {name: getattr(module, leaf)}

    def _join(self, name: str, input_dict: dict[str, Any], model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.original is None or set(input_dict) - set(self.sources):
            raise _not_to_be_packed(name)
        dtype = self.hf_quantizer.unquantized_dtype(name, cast(PreTrainedModel, model).get_parameter_or_buffer(name))
        joined = {source: [value.to(dtype) for value in values] for source, values in input_dict.items()}
        for operation in self.original.operations:
            patterns = {"source_patterns": list(self.sources), "target_patterns": self.original.target_patterns}
            joined = operation.convert(joined, **(kwargs | patterns))
        (stack,) = joined.values()
        return {name: stack}


def _pack(name: str, value: torch.Tensor, module: nn.Module, meter: QualityMeter | None) -> dict[str, Any]:
    """Packs a weight as files hold it where it is; one of another kind of module passes through."""
    if not isinstance(module, PackedModule):
        return {name: value}
    weight = value.t() if module.is_transposed_source else value
    if tuple(weight.shape) != module.matrix_shape:
        raise CheckpointError(f"tensor {name} has shape {list(weight.shape)}; {list(module.matrix_shape)} is needed")
    module.quantize(weight)
    if meter is not None and module.is_packed:
        meter.add(name, module.packed_weight(), weight)
    module._is_hf_initialized = False  # type: ignore[assignment]
    return {name: module.weight}


def _not_to_be_packed(name: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name} is packed in the file, but its module stays unquantized; accepted there is a tensor of values"
    )


def _holds_values(weight: torch.Tensor, module: PackedModule) -> bool:
    """Whether a layer's tensor is an unquantized weight, which has its shape, and not codes in a floating storage."""
    shape = weight.shape[::-1] if module.is_transposed_source else weight.shape
    return weight.is_floating_point() and tuple(shape) == module.matrix_shape


def headers_in(files: Any) -> dict[str, TensorHeader]:
    """What a checkpoint's safetensors files hold, named without adapters around layers; nothing of other files."""
    found = read_headers(Path(file) for file in files or () if str(file).endswith(".safetensors"))
    return {plain_name(name): header for name, header in found.items()}


def read(header: TensorHeader) -> torch.Tensor:
    with safe_open(header.file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(header.name)
    return tensor
