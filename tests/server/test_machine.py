"""server/memory/machine.py: the machine's memory, or what a control group leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.memory import machine

KIB = 1024


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """What stands in for /proc/meminfo and /sys/fs/cgroup: 1000 KiB, 600 of them free, and no control group."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    600 kB\n")
    (tmp_path / "memory").mkdir()
    return meminfo, tmp_path


def test_without_a_limit_it_is_the_machines(files: tuple[Path, Path]) -> None:
    assert (machine.capacity(*files), machine.available(*files)) == (1000 * KIB, 600 * KIB)
    (files[1] / "memory.max").write_text("max\n")
    (files[1] / "memory.current").write_text("5\n")
    assert (machine.capacity(*files), machine.available(*files)) == (1000 * KIB, 600 * KIB)


@pytest.mark.parametrize(("usage", "left"), [(100_000, 200_000), (400_000, 0)])
@pytest.mark.parametrize("version", machine._LIMIT_AND_USAGE)
def test_a_control_group_allows_less(files: tuple[Path, Path], version: tuple[str, str], usage: int, left: int) -> None:
    (files[1] / version[0]).write_text("300000\n")
    (files[1] / version[1]).write_text(f"{usage}\n")
    assert (machine.capacity(*files), machine.available(*files)) == (300_000, left)


def test_a_machine_that_does_not_say(files: tuple[Path, Path]) -> None:
    files[0].unlink()
    assert (machine.capacity(*files), machine.available(*files)) == (None, None)
