"""The transformers quantizer: `from_pretrained` with our config builds our layers and packs each tensor as it arrives.

Importing `quant` calls register(), which puts our classes where transformers looks for bitsandbytes' (a setting of the
whole process); unregister() puts the others back. Which modules are converted is decided in modules_to_quantize alone:
the swap uses it, and so does the prediction of memory. Not here: the layers (linear.py), the file format (state.py).

Loading runs in transformers. It swaps nothing itself: preprocess_model (here) puts Linear4bit or Linear8bit on the meta
device, then each tensor of the file goes through one of two operations: Quantize (an unquantized file) or Deserialize
(a quantized one). transformers turns whatever an operation raises into a report of its own; so that the reader gets
our sentence, operations keep the first error, pack nothing from then on, and postprocess_model raises it.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from quant.config import BitsAndBytesConfig
from quant.errors import CheckpointError, QuantConfigError, QuantError
from quant.linear import Linear4bit, Linear8bit, PackedLinear
from quant.state import NAMES_4BIT, NAMES_8BIT, PackedWeight

logger = logging.getLogger(__name__)

Kind = Literal["4bit", "8bit"]
LAYERS: Final[Mapping[Kind, type[Linear4bit | Linear8bit]]] = {"4bit": Linear4bit, "8bit": Linear8bit}
METHODS: Final = ("bitsandbytes_4bit", "bitsandbytes_8bit")
"""The names under which transformers looks up quantizers and configs for `quant_method: bitsandbytes`."""

OFFLOAD_REFUSED: Final = (
    "Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to fit the quantized model. "
    "If you want to dispatch the model on the CPU or the disk while keeping these modules in 32-bit, you need to set "
    "`llm_int8_enable_fp32_cpu_offload=True` and pass a custom `device_map` to `from_pretrained`."
)
"""The words that bitsandbytes users know and search for."""


def modules_to_quantize(model: nn.Module, config: BitsAndBytesConfig, device_map: object = None) -> dict[str, Kind]:
    """The modules of a model (on meta or not) that `config` converts, by name: nn.Linear itself and GPT-2's Conv1D.

    Not converted: what `llm_int8_skip_modules` names (as transformers applies it: by prefix up to a dot, as a regular
    expression, or as a suffix) or, where it is None, the output embedding and the last module; always what is tied to
    another tensor; modules that transformers keeps in float32; and with `llm_int8_enable_fp32_cpu_offload` what
    `device_map` (a dictionary) puts on the CPU or disk beside the main device. An entry of `module_overrides` decides
    in the place of `llm_int8_skip_modules`; one that has no effect is a QuantConfigError. `config.for_module(name)` is
    the config of each module that is returned.
    """
    kept_in_float32 = getattr(model, "_keep_in_fp32_modules", None)
    skips: list[str] = HfQuantizer.get_modules_to_not_convert(
        cast(PreTrainedModel, model), config.llm_int8_skip_modules, kept_in_float32
    )
    offloaded = offloaded_modules(device_map) if config.llm_int8_enable_fp32_cpu_offload else []
    tied = _tied_modules(model)
    kinds: dict[str, Kind] = {}
    without_effect = set(config.module_overrides)
    for name, module in model.named_modules():
        if not (type(module) is nn.Linear or isinstance(module, Conv1D)):
            continue
        own, pattern = config.for_module(name), config.override_of(name)
        if own is None:
            without_effect.discard(str(pattern))
        elif name not in tied and should_convert_module(name, skips if pattern is None else kept_in_float32):
            without_effect.discard(str(pattern))
            if should_convert_module(name, offloaded):
                kinds[name] = "8bit" if own.load_in_8bit else "4bit"
    if without_effect:
        raise QuantConfigError(
            f"module_overrides names {', '.join(map(repr, sorted(without_effect)))}, which changes nothing in "
            f"{type(model).__name__}; accepted are names of linear layers whose weight is not tied to another one"
        )
    return kinds


def offloaded_modules(device_map: object) -> list[str]:
    """The entries of a device map that lie beside the main device: disk, and the CPU where there is an accelerator."""
    if not isinstance(device_map, Mapping):
        return []
    places = {name: _place(device) for name, device in device_map.items()}
    away = {"disk"} if set(places.values()) <= {"cpu", "disk"} else {"cpu", "disk"}
    return [name for name, place in places.items() if place in away]


def _place(device: object) -> str:
    return device.type if isinstance(device, torch.device) else str(device)


def _tied_modules(model: nn.Module) -> set[str]:
    """Modules whose weight is another module's too: packing one of the two would untie them."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {name.removesuffix(".weight") for pair in tied.items() for name in pair}


