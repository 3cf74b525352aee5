"""Mixture of experts: transformers' stacks of expert weights (3-D parameters), packed matrix by matrix.

A stack holds one matrix per expert and projection: `gate_up_proj` [E, 2I, H] is E gate and E up matrices. Each is
packed by itself, as bitsandbytes packs a linear layer, and saved under the name it had when experts were linear layers
(`experts.3.gate_proj.weight` and its statistics): older checkpoints can be read, and older readers read ours. In memory
they are stacked again, and a forward pass computes with the active experts only: 4-bit stacks in one call of
ops.linear_4bit_experts, others expert by expert (grouped.py). Not here: loading through transformers (hf.py), the
format of one matrix (state.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Self

import torch
from torch import nn
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from quant import formats, ops, pages
from quant.config import BitsAndBytesConfig
from quant.errors import CheckpointError
from quant.grouped import grouped_linear_4bit_int8
from quant.hooks import Offloadable
from quant.packed import bits_kept, loaded_bias
from quant.state import NAMES_4BIT, NAMES_8BIT, Packed4bit, Packed8bit, PackedWeight, SecondLevel, layer_tensor

LEAVES: Final = ("gate_up_proj", "down_proj")
"""The stacks that are packed. Their biases, where there are any, are parameters of their own: `down_proj_bias`."""
_STATISTICS: Final = ("absmax", "nested_absmax", "nested_offset", "SCB")
_MERGED: Final = re.compile(r"(?:.*\.)?experts\.\*\.(\w+)\.weight")


@dataclasses.dataclass(frozen=True, slots=True)
class Projection:
    """One stack: how its matrices lie in it, and what they are called in files."""

    leaf: str
    names: tuple[str, ...]  # one per matrix of an expert, "{expert}" for its number: "{expert}.gate_proj"
    experts: int
    rows: int  # of one matrix, [rows, columns]
    columns: int
    is_transposed: bool  # the unquantized stack is [E, columns, rows] (GPT-OSS)

    def split(self, stack: torch.Tensor) -> Iterator[torch.Tensor]:
        """The matrices of an unquantized stack, expert by expert; views."""
        height = len(self.names) * self.rows
        wanted = (self.experts, self.columns, height) if self.is_transposed else (self.experts, height, self.columns)
        if tuple(stack.shape) != wanted:
            raise CheckpointError(f"tensor {self.leaf} has shape {list(stack.shape)}; {list(wanted)} is needed")
        for expert in stack.detach():
            yield from (expert.t() if self.is_transposed else expert).split(self.rows)

    def join(self, matrices: Iterable[torch.Tensor]) -> torch.Tensor:
        """split() backwards: an unquantized stack."""
        flat = torch.stack(list(matrices))
        stack = flat.view(self.experts, len(self.names) * self.rows, self.columns)
        return stack.transpose(1, 2).contiguous() if self.is_transposed else stack

    def file_names(self) -> list[str]:
        """One per matrix, in the order of split()."""
        return [name.format(expert=expert) for expert in range(self.experts) for name in self.names]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.experts, len(self.names) * self.rows, self.columns)


def find_experts(model: nn.Module) -> dict[str, tuple[Projection, ...]]:
    """The expert modules of a transformers model that can be packed, by name, with their two projections.

    They are those that transformers lets others compute (`use_experts_implementation`), gated, and whose stacks are
    joined from one linear layer per expert and name when they are loaded, or lie stacked in the file.
    """
    found = {}
    merged: dict[str, tuple[str, ...] | None] | None = None
    for name, module in model.named_modules():
        if not _is_experts(module):
            continue
        if merged is None:
            merged = _merged_names(model)
        stem = name.rpartition(".")[2]
        projections = []
        for leaf in LEAVES:
            key = f"{stem}.{leaf}"
            parts = merged.get(key, (f"{leaf}s.{{expert}}",))
            projection = None if parts is None else _projection(module, leaf, parts)
            if projection is not None:
                projections.append(projection)
        if len(projections) == len(LEAVES):
            found[name] = tuple(projections)
    return found


def _is_experts(module: nn.Module) -> bool:
    stacks = [getattr(module, leaf, None) for leaf in LEAVES]
    return (
        all(isinstance(stack, nn.Parameter) and stack.dim() == 3 and stack.is_floating_point() for stack in stacks)
        and hasattr(module, "_apply_gate")
        and getattr(module, "has_gate", False)
        and not getattr(module, "has_post_expert_norm", True)
    )


def _projection(module: Any, leaf: str, names: tuple[str, ...]) -> Projection | None:
    stack = getattr(module, leaf)
    height, columns = (stack.shape[2], stack.shape[1]) if module.is_transposed else stack.shape[1:]
    if height % len(names):
        return None
    return Projection(leaf, names, stack.shape[0], height // len(names), columns, module.is_transposed)


def _merged_names(model: nn.Module) -> dict[str, tuple[str, ...] | None]:
    """For each stack that transformers joins while loading, by its last two names: its parts, or None if in a way
    that is not one linear layer per expert."""
    names: dict[str, tuple[str, ...] | None] = {}
    for converter in get_model_conversion_mapping(model):  # type: ignore[arg-type]
        if isinstance(converter, loading.WeightConverter):
            for target in converter._original_target_patterns:
                last = ".".join(target.replace("\\", "").split(".")[-2:])
                names[last] = converter_parts(converter)
    return names


def converter_parts(converter: loading.WeightConverter) -> tuple[str, ...] | None:
    """("{expert}.w1", "{expert}.w3") for the converter that joins these into a stack; None for one of another kind."""
    parts = [_MERGED.fullmatch(source) for source in converter._original_source_patterns]
    kinds = [type(operation) for operation in converter.operations]
    plain = [loading.MergeModulelist] if len(parts) == 1 else [loading.MergeModulelist, loading.Concatenate]
    dims = [getattr(operation, "dim", None) for operation in converter.operations]
    if len(converter._original_target_patterns) != 1 or kinds != plain or dims != [0, 1][: len(plain)]:
        return None
    matched = tuple(f"{{expert}}.{part[1]}" for part in parts if part is not None)
    return matched if len(matched) == len(parts) else None


def pack_matrix(matrix: torch.Tensor, config: BitsAndBytesConfig) -> PackedWeight:
    """One expert's matrix [N, K], packed as `config` says."""
    if config.load_in_8bit:
        return Packed8bit.quantize(matrix.contiguous())
    return Packed4bit.quantize(
        matrix.contiguous(),
        config.bnb_4bit_quant_type,
        blocksize=config.bnb_4bit_blocksize,
        double_quant=config.bnb_4bit_use_double_quant,
        storage=config.bnb_4bit_quant_storage,
        search=config.bnb_4bit_search,
    )


