"""Work that ends when something else comes first: a client that leaves, requests that are cut. Knows neither."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


async def unless(
    ended: Coroutine[Any, Any, object], work: Coroutine[Any, Any, _Result], error: Callable[[], Exception]
) -> _Result:
    """The result of `work`, which is cancelled where `ended` is over first: then the error is raised. Where both are,
    the result counts. Neither runs any more afterwards.
    """
    working, watching = asyncio.create_task(work), asyncio.create_task(ended)
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise error()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
