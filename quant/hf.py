"""The transformers quantizer: `from_pretrained` with our config builds our layers and packs each tensor as it arrives.

Importing `quant` calls register(), which puts our classes where transformers looks for bitsandbytes' (a setting of the
whole process); unregister() puts the others back. Not here: which modules are converted (conversion.py), the layers
(linear.py, embedding.py, experts.py), the file format (state.py).

Loading runs in transformers. It swaps nothing itself: preprocess_model (here) puts packed layers on the meta device,
then each tensor of the file goes through an operation of loading.py. Those keep the first error, and
postprocess_model (here) raises it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from quant.config import BitsAndBytesConfig
from quant.conversion import modules_packed_in, modules_to_quantize, pack_module
from quant.embedding import PackedEmbedding, TiedToEmbedding, embedding_groups
from quant.errors import CheckpointError, QuantConfigError, QuantError, some
from quant.experts import PackedExperts, converter_parts, find_experts
from quant.headers import ADAPTED, TensorHeader
from quant.linear import PackedLinear
from quant.loading import Deserialize, DeserializeExperts, Quantize, headers_in, read
from quant.offload import keep_in_float32, offloaded_modules
from quant.packed import PackedModule
from quant.quality import current_meter
from quant.state import NAMES_4BIT, NAMES_8BIT
from quant.stored import stored_modules

logger = logging.getLogger(__name__)

METHODS: Final = ("bitsandbytes_4bit", "bitsandbytes_8bit")
"""The names under which transformers looks up quantizers and configs for `quant_method: bitsandbytes`."""

OFFLOAD_REFUSED: Final = (
    "Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to fit the quantized model. "
    "If you want to dispatch the model on the CPU or the disk while keeping these modules in 32-bit, you need to set "
    "`llm_int8_enable_fp32_cpu_offload=True` and pass a custom `device_map` to `from_pretrained`."
)
"""The words that bitsandbytes users know and search for."""


def require_offload_allowed(config: BitsAndBytesConfig, device_map: object) -> None:
    """Raises QuantConfigError for a map that puts modules beside the main device where the config does not allow it."""
    if not config.llm_int8_enable_fp32_cpu_offload and offloaded_modules(device_map):
        raise QuantConfigError(OFFLOAD_REFUSED)


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
        self.meter = current_meter()
        """Told of every tensor that is packed, where somebody measures."""
        self.dtype = torch.float32
        """The model's, which preprocess_model finds out."""
        self._float32_patterns: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called with the device map as given and once more as worked out from "auto"."""
        require_offload_allowed(self.quantization_config, kwargs.get("device_map"))

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
        self.dtype = model.dtype
        plan = model._get_dtype_plan(self.dtype)
        self._float32_patterns = [pattern for pattern, dtype in plan.items() if dtype == torch.float32]
        experts = find_experts(model)
        is_asked = self.pre_quantized or config.quantize_embeddings  # else nobody needs to know what the files hold
        files = headers_in(kwargs.get("checkpoint_files")) if is_asked else {}
        left_alone: list[str] = []
        if self.pre_quantized and files:
            names, values = modules_packed_in(model, config, stored_modules(model, files), device_map)
            left_alone = [name for name in values if name not in experts]  # stacks have a warning of their own
        else:
            names = modules_to_quantize(model, config, device_map)
            if self.pre_quantized:  # files that say nothing in time: stacks are there as others write them, unpacked
                names = {name: kind for name, kind in names.items() if name not in experts}
        if left_alone:
            logger.warning(
                "%d layers that the configuration would quantize are stored in floating point and stay so: %s",
                len(left_alone),
                some(left_alone),
            )
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

    def _rename_tied(self, model: Any, tied_to: Mapping[str, str], files: Mapping[str, TensorHeader]) -> None:
        """A file may hold a tied table under any of its names, or under several; it is read under the first one's."""
        for name, first in tied_to.items():
            leaf = first.rpartition(".")[2]
            own = [key for key in files if f".{key}".endswith(f".{leaf}.weight")]
            if f"{name}.weight" in files and not own:
                renaming = WeightRenaming(rf"^{re.escape(name)}\.weight", f"{first}.weight")
                self.renamings.append(renaming)
            elif f"{name}.weight" in files and not self.pre_quantized:
                tied, table = (read(files[key]) for key in (f"{name}.weight", own[0]))
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
            if isinstance(first, DeserializeExperts):
                conversions += [] if first.original is None else [first.original]
            elif not isinstance(first, Deserialize) and conversion not in self.renamings:
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
        operation = DeserializeExperts(self, original, tuple(sources))
        if original is None:
            return WeightConverter(named, targets, [operation])
        return original.copy(named, targets, operations=[operation])

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": Deserialize}

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
