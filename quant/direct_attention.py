"""Attention over the paged cache called straight, for inference on a CPU: quant/direct.py's way for one batch.

A batch's tables serve every layer of a model. They are checked and put into the argument struct once, and so are the
sizes and options, which most layers share; a layer's call adds its pointers and goes. Not here: what is computed
(csrc), whether a call may come this way (`quant.direct.is_direct`).
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import torch

from quant import arguments, native
from quant.direct import WORKSPACE

_ENTRY: Final = "hb_paged_attention"


class DirectAttention:
    """ops.paged_attention for the layers of one batch, one call at a time; the same bits."""

    def __init__(self, tables: torch.Tensor, offsets: torch.Tensor, starts: torch.Tensor) -> None:
        """The tensors' values are not to change while this is in use."""
        self._kernels = native.kernels("cpu")
        self._function = getattr(self._kernels.library, _ENTRY)
        self._tables, self._offsets, self._starts = map(native.ready, (tables, offsets, starts))
        self._prepared: dict[tuple[object, ...], ctypes.Structure] = {}

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, H, D] over [blocks, block_tokens, G, D] and [.., E] -> [T, H, E]. Raises ShapeError and NativeError."""
        keys, values, sinks = native.ready(keys), native.ready(values), native.ready_or_none(sinks)
        scales = native.ready_or_none(scales)
        if query.stride(2) != 1 or query.data_ptr() % query.element_size():
            query = query.clone(memory_format=torch.contiguous_format)
        out = query.new_empty((query.shape[0], query.shape[1], values.shape[3]))
        status = self._function(
            ctypes.byref(self.arguments_for(query, keys, values, out, scale, window, softcap, sinks, scales))
        )
        if status:
            self._kernels.check_status(_ENTRY, status)
        return out

    def arguments_for(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> Any:
        """The struct of such a call, good until the next one; all but `query` contiguous. Raises ShapeError."""
        threads = native.thread_count()
        stores = (keys.shape, values.shape, keys.dtype, values.dtype)
        others = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in (sinks, scales)]
        key = (query.shape, query.dtype, stores, scale, window, softcap, *others, threads)  # what the checks look at
        args: Any = self._prepared.get(key)
        if args is None:
            args = self._prepare(query, keys, values, scale, window, softcap, sinks, scales, threads)
            self._prepared[key] = args
        args.query = query.data_ptr()
        args.query_row_stride, args.query_head_stride, _ = query.stride()
        args.keys, args.values, args.out = keys.data_ptr(), values.data_ptr(), out.data_ptr()
        if sinks is not None:
            args.sinks = sinks.data_ptr()
        if scales is not None:
            args.scales = scales.data_ptr()
        call = args.call
        call.workspace = WORKSPACE.at_least(call.workspace_bytes)
        return args

    def _prepare(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
        scales: torch.Tensor | None,
        threads: int,
    ) -> ctypes.Structure:
        """Everything but a layer's own pointers, checked as ops.paged_attention checks it."""
        tables = self._tables
        arguments.check_paged_attention(
            query, keys, values, tables, self._offsets, self._starts, scale, window, softcap, sinks, scales
        )
        T, H, D = query.shape
        blocks, block_tokens, G, E = values.shape
        row_stride, head_stride, _ = query.stride()
        args: ctypes.Structure = native.filled(
            _ENTRY,
            query_row_stride=row_stride,
            query_head_stride=head_stride,
            store_dtype=native.STORE_CODES[keys.dtype],
            dtype=native.DTYPE_CODES[query.dtype],
            T=T,
            H=H,
            G=G,
            D=D,
            E=E,
            blocks=blocks,
            block_tokens=block_tokens,
            tables=tables,
            S=tables.shape[0],
            max_blocks=tables.shape[1],
            offsets=self._offsets,
            starts=self._starts,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks_dtype=0 if sinks is None else native.DTYPE_CODES[sinks.dtype],
        )
        args.call.threads = threads
        args.call.workspace_bytes = self._kernels.workspace_bytes(_ENTRY, args)
        return args
