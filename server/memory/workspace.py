"""What a runner and its kernels keep from step to step, predicted from limits and shapes."""

from __future__ import annotations

from server.records import KV_BLOCK_TOKENS

_INDEX_BYTES = 8
_ROWS_PER_TOKEN = 3  # ids, positions, cache slots


def workspace_bytes(max_batch_tokens: int, max_sequences: int, max_model_len: int) -> int:
    """The paged runner's input buffers (server/model/runner.py): int64, per token of a step and per cache block."""
    tables = max_sequences * -(-max_model_len // KV_BLOCK_TOKENS)
    return _INDEX_BYTES * (_ROWS_PER_TOKEN * max_batch_tokens + tables)
