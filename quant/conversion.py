"""Which modules of a model are packed, and as what. The loading uses it, and so does the prediction of memory.

Not here: what a module of its own looks like (config.for_module says), swapping and loading (hf.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from quant.stored import Stored

Kind = Literal["4bit", "8bit"]
_KEPT: Final = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""What transformers' models call their lists of what stays in float32: in float16 alone, and in bfloat16 too."""
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
    skips: list[str] = HfQuantizer.get_modules_to_not_convert(
        cast(PreTrainedModel, model), config.llm_int8_skip_modules
    )
    is_kept_in_float32 = _kept_in_float32(model)
    lies_away = is_offloaded(device_map if config.llm_int8_enable_fp32_cpu_offload else None)
    tied = _tied_modules(model)
    experts = find_experts(model)
    kinds: dict[str, Kind] = {}
    without_effect = set(config.module_overrides)
    groups = embedding_groups(model) if config.quantize_embeddings else {}
    for members in groups.values():
        named = {config.override_of(name) for name in members}
        without_effect -= {pattern for pattern in named if pattern is not None}
        own = _config_of_group(model, config, members)
        if own is not None and not any(
            lies_away(name)
            or is_kept_in_float32(name)
            or (config.override_of(name) is None and not should_convert_module(name, config.llm_int8_skip_modules))
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
        elif (
            name not in tied
            and not is_kept_in_float32(name)
            and (pattern is not None or should_convert_module(name, skips))
        ):
            without_effect.discard(str(pattern))
            if not lies_away(name) and not (name in experts and _has_main_weights(own)):
                kinds[name] = "8bit" if own.load_in_8bit else "4bit"
    if without_effect:
        raise QuantConfigError(
            f"module_overrides names {', '.join(map(repr, sorted(without_effect)))}, which changes nothing in "
            f"{type(model).__name__}; accepted are names of linear layers whose weight is not tied to another one"
        )
    return kinds


def modules_packed_in(
    model: nn.Module, config: BitsAndBytesConfig, stored: Stored, device_map: object = None
) -> tuple[dict[str, Kind], list[str]]:
    """The same for a checkpoint that is packed already, where the file decides: the modules that are packed, by name,
    and those that `config` converts and the file holds as values, which stay so. Raises QuantConfigError as it does.

    Whoever packed the file matched its list of modules by other names or rules, or left out more than it says. Packed
    is a layer or stack that is packed in the file, unless it is tied, offloaded, or on the list of what is kept in
    float32 that bitsandbytes heeds too; or of which the file holds nothing, which is found missing. As `config` says
    it stays where it knows better than the file: with `llm_int8_has_fp16_weight` values are a layer's format, and with
    `llm_int8_enable_fp32_cpu_offload` it was offloaded when the file was written, unless `llm_int8_skip_modules` names
    it as the file does.
    """
    kinds = modules_to_quantize(model, config, device_map)
    experts, tied, is_kept_in_float32 = find_experts(model), _tied_modules(model), _kept_in_float32(model, _KEPT[:1])
    lies_away = is_offloaded(device_map if config.llm_int8_enable_fp32_cpu_offload else None)
    groups = embedding_groups(model).values() if config.quantize_embeddings else ()
    parts = {name: members for members in groups for name in members}
    parts |= {
        name: tuple(f"{name}.{own}" for projection in stack for own in (projection.leaf, *projection.file_names()))
        for name, stack in experts.items()
    }

    def was_offloaded(name: str) -> bool:
        if not config.llm_int8_enable_fp32_cpu_offload or name in experts:
            return False
        in_file = [stored.values[part] for part in parts.get(name, (name,)) if part in stored.values]
        return all(should_convert_module(file_name, config.llm_int8_skip_modules) for file_name in in_file)

    values = [
        name
        for name in kinds
        if stored.are_values(parts.get(name, (name,)))
        and not _has_main_weights(config.for_module(name) or config)
        and not was_offloaded(name)
    ]
    for name, module in model.named_modules():
        if (
            (is_linear_layer(module) or name in experts)
            and any(part in stored.packed for part in parts.get(name, (name,)))
            and not (name in kinds or name in tied or is_kept_in_float32(name) or lies_away(name))
        ):
            kinds[name] = "8bit" if (config.for_module(name) or config).load_in_8bit else "4bit"
    return {name: kind for name, kind in kinds.items() if name not in values}, values


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
    if own is not None and _has_main_weights(own) and not is_linear:
        raise QuantConfigError(
            f"llm_int8_has_fp16_weight is True, which the embedding {first} cannot have; accepted is False, or an "
            "entry of module_overrides for it"
        )
    return own


def pack_module(module: nn.Module, kind: Kind, config: BitsAndBytesConfig) -> PackedLinear | PackedEmbedding:
    """A linear layer or an embedding as its packed one."""
    layers = EMBEDDINGS if isinstance(module, nn.Embedding) else LAYERS
    return layers[kind].from_float(module, config)


def _has_main_weights(config: BitsAndBytesConfig) -> bool:
    """Whether a layer of this config keeps values, which it quantizes in each forward."""
    return config.load_in_8bit and config.llm_int8_has_fp16_weight


def _kept_in_float32(model: nn.Module, lists_of_names: Sequence[str] = _KEPT) -> Callable[[str], bool]:
    """Whether transformers keeps a module in float32; its lists name modules, and weights of modules."""
    lists = (getattr(model, name, None) for name in lists_of_names)
    kept = [pattern for patterns in lists for pattern in patterns or ()]
    return lambda name: not (should_convert_module(name, kept) and should_convert_module(f"{name}.weight", kept))


def _tied_modules(model: nn.Module) -> set[str]:
    """Modules whose weight is another module's too: packing one of the two would untie them."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {name.removesuffix(".weight") for pair in tied.items() for name in pair}
