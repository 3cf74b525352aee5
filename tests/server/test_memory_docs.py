"""docs/memory.md: the table of plan and measurement is complete for the lists in the code, and its bytes agree."""

from __future__ import annotations

import re
from pathlib import Path

from quant import memory
from quant.config import PRESETS
from server.memory import components
from tests.tiny_models import CONFIGS, MORE_CONFIGS

TEXT = (Path(__file__).parent.parent.parent / "docs" / "memory.md").read_text(encoding="utf-8")
NOT_SERVED = {"llava"}


def rows(mark: str) -> list[list[str]]:
    (table,) = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", TEXT, re.DOTALL)
    lines = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in table.splitlines()]
    return lines[2:]


def test_every_architecture_is_there_in_every_format() -> None:
    found = [(row[0].strip("|"), row[1]) for row in rows("tiny")]
    assert sorted(found) == sorted((name, form) for name in (*CONFIGS, *MORE_CONFIGS) for form in PRESETS)


def test_planned_bytes_are_those_that_were_measured() -> None:
    for architecture, form, runner, *figures in rows("tiny"):
        if architecture in NOT_SERVED:
            assert runner.startswith("not served")
            continue
        assert "not equal" not in runner, (architecture, form)
        weights, measured, cache, found = figures
        assert weights == measured, (architecture, form)
        assert runner == "SingleRunner" or cache == found, (architecture, form)


def test_little_is_unaccounted_for_a_billion_parameters() -> None:
    shown = [row for row in rows("large") if "unaccounted" in row[0]]
    assert len(shown) == 2
    for row in shown:
        shares = [abs(float(share)) for share in re.findall(r"\((-?[\d.]+) %\)", " ".join(row))]
        assert len(shares) == len(PRESETS)
        assert max(shares) < 3


def test_every_component_is_explained() -> None:
    names = {components.KV_CACHE, *components.ESTIMATED, memory.PACKED_WEIGHTS, memory.ABSMAX, memory.NESTED_STATISTICS}
    assert names <= set(re.findall(r"^\| `(\w+)`", TEXT, re.MULTILINE))
