"""What a runner keeps from step to step (server/model/runner.py): the sizes of its input buffers, and their sum."""

from __future__ import annotations

from typing import Final

from server.records import KV_BLOCK_TOKENS

_INDEX_BYTES: Final = 8
ROWS_PER_TOKEN: Final = 3
"""Numbers of a token: its id, its position, its cache slot."""
PROOF_SEQUENCES: Final = 2
PROOF_TOKENS: Final = 14
"""Of the largest step that a model is proven with (server/model/proof.py), however few are served."""


def table_sizes(sequences: int, width: int) -> tuple[int, int, int]:
    """Numbers of so many sequences' tables: their blocks [sequences, width], where each one's rows begin and the last
    one's end, at which position each begins.
    """
    return sequences * width, sequences + 1, sequences


def most_rows(max_batch_tokens: int) -> int:
    """Numbers of the largest step's tokens."""
    return ROWS_PER_TOKEN * max(max_batch_tokens, PROOF_TOKENS)


def most_tables(max_sequences: int, most_blocks: int) -> int:
    """Numbers of the largest tables that a runner fills; most_blocks: of a sequence."""
    return sum(table_sizes(max(max_sequences, PROOF_SEQUENCES), most_blocks))


def workspace_bytes(max_batch_tokens: int, max_sequences: int, max_model_len: int) -> int:
    """All of it, in int64."""
    tables = most_tables(max_sequences, -(-max_model_len // KV_BLOCK_TOKENS))
    return _INDEX_BYTES * (most_rows(max_batch_tokens) + tables)
