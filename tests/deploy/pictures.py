"""Makes docs/pictures: a few minutes in the life of a server, as the dashboards show them. Not a test.

    python -m tests.deploy.pictures [DIRECTORY]

Two copies of the demo model are under load. A third one is loaded, asked and unloaded meanwhile, and one engine is
killed and started again.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx

from server.demo import DEMO_MODEL_PATH
from tests.deploy.boards import DASHBOARDS, dashboard
from tests.deploy.drawing import Board
from tests.deploy.monitored import load, prometheus, server

PICTURES = Path(__file__).parent.parent.parent / "docs" / "pictures"
QUIET, BUSY = 25.0, 45.0
"""Seconds of the parts of the story."""
LONGEST = 512


def entry(name: str, quantization: str) -> dict[str, object]:
    return {
        "name": name,
        "path": str(DEMO_MODEL_PATH),
        "quantization": quantization,
        "max_model_len": LONGEST,
        "max_sequences": 16,
        "kv_cache": {"tokens": 3 * LONGEST},
        "threads": 1,
    }


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    models = [entry("stories", "nf4-dq"), entry("careful", "int8")]
    admin = secrets.token_urlsafe()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with (
            server(models, folder, max_queued_requests=8, restart_pause_seconds=5, admin_key=admin) as running,
            prometheus(running, folder) as scraper,
            httpx.Client(
                base_url=running.url, headers={"Authorization": f"Bearer {admin}"}, timeout=120
            ) as administrator,
        ):
            begin = time.time()
            time.sleep(QUIET / 5)
            with load(running, ["stories", "careful"], longest=LONGEST):
                time.sleep(BUSY)
                administrator.post("/admin/models", json=entry("visitor", "fp4")).raise_for_status()
                with load(running, ["visitor"], longest=LONGEST):
                    time.sleep(QUIET)
                    os.kill(running.engines()[1], signal.SIGKILL)
                    time.sleep(BUSY)
                administrator.delete("/admin/models/visitor").raise_for_status()
                time.sleep(QUIET)
                end = time.time()
            for path in DASHBOARDS:
                board = Board(dashboard(path), scraper, begin, end, step=1.0, rate_interval="15s")
                board.save(directory / f"{path.stem}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES)
