"""Small modules of transformers' models, computed by quant's kernels: one call where torch runs six operators.

In a decode step on a CPU a norm of some hundred values costs what torch's dispatcher costs, several times per layer.
A module that is fused keeps its object, parameters and names, and gets a subclass of its class whose forward takes the
short way where it may (`quant.direct.is_direct`); every other call is transformers' own.

Nothing is believed by name. A norm is fused where its own output on random rows is what the kernel gives, an MLP where
its forward, run on stand-ins for its four parts, proves to be down(silu(gate(x)) * up(x)) bit for bit. Whatever else
there is stays as it is, among it Gemma's (1 + weight) norms, modules with accelerate's hooks, and other devices' ones.
Not here: attention (fuse_attention.py).
"""

from __future__ import annotations

import functools
import inspect
import logging
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import nn
from transformers.activations import SiLUActivation

from quant import direct_rows, formats
from quant.direct import is_direct
from quant.siblings import multiplied_together
from server.model.fuse_attention import FusedAttention, is_attention
from server.model.fuse_layer import LAYER_PARTS, FusedLayer, is_layer

log = logging.getLogger(__name__)

_PROBED_VALUES: Final = 4096
_SEED: Final = 20
_MLP_PARTS: Final = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class FusedNorm(nn.Module):
    """Llama's RMSNorm under any name; comes before the class of transformers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters["weight"]
        if is_direct(x) and weight is not None and weight.dtype is x.dtype:
            return direct_rows.rms_norm(x, weight, self.variance_epsilon)  # type: ignore[arg-type]
        return super().forward(x)  # type: ignore[no-any-return]


class FusedMLP(nn.Module):
    """Llama's gated MLP under any name; comes before the class of transformers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not is_direct(x):
            return super().forward(x)  # type: ignore[no-any-return]
        parts: Any = self._modules
        gate, up = multiplied_together(self, (parts["gate_proj"], parts["up_proj"]), x)
        return parts["down_proj"](direct_rows.swiglu(gate, up))  # type: ignore[no-any-return]


@torch.inference_mode()
def fuse(model: nn.Module) -> int:
    """Fuses what it knows in a model on a CPU, in place; how many modules that are."""
    count = 0
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    for module in model.modules():
        if isinstance(module, (FusedNorm, FusedMLP, FusedAttention)) or not _is_plain(module):
            continue
        mixin: Any = _mixin_for(module, dtype)
        kind: Any = type(module)
        if mixin is not None:
            module.__class__ = _fused(mixin, kind)
            count += 1
    for module in model.modules():
        if not isinstance(module, FusedLayer) and _has_fused_parts(module) and is_layer(module):
            kind = type(module)
            module.__class__ = _fused(FusedLayer, kind)
            count += 1
    log.info("%d modules of %s run on kernels of their own", count, type(model).__name__)
    return count


def _has_fused_parts(module: nn.Module) -> bool:
    """Whether its parts, if it has those of a layer, are the fused ones."""
    kinds = dict(zip(LAYER_PARTS, (FusedNorm, FusedAttention, FusedNorm, FusedMLP), strict=True))
    return _is_plain(module) and all(isinstance(module._modules.get(name), kind) for name, kind in kinds.items())


def _mixin_for(module: nn.Module, dtype: torch.dtype | None) -> type[nn.Module] | None:
    if _is_norm(module):
        return FusedNorm
    if _is_mlp(module):
        return FusedMLP
    return FusedAttention if is_attention(module, dtype) else None


@functools.cache
def _fused(mixin: Any, kind: Any) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (mixin, kind), {"__module__": __name__})


def _is_plain(module: nn.Module) -> bool:
    """In memory on a CPU, with no forward but its class's: accelerate's hooks put one on the object."""
    for part in module.modules():
        if "forward" in vars(part) or hasattr(part, "_hf_hook"):
            return False
    return all(tensor.is_cpu for tensor in (*module.parameters(), *module.buffers()))


def _is_norm(module: nn.Module) -> bool:
    weight, eps = module._parameters.get("weight"), getattr(module, "variance_epsilon", None)
    if weight is None or len(module._parameters) != 1 or module._buffers or module._modules:
        return False
    if weight.dim() != 1 or weight.dtype not in formats.VALUE_DTYPES or not weight.numel():
        return False
    if not isinstance(eps, float) or not 0 <= eps < 1:
        return False
    if not _takes_rows_alone(type(module)):
        return False
    rows = -(-_PROBED_VALUES // weight.numel())
    x = (torch.randn(rows, weight.numel(), generator=_generator()) * 3).to(weight.dtype)
    try:
        expected = module(x)
    except Exception:  # whatever it is, it is no such norm
        return False
    return isinstance(expected, torch.Tensor) and _agree(direct_rows.rms_norm(x, weight, eps), expected)


def _takes_rows_alone(kind: type[nn.Module]) -> bool:
    """Whether a forward has one argument: some norms have a gate beside x, and are Llama's only without it."""
    return len(inspect.signature(kind.forward).parameters) == 2


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to the order of a row's sum: a few last bits in float32, hardly ever one or two where it is rounded twice."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    is_rounded = found.dtype != torch.float32
    bits = 2 if is_rounded else 8
    allowed = bits * torch.finfo(found.dtype).eps * expected.float().abs()
    different = (found != expected).float().mean().item()
    near = ((found.float() - expected.float()).abs() <= allowed).all()
    return bool(near) and (not is_rounded or different < 0.01)


def _is_mlp(module: nn.Module) -> bool:
    is_silu = type(module._modules.get("act_fn")) in (nn.SiLU, SiLUActivation)
    if not is_silu or set(module._modules) != _MLP_PARTS or module._parameters or module._buffers:
        return False
    kind: Any = type(module)
    return _takes_rows_alone(kind) and _is_gated_silu(kind)


@functools.cache
def _is_gated_silu(kind: Any) -> bool:
    """Whether a class's forward looks at nothing but its four parts, and is what a fused one computes."""
    x, a, b, c = torch.randn(4, 3, 64, generator=_generator()).unbind()
    silu = nn.functional.silu
    parts: Any = SimpleNamespace(
        gate_proj=lambda y: y * a, up_proj=lambda y: y * b, down_proj=lambda y: y * c, act_fn=silu
    )
    try:
        found: Any = kind.forward(parts, x)
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
    return isinstance(found, torch.Tensor) and torch.equal(found, silu(x * a) * (x * b) * c)


def _generator() -> torch.Generator:
    """Numbers of its own: a model's loading leaves torch's as they were."""
    return torch.Generator().manual_seed(_SEED)
