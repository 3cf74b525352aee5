"""How many instructions a warp issues in one turn of each CUDA matmul's main loop, counted in the machine code.

The one figure of a kernel's speed that needs no GPU: a multiprocessor issues four a clock, so a loop that decodes W
weights a warp in n instructions decodes at most 4 W / n a clock. Nothing here says how long memory is waited for.

    python -m benchmarks.cuda_instructions [--architectures 80 90a] [--disassembler nvdisasm]

needs nvcc and nvdisasm, which CUDA's toolkit brings, and prints a Markdown table. What is counted is the way through
the loop on which most is copied, loaded and multiplied, double quantization's loads among it, and otherwise the
shortest: rows that are copied byte by byte and the end of a slice are left out. Kernels for Hopper have a loop
for those who multiply, a stage a turn, and one for those who copy, two stages a turn.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

SOURCES: Final = (
    "linear4_mma.cu",
    "linear4_experts_mma.cu",
    "linear4_hopper.cu",
    "linear8_mma.cu",
    "linear8_weights.cu",
)
CSRC: Final = Path(__file__).parents[1] / "csrc"
PRODUCTS: Final = ("HMMA", "IMMA", "HGMMA")
COPIES: Final = ("LDGSTS", "UBLKCP")
WANTED: Final = (*PRODUCTS, *COPIES, "LDG.E.U8")
LEFT_OUT: Final = ("STS.U8",)
"""Stores of single bytes: copies of rows that no wide one can be made of."""
_SECTION: Final = re.compile(r"\.text\.(\S+):")
_LABEL: Final = re.compile(r"(\.L_\w+):")
_INSTRUCTION: Final = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH: Final = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_PREDICATE: Final = re.compile(r"^@!?U?P\w+\s+")


@dataclass
class Code:
    """A kernel's instructions, and where its labels are among them."""

    name: str
    instructions: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def target(self, at: int) -> int | None:
        """Where a branch goes; None for what is none."""
        found = _BRANCH.search(self.instructions[at])
        return None if found is None else self.labels.get(found.group(1))

    def may_go_on(self, at: int) -> bool:
        """Whether the next instruction may follow this one."""
        text = self.instructions[at]
        always_leaves = operation(text).startswith(("BRA", "EXIT", "RET"))
        return not always_leaves or text.startswith("@") or re.search(r"BRA(\.\S+)?\s+!?U?P", text) is not None


def operation(instruction: str) -> str:
    return _PREDICATE.sub("", instruction).split()[0]


def codes(listing: str) -> Iterator[Code]:
    """The functions of what `nvdisasm -c` writes."""
    code: Code | None = None
    for line in listing.splitlines():
        if (section := _SECTION.match(line)) is not None:
            if code is not None:
                yield code
            code = Code(section.group(1))
        elif code is not None and (label := _LABEL.match(line)) is not None:
            code.labels[label.group(1)] = len(code.instructions)
        elif code is not None and (found := _INSTRUCTION.match(line)) is not None:
            code.instructions.append(found.group(1))
    if code is not None:
        yield code


def loops(code: Code) -> list[tuple[int, int]]:
    """The loop with most products, the shortest of those; and where products stand apart from copies, theirs."""
    ends = [(code.target(last), last) for last in range(len(code.instructions))]
    found = [(first, last) for first, last in ends if first is not None and first < last]
    # Not waits that are tried again: they jump back from behind the loop, and no way through it leads to them.
    found = [loop for loop in found if len(turn(code, *loop)) > 1]

    def count(loop: tuple[int, int], names: tuple[str, ...]) -> int:
        return sum(operation(text).startswith(names) for text in code.instructions[loop[0] : loop[1] + 1])

    chosen = []
    for names, others in ((PRODUCTS, ()), (COPIES, PRODUCTS)):
        having = [loop for loop in found if count(loop, names) and not count(loop, others)]
        if having and not (chosen and count(chosen[0], COPIES)):
            chosen.append(max(having, key=lambda loop: (count(loop, names), loop[0] - loop[1])))
    return chosen


def turn(code: Code, first: int, last: int) -> list[str]:
    """The instructions of one turn of a loop: those of the way that has most of what is wanted, then the fewest."""
    best = {first: (0, 0)}
    before: dict[int, int] = {}
    for at in range(first, last):
        if at not in best or operation(code.instructions[at]).startswith(LEFT_OUT):
            continue
        wanted, cost = best[at]
        value = (wanted + operation(code.instructions[at]).startswith(WANTED), cost - 1)
        target = code.target(at)
        following = [target] if target is not None and at < target <= last else []
        following += [at + 1] if code.may_go_on(at) else []
        for place in following:
            if place not in best or value > best[place]:
                best[place], before[place] = value, at
    way = [last]
    while way[-1] in before:
        way.append(before[way[-1]])
    return [code.instructions[at] for at in reversed(way)]


def row(architecture: str, name: str, way: list[str]) -> str:
    kinds = Counter(operation(text).split(".")[0] for text in way)
    counts = (len(way), sum(kinds[name] for name in PRODUCTS), kinds["LDS"], kinds["LDG"], kinds["LDGSTS"])
    return f"| {name} | {architecture} | {' | '.join(map(str, counts))} |"


def compiled(source: str, architecture: str, directory: Path) -> Path:
    cubin = directory / f"{source}.{architecture}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
    subprocess.run([*command, "-o", str(cubin), str(CSRC / "cuda" / source)], check=True)
    return cubin


def readable(name: str) -> str:
    """A kernel's name without its parameters; as it is mangled where there is no c++filt."""
    filt = shutil.which("c++filt")
    if filt is None:
        return name
    full = subprocess.run([filt, name], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|hb::|void |\(\w+\)(?=\d)|_nv_|__", "", full).split("(")[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["80", "90a"])
    parser.add_argument("--disassembler", default="nvdisasm")
    options = parser.parse_args(arguments)
    for tool in ("nvcc", options.disassembler):
        if shutil.which(tool) is None:
            print(f"needs {tool}, which is not on PATH; CUDA's toolkit brings it", file=sys.stderr)
            return 1
    print("| kernel | architecture | instructions | products | from shared memory | loads | copies |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as directory:
        for source in SOURCES:
            for architecture in options.architectures:
                cubin = compiled(source, architecture, Path(directory))
                command = [options.disassembler, "-c", str(cubin)]
                listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                for code in codes(listing):
                    for number, (first, last) in enumerate(loops(code)):
                        name = readable(code.name) + (", who copy" if number else "")
                        print(row(architecture, name, turn(code, first, last)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
