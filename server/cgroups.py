"""The control groups that this process is in. Not here: what they limit (cpus.py, memory/machine.py). No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path("/sys/fs/cgroup")
OWN: Final = Path("/proc/self/cgroup")


class Group(NamedTuple):
    """Where a group's files are, and the version of control groups, 1 or 2, that names them."""

    path: Path
    version: int


def own_groups(controller: str, root: Path = ROOT, own: Path = OWN) -> Iterator[Group]:
    """This process's groups of a controller, each with those that it lies in: a limit of any of them holds.

    `root` stands for /sys/fs/cgroup and `own` for /proc/self/cgroup. A group may be out of sight, as those outside of a
    container are: then its directory is not there.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            base, version = root / controller, 1
        elif number == "0":
            base, version = root, 2
        else:
            continue
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            yield Group(base / group, version)
