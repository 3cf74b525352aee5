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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, Self, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from quant.config import BitsAndBytesConfig
from quant.embedding import (
    Embedding4bit,
    Embedding8bit,
    PackedEmbedding,
    TiedToEmbedding,
    embedding_groups,
)
from quant.errors import CheckpointError, QuantConfigError, QuantError
from quant.experts import PackedExperts, are_packed_in, converter_parts, find_experts
from quant.headers import ADAPTED, plain_name
from quant.linear import Linear4bit, Linear8bit, PackedLinear
from quant.offload import is_offloaded, keep_in_float32, offloaded_modules
from quant.packed import PackedModule
from quant.state import NAMES_4BIT, NAMES_8BIT, PackedWeight

logger = logging.getLogger(__name__)

Kind = Literal["4bit", "8bit"]
LAYERS: Final[Mapping[Kind, type[Linear4bit | Linear8bit]]] = {"4bit": Linear4bit, "8bit": Linear8bit}
EMBEDDINGS: Final[Mapping[Kind, type[Embedding4bit | Embedding8bit]]] = {"4bit": Embedding4bit, "8bit": Embedding8bit}
METHODS: Final = ("bitsandbytes_4bit", "bitsandbytes_8bit")
"""The names under which transformers looks up quantizers and configs for `quant_method: bitsandbytes`."""

OFFLOAD_REFUSED: Final = (
    "Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to fit the quantized model. "
    "If you want to dispatch the model on the CPU or the disk while keeping these modules in 32-bit, you need to set "
    "`llm_int8_enable_fp32_cpu_offload=True` and pass a custom `device_map` to `from_pretrained`."
)
"""The words that bitsandbytes users know and search for."""


def modules_to_quantize(model: nn.Module, config: BitsAndBytesConfig, device_map: object = None) -> dict[str, Kind]:
    """The modules of a model (on meta or not) that `config` converts, by name: nn.Linear itself, GPT-2's Conv1D, and
    stacks of experts (quant/experts.py) unless `llm_int8_has_fp16_weight` keeps main weights.

    Not converted: what `llm_int8_skip_modules` names (as transformers applies it: by prefix up to a dot, as a regular
    expression, or as a suffix) or, where it is None, the output embedding and the last module; always what is tied to
    another tensor; modules that transformers keeps in float32; and with `llm_int8_enable_fp32_cpu_offload` what
    `device_map` (a dictionary) puts on the CPU or disk beside the main device. An entry of `module_overrides` decides
    in the place of `llm_int8_skip_modules`; one that has no effect is a QuantConfigError. `config.for_module(name)` is
    the config of each module that is returned. With `quantize_embeddings` also the input and the output embedding are
    converted, and what is tied to them, which shares the config of the group's first (embedding_groups).
    """
    kept_in_float32 = getattr(model, "_keep_in_fp32_modules", None)
    skips: list[str] = HfQuantizer.get_modules_to_not_convert(
        cast(PreTrainedModel, model), config.llm_int8_skip_modules, kept_in_float32
    )
    lies_away = is_offloaded(device_map if config.llm_int8_enable_fp32_cpu_offload else None)
    tied = _tied_modules(model)
    experts = find_experts(model)
    kinds: dict[str, Kind] = {}
    without_effect = set(config.module_overrides)
    groups = embedding_groups(model) if config.quantize_embeddings else {}
    for members in groups.values():
        named = {config.override_of(name) for name in members}
        without_effect -= {pattern for pattern in named if pattern is not None}
        named_skips = [*(config.llm_int8_skip_modules or ()), *(kept_in_float32 or ())]
        own = _config_of_group(model, config, members)
        if own is not None and all(
            not lies_away(name)
            and should_convert_module(name, named_skips if config.override_of(name) is None else kept_in_float32)
            for name in members
        ):
            kinds |= dict.fromkeys(members, "8bit" if own.load_in_8bit else "4bit")
    in_groups = {name for members in groups.values() for name in members}
    for name, module in model.named_modules():
        if name in in_groups or not (type(module) is nn.Linear or isinstance(module, Conv1D) or name in experts):
            continue
        own, pattern = config.for_module(name), config.override_of(name)
        if own is None:
            without_effect.discard(str(pattern))
        elif name not in tied and should_convert_module(name, skips if pattern is None else kept_in_float32):
            without_effect.discard(str(pattern))
            keeps_values = name in experts and own.load_in_8bit and own.llm_int8_has_fp16_weight
            if not lies_away(name) and not keeps_values:
                kinds[name] = "8bit" if own.load_in_8bit else "4bit"
    if without_effect:
        raise QuantConfigError(
            f"module_overrides names {', '.join(map(repr, sorted(without_effect)))}, which changes nothing in "
            f"{type(model).__name__}; accepted are names of linear layers whose weight is not tied to another one"
        )
    return kinds


