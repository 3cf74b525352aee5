"""server/memory/machine.py: the machine's memory, or what a control group leaves of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.memory import machine

KIB = 1024


Files = tuple[Path, Path, Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """What stands in for /proc/meminfo, /sys/fs/cgroup and /proc/self/cgroup: 1000 KiB, 600 free, no control group."""
    meminfo, own = tmp_path / "meminfo", tmp_path / "own"
    meminfo.write_text("MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    600 kB\n")
    own.write_text("0::/\n")
    return meminfo, tmp_path / "cgroup", own


def limit(files: Files, place: str, limit: object, usage: int, cache: int = 0) -> None:
    """A control group; `place` below "memory" is of version 1."""
    group = files[1] / place
    group.mkdir(parents=True, exist_ok=True)
    is_first = place.split("/")[0] == "memory"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_first else ("memory.max", "memory.current")
    for name, value in zip(names, (limit, usage), strict=True):
        (group / name).write_text(f"{value}\n")
    prefix = "total_" if is_first else ""
    (group / "memory.stat").write_text(
        f"anon {usage - cache}\n{prefix}inactive_file {cache - cache // 4}\n{prefix}active_file {cache // 4}\n"
    )


def test_without_a_limit_it_is_the_machines(files: Files) -> None:
    assert (machine.capacity(*files), machine.available(*files)) == (1000 * KIB, 600 * KIB)
    limit(files, ".", "max", 5)
    assert (machine.capacity(*files), machine.available(*files)) == (1000 * KIB, 600 * KIB)
    files[2].unlink()
    assert (machine.capacity(*files), machine.available(*files)) == (1000 * KIB, 600 * KIB)


@pytest.mark.parametrize(("usage", "left"), [(100_000, 200_000), (400_000, 0)])
@pytest.mark.parametrize(("place", "own"), [(".", "0::/"), ("memory", "7:cpu:/x\n4:memory:/\n0::/")])
def test_a_control_group_allows_less(files: Files, place: str, own: str, usage: int, left: int) -> None:
    files[2].write_text(own)
    limit(files, place, 300_000, usage)
    assert (machine.capacity(*files), machine.available(*files)) == (300_000, left)


@pytest.mark.parametrize(("place", "own"), [(".", "0::/"), ("memory", "4:memory:/")])
def test_page_cache_of_a_control_group_is_as_good_as_free(files: Files, place: str, own: str) -> None:
    """Else a checkpoint that has been read once would keep its engine from starting again."""
    files[2].write_text(own)
    limit(files, place, 300_000, 290_000, cache=240_000)
    assert machine.available(*files) == 250_000


@pytest.mark.parametrize(
    ("base", "own"), [("", "0::/system.slice/halfbyte"), ("memory/", "4:memory:/system.slice/halfbyte")]
)
def test_a_limit_of_any_group_that_the_process_lies_in_holds(files: Files, base: str, own: str) -> None:
    files[2].write_text(own)
    limit(files, f"{base}system.slice/halfbyte", 400_000, 100_000)
    limit(files, f"{base}system.slice", 500_000, 300_000)
    limit(files, f"{base}system.slice/other", 7, 7)
    assert (machine.capacity(*files), machine.available(*files)) == (400_000, 200_000)


def test_a_group_that_is_not_seen_from_here_does_not_count(files: Files) -> None:
    """As in a container that has the path of the machine, and of the files those of its own group."""
    files[2].write_text("4:memory:/docker/0123\n0::/../elsewhere\n")
    limit(files, "memory", 300_000, 100_000)
    assert (machine.capacity(*files), machine.available(*files)) == (300_000, 200_000)


def test_a_machine_that_does_not_say(files: Files) -> None:
    files[0].unlink()
    assert (machine.capacity(*files), machine.available(*files)) == (None, None)


def test_the_file_system_of_a_path(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    number = f"{os.major(device)}:{os.minor(device)}"
    other = "22 1 999:7 / /other rw - ext4 /dev/x rw"
    mounts.write_text(f"{other}\n23 1 {number} / /tmp rw,nosuid shared:2 - tmpfs tmpfs rw,size=9k\n")
    assert machine.file_system(tmp_path, mounts) == "tmpfs"
    assert machine.file_system(tmp_path, tmp_path / "none") == ""
    assert machine.file_system(Path("/proc")) == "proc"
