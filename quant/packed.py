"""What modules with one packed weight have in common, whatever its format and whatever they compute with it.

They keep their statistics in persistent buffers, write and read state_dicts in bitsandbytes' names, and move between
devices without ever casting packed bytes or statistics. Not here: the formats (packed4.py, packed8.py), what the
modules are (linear.py, embedding.py), checkpoint tensors (state.py), what accelerate's hooks look up (hooks.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, Self

import torch
from torch import nn

from quant.config import BitsAndBytesConfig
from quant.direct import Direct
from quant.errors import CheckpointError, QuantConfigError
from quant.hooks import Offloadable
from quant.state import (
    PackedWeight,
    layer_tensor,
)

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


def loaded_bias(held: nn.Parameter, given: torch.Tensor, name: str, assign: bool) -> nn.Parameter:
    """What a module holds in the place of its bias when load_state_dict brings `given`, the tensor `name`: the same
    parameter with its values, or a new one to `assign` and where the old one is on meta. CheckpointError for another
    shape.
    """
    if given.shape != held.shape:
        raise CheckpointError(f"tensor {name} has shape {list(given.shape)}; {list(held.shape)} is needed")
    if assign or held.is_meta:
        return nn.Parameter(given.detach() if assign else given.detach().clone(), requires_grad=held.requires_grad)
    with torch.no_grad():
        held.copy_(given)
    return held


class PackedModule(Offloadable):
    """A packed weight [rows, columns] and a bias [rows] or none. Not to be built itself."""

    flag: ClassVar[str]
    """The field of a config that asks for it."""
    checkpoint_names: ClassVar[tuple[str, ...]]
    """The names, without the module's prefix, that its weight has in a state_dict."""
    direct_options: ClassVar[tuple[str, ...]]
    """The attributes, beside its tensors, that a direct call is made with."""
    is_transposed_source = False
    """The layer stands for a Conv1D (GPT-2), whose unquantized files hold [in, out]."""
    _direct: Direct | None = None
    """The kernel's call with this module's pointers, made by the first product that may use it."""
    matrix_shape: tuple[int, int]
    weight: torch.Tensor
    bias: nn.Parameter  # or None, as in nn.Linear

    def __init__(
        self,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        config: BitsAndBytesConfig,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        """A weight of zeros, packed as `config` says; `dtype` is that of the weight before."""
        nn.Module.__init__(self)  # nn.Linear's own, which comes next, would allocate the whole weight
        other = "load_in_8bit" if self.flag == "load_in_4bit" else "load_in_4bit"
        if getattr(config, other):
            raise QuantConfigError(
                f"a {type(self).__name__} was asked for with {other}=True; accepted is {self.flag}=True"
            )
        self.matrix_shape = shape
        self.register_parameter("weight", None)
        self.register_parameter("bias", bias)
        self._configure(config)
        self.quantize(torch.zeros(shape, device=device, dtype=dtype))

    @abstractmethod
    def _configure(self, config: BitsAndBytesConfig) -> None:
        """Takes what it needs of a config and registers its buffers, empty."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> None:
        """Packs a weight [rows, columns] on its own device and holds it from now on."""

    @abstractmethod
    def adopt(self, packed: PackedWeight) -> None:
        """Holds an already packed weight; raises CheckpointError where its kind or shape is another one."""

    @abstractmethod
    def packed_weight(self) -> PackedWeight:
        """The weight with its statistics; shares the module's tensors."""

    @abstractmethod
    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., columns] times the transposed weight, plus a bias: [..., rows] in x's dtype."""

    def _direct_call(self, statistics: Sequence[str], bias: torch.Tensor | None) -> Direct | None:
        """The call with this module's pointers, or None where there is none or a tensor lies elsewhere; `statistics`
        are the names of buffers, of which the first is never missing. Fast: no module attributes.
        """
        buffers = self._buffers
        held = (self._parameters["weight"], *[buffers.get(name) for name in statistics])
        direct = self._direct
        if held[0] is None or held[1] is None:
            return None
        if direct is None or not direct.fits(held, bias):
            self._direct = None
            tensors = (held[0], bias, *buffers.values())
            if any(tensor is not None and not tensor.is_cpu for tensor in tensors):
                return None
            direct = self._direct = self._make_direct(held, bias)
        return direct

    @abstractmethod
    def direct_for(self, x: torch.Tensor) -> Direct | None:
        """The call that gives this module's product with x, which is_direct(); None where there is none."""

    @abstractmethod
    def _make_direct(self, held: Sequence[torch.Tensor | None], bias: torch.Tensor | None) -> Direct | None:
        """The call, all tensors being on a CPU, `held` the weight and its statistics; None where there is none."""

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: pointers stay behind."""
        state = self.__dict__.copy()
        state.pop("_direct", None)
        return state

    @abstractmethod
    def _format_repr(self) -> str:
        """The format in a few words, for repr()."""

    @property
    def is_packed(self) -> bool:
        """Whether `weight` holds codes; with float16 main weights it holds values."""
        return True

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [rows, columns] as values."""
        return self.packed_weight().dequantize(dtype)

    def tensor_in_files(self, name: str, files: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return layer_tensor(files, name)

    def _packed_tensors(self) -> list[torch.Tensor]:
        """The tensors whose bits must survive every cast."""
        return [self.weight, *(buffer for buffer in self._buffers.values() if buffer is not None)]

    def _misfit(self, packed: PackedWeight) -> CheckpointError:
        return CheckpointError(
            f"a {type(packed).__name__} of shape {list(packed.shape)} was given to a {type(self).__name__} that needs "
            f"shape {list(self.matrix_shape)}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves like any module, but `fn` sees packed bytes and statistics as integers, which no cast touches."""
        self._direct = None  # which would keep the tensors alive that are moved away
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
                self.bias = loaded_bias(self.bias, bias, f"{prefix}bias", assign)
            elif self.bias is not None:
                missing_keys.append(prefix + "bias")
        except CheckpointError as error:
            error_msgs.append(str(error))

    def _load_weight(self, tensors: Mapping[str, torch.Tensor], name: str, assign: bool) -> None:
        if not assign:  # like nn.Linear: the caller's tensors stay the caller's, and the layer stays where it is
            device = None if self.weight.is_meta else self.weight.device
            tensors = {key: tensor.to(device=device, copy=True) for key, tensor in tensors.items()}
        self.adopt(PackedWeight.from_checkpoint(tensors, name=name))