def _config_of_group(
    model: nn.Module, config: BitsAndBytesConfig, members: tuple[str, ...]
) -> BitsAndBytesConfig | None:
    """The config of the modules that share one table: the first one's; an override of another must be the same."""
    first = members[0]
    for name in members[1:]:
        pattern = config.override_of(name)
        if pattern is not None and config.for_module(name) != config.for_module(first):
            raise QuantConfigError(
                f"module_overrides names {name} in {pattern!r}, and its weight is that of {first}; accepted is to name "
                f"{first}, or both alike"
            )
    own = config.for_module(first)
    is_linear = isinstance(model.get_submodule(first), nn.Linear)
    if own is not None and own.load_in_8bit and own.llm_int8_has_fp16_weight and not is_linear:
        raise QuantConfigError(
            f"llm_int8_has_fp16_weight is True, which the embedding {first} cannot have; accepted is False, or an "
            "entry of module_overrides for it"
        )
    return own


def pack_module(module: nn.Module, kind: Kind, config: BitsAndBytesConfig) -> PackedLinear | PackedEmbedding:
    """A linear layer or an embedding as its packed one."""
    layers = EMBEDDINGS if isinstance(module, nn.Embedding) else LAYERS
    return layers[kind].from_float(module, config)


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
        self.renamings = [WeightRenaming(re.escape(ADAPTED), ".")]
        """How names in files become the model's, beside transformers' own rules; saving does not undo them."""
        self.failure: QuantError | None = None
        self.is_spread = False
        """The model lies on several devices, so that transformers dispatches it before it lets us report."""
        self.dtype = torch.float32
        """The model's, which preprocess_model finds out."""
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
        if isinstance(module, PackedExperts):
            return leaf in module.projections
        return leaf == "weight" and isinstance(module, PackedModule)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        device_map = kwargs.get("device_map")
        self.is_spread = isinstance(device_map, Mapping) and len(set(device_map.values())) > 1
        names = modules_to_quantize(model, config, device_map)
        self.dtype = model.dtype
        plan = model._get_dtype_plan(self.dtype)
        self._float32_patterns = [pattern for pattern, dtype in plan.items() if dtype == torch.float32]
        experts = find_experts(model)
        files = dict(_tensors_in(kwargs.get("checkpoint_files")))
        if self.pre_quantized and experts and not are_packed_in(files):
            names = {name: kind for name, kind in names.items() if name not in experts}
        groups = embedding_groups(model) if config.quantize_embeddings else {}
        tied_to = {name: first for first, members in groups.items() for name in members[1:] if first in names}
        for name, kind in names.items():
            own = config.for_module(name) or config
            module = model.get_submodule(name)
            layer: nn.Module
            if name in experts:
                layer = PackedExperts(module, experts[name], own)
                module._is_hf_initialized = True
            elif name in tied_to:
                continue
            else:
                layer = pack_module(module, kind, own)
            # Until its weight arrives: transformers would draw random numbers into bytes that are missing.
            layer._is_hf_initialized = True  # type: ignore[assignment]
            model.set_submodule(name, layer)
        self._rename_tied(model, tied_to, files)
        for name, first in tied_to.items():
            model.set_submodule(name, TiedToEmbedding(model.get_submodule(first), model.get_submodule(name)))
            del model.all_tied_weights_keys[f"{name}.weight"]
        if config.llm_int8_enable_fp32_cpu_offload:
            keep_in_float32(model, device_map, self._is_kept_in_float32)
        if not names:
            logger.warning("no module of %s is converted; its linear layers are all skipped", type(model).__name__)
        stacked = [
            f"{name}.{leaf}"
            for name, module in model.named_modules()
            for leaf, p in module.named_parameters(recurse=False)
            if p.dim() == 3 and leaf != "weight" and not isinstance(module, PackedExperts)
        ]
        if stacked:
            logger.warning(
                "%d stacked expert weights of %s stay unquantized, among them %s",
                len(stacked),
                type(model).__name__,
                stacked[0],
            )

    def _rename_tied(self, model: Any, tied_to: Mapping[str, str], files: Mapping[str, _Place]) -> None:
        """A file may hold a tied table under any of its names, or under several; it is read under the first one's."""
        for name, first in tied_to.items():
            leaf = first.rpartition(".")[2]
            own = [key for key in files if f".{key}".endswith(f".{leaf}.weight")]
            if f"{name}.weight" in files and not own:
                renaming = WeightRenaming(rf"^{re.escape(name)}\.weight", f"{first}.weight")
                self.renamings.append(renaming)
            elif f"{name}.weight" in files and not self.pre_quantized:
                tied, table = (_read(files[key]) for key in (f"{name}.weight", own[0]))
                if not torch.equal(tied, table):
                    raise CheckpointError(
                        f"the file holds {name}.weight and {own[0]} with different values, and the config ties them; "
                        "accepted with quantize_embeddings are equal ones, or tie_word_embeddings=False in config.json"
                    )
            model._keys_to_ignore_on_load_unexpected.add(rf"^{re.escape(name)}\.(weight|SCB)")

    def unquantized_dtype(self, name: str, meta: torch.Tensor) -> torch.dtype:
        """The dtype of what is not quantized: that on meta (float32 if it is offloaded), or float32 by its name."""
        return torch.float32 if meta.is_floating_point() and self._is_kept_in_float32(name) else meta.dtype

    def _is_kept_in_float32(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self._float32_patterns)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        for name, module in model.named_modules():
            if isinstance(module, PackedModule | PackedExperts) and any(
                buffer.is_meta for buffer in module.buffers(recurse=False)
            ):
                raise CheckpointError(f"tensor {name}.weight is missing")
        # Saving replays the load operations backwards; ours needs none of that, as layers write their own names.
        conversions = []
        for conversion in getattr(model, "_weight_conversions", None) or []:
            first = next(iter(getattr(conversion, "operations", ())), None)
            if isinstance(first, _DeserializeExperts):
                conversions += [] if first.original is None else [first.original]
            elif not isinstance(first, _Deserialize) and conversion not in self.renamings:
                conversions.append(conversion)
        model._weight_conversions = conversions
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Ours come first; in a packed file, what joins expert weights into a stack gets their statistics too."""
        weight_conversions = [*self.renamings, *weight_conversions]
        if not self.pre_quantized:
            return list(super().update_weight_conversions(weight_conversions, model))  # type: ignore[no-untyped-call]
        conversions = [
            self._joining(entry, entry._original_source_patterns, entry._original_target_patterns)
            if isinstance(entry, WeightConverter) and converter_parts(entry) is not None
            else entry
            for entry in weight_conversions
        ]
        for stem, leaf in {  # stacks that transformers does not join: each matrix has a name of its own in our files
            (name.rpartition(".")[2], projection.leaf)
            for name, module in model.named_modules()
            if isinstance(module, PackedExperts)
            for projection in module.projections.values()
            if projection.names == (f"{projection.leaf}s.{{expert}}",)
        }:
            conversions.append(self._joining(None, [f"{stem}.{leaf}s.*.weight"], [f"{stem}.{leaf}"]))
        return list(super().update_weight_conversions(conversions, model))  # type: ignore[no-untyped-call]

    def _joining(self, original: WeightConverter | None, sources: list[str], targets: list[str]) -> WeightConverter:
        named = [source.removesuffix("weight") + name for source in sources for name in self.serialized_names["weight"]]
        operation = _DeserializeExperts(self, original, tuple(sources))
        if original is None:
            return WeightConverter(named, targets, [operation])
        return original.copy(named, targets, operations=[operation])

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
        modules = dict(model.named_modules())
        for name, module in modules.items():
            if isinstance(module, PackedEmbedding):
                embedding = module.to_float(dtype)
                model.set_submodule(name, embedding)
                for other, tied in modules.items():
                    if isinstance(tied, TiedToEmbedding) and tied.embedding is module:
                        model.set_submodule(other, tied.to_float(embedding))
                        model.all_tied_weights_keys[f"{other}.weight"] = f"{name}.weight"
            elif isinstance(module, PackedLinear):
                linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(module.dequantize(dtype))
                if module.bias is not None:
                    linear.bias = nn.Parameter(module.bias.detach().to(dtype or module.bias.dtype))
                model.set_submodule(name, linear.train(module.training))
            elif isinstance(module, PackedExperts):
                model.set_submodule(name, module.to_float(dtype))
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
        if quantizer.failure is None or not isinstance(module, PackedModule | PackedExperts):
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
            module, leaf = get_module_from_name(model, name)
            work = functools.partial(_pack, name, value, module)
            if isinstance(module, PackedExperts):
                work = functools.partial(self._pack_stack, name, value, module, leaf)
            results |= self._guarded(name, module, kwargs.get("missing_keys"), work)
        return results

    def _pack_stack(self, name: str, value: torch.Tensor, module: PackedExperts, leaf: str) -> dict[str, Any]:
        module.quantize(leaf, value)
        return {name: getattr(module, leaf)}


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
        if not isinstance(module, PackedModule):
            return {name: self._unquantized(name, tensors, module, model)}
        has_fp16 = isinstance(module, Linear8bit) and module.has_fp16_weight
        if has_fp16 and "SCB" not in tensors:
            module.quantize(tensors["weight"])
        elif set(tensors) == {"weight"} and _holds_values(tensors["weight"], module):
            # Unquantized in a packed file: the module was offloaded when the file was written.
            _pack(name, tensors["weight"].to(self.hf_quantizer.dtype), module)
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
            raise CheckpointError(
                f"tensor {name} is packed in the file, but the quantization config keeps this module unquantized; "
                "take it out of llm_int8_skip_modules"
            )
        # A packed file, and a module that is to stay unquantized because it is offloaded.
        weight = PackedWeight.from_checkpoint(tensors, name=name.removesuffix(".weight")).dequantize(dtype)
        return weight.t().contiguous() if isinstance(module, Conv1D) else weight


class _DeserializeExperts(_Operation):
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
            raise CheckpointError(
                f"tensor {name} is packed in the file, but the quantization config keeps this module unquantized; "
                "take it out of llm_int8_skip_modules"
            )
        dtype = self.hf_quantizer.unquantized_dtype(name, cast(PreTrainedModel, model).get_parameter_or_buffer(name))
        joined = {source: [value.to(dtype) for value in values] for source, values in input_dict.items()}
        for operation in self.original.operations:
            patterns = {"source_patterns": list(self.sources), "target_patterns": self.original.target_patterns}
            joined = operation.convert(joined, **(kwargs | patterns))
        (stack,) = joined.values()
        return {name: stack}


def _pack(name: str, value: torch.Tensor, module: nn.Module) -> dict[str, Any]:
    """Packs a weight as files hold it where it is; one of another kind of module passes through."""
    if not isinstance(module, PackedModule):
        return {name: value}
    weight = value.t() if module.is_transposed_source else value
    if tuple(weight.shape) != module.matrix_shape:
        raise CheckpointError(f"tensor {name} has shape {list(weight.shape)}; {list(module.matrix_shape)} is needed")
    module.quantize(weight)
    module._is_hf_initialized = False  # type: ignore[assignment]
    return {name: module.weight}


def _holds_values(weight: torch.Tensor, module: PackedModule) -> bool:
    """Whether a layer's tensor is an unquantized weight, which has its shape, and not codes in a floating storage."""
    shape = weight.shape[::-1] if module.is_transposed_source else weight.shape
    return weight.is_floating_point() and tuple(shape) == module.matrix_shape


_Place = tuple[str, str]
"""A tensor's file and its name there."""


def _tensors_in(files: Any) -> Iterator[tuple[str, _Place]]:
    """The tensors in a checkpoint's safetensors files, named without adapters around layers."""
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                yield from ((plain_name(name), (str(file), name)) for name in opened.keys())  # noqa: SIM118


def _read(place: _Place) -> torch.Tensor:
    file, name = place
    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


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
