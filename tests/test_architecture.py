"""Reads the imports and draws the picture of docs/architecture.md; fails when an arrow turns back.

Every package has a layer and may import from its own layer and the ones below. What must stay out of the HTTP process
(torch and what brings it) is checked twice: here by reading, and in a real interpreter by looking at what got loaded.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED: dict[str, set[str]] = {
    # `plan` and `quantize` are processes without HTTP: they alone reach memory and quant, and only when they run.
    "server.cli": {"server.app", "server.config", "server.demo", "server.errors", "server.memory", "quant"},
    "server.app": {
        "server.api",
        "server.config",
        "server.engine.client",
        "server.engine.planner",
        "server.errors",
        "server.memory.allocator",
        "server.metrics",
        "server.records",
        "server.sentences",
        "server.text",
    },
    "server.api": {
        "server.config",
        "server.engine.client",
        "server.engine.planner",
        "server.engine.room",
        "server.engine.stream",
        "server.engine.supervisor",
        "server.errors",
        "server.memory.allocator",
        "server.memory.machine",
        "server.metrics",
        "server.records",
        "server.sampling_ranges",
        "server.sentences",
        "server.text",
    },
    "server.config": {
        "server.cpus",
        "server.demo",
        "server.errors",
        "server.records",
        "server.sentences",
        "server.yaml_file",
    },
    "server.cpus": {"server.cgroups"},
    "server.cgroups": set(),
    "server.sampling_ranges": set(),
    "server.sentences": set(),
    "server.yaml_file": {"server.errors", "server.sentences"},
    "server.engine.supervisor": {
        "server.engine.client",
        "server.engine.room",
        "server.errors",
        "server.metrics",
        "server.records",
    },
    "server.engine.client": {
        "server.engine.room",
        "server.engine.stream",
        "server.errors",
        "server.metrics",
        "server.records",
    },
    "server.engine.room": {"server.memory.machine", "server.records"},
    "server.engine.stream": {"server.errors", "server.metrics", "server.records"},
    "server.metrics": {"server.errors", "server.records"},
    "server.text": {"server.errors", "server.sentences"},
    "server.engine.process": {
        "server.engine.loop",
        "server.engine.scheduler",
        "server.engine.blocks",
        "server.memory",
        "server.memory.allocator",
        "server.memory.machine",
        "server.model",
        "server.errors",
        "server.records",
        "quant",
    },
    "server.engine.plan_process": {"server.engine.process", "server.memory", "server.model", "server.records"},
    "server.engine.planner": {"server.errors", "server.records"},
    "server.engine.loop": {
        "server.engine.scheduler",
        "server.engine.blocks",
        "server.model.batch",
        "server.errors",
        "server.records",
    },
    "server.engine.scheduler": {
        "server.engine.blocks",
        "server.engine.lookup",
        "server.engine.prefix",
        "server.engine.sequence",
        "server.errors",
        "server.model.batch",
        "server.model.history",
        "server.records",
    },
    "server.engine.sequence": {
        "server.engine.lookup",
        "server.model.batch",
        "server.model.history",
        "server.records",
    },
    "server.engine.lookup": set(),
    "server.engine.prefix": set(),
    "server.engine.blocks": {"server.errors", "server.records"},
    "server.model": {
        "server.errors",
        "server.memory",
        "server.memory.machine",
        "server.model.batch",
        "server.model.history",
        "server.records",
        "server.sampling_ranges",
        "server.sentences",
        "quant",
    },
    "server.model.batch": {"server.model.history", "server.records"},
    "server.model.history": {"server.records"},
    "server.memory": {"server.errors", "server.memory.allocator", "server.memory.machine", "server.records", "quant"},
    "server.memory.allocator": set(),
    "server.memory.machine": {"server.cgroups"},
    "server.demo": set(),
    "server.records": set(),
    "server.errors": {"server.records"},
    "server.engine": set(),
    "server": set(),
    "quant": set(),
}

NO_TORCH = [
    "server.app",
    "server.api",
    "server.cli",
    "server.config",
    "server.engine.client",
    "server.engine.planner",
    "server.memory.allocator",
    "server.memory.machine",
    "server.metrics",
    "server.text",
]
HEAVY = {"torch", "transformers", "quant", "accelerate"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in ("quant", "server"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def room(module: str) -> str:
    """The longest name in ALLOWED that holds this module; only a package's own __init__ may be the package's room."""
    return max((name for name in ALLOWED if module == name or module.startswith(name + ".")), key=len)


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if not top_level_only else _outside_functions(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _outside_functions(tree: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [child, *_outside_functions(child)]
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(module: str, path: Path) -> None:
    here = room(module)
    for name in imports(path):
        if name.partition(".")[0] not in ("quant", "server"):
            continue
        there = room(name)
        if there in (here, "server") or there in ALLOWED[here]:
            continue
        pytest.fail(f"{module} imports {name}: {here} may only import {sorted(ALLOWED[here])}")


def test_every_module_has_a_room_and_every_room_a_module() -> None:
    homeless = [m for m, path in modules() if room(m) in ("server", "server.engine") and path.name != "__init__.py"]
    assert homeless == []
    rooms = {room(module) for module, _ in modules()}
    assert rooms == set(ALLOWED)


def test_relative_imports_are_not_used() -> None:
    for module, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module} has a relative import"


@pytest.mark.parametrize("name", NO_TORCH)
def test_the_http_process_loads_no_torch(name: str) -> None:
    code = f"import sys, {name}; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "[]"


def test_csrc_never_hears_of_torch() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".txt"):
            text = path.read_text().lower()
            assert "#include <torch" not in text, path
            assert "python.h" not in text, path
            assert "find_package(torch" not in text, path
