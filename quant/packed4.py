"""A module's weight in NF4 or FP4: its tensors, and the product with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from quant import ops
from quant.config import BitsAndBytesConfig
from quant.direct import Direct, direct_4bit, is_direct
from quant.errors import CheckpointError
from quant.packed import PackedModule
from quant.state import NAMES_4BIT, Packed4bit, PackedWeight, SecondLevel, flat_codes

_STATISTICS: Final = ("absmax", "nested_absmax", "nested_offset")


class Weight4bit(PackedModule):
    """A weight in NF4 or FP4.

    Tensors: `weight` uint8 (or the storage dtype) [ceil(N K / 2), 1]; buffers `absmax` float32 [B], or uint8 [B] with
    `nested_absmax` float32 [ceil(B / 256)] and `nested_offset` float32 []. x is computed with in `compute_dtype`, or
    rounded from that to int8.
    """

    flag = "load_in_4bit"
    checkpoint_names = NAMES_4BIT
    direct_options = ("compute_dtype", "activations")
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None
    nested_quant_map: torch.Tensor | None
    quant_map: torch.Tensor | None
    quant_type: str
    blocksize: int
    nested_blocksize: int
    weight_dtype: torch.dtype
    """The dtype that dequantize() gives: the one the weight had before it was packed."""
    _state: bytes
    _direct_activations: str | None = None
    """The `activations` that the direct call was made with."""

    def _configure(self, config: BitsAndBytesConfig) -> None:
        self.compute_dtype = config.bnb_4bit_compute_dtype
        self.activations = config.bnb_4bit_activations
        self.double_quant = config.bnb_4bit_use_double_quant
        self.quant_storage = config.bnb_4bit_quant_storage
        self.quant_type = config.bnb_4bit_quant_type
        self.blocksize = config.bnb_4bit_blocksize
        self.search = config.bnb_4bit_search
        for name in ("absmax", "nested_absmax", "nested_offset", "nested_quant_map", "quant_map"):
            self.register_buffer(name, None)

    def quantize(self, weight: torch.Tensor) -> None:
        packed = Packed4bit.quantize(
            weight,
            self.quant_type,
            blocksize=self.blocksize,
            double_quant=self.double_quant,
            storage=self.quant_storage,
            search=self.search,
        )
        self.adopt(packed)

    def adopt(self, packed: PackedWeight) -> None:
        if not isinstance(packed, Packed4bit) or packed.shape != self.matrix_shape:
            raise self._misfit(packed)
        nested = packed.nested
        self.weight = nn.Parameter(packed.packed, requires_grad=False)
        self.absmax = packed.absmax
        self.nested_absmax = None if nested is None else nested.absmax
        self.nested_offset = None if nested is None else nested.offset
        self.nested_quant_map = None if nested is None else nested.table
        self.nested_blocksize = 0 if nested is None else nested.blocksize
        self.double_quant = nested is not None
        self.quant_map = packed.quant_map
        self.quant_storage = packed.packed.dtype
        self.quant_type = packed.quant_type
        self.blocksize = packed.blocksize
        self.weight_dtype = packed.dtype
        self._state = packed.state

    def packed_weight(self) -> Packed4bit:
        if self.weight.dtype != self.quant_storage:
            raise self._cast()
        return Packed4bit(
            packed=self.weight.detach(),
            absmax=self.absmax,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            shape=self.matrix_shape,
            dtype=self.weight_dtype,
            nested=self._second_level(),
            quant_map=self.quant_map,
            state=self._state,
        )

    def _cast(self) -> CheckpointError:
        """Somebody wrote other values into the parameter itself, where `.to()` and its like cast nothing."""
        return CheckpointError(
            f"a packed weight stored as {self.quant_storage} was cast to {self.weight.dtype}, which destroyed it; load "
            "it anew, and before training call quant.lora.prepare_model_for_kbit_training"
        )

    def _second_level(self) -> SecondLevel | None:
        if self.nested_absmax is None or self.nested_offset is None:
            return None
        return SecondLevel(
            absmax=self.nested_absmax,
            offset=self.nested_offset,
            blocksize=self.nested_blocksize,
            table=self.nested_quant_map,
        )

    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The flat codes, absmax, nested_absmax and offset, as operators take them."""
        if self.weight.dtype != self.quant_storage:
            raise self._cast()
        codes = flat_codes(self.weight, self.matrix_shape[0] * self.matrix_shape[1])
        if self.nested_quant_map is not None:  # a file with a table of its own, which operators do not know
            second_level = self._second_level()
            return codes, self.absmax if second_level is None else second_level.decode(self.absmax), None, None
        return codes, self.absmax, self.nested_absmax, self.nested_offset

    def direct_for(self, x: torch.Tensor) -> Direct | None:
        if x.dtype is not self.compute_dtype:
            return None
        return self._direct_now(self._parameters.get("bias"))

    def _direct_now(self, bias: torch.Tensor | None) -> Direct | None:
        if self._direct_activations != self.activations:
            self._direct = None
        return self._direct_call(_STATISTICS, bias)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        given, compute_dtype = x.dtype, self.compute_dtype
        if is_direct(x):
            direct = self._direct_now(bias)
            if direct is not None:
                return direct(x) if given is compute_dtype else direct(x.to(compute_dtype)).to(given)
        codes, absmax, nested_absmax, offset = self.operands()
        linear = ops.linear_4bit if self.activations == "float" else ops.linear_4bit_int8
        out = linear(
            x.to(compute_dtype),
            codes,
            absmax,
            self.quant_type,
            self.blocksize,
            self.matrix_shape,
            nested_absmax,
            offset,
            self.nested_blocksize or 1,
            bias,
        )
        return out.to(given)

    def _make_direct(self, held: Sequence[torch.Tensor | None], bias: torch.Tensor | None) -> Direct | None:
        """None also for a file with a table of its own, which the kernel does not know."""
        if self.nested_quant_map is not None:
            return None
        codes, absmax, nested_absmax, offset = self.operands()
        nested_blocksize = self.nested_blocksize or 1
        self._direct_activations = self.activations
        return direct_4bit(
            self.activations,
            held,
            codes.detach(),
            absmax,
            self.quant_type,
            self.blocksize,
            self.matrix_shape,
            nested_absmax,
            offset,
            nested_blocksize,
            bias,
        )

    def _format_repr(self) -> str:
        nested = ", double_quant" if self.nested_absmax is not None else ""
        rounded = "" if self.activations == "float" else f", {self.activations} activations"
        return f"{self.quant_type}, blocksize={self.blocksize}{nested}{rounded}"
