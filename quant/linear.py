"""Linear4bit and Linear8bit: linear layers whose weight stays packed.

Both are nn.Linear to whoever asks (adapters and model code do); `forward` only reads, and calls one operator. Not here:
how a packed weight is held, moved, saved and loaded (packed.py and its formats), converting models (hf.py).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.config import BitsAndBytesConfig
from quant.errors import ShapeError
from quant.packed import PackedModule
from quant.packed4 import Weight4bit
from quant.packed8 import Weight8bit


class PackedLinear(PackedModule, nn.Linear):
    """What the two layers share. Not to be built itself."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool | nn.Parameter | None = True,
        *,
        config: BitsAndBytesConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """A layer of zeros; `dtype` is that of the bias and of the weight before it is packed."""
        own_bias = _bias(bias, out_features, device, dtype)
        super().__init__((out_features, in_features), own_bias, config, device, dtype)
        self.in_features = in_features
        self.out_features = out_features

    @classmethod
    def from_float(cls, linear: nn.Module, config: BitsAndBytesConfig) -> Self:
        """A linear layer (or GPT-2's Conv1D), packed as `config` says; one on meta gives shapes only."""
        weight, bias, is_transposed = _parts(linear)
        layer = cls(weight.shape[1], weight.shape[0], bias, config=config, device="meta", dtype=weight.dtype)
        layer.is_transposed_source = is_transposed
        layer.quantize(weight)
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, self._parameters["bias"])  # an attribute of a module takes a tenth of a small call

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._format_repr()}"


class Linear4bit(Weight4bit, PackedLinear):
    """y = x Wᵀ + b with W in NF4 or FP4; the result has x's dtype."""


class Linear8bit(Weight8bit, PackedLinear):
    """y = x Wᵀ + b with W as int8 rows: LLM.int8()."""


def _parts(linear: nn.Module) -> tuple[torch.Tensor, nn.Parameter | None, bool]:
    """Weight [out, in], bias, and whether the weight is stored transposed."""
    if isinstance(linear, PackedLinear) or not isinstance(linear, nn.Linear | Conv1D):
        raise ShapeError(f"{type(linear).__name__} cannot be quantized; accepted are nn.Linear and Conv1D")
    if isinstance(linear, Conv1D):
        return linear.weight.detach().t(), linear.bias, True
    return linear.weight.detach(), linear.bias, False


def _bias(
    bias: bool | nn.Parameter | None, size: int, device: torch.device | str | None, dtype: torch.dtype
) -> nn.Parameter | None:
    if isinstance(bias, bool):
        return nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if bias else None
    # The same values under a name of its own: casting this layer must not cast the one it was made from.
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
