"""Embedding4bit and Embedding8bit: a table of packed rows, of which a lookup dequantizes the touched ones only.

The table is held, moved and saved like a linear layer's weight [rows, columns], under the same names. Where the output
embedding is tied to it there is one table: the output embedding becomes a TiedToEmbedding, which holds no weight of its
own and multiplies with the table's. Neither is an nn.Embedding, so that what would resize or adapt one refuses a table
that it cannot read. Not here: which embeddings are packed (conversion.py), the lookup (rows.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import torch
from torch import nn

from quant import rows
from quant.config import BitsAndBytesConfig
from quant.direct import is_direct
from quant.errors import QuantConfigError, ShapeError
from quant.packed import PackedModule
from quant.packed4 import Weight4bit
from quant.packed8 import Weight8bit

_SCALING: Final = "ScaledWordEmbedding"
"""How the names of transformers' embeddings end that multiply their rows by `embed_scale` (Gemma, BART)."""


class PackedEmbedding(PackedModule):
    """What the two share. Not to be built itself."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        config: BitsAndBytesConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """A table of zeros; `dtype` is that of the rows it gives."""
        super().__init__((num_embeddings, embedding_dim), None, config, device, dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx  # as in nn.Embedding, where it concerns gradients alone
        self.dtype = dtype
        self.original: type[nn.Embedding] = nn.Embedding
        self.embed_scale: float | None = None
        self.rounds_scale = False
        """The scale is rounded to the rows' dtype before it multiplies them."""

    @classmethod
    def from_float(cls, embedding: nn.Module, config: BitsAndBytesConfig) -> Self:
        """An nn.Embedding (or one that scales its rows) packed as `config` says; one on meta gives shapes only."""
        if not isinstance(embedding, nn.Embedding) or not can_pack(embedding):
            raise ShapeError(
                f"{type(embedding).__name__} cannot be quantized; accepted is nn.Embedding without max_norm"
            )
        weight = embedding.weight.detach()
        number, size = weight.shape
        table = cls(number, size, embedding.padding_idx, config=config, device="meta", dtype=weight.dtype)
        table.original = type(embedding)
        table.embed_scale = scale_of(embedding)
        table.rounds_scale = isinstance(getattr(embedding, "embed_scale", None), torch.Tensor)
        table.quantize(weight)
        return table.train(embedding.training)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The embedding that it stands for, with dequantized rows."""
        scale: dict[str, Any] = {} if self.embed_scale is None else {"embed_scale": self.embed_scale}
        embedding = self.original(self.num_embeddings, self.embedding_dim, self.padding_idx, **scale)
        embedding.weight = nn.Parameter(self.dequantize(dtype or self.dtype))
        return embedding.to(self.weight.device).train(self.training)

    def forward(self, given: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """ids [...] -> rows [..., columns]; or values [..., columns] -> their products with all rows [..., rows]."""
        if given.is_floating_point():
            return self.multiply(given, bias)
        found = self._rows(given)
        if self.embed_scale is None:
            return found
        return found * (torch.tensor(self.embed_scale, dtype=found.dtype) if self.rounds_scale else self.embed_scale)

    @abstractmethod
    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The touched rows in `dtype`, not scaled."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Packed bytes are never cast, but the rows that come out have the dtype that the model was cast to."""
        self.dtype = fn(torch.empty(1, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._format_repr()}"


class Embedding4bit(Weight4bit, PackedEmbedding):
    """Rows in NF4 or FP4. Blocks run over row ends where the row's length is no multiple of the block size."""

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        codes, absmax, nested_absmax, offset = self.operands()
        look_up = rows.look_up_4bit if is_direct(ids) else rows.embedding_4bit
        found: torch.Tensor = look_up(
            ids,
            codes,
            absmax,
            self.quant_type,
            self.blocksize,
            *self.matrix_shape,
            nested_absmax,
            offset,
            self.nested_blocksize or 1,
            self.dtype,
        )
        return found


class Embedding8bit(Weight8bit, PackedEmbedding):
    """Rows as int8."""

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = rows.embedding_8bit(ids, self.weight, self.SCB, self.dtype)
        return found


class TiedToEmbedding(nn.Module):
    """Stands for a module whose weight is the embedding's: an output embedding, or an embedding of the decoder."""

    bias: nn.Parameter | None

    def __init__(self, embedding: PackedEmbedding, original: nn.Module) -> None:
        """Takes the place of `original`, an nn.Linear or an embedding like the one that was packed."""
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is no child: its tensors belong to one module
        self.is_linear = isinstance(original, nn.Linear)
        self.register_parameter("bias", getattr(original, "bias", None))
        self.train(original.training)

    @property
    def embedding(self) -> PackedEmbedding:
        return self._embedding[0]

    @property
    def weight(self) -> torch.Tensor:
        """The embedding's."""
        return self.embedding.weight

    def __setattr__(self, name: str, value: Any) -> None:
        """transformers ties by setting `weight` to the embedding's, which it is already."""
        if name != "weight":
            super().__setattr__(name, value)
        elif value is not self.weight:
            raise ShapeError("the weight of a module tied to a packed embedding was set; set the embedding's instead")

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        # `forward` and not a call: hooks that others put on the embedding mean its rows (training), while accelerate's
        # replace `forward` itself and bring the weight.
        return self.embedding.forward(given, self.bias)

    def to_float(self, embedding: nn.Embedding) -> nn.Module:
        """The module that it stands for, tied to the dequantized embedding."""
        if not self.is_linear:
            return embedding
        linear = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
        linear.weight = embedding.weight
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(embedding.weight.dtype))
        return linear.train(self.training)


def can_pack(embedding: nn.Module) -> bool:
    """Whether a module is an embedding whose rows are looked up and at most scaled."""
    is_known = type(embedding) is nn.Embedding or type(embedding).__name__.endswith(_SCALING)
    return is_known and isinstance(embedding, nn.Embedding) and embedding.max_norm is None


def embedding_groups(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The input and the output embedding of a transformers model: each table's module by name, and all that share it.

    The first of a group is the one that holds the table, an embedding where there is one. Raises QuantConfigError for
    what cannot be packed.
    """
    names = {id(module): name for name, module in model.named_modules()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    sources = {name.removesuffix(".weight"): source.removesuffix(".weight") for name, source in tied.items()}
    groups: dict[str, tuple[str, ...]] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        if module is None:
            continue
        name = names[id(module)]
        source = sources.get(name, name)
        members = [source, *(target for target, own in sources.items() if own == source)]
        members.sort(key=lambda member: not isinstance(model.get_submodule(member), nn.Embedding))
        if len(members) > 1 or not isinstance(module, nn.Linear):
            _check_group(model, members)
        groups[members[0]] = tuple(members)
    return groups


def _check_group(model: nn.Module, members: list[str]) -> None:
    first = model.get_submodule(members[0])
    for name in members:
        module = model.get_submodule(name)
        is_like = type(module) is type(first) and can_pack(module) and scale_of(module) == scale_of(first)
        if not (is_like or (type(module) is nn.Linear and module is not first)):
            raise QuantConfigError(
                f"quantize_embeddings is True, but {name} of {type(model).__name__} is a {type(module).__name__}; "
                "accepted are nn.Embedding, embeddings that scale their rows, and what is tied to them: linear layers "
                "and embeddings alike"
            )


def scale_of(embedding: nn.Module) -> float | None:
    """What an embedding multiplies its rows by; on meta the number stands beside the tensor."""
    scale: Any = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return None if scale is None else float(scale)
