"""A module's weight as int8 rows, or in float16 and quantized in each forward: its tensors, and the product with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from quant import ops
from quant.config import BitsAndBytesConfig
from quant.direct import Direct, direct_8bit, is_direct
from quant.errors import CheckpointError
from quant.packed import PackedModule
from quant.state import NAMES_8BIT, Packed8bit, PackedWeight

MAIN_WEIGHT_DTYPE: Final = torch.float16
"""What llm_int8_has_fp16_weight keeps instead of int8 codes."""


class Weight8bit(PackedModule):
    """A weight as int8 rows: LLM.int8().

    Tensors: `weight` int8 [N, K] and the buffer `SCB` float32 [N] (row maxima); with `has_fp16_weight` instead only a
    float16 `weight` [N, K] that requires gradients and is quantized anew in each forward.
    """

    flag = "load_in_8bit"
    checkpoint_names = NAMES_8BIT
    direct_options = ("has_fp16_weight", "threshold", "outliers")
    SCB: torch.Tensor
    _direct_options: tuple[float, str] | None = None
    """The threshold and the outlier rule that the direct call was made with."""

    def _configure(self, config: BitsAndBytesConfig) -> None:
        self.threshold = config.llm_int8_threshold
        self.outliers = config.llm_int8_outliers
        self.has_fp16_weight = config.llm_int8_has_fp16_weight
        self._has_format = True
        self.register_buffer("SCB", None)

    def quantize(self, weight: torch.Tensor) -> None:
        if self.has_fp16_weight:
            held = self._parameters["weight"]
            is_trained = held is None or held.requires_grad
            self.weight = nn.Parameter(weight.detach().to(MAIN_WEIGHT_DTYPE), requires_grad=is_trained)
        else:
            self.adopt(Packed8bit.quantize(weight))

    def adopt(self, packed: PackedWeight) -> None:
        if not isinstance(packed, Packed8bit) or packed.shape != self.matrix_shape:
            raise self._misfit(packed)
        self.weight = nn.Parameter(packed.packed, requires_grad=False)
        self.SCB = packed.row_absmax
        self._has_format = packed.has_format
        self.has_fp16_weight = False

    def packed_weight(self) -> Packed8bit:
        if self.has_fp16_weight:
            return Packed8bit.quantize(self.weight)
        return Packed8bit(packed=self.weight.detach(), row_absmax=self.SCB, has_format=self._has_format)

    @property
    def is_packed(self) -> bool:
        return not self.has_fp16_weight

    def _packed_tensors(self) -> list[torch.Tensor]:
        return super()._packed_tensors() if self.is_packed else []

    def _checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.has_fp16_weight else super()._checkpoint_tensors()

    def _load_weight(self, tensors: Mapping[str, torch.Tensor], name: str, assign: bool) -> None:
        if not self.has_fp16_weight or "SCB" in tensors:
            super()._load_weight(tensors, name, assign)
            return
        weight = tensors["weight"]
        if weight.shape != self.matrix_shape or not weight.is_floating_point():
            raise CheckpointError(
                f"tensor {name}.weight is {weight.dtype} {list(weight.shape)}; a floating-point "
                f"{list(self.matrix_shape)} is needed"
            )
        if assign or self.weight.is_meta:
            self.quantize(weight if assign else weight.clone())
        else:  # an optimizer may hold the parameter
            with torch.no_grad():
                self.weight.copy_(weight)

    def direct_for(self, x: torch.Tensor) -> Direct | None:
        return None if self.has_fp16_weight else self._direct_now(self._parameters.get("bias"))

    def _direct_now(self, bias: torch.Tensor | None) -> Direct | None:
        if self._direct_options != (self.threshold, self.outliers):
            self._direct = None
        return self._direct_call(("SCB",), bias)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.has_fp16_weight:
            result: torch.Tensor = _QuantizedOnTheFly.apply(  # type: ignore[no-untyped-call]
                x, self.weight, bias, self.threshold, self.outliers
            )
            return result
        if is_direct(x):
            direct = self._direct_now(bias)
            if direct is not None:
                return direct(x)
        return ops.linear_8bit(x, self.weight, self.SCB, self.threshold, self.outliers, bias)

    def _make_direct(self, held: Sequence[torch.Tensor | None], bias: torch.Tensor | None) -> Direct | None:
        self._direct_options = (self.threshold, self.outliers)
        return direct_8bit(self.weight, self.SCB, self.threshold, self.outliers, bias)

    def _format_repr(self) -> str:
        main = ", has_fp16_weight" if self.has_fp16_weight else ""
        return f"int8, threshold={self.threshold}, outliers={self.outliers}{main}"


class _QuantizedOnTheFly(torch.autograd.Function):
    """LLM.int8() on a float16 weight, with gradients to it as if rounding were the identity."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, threshold: float, outliers: str
    ) -> torch.Tensor:
        codes, row_absmax = ops.quantize_8bit(weight)
        ctx.save_for_backward(x, codes, row_absmax)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return ops.linear_8bit(x, codes, row_absmax, threshold, outliers, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        x, codes, row_absmax = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ ops.dequantize_8bit(codes, row_absmax, gradient.dtype)
        if ctx.needs_input_grad[1]:
            to_weight = (rows.float().t() @ x.reshape(-1, x.shape[-1]).float()).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(dim=0, dtype=torch.float32).to(bias_dtype)
        return to_x, to_weight, to_bias, None, None