class HalfbyteQuantizer(HfQuantizer):
    """transformers' side of loading and saving; one instance per from_pretrained."""

    quantization_config: BitsAndBytesConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not isinstance(quantization_config, BitsAndBytesConfig):  # transformers' own class: check its values
            quantization_config = BitsAndBytesConfig.from_dict(quantization_config.to_dict())
        if not (quantization_config.load_in_4bit or quantization_config.load_in_8bit):
            raise QuantConfigError("neither load_in_4bit nor load_in_8bit is set; set one of them to True")
        super().__init__(quantization_config, **kwargs)
        # Which names of a file make up one `weight`.
        configs = [quantization_config, *map(quantization_config.for_override, quantization_config.module_overrides)]
        flags = {config.load_in_8bit for config in configs if config is not None}
        names = [*(NAMES_4BIT if False in flags else ()), *(NAMES_8BIT if True in flags else ())]
        self.serialized_names = {"weight": list(dict.fromkeys(names))}
        self.failure: QuantError | None = None
        self.is_spread = False
        """The model lies on several devices, so that transformers dispatches it before it lets us report."""
        self._float32_patterns: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called with the device map as given and once more as worked out from "auto"."""
        if not self.quantization_config.llm_int8_enable_fp32_cpu_offload and offloaded_modules(
            kwargs.get("device_map")
        ):
            raise QuantConfigError(OFFLOAD_REFUSED)

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """Leaves a tenth of each device free for the tensor that is being packed."""
        return {key: int(value * 0.9) if isinstance(value, int) else value for key, value in max_memory.items()}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        return leaf == "weight" and isinstance(module, PackedLinear)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        device_map = kwargs.get("device_map")
        self.is_spread = isinstance(device_map, Mapping) and len(set(device_map.values())) > 1
        names = modules_to_quantize(model, config, device_map)
        for name, kind in names.items():
            own = config.for_module(name) or config
            layer = LAYERS[kind].from_float(model.get_submodule(name), own)
            # Until its weight arrives: transformers would draw random numbers into bytes that are missing.
            layer._is_hf_initialized = True  # type: ignore[assignment]
            model.set_submodule(name, layer)
        plan = model._get_dtype_plan(kwargs.get("dtype"))
        self._float32_patterns = [pattern for pattern, dtype in plan.items() if dtype == torch.float32]
        if not names:
            logger.warning("no module of %s is converted; its linear layers are all skipped", type(model).__name__)
        stacked = [name for name, p in model.named_parameters() if p.dim() == 3 and not name.endswith(".weight")]
        if stacked:
            logger.warning(
                "%d stacked expert weights of %s stay unquantized, among them %s; only linear layers are converted",
                len(stacked),
                type(model).__name__,
                stacked[0],
            )

    def unquantized_dtype(self, name: str, meta: torch.Tensor) -> torch.dtype:
        """The dtype in which transformers loads what is not quantized: the model's, or float32 for some names."""
        is_kept = any(re.search(pattern, name) for pattern in self._float32_patterns)
        return torch.float32 if is_kept and meta.is_floating_point() else meta.dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear) and any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                raise CheckpointError(f"tensor {name}.weight is missing")
        # Saving replays the load operations backwards; ours needs none of that, as layers write their own names.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not any(isinstance(operation, _Deserialize) for operation in getattr(conversion, "operations", ()))
        ]
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _Deserialize}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Every packed layer as an nn.Linear of `dtype` (the model's by default)."""
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(module.dequantize(dtype))
                if module.bias is not None:
                    linear.bias = nn.Parameter(module.bias.detach().to(dtype or module.bias.dtype))
                model.set_submodule(name, linear.train(module.training))
        return model


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
        if quantizer.failure is None or not isinstance(module, PackedLinear):
            try:
                return work()
            except QuantError as error:
                text = str(error)
                quantizer.failure = error if name in text else type(error)(f"{name}: {text}")
        if missing_keys is not None and not quantizer.is_spread:
            missing_keys.discard(name)  # the error says it; a table of all that is missing since would hide it
        return {}


class _Quantize(_Operation):
    """An unquantized tensor of a layer of ours: packed where it is, as soon as it is there."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model: nn.Module = kwargs["model"]
        results: dict[str, Any] = {}
        for name, values in input_dict.items():
            value = values[0] if isinstance(values, list) else values
            module, _ = get_module_from_name(model, name)
            work = functools.partial(self._pack, name, value, module)
            results |= self._guarded(name, module, kwargs.get("missing_keys"), work)
        return results

    def _pack(self, name: str, value: torch.Tensor, module: nn.Module) -> dict[str, Any]:
        if not isinstance(module, PackedLinear):
            return {name: value}
        weight = value.t() if module.is_transposed_source else value
        wanted = (module.out_features, module.in_features)
        if tuple(weight.shape) != wanted:
            raise CheckpointError(f"tensor {name} has shape {list(weight.shape)}; {list(wanted)} is needed")
        module.quantize(weight)
        module._is_hf_initialized = False  # type: ignore[assignment]
        return {name: module.weight}


class _Deserialize(_Operation):
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
        if not isinstance(module, PackedLinear):
            return {name: self._unquantized(name, tensors, module, model)}
        if isinstance(module, Linear8bit) and module.has_fp16_weight and "SCB" not in tensors:
            module.quantize(tensors["weight"])
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
        if not self.hf_quantizer.quantization_config.llm_int8_enable_fp32_cpu_offload:
            raise CheckpointError(
                f"tensor {name} is packed in the file, but the quantization config keeps this module unquantized; "
                "take it out of llm_int8_skip_modules"
            )
        # A packed file, and a module that is to stay unquantized because it is offloaded.
        weight = PackedWeight.from_checkpoint(tensors, name=name.removesuffix(".weight")).dequantize(dtype)
        return weight.t().contiguous() if isinstance(module, Conv1D) else weight


_originals: dict[str, tuple[Any, Any]] = {}


def register() -> None:
    """Makes transformers use these layers for every bitsandbytes config and checkpoint in this process."""
    for method in METHODS:
        # transformers' own register_quantizer refuses names that exist already.
        current = (auto.AUTO_QUANTIZER_MAPPING[method], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method])
        if current[0] is not HalfbyteQuantizer:
            _originals[method] = current
        auto.AUTO_QUANTIZER_MAPPING[method] = HalfbyteQuantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = BitsAndBytesConfig


def unregister() -> None:
    """Gives transformers its own classes back; models that are already loaded keep working."""
    for method, (quantizer, config) in _originals.items():
        auto.AUTO_QUANTIZER_MAPPING[method] = quantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
    _originals.clear()
