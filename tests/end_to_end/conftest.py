"""One demo server for all tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.server import Server, serve


@pytest.fixture(scope="session")
def demo() -> Iterator[Server]:
    with serve() as server:
        yield server
