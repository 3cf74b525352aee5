"""What image and server promise, for the files in deploy/: read from the Dockerfile and the code. Not a test."""

from __future__ import annotations

import re
from pathlib import Path

from server.api.middleware import OPEN_PATHS
from server.app import create_app
from server.config import ALL_KEYS, ENVIRONMENT_PREFIX, load_config

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
GUIDE = (ROOT / "docs" / "deployment.md").read_text()
VARIABLES = frozenset(ENVIRONMENT_PREFIX + key.upper() for key in ALL_KEYS)


def promised(pattern: str) -> str:
    """The one place in the Dockerfile that matches; its group."""
    (found,) = re.findall(pattern, DOCKERFILE, re.MULTILINE)
    return str(found)


PORT = int(promised(r"HALFBYTE_PORT=(\d+)"))
USER = int(promised(r"^USER (\d+)$"))


def open_routes() -> frozenset[str]:
    """Paths that the application has and answers without a key: what a probe may ask for."""
    return OPEN_PATHS & set(create_app(load_config({}, {})).openapi()["paths"])


def blocks(language: str) -> list[str]:
    """The fenced blocks of docs/deployment.md in one language."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
