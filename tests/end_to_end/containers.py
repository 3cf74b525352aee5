"""buildah and podman for tests: what this machine lacks for them, and the image that they run. Not a test.

CONTAINER_TEST_BASE_IMAGE names another base than the Dockerfile's; CONTAINER_TEST_BUILD_ARGS holds more arguments for
`buildah bud`: mounts or build arguments that a network needs. docs/container.md says how to make a base image where no
registry can be reached.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text()
(DEFAULT_BASE,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
BASE_IMAGE: Final = os.environ.get("CONTAINER_TEST_BASE_IMAGE", DEFAULT_BASE)
TAG: Final = "localhost/halfbyte-test"
BUILD_SECONDS: Final = 1500


@cache
def missing(*programs: str) -> str:
    """What this machine lacks to build and run images, and `programs` beside; empty where it lacks nothing."""
    absent = [program for program in ("buildah", "podman", *programs) if not shutil.which(program)]
    if absent:
        return f"needs {' and '.join(absent)}"
    found = subprocess.run(["podman", "image", "exists", BASE_IMAGE], capture_output=True, check=False)
    if found.returncode != 0:
        return f"needs the image {BASE_IMAGE} in podman's storage"
    command = ["podman", "run", "--rm", "--network", "none", BASE_IMAGE, "true"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if run.returncode == 0 else f"podman runs no container here: {run.stderr.strip().splitlines()[-1]}"


def podman(*arguments: str) -> str:
    """What it printed; an AssertionError where it failed."""
    result = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def build(tag: str, context: Path) -> None:
    """The image of a directory's Dockerfile on BASE_IMAGE; what has been built before is not built again."""
    command = ["buildah", "bud", "--format", "docker", "--isolation", "chroot", "--layers", "-t", tag]
    command += ["--build-arg", f"BASE_IMAGE={BASE_IMAGE}"]
    command += shlex.split(os.environ.get("CONTAINER_TEST_BUILD_ARGS", ""))
    result = subprocess.run([*command, str(context)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
