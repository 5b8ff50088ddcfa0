"""Machine code of compiled kernels: resource usage, and a scan for a hazard on Hopper.

    python tools/sass.py FILE...                  cubins, libraries with GPU code, or disassembled text

wgmma is asynchronous. If its A operand is in registers, they must not be written before a wait for its
group; Triton before 3.9 does write them (triton issue 9433), and the result is silently wrong. In each loop
with such instructions this reports writes to registers of a group that has not been waited for. A heuristic:
the body is scanned linearly, three times, and the destination of an instruction is its first register, unless
it is a store.

Exit status: 0 no hazard, 1 a hazard, 2 a file could not be read.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_BRANCH = re.compile(r"BRA\S*\s+(?:!?U?P\d+,\s*)?(?:`\()?0x([0-9a-f]+)")
_FROM_REGISTERS = re.compile(r"HGMMA\S*\s+R(\d+), R(\d+), gdesc")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")
_PREDICATE = re.compile(r"^@!?U?P\d+\s+")
_WRITE = re.compile(r"(\S+)\s+R(\d+)\b")
_NO_DESTINATION = re.compile(r"(ST|RED|BAR|BRA|SYNCS|R2UR|UTMA|ATOM|ISETP|FSETP)")
_OPERAND_REGISTERS = 4  # registers of the A operand of one wgmma

Instruction = tuple[int, str]  # address, text


class Loop(NamedTuple):
    """A loop with wgmma whose A operand is in registers, and writes to registers still being read."""

    start: int
    end: int
    hazards: list[Instruction]


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes of local memory and stack per thread
    shared: int  # bytes known at compile time


def disassembler(name: str) -> str | None:
    """``cuobjdump`` or ``nvdisasm``, on PATH or inside the package triton; None if it is missing."""
    found = shutil.which(name)
    spec = find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(inside) if inside.exists() else None


def _output(name: str, *arguments: str) -> str | None:
    tool = disassembler(name)
    if tool is None:
        return None
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def text_of(path: Path, architecture: str | None = None) -> str:
    """The instructions in a file, as text; in one for several architectures, of one of them (``"sm_80"``).

    Raises OSError where the file cannot be read or no disassembler is found that understands it.
    """
    if path.read_bytes()[:4] != b"\x7fELF":
        return path.read_text(errors="replace")
    only = [] if architecture is None else ["-arch", architecture]
    for name, arguments in (("cuobjdump", ["-sass", *only]), ("nvdisasm", [])):
        text = _output(name, *arguments, str(path))
        if text is not None and "/*0000*/" in text:
            return text
    raise OSError(f"{path}: no disassembler could read it")


def resources_of(path: Path) -> Resources:
    """Resource usage of a cubin with a single kernel. Raises OSError without cuobjdump."""
    text = _output("cuobjdump", "-res-usage", str(path))
    fields = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text or ""))
    if not fields:
        raise OSError(f"{path}: cuobjdump could not read it")
    local = int(fields["STACK"]) + int(fields["LOCAL"])
    return Resources(int(fields["REG"]), local, int(fields["SHARED"]))


def loops(text: str) -> Iterator[Loop]:
    """All loops with wgmma from registers in disassembled text."""
    for code in _functions(text):
        for end, instruction in code:
            jump = _BRANCH.search(instruction)
            if jump is None or int(jump.group(1), 16) >= end:
                continue
            start = int(jump.group(1), 16)
            body = [line for line in code if start <= line[0] <= end]
            if any(_FROM_REGISTERS.search(line) for _, line in body):
                yield Loop(start, end, _hazards(body))


def _functions(text: str) -> Iterator[list[Instruction]]:
    """Split by function, in each of which addresses restart."""
    current: list[Instruction] = []
    for found in _INSTRUCTION.finditer(text):
        address = int(found.group(1), 16)
        if current and address <= current[-1][0]:
            yield current
            current = []
        current.append((address, found.group(2).strip()))
    if current:
        yield current


def _width(opcode: str) -> int:
    """The number of registers that an instruction writes."""
    if re.search(r"\.4$|\.128", opcode):
        return 4
    return 2 if ".64" in opcode or ".WIDE" in opcode else 1


def _hazards(body: list[Instruction]) -> list[Instruction]:
    issued: list[int] = []  # first operand registers of the open group
    groups: list[list[int]] = []  # those of groups in flight, the oldest first
    found = set()
    for _ in range(3):
        for address, line in body:
            line = _PREDICATE.sub("", line)
            product, wait, write = _FROM_REGISTERS.match(line), _WAIT.match(line), _WRITE.match(line)
            if product:
                issued.append(int(product.group(2)))
                if "gsb0" in line:
                    groups.append(issued)
                    issued = []
            elif wait:
                left = int(wait.group(1))
                groups = groups[-left:] if left else []
            elif write and not _NO_DESTINATION.match(write.group(1)):
                first = int(write.group(2))
                busy = {
                    r + k for group in (*groups, issued) for r in group for k in range(_OPERAND_REGISTERS)
                }
                if busy & set(range(first, first + _width(write.group(1)))):
                    found.add((address, line[:60]))
    return sorted(found)


def main(paths: Iterable[str]) -> int:
    status = 0
    for name in paths:
        try:
            found = list(loops(text_of(Path(name))))
        except OSError as error:
            print(error)
            status = 2
            continue
        for loop in found:
            if loop.hazards:
                status = max(status, 1)
                where = f"{name}: loop {loop.start:#x}-{loop.end:#x}"
                print(f"{where}: {len(loop.hazards)} writes to registers that a wgmma may still read")
                for address, line in loop.hazards[:4]:
                    print(f"    {address:#x}  {line}")
        print(f"{name}: {len(found)} loops with wgmma from registers")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if len(sys.argv) > 1 else (print(__doc__) or 2))
