"""How far threads can share a call, by counts: the tasks into which the planner divides it. No clock is read.

The planner (csrc/cpu/dispatch/plan.h) divides by sizes, dtype and instruction set alone. A free thread takes
the next task, so the time of a call on N threads is at least that of this list scheduling, where a task
takes as long as its operations, empty lanes included. Not counted: packing, partial sums, shared memory.
"""

import heapq
import math
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import ROOT
from benchmarks.harness.measure import Entry, sizes_of
from mi_kernels import libraries

PRIMITIVES = ("forward", "input_grads", "weight_grads")
THREADS = (2, 4, 8, 16, 32, 64)
ENOUGH = 0.8  # efficiency that is not listed
SHARED = 1 << 20  # operations below which a call stays on one thread (workspace.h)
VECTOR_BYTES = {"avx512bf16": 64, "avx512": 64, "avx2": 32, "generic": 16}


@dataclass(frozen=True)
class Division:
    """The tasks of a call."""

    form: str
    tasks: int
    operations: int
    worker_bytes: int
    partial_bytes: int
    factor: int  # operations of a task for each point of its box
    axes: tuple[tuple[int, int, int], ...]  # extent, step of a task, and unit to which its side is padded

    def costs(self) -> list[int]:
        """The operations of each task, in the order in which tasks are taken."""
        sides = [
            [math.ceil(min(step, extent - begin) / unit) * unit for begin in range(0, extent, step)]
            for extent, step, unit in self.axes
        ]
        return [self.factor * math.prod(box) for box in product(*sides)]

    def longest(self, threads: int) -> int:
        """The operations of the thread that ends last."""
        costs = self.costs()
        return sum(costs) if self.operations < SHARED else longest_share(costs, threads)

    def efficiency(self, threads: int) -> float:
        """The operations of all tasks by those that N threads could do until the last one ends."""
        return sum(self.costs()) / (threads * self.longest(threads))

    def limit(self, threads: int) -> str:
        """What keeps the efficiency on so many threads below 1, in a few words."""
        if self.operations < SHARED:
            return "one thread"
        if self.tasks < threads:
            return f"{self.tasks} tasks"
        equal = len(set(self.costs())) == 1
        return f"{self.tasks} {'equal' if equal else 'unequal'} tasks"


def longest_share(costs: Iterable[int], threads: int) -> int:
    """The largest sum of a thread, where a free thread takes the next cost."""
    ends = [0] * threads
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def traits(dtype: torch.dtype, isa: str) -> tuple[int, ...]:
    """Lanes, elements in a word, bytes of a word and of an accumulator (MulTraits in plans.h): of products,
    and of the sums that are more exact."""

    def of(bytes_: int, pair: int = 1) -> tuple[int, ...]:
        return VECTOR_BYTES[isa] // bytes_, pair, bytes_, bytes_

    if dtype == torch.float64:
        return of(8) * 2
    if dtype == torch.bfloat16 and isa == "avx512bf16":
        return of(4, 2) * 2
    return of(4) + of(8 if dtype == torch.float32 else 4)


def selected_isa() -> str:
    found = libraries.cpu_isa()
    return "generic" if found is None else found.get("selected", "generic")


class CompilationError(RuntimeError):
    """Something was not compiled; the message is for the user."""


@cache
def _planner() -> tuple[tempfile.TemporaryDirectory, Path]:
    folder = tempfile.TemporaryDirectory(prefix="mi_kernels_scaling_")
    program = Path(folder.name) / "scaling"
    sources = sorted((ROOT / "csrc/cpu/dispatch").glob("plan*.cpp"))
    compiled("-I", ROOT / "csrc", Path(__file__).with_suffix(".cpp"), *sources, output=program)
    return folder, program


def compiled(*arguments: str | Path, output: Path) -> None:
    """Compiles C++; CompilationError if that fails."""
    try:
        done = subprocess.run(
            ["c++", "-std=c++20", "-O1", *arguments, "-o", output], capture_output=True, text=True
        )
    except OSError as error:
        raise CompilationError(f"no compiler: {error}") from None
    if done.returncode:
        raise CompilationError(f"{output.name} does not compile:\n{done.stderr[-2000:]}")


def divisions(
    calls: Iterable[tuple[str, tuple[int, ...], torch.dtype]], isa: str | None = None
) -> list[Division]:
    """The tasks of calls (primitive, sizes B, Z, X, O, dtype) with W alone, contiguous."""
    lines = [
        " ".join(map(str, (primitive, 1, *sizes, *traits(dtype, isa or selected_isa()))))
        for primitive, sizes, dtype in calls
    ]
    _, program = _planner()
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    return [_division(line) for line in done.stdout.splitlines()]


def _division(line: str) -> Division:
    form, *rest = line.split()
    tasks, operations, worker_bytes, partial_bytes, factor = map(int, rest[:5])
    axes = tuple(tuple(map(int, axis.split(":"))) for axis in rest[5:])
    return Division(form, tasks, operations, worker_bytes, partial_bytes, factor, axes)  # type: ignore[arg-type]


def count(entries: Iterable[Entry], dtypes: Iterable[torch.dtype], isa: str | None = None) -> Iterator[dict]:
    """The shares of each primitive of each shape, and of the three together, as `json` can write them."""
    cases = [(entry, dtype) for entry in entries for dtype in dtypes]
    calls = [(one, tuple(sizes_of(entry)), dtype) for entry, dtype in cases for one in PRIMITIVES]
    found = divisions(calls, isa)
    for number, (entry, dtype) in enumerate(cases):
        parts = found[number * len(PRIMITIVES) : (number + 1) * len(PRIMITIVES)]
        case = {"shape": entry.shape.name, "dtype": str(dtype).removeprefix("torch.")}
        for primitive, one in zip(PRIMITIVES, parts, strict=True):
            yield case | {"pass": primitive, "form": one.form, "tasks": one.tasks} | _by_threads([one])
        tasks = "/".join(str(one.tasks) for one in parts)
        yield case | {"pass": "training", "form": "", "tasks": tasks} | _by_threads(parts)


def _by_threads(parts: list[Division]) -> dict[str, Any]:
    whole = sum(sum(one.costs()) for one in parts)
    efficiency = {
        str(threads): whole / (threads * sum(one.longest(threads) for one in parts)) for threads in THREADS
    }
    limits = {
        str(threads): "; ".join(dict.fromkeys(one.limit(threads) for one in parts))
        for threads in THREADS
        if efficiency[str(threads)] < ENOUGH
    }
    return {"efficiency": efficiency, "limits": limits}


COLUMNS = ["shape", "dtype", "pass", "tasks", *map(str, THREADS), "below 0.8 from"]


def rows(found: Iterable[dict[str, Any]], everything: bool = False) -> list[list[str]]:
    """A table of what falls short, or of everything."""
    table = []
    for one in found:
        short = next(iter(one["limits"].items()), None)
        if short is None and not everything:
            continue
        shares = [f"{share:.2f}" for share in one["efficiency"].values()]
        why = "" if short is None else f"{short[0]}: {short[1]}"
        table.append([one["shape"], one["dtype"], one["pass"], str(one["tasks"]), *shares, why])
    return table
