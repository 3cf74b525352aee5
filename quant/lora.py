"""LoRA adapters of peft on packed layers: training (QLoRA) and merging. Needs peft; nothing else here imports it.

peft chooses its adapter layer by the class of the layer it wraps, and knows bitsandbytes' classes, not ours.
lora_config registers PackedLora for them through peft's own hook for custom modules. Without it adapters train just as
well (our layers are nn.Linear to peft), but merging fails, and what wants the base weight's values gets packed bytes.

Merging adds the adapter to the dequantized weight in float32 and packs the sum anew, in the layer's own format. That
rounds: the merged model is near the unmerged one, not equal. Serve adapters unmerged where that matters. Unmerging
gives back the very bytes from before, which are kept until then.
"""

from __future__ import annotations

from typing import Any, Final

import peft
import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from quant.errors import QuantConfigError, QuantError
from quant.experts import PackedExperts
from quant.linear import Linear4bit, Linear8bit, PackedLinear
from quant.packed import PackedModule
from quant.state import PackedWeight

INITIALISATIONS: Final = (True, False, "gaussian", "eva")
"""The values of `init_lora_weights` that do not change or read the base weight."""


class PackedLora(lora.Linear):
    """peft's LoRA layer around a Linear4bit or Linear8bit; the base weight stays packed."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: peft.LoraConfig, **kwargs: Any) -> None:
        """Adds an adapter in float32. Raises QuantConfigError for what would need the base weight as values."""
        if config.init_lora_weights not in INITIALISATIONS:
            raise QuantConfigError(
                f"init_lora_weights is {config.init_lora_weights!r}, which changes or reads the base weight; accepted "
                f"on packed layers are {', '.join(map(repr, INITIALISATIONS))}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        # peft gives adapters the dtype of the base weight, which is a storage dtype here.
        for part in (self.lora_A, self.lora_B):
            part[adapter_name].to(torch.float32)

    def resolve_lora_variant(self, *, config: peft.LoraConfig, **kwargs: Any) -> None:
        """Raises QuantConfigError for DoRA and the other variants: they read the base weight."""
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if variant is not None:
            name = type(variant).__name__.removesuffix("LinearVariant")
            raise QuantConfigError(f"{name} was asked for; accepted on packed layers is plain LoRA")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters to the weight and packs it anew: one rounding for all of them.

        With `safe_merge` a sum that is not finite is refused and nothing has changed. Raises QuantError, also for
        adapters with a bias where the layer has none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self._packed_layer()
        with torch.no_grad():
            merged = _values(base)
            for name in names:
                merged += self.get_delta_weight(name).to(merged)
            bias = self._merged_bias(base, names)
        if safe_merge and not (merged.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise QuantError(
                f"the sum of the weight and of adapters {', '.join(names)} is not finite; nothing was merged"
            )
        if not self.merged_adapters:
            kept = None if base.bias is None else base.bias.detach().clone()
            self._before_merging: tuple[PackedWeight | torch.Tensor, torch.Tensor | None] = (_weight_of(base), kept)
        base.quantize(merged.to(_source_dtype(base)))
        if bias is not None:
            base.bias.data = bias
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Gives the layer the bytes that it had before the first merge."""
        if not self.merged_adapters:
            return
        base = self._packed_layer()
        weight, bias = self._before_merging
        if isinstance(weight, PackedWeight):
            base.adopt(weight)
        else:
            base.weight = nn.Parameter(weight, requires_grad=base.weight.requires_grad)
        if bias is not None:
            base.bias.data = bias
        del self._before_merging
        self.merged_adapters.clear()

    def _packed_layer(self) -> PackedLinear:
        base = self.get_base_layer()
        if not isinstance(base, PackedLinear):
            raise QuantError(f"a PackedLora wraps a {type(base).__name__}; accepted are Linear4bit and Linear8bit")
        return base

    def _merged_bias(self, base: PackedLinear, names: list[str]) -> torch.Tensor | None:
        biased = [name for name in names if self.lora_bias[name]]
        if not biased:
            return None
        if base.bias is None:
            raise QuantError(f"adapter {biased[0]} has a bias (lora_bias) and the layer has none; it cannot be merged")
        total = base.bias.detach().clone()
        for name in biased:
            total += (self.lora_B[name].bias * self.scaling[name]).to(total)
        return total


def lora_config(config: peft.LoraConfig | None = None, **arguments: Any) -> peft.LoraConfig:
    """A LoraConfig (the given one, or a new one of these arguments) whose adapters know packed layers.

    Give it to peft.get_peft_model, or to PeftModel.from_pretrained(model, path, config=lora_config(
    LoraConfig.from_pretrained(path))): files of adapters do not hold the registration.
    """
    if config is None:
        config = peft.LoraConfig(**arguments)
    elif arguments:
        raise QuantConfigError(f"a LoraConfig and {', '.join(arguments)} were given; accepted is one or the other")
    config._register_custom_module({Linear4bit: PackedLora, Linear8bit: PackedLora})
    return config


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """peft's function of this name, made safe for packed weights in a floating-point storage dtype.

    It freezes the model and casts 16-bit parameters to float32. peft's own spares bitsandbytes' parameters only, and
    would cast the bytes of a weight stored as bfloat16 or float16; it also sees no quantized model here, and would
    leave gradient checkpointing off.
    """
    stored = [
        (module, name, parameter.dtype)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if _holds_codes(module, name) and parameter.dtype.is_floating_point
    ]
    for module, name, _ in stored:
        setattr(module, name, _viewed(getattr(module, name), torch.uint8))
    try:
        model = peft.prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=False
        )
    finally:
        for module, name, dtype in stored:
            setattr(module, name, _viewed(getattr(module, name), dtype))
    if use_gradient_checkpointing:
        arguments = gradient_checkpointing_kwargs or {}
        if arguments.get("use_reentrant", True):
            model.enable_input_require_grads()
        model.activation_checkpointing_enable(arguments)
    return model


def _holds_codes(module: nn.Module, name: str) -> bool:
    """Whether a parameter of a module is bytes, whatever its dtype says."""
    if isinstance(module, PackedExperts):
        return name in module.projections
    return isinstance(module, PackedModule) and module.is_packed and name == "weight"


def _viewed(weight: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.detach().view(dtype), requires_grad=False)


def _weight_of(base: PackedLinear) -> PackedWeight | torch.Tensor:
    return base.packed_weight() if base.is_packed else base.weight.detach()


def _values(base: PackedLinear) -> torch.Tensor:
    """The base weight as float32 values of its own."""
    return base.dequantize(torch.float32) if base.is_packed else base.weight.detach().float().clone()


def _source_dtype(base: PackedLinear) -> torch.dtype:
    """A 4-bit weight says in its file which dtype it had; it keeps it."""
    return base.weight_dtype if isinstance(base, Linear4bit) else torch.float32