class PackedExperts(Offloadable):
    """All experts of one layer, packed; stands in the place of transformers' own module.

    Per projection: the parameter `<leaf>` uint8 (or the storage dtype) [E, P, bytes] or int8 [E, P, N, K], where P
    counts the matrices of an expert, and buffers `<leaf>_absmax` [E, P, B], with double quantization
    `<leaf>_nested_absmax` and `<leaf>_nested_offset`, or `<leaf>_SCB` [E, P, N]. Biases keep their names.
    """

    def __init__(self, original: nn.Module, projections: tuple[Projection, ...], config: BitsAndBytesConfig) -> None:
        """Takes the place of `original`, whose stacks it packs (on meta: shapes only) and takes from it."""
        super().__init__()
        self.projections = {projection.leaf: projection for projection in projections}
        self.options = config
        self.compute_dtype = config.bnb_4bit_compute_dtype
        self._templates: dict[str, list[PackedWeight]] = {}
        for leaf in self.projections:
            stack, bias = getattr(original, leaf), getattr(original, f"{leaf}_bias", None)
            self.register_parameter(leaf, None)
            for statistic in _STATISTICS:
                self.register_buffer(f"{leaf}_{statistic}", None)
            self.register_parameter(f"{leaf}_bias", bias)
            for name in (leaf, f"{leaf}_bias"):
                if hasattr(original, name):
                    delattr(original, name)
            self.quantize(leaf, stack)
        self.shell = original
        """The module without its weights: what comes between the two products is its business."""
        self.train(original.training)

    def quantize(self, leaf: str, stack: torch.Tensor) -> None:
        """Packs a stack as transformers holds it, one matrix after another, on its own device."""
        matrices = self.projections[leaf].split(stack)
        self.adopt(leaf, [pack_matrix(matrix, self.options) for matrix in matrices])

    def adopt(self, leaf: str, matrices: list[PackedWeight]) -> None:
        """Holds packed matrices, in the order of file_names(); CheckpointError where they do not belong together."""
        projection = self.projections[leaf]
        first = matrices[0]
        names = projection.file_names()
        for name, matrix in zip(names, matrices, strict=True):
            if matrix.shape != (projection.rows, projection.columns):
                wanted = [projection.rows, projection.columns]
                raise CheckpointError(f"tensor {name}.weight has shape {list(matrix.shape)}; {wanted} is needed")
            if _kind(matrix) != _kind(first):
                raise CheckpointError(
                    f"tensor {name}.weight is packed as {_kind(matrix)} where {names[0]}.weight is {_kind(first)}; "
                    "accepted is one format for all experts of a layer"
                )

        def stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
            return pages.stacked(tensors).view(projection.experts, len(projection.names), *tensors[0].shape)

        values: dict[str, torch.Tensor | None] = dict.fromkeys(_STATISTICS)
        if isinstance(first, Packed8bit):
            eights = [matrix for matrix in matrices if isinstance(matrix, Packed8bit)]
            codes = stacked([matrix.packed for matrix in eights])
            values["SCB"] = stacked([matrix.row_absmax for matrix in eights])
        else:
            fours = [matrix for matrix in matrices if isinstance(matrix, Packed4bit)]
            codes = stacked([matrix.packed.flatten() for matrix in fours])
            values["absmax"] = stacked([matrix.absmax for matrix in fours])
            nested = [matrix.nested for matrix in fours if matrix.nested is not None]
            if nested:
                values["nested_absmax"] = stacked([level.absmax for level in nested])
                values["nested_offset"] = stacked([level.offset for level in nested])
        setattr(self, leaf, nn.Parameter(codes, requires_grad=False))
        for statistic, value in values.items():
            setattr(self, f"{leaf}_{statistic}", value)
        # What the tensors do not say: the JSON as it stands in the file, tables of its own. The tensors are not kept.
        self._templates[leaf] = [_without_tensors(matrix) for matrix in matrices]

    def matrices(self, leaf: str) -> Iterator[PackedWeight]:
        """The packed matrices in the order of file_names(); they share the stack's tensors."""
        codes = self._codes(leaf).detach().flatten(0, 1)
        statistics = {name: getattr(self, f"{leaf}_{name}") for name in _STATISTICS}
        for index, template in enumerate(self._templates[leaf]):
            own = {name: value.flatten(0, 1)[index] for name, value in statistics.items() if value is not None}
            if isinstance(template, Packed8bit):
                yield dataclasses.replace(template, packed=codes[index], row_absmax=own["SCB"])
            elif isinstance(template, Packed4bit):
                nested = template.nested and dataclasses.replace(
                    template.nested, absmax=own["nested_absmax"], offset=own["nested_offset"]
                )
                packed = codes[index].unsqueeze(1)
                yield dataclasses.replace(template, packed=packed, absmax=own["absmax"], nested=nested)

    def checkpoint_tensors(self, leaf: str) -> dict[str, torch.Tensor]:
        """One projection's tensors under the names that files have for them, without the module's own prefix."""
        return {
            f"{name}.{key}": tensor
            for name, matrix in zip(self.projections[leaf].file_names(), self.matrices(leaf), strict=True)
            for key, tensor in matrix.to_checkpoint().items()
        }

    def tensor_in_files(self, name: str, files: Mapping[str, torch.Tensor]) -> torch.Tensor:
        for leaf, projection in self.projections.items():
            statistic = "weight" if name == leaf else name.removeprefix(f"{leaf}_")
            if statistic in ("weight", *_STATISTICS):
                parts = [layer_tensor(files, statistic, f"{own}.") for own in projection.file_names()]
                shape: torch.Size = getattr(self, name).shape
                return torch.stack(parts).view(shape)
        raise KeyError(name)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """transformers' own module with unquantized stacks of `dtype`; this one loses its shell to it."""
        original = self.shell
        for leaf, projection in self.projections.items():
            stack = projection.join(matrix.dequantize(dtype) for matrix in self.matrices(leaf))
            original.register_parameter(leaf, nn.Parameter(stack))
            bias = getattr(self, f"{leaf}_bias")
            if bias is not None:
                original.register_parameter(f"{leaf}_bias", nn.Parameter(bias.detach().to(dtype or bias.dtype)))
        return original.train(self.training)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
        tokens, choices = top_k_index.shape
        experts = self.projections["down_proj"].experts
        ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
        ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True)
        shell: Any = self.shell
        gated = shell._apply_gate(self._project("gate_up_proj", hidden_states[order // choices], ids, ends))
        out = self._project("down_proj", gated, ids, ends)
        weighted = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return weighted[back].view(tokens, choices, out.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def _project(self, leaf: str, x: torch.Tensor, ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert through one stack: [S, K] -> [S, N], the matrices of an expert side by side."""
        template = self._templates[leaf][0]
        if isinstance(template, Packed8bit):
            return self._project_8bit(leaf, x, ends)
        if not isinstance(template, Packed4bit):
            raise TypeError(f"a {type(template).__name__} cannot be computed with")
        if self.options.bnb_4bit_activations == "float":
            return self._project_4bit(leaf, template, x, ends)
        parts = len(self.projections[leaf].names)
        out = torch.cat([self._product(leaf, template, part, x, ends) for part in range(parts)], -1)
        bias = getattr(self, f"{leaf}_bias")
        return out if bias is None else out + bias[ids.clamp(max=bias.shape[0] - 1)]

    def _project_8bit(self, leaf: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """All matrices of the active experts in one call, where an expert's are one, row under row."""
        CB, SCB = self._codes(leaf).flatten(1, 2), getattr(self, f"{leaf}_SCB").flatten(1, 2)
        options = self.options
        rule = (options.llm_int8_threshold, options.llm_int8_outliers)
        return ops.linear_8bit_experts(x, ends, CB, SCB, *rule, getattr(self, f"{leaf}_bias"))

    def _project_4bit(self, leaf: str, template: Packed4bit, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """All matrices of the active experts in one call."""
        projection = self.projections[leaf]
        absmax, nested_absmax, offset = (getattr(self, f"{leaf}_{name}") for name in _STATISTICS[:3])
        out = ops.linear_4bit_experts(
            x.to(self.compute_dtype),
            ends,
            self._codes(leaf).view(torch.uint8),
            absmax,
            template.quant_type,
            template.blocksize,
            [projection.rows, projection.columns],
            nested_absmax,
            offset,
            1 if template.nested is None else template.nested.blocksize,
            getattr(self, f"{leaf}_bias"),
        )
        return out.to(x.dtype)

    def _product(self, leaf: str, template: Packed4bit, part: int, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """One matrix of each active expert, one after another, activations in int8."""
        codes = self._codes(leaf)[:, part]
        absmax, nested_absmax, offset = (getattr(self, f"{leaf}_{name}") for name in _STATISTICS[:3])
        bytes_used = formats.packed_bytes(self.projections[leaf].rows * self.projections[leaf].columns)
        out: torch.Tensor = grouped_linear_4bit_int8(
            x.to(self.compute_dtype),
            ends,
            codes.view(torch.uint8)[:, :bytes_used],
            absmax[:, part],
            template.quant_type,
            template.blocksize,
            self.projections[leaf].rows,
            None if nested_absmax is None else nested_absmax[:, part],
            None if offset is None else offset[:, part],
            1 if template.nested is None else template.nested.blocksize,
        )
        return out.to(x.dtype)

    def _codes(self, leaf: str) -> torch.Tensor:
        codes: torch.Tensor = getattr(self, leaf)
        template = self._templates[leaf][0]
        stored = template.packed.dtype if isinstance(template, Packed4bit | Packed8bit) else codes.dtype
        if codes.dtype != stored:  # somebody wrote other values into the parameter itself; .to() and its like do not
            raise CheckpointError(
                f"packed experts stored as {stored} were cast to {codes.dtype}, which destroyed them; load them anew, "
                "and before training call quant.lora.prepare_model_for_kbit_training"
            )
        return codes

    def packed_tensors(self) -> list[torch.Tensor]:
        """Codes and statistics: what must survive every cast bit for bit."""
        names = [*self.projections, *(f"{leaf}_{name}" for leaf in self.projections for name in _STATISTICS)]
        return [tensor for tensor in (getattr(self, name) for name in names) if tensor is not None]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(bits_kept(fn, self.packed_tensors()), recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for leaf in self.projections:
            # On meta there is nothing to save; loaders then expect one entry per parameter, under its own name.
            codes = getattr(self, leaf)
            tensors = {leaf: codes} if codes.is_meta else self.checkpoint_tensors(leaf)
            bias = getattr(self, f"{leaf}_bias")
            if bias is not None:
                tensors[f"{leaf}_bias"] = bias
            for name, tensor in tensors.items():
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

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
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        for leaf, projection in self.projections.items():
            device = getattr(self, leaf).device
            place = None if device.type == "meta" else device
            name = f"{leaf}_bias"
            bias = getattr(self, name)
            if bias is not None and name not in own:
                missing_keys.append(prefix + name)
            elif bias is not None:
                try:
                    setattr(self, name, loaded_bias(bias, own.pop(name), prefix + name, assign))
                except CheckpointError as error:
                    error_msgs.append(str(error))
            matrices = []
            for name in projection.file_names():
                known = [key for key in NAMES_4BIT + NAMES_8BIT if f"{name}.{key}" in own]
                tensors = {key: own.pop(f"{name}.{key}") for key in dict.fromkeys(known)}
                if not assign:  # like any module: the caller's tensors stay the caller's, and this one where it is
                    tensors = {key: tensor.to(device=place, copy=True) for key, tensor in tensors.items()}
                if not tensors:
                    missing_keys.append(f"{prefix}{name}.weight")
                    continue
                try:
                    matrices.append(PackedWeight.from_checkpoint(tensors, name=prefix + name))
                except CheckpointError as error:
                    error_msgs.append(str(error))
            if len(matrices) == len(projection.file_names()):
                try:
                    self.adopt(leaf, matrices)
                except CheckpointError as error:
                    error_msgs.append(str(error))
        if strict:
            unexpected_keys.extend(prefix + name for name in own)

    def extra_repr(self) -> str:
        kinds = {leaf: _kind(templates[0]) for leaf, templates in self._templates.items()}
        return ", ".join(f"{leaf}: {list(self.projections[leaf].shape)} {kind}" for leaf, kind in kinds.items())


def _kind(matrix: PackedWeight) -> str:
    """What all matrices of a stack have in common."""
    if not isinstance(matrix, Packed4bit):
        return "int8"
    nested = "" if matrix.nested is None else f" double-quantized in blocks of {matrix.nested.blocksize}"
    return f"{matrix.quant_type} in blocks of {matrix.blocksize}{nested} as {matrix.packed.dtype}"


def _without_tensors(matrix: PackedWeight) -> PackedWeight:
    """The same with empty tensors of its dtypes in the place of codes and statistics."""
    if isinstance(matrix, Packed8bit):
        return dataclasses.replace(matrix, packed=_nothing(matrix.packed), row_absmax=_nothing(matrix.row_absmax))
    if not isinstance(matrix, Packed4bit):
        raise TypeError(f"a {type(matrix).__name__} cannot be stacked; accepted are Packed4bit and Packed8bit")
    level = matrix.nested
    if level is not None and level.table is not None:
        raise CheckpointError("a nested_quant_map of its own; accepted for experts is bitsandbytes' own table")
    nested = level and SecondLevel(
        absmax=_nothing(level.absmax), offset=_nothing(level.offset), blocksize=level.blocksize
    )
    return dataclasses.replace(matrix, packed=_nothing(matrix.packed), absmax=_nothing(matrix.absmax), nested=nested)


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype, device="meta")
