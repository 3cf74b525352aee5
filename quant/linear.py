"""Linear4bit and Linear8bit: linear layers whose weight stays packed. They hold tensors and call one operator each.

Both are nn.Linear to whoever asks (adapters and model code do), hold their statistics in persistent buffers, write and
read state_dicts in bitsandbytes' names, and move between devices without ever casting packed bytes or statistics.
`forward` only reads. Not here: arithmetic (ops.py), the checkpoint format (state.py), converting models (hf.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Self

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant import ops
from quant.config import BitsAndBytesConfig
from quant.errors import CheckpointError, QuantConfigError, ShapeError
from quant.hooks import Offloadable
from quant.state import (
    NAMES_4BIT,
    NAMES_8BIT,
    Packed4bit,
    Packed8bit,
    PackedWeight,
    SecondLevel,
    flat_codes,
    layer_tensor,
)

MAIN_WEIGHT_DTYPE: Final = torch.float16
"""What llm_int8_has_fp16_weight keeps instead of int8 codes."""
_SAME_SIZE_INTEGER: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_kept(
    fn: Callable[[torch.Tensor], torch.Tensor], tensors: Iterable[torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` for Module._apply, which moves `tensors` but never casts them: it sees them as integers."""
    protected = {id(tensor) for tensor in tensors}

    def keep_bits(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in protected:
            return fn(tensor)
        integers = tensor.view(_SAME_SIZE_INTEGER[tensor.itemsize])
        moved = fn(integers)
        if moved.dtype != integers.dtype:
            moved = integers.to(moved.device)
        return moved.view(tensor.dtype)

    return keep_bits


class PackedLinear(Offloadable, nn.Linear):
    """What the two layers share. Not to be built itself."""

    checkpoint_names: tuple[str, ...]
    """The names, without the layer's prefix, that its weight has in a state_dict."""
    is_transposed_source = False
    """The layer stands for a Conv1D (GPT-2), whose unquantized files hold [in, out]."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the whole weight
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", bias)

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> None:
        """Packs a weight [out, in] on its own device and holds it from now on."""

    @abstractmethod
    def adopt(self, packed: PackedWeight) -> None:
        """Holds an already packed weight; raises CheckpointError where its kind or shape is another one."""

    @abstractmethod
    def packed_weight(self) -> PackedWeight:
        """The weight with its statistics; shares the layer's tensors."""

    @property
    def is_packed(self) -> bool:
        """Whether `weight` holds codes; a layer with float16 main weights holds values."""
        return True

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [out, in] as values."""
        return self.packed_weight().dequantize(dtype)

    def tensor_in_files(self, name: str, files: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return layer_tensor(files, name)

    def _packed_tensors(self) -> list[torch.Tensor]:
        """The tensors whose bits must survive every cast."""
        return [self.weight, *(buffer for buffer in self._buffers.values() if buffer is not None)]

    def _misfit(self, packed: PackedWeight) -> CheckpointError:
        return CheckpointError(
            f"a {type(packed).__name__} of shape {list(packed.shape)} was given to a {type(self).__name__} that needs "
            f"shape {[self.out_features, self.in_features]}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves like any module, but `fn` sees packed bytes and statistics as integers, which no cast touches."""
        super()._apply(bits_kept(fn, self._packed_tensors()), recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # On meta there is nothing to save; loaders then expect one entry per parameter, under its own name.
        tensors = {} if self.weight.is_meta else self._checkpoint_tensors()
        tensors["weight"] = self.weight
        if self.bias is not None:
            tensors["bias"] = self.bias
        for name, tensor in tensors.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        return self.packed_weight().to_checkpoint()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        tensors = {name: own.pop(name) for name in self.checkpoint_names if name in own}
        bias = own.pop("bias", None) if self.bias is not None else None
        if strict:
            unexpected_keys.extend(prefix + name for name in own)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            if not tensors:
                missing_keys.append(prefix + "weight")
            else:
                self._load_weight(tensors, prefix.removesuffix("."), assign)
            if bias is not None:
                self._load_bias(bias, prefix, assign)
            elif self.bias is not None:
                missing_keys.append(prefix + "bias")
        except CheckpointError as error:
            error_msgs.append(str(error))

    def _load_weight(self, tensors: Mapping[str, torch.Tensor], name: str, assign: bool) -> None:
        if not assign:  # like nn.Linear: the caller's tensors stay the caller's, and the layer stays where it is
            device = None if self.weight.is_meta else self.weight.device
            tensors = {key: tensor.to(device=device, copy=True) for key, tensor in tensors.items()}
        self.adopt(PackedWeight.from_checkpoint(tensors, name=name))

    def _load_bias(self, bias: torch.Tensor, prefix: str, assign: bool) -> None:
        if bias.shape != self.bias.shape:
            raise CheckpointError(
                f"tensor {prefix}bias has shape {list(bias.shape)}; {list(self.bias.shape)} is needed"
            )
        if assign or self.bias.is_meta:
            self.bias = nn.Parameter(bias.detach(), requires_grad=self.bias.requires_grad)
        else:
            with torch.no_grad():
                self.bias.copy_(bias)


class Linear4bit(PackedLinear):
    """y = x Wᵀ + b with W in NF4 or FP4.

    Tensors: `weight` uint8 (or the storage dtype) [ceil(N K / 2), 1]; buffers `absmax` float32 [B], or uint8 [B] with
    `nested_absmax` float32 [ceil(B / 256)] and `nested_offset` float32 []. x is computed with in `compute_dtype`, and
    the result is given back in x's dtype.
    """

    checkpoint_names = NAMES_4BIT
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
        if config.load_in_8bit:
            raise QuantConfigError("a Linear4bit was asked for with load_in_8bit=True; accepted is load_in_4bit=True")
        super().__init__(in_features, out_features, _bias(bias, out_features, device, dtype))
        self.compute_dtype = config.bnb_4bit_compute_dtype
        self.double_quant = config.bnb_4bit_use_double_quant
        self.quant_storage = config.bnb_4bit_quant_storage
        self.quant_type = config.bnb_4bit_quant_type
        self.blocksize = config.bnb_4bit_blocksize
        self.search = config.bnb_4bit_search
        for name in ("absmax", "nested_absmax", "nested_offset", "nested_quant_map", "quant_map"):
            self.register_buffer(name, None)
        self.quantize(torch.zeros(out_features, in_features, device=device, dtype=dtype))

    @classmethod
    def from_float(cls, linear: nn.Module, config: BitsAndBytesConfig) -> Linear4bit:
        """A linear layer (or GPT-2's Conv1D), packed as `config` says; one on meta gives shapes only."""
        weight, bias, is_transposed = _parts(linear)
        layer = cls(weight.shape[1], weight.shape[0], bias, config=config, device="meta", dtype=weight.dtype)
        layer.is_transposed_source = is_transposed
        layer.quantize(weight)
        return layer.train(linear.training)

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
        if not isinstance(packed, Packed4bit) or packed.shape != (self.out_features, self.in_features):
            raise self._misfit(packed)
        nested = packed.nested
        self.weight = nn.Parameter(packed.packed, requires_grad=False)
        self.absmax = packed.absmax
        self.nested_absmax = None if nested is None else nested.absmax
        self.nested_offset = None if nested is None else nested.offset
        self.nested_quant_map = None if nested is None else nested.table
        self.nested_blocksize = 0 if nested is None else nested.blocksize
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
            shape=(self.out_features, self.in_features),
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype != self.quant_storage:
            raise self._cast()
        absmax, nested_absmax, offset = self.absmax, self.nested_absmax, self.nested_offset
        if self.nested_quant_map is not None:  # a file with a table of its own, which the operator does not know
            second_level = self._second_level()
            absmax = absmax if second_level is None else second_level.decode(absmax)
            nested_absmax = offset = None
        out = ops.linear_4bit(
            x.to(self.compute_dtype),
            flat_codes(self.weight, self.out_features * self.in_features),
            absmax,
            self.quant_type,
            self.blocksize,
            [self.out_features, self.in_features],
            nested_absmax,
            offset,
            self.nested_blocksize or 1,
            self.bias,
        )
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.nested_absmax is not None else ""
        return f"{super().extra_repr()}, {self.quant_type}, blocksize={self.blocksize}{nested}"


class Linear8bit(PackedLinear):
    """y = x Wᵀ + b with W as int8 rows: LLM.int8().

    Tensors: `weight` int8 [N, K] and the buffer `SCB` float32 [N] (row maxima); with `has_fp16_weight` instead only a
    float16 `weight` [N, K] that requires gradients and is quantized anew in each forward.
    """

    checkpoint_names = NAMES_8BIT
    SCB: torch.Tensor

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
        """A layer of zeros; `dtype` is that of the bias."""
        if config.load_in_4bit:
            raise QuantConfigError("a Linear8bit was asked for with load_in_4bit=True; accepted is load_in_8bit=True")
        super().__init__(in_features, out_features, _bias(bias, out_features, device, dtype))
        self.threshold = config.llm_int8_threshold
        self.outliers = config.llm_int8_outliers
        self.has_fp16_weight = config.llm_int8_has_fp16_weight
        self._has_format = True
        self.register_buffer("SCB", None)
        self.quantize(torch.zeros(out_features, in_features, device=device, dtype=dtype))

    @classmethod
    def from_float(cls, linear: nn.Module, config: BitsAndBytesConfig) -> Linear8bit:
        """A linear layer (or GPT-2's Conv1D), quantized row by row; one on meta gives shapes only."""
        weight, bias, is_transposed = _parts(linear)
        layer = cls(weight.shape[1], weight.shape[0], bias, config=config, device="meta", dtype=weight.dtype)
        layer.is_transposed_source = is_transposed
        layer.quantize(weight)
        return layer.train(linear.training)

    def quantize(self, weight: torch.Tensor) -> None:
        if self.has_fp16_weight:
            self.weight = nn.Parameter(weight.detach().to(MAIN_WEIGHT_DTYPE))
        else:
            self.adopt(Packed8bit.quantize(weight))

    def adopt(self, packed: PackedWeight) -> None:
        if not isinstance(packed, Packed8bit) or packed.shape != (self.out_features, self.in_features):
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
        if weight.shape != (self.out_features, self.in_features) or not weight.is_floating_point():
            raise CheckpointError(
                f"tensor {name}.weight is {weight.dtype} {list(weight.shape)}; a floating-point "
                f"{[self.out_features, self.in_features]} is needed"
            )
        device = weight.device if assign or self.weight.is_meta else self.weight.device
        self.quantize(weight.to(device, copy=not assign))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.has_fp16_weight:
            result: torch.Tensor = _QuantizedOnTheFly.apply(  # type: ignore[no-untyped-call]
                x, self.weight, self.bias, self.threshold, self.outliers
            )
            return result
        return ops.linear_8bit(x, self.weight, self.SCB, self.threshold, self.outliers, self.bias)

    def extra_repr(self) -> str:
        main = ", has_fp16_weight" if self.has_fp16_weight else ""
        return f"{super().extra_repr()}, int8, threshold={self.threshold}, outliers={self.outliers}{main}"


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
