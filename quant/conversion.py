"""Which modules of a model are packed, and as what. The loading uses it, and so does the prediction of memory.

Not here: what a module of its own looks like (config.for_module says), swapping and loading (hf.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from quant.config import BitsAndBytesConfig
from quant.embedding import Embedding4bit, Embedding8bit, PackedEmbedding, embedding_groups
from quant.errors import QuantConfigError
from quant.experts import find_experts
from quant.linear import Linear4bit, Linear8bit, PackedLinear
from quant.offload import is_offloaded

Kind = Literal["4bit", "8bit"]
LAYERS: Final[Mapping[Kind, type[Linear4bit | Linear8bit]]] = {"4bit": Linear4bit, "8bit": Linear8bit}
EMBEDDINGS: Final[Mapping[Kind, type[Embedding4bit | Embedding8bit]]] = {"4bit": Embedding4bit, "8bit": Embedding8bit}

_FALCON_LINEAR: Final = "FalconLinear"
"""The one subclass of nn.Linear in transformers that computes what nn.Linear does, and only rounds in between."""


def modules_to_quantize(model: nn.Module, config: BitsAndBytesConfig, device_map: object = None) -> dict[str, Kind]:
    """The modules of a model (on meta or not) that `config` converts, by name: linear layers (is_linear_layer), GPT-2's
    Conv1D among them, and stacks of experts (quant/experts.py) unless `llm_int8_has_fp16_weight` keeps main weights.

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
        if name in in_groups or not (is_linear_layer(module) or name in experts):
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


def is_linear_layer(module: nn.Module) -> bool:
    """Whether the module is a linear layer and nothing more: its class may add to what an nn.Linear computes."""
    kind = type(module)
    return kind is nn.Linear or isinstance(module, Conv1D) or kind.__name__ == _FALCON_LINEAR


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
