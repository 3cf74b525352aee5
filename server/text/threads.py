"""Threads of their own for templates and tokenizers: a burst of long texts holds up nothing else that goes to a thread,
such as a page of metrics. No text here, and no tokens.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar, TypeVarTuple

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")
_THREADS: Final = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)), thread_name_prefix="text")
"""One for each processor, which a tokenizer keeps busy."""


async def in_text_thread(work: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
    """What `work` returns or raises. Who stops waiting for it does not stop it, unless it had not begun."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work, *arguments)
