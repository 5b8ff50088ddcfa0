"""First calls, changes of the number of threads, two processes on one machine, shares of threads by counts.

    python benchmarks/suites/processes.py --output benchmarks/results/processes.json
    python benchmarks/suites/processes.py --part scaling      # of every shape of shapes.py; no clock

imports   seconds of `import torch` and, after it, of `import mi_kernels` and of what torch.compile imports
first     in a process of its own on one thread, the first call of each form by its steady time; the same for
          PyTorch's form (CPU time; without sympy, which PyTorch imports at any first backward pass)
switch    a call right after torch.set_num_threads, by a steady call on as many threads
pairs     calls of two processes together, by those of one alone: 2 is a machine of their own for each
regions   parallel regions of a call on two threads, each of which waits for its last thread; no clock
scaling   how far N threads could share a call, from the tasks of the planner (harness/scaling.py)

Each figure of a rival is of the same minute, in processes that take turns. On a machine that others load only
ratios of the least times mean something, and those of `pairs` the least: the load stands in the output.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.harness import environment, results, scaling, tables
from benchmarks.harness import process as child
from benchmarks.suites import shapes
from mi_kernels.tune import positive

SIZES = (64, 64)  # rows and features of a first call
# Form, rows, features and backward of what is called for longer: tasks of many sizes. Results have less than
# 4 MiB: of larger ones the allocator may give back the memory, and page faults would be what is measured.
LONG = (
    ("interaction", 512, 64, True),
    ("interaction", 64, 64, True),
    ("diagonal", 2048, 256, True),
    ("modulate", 1024, 512, False),
    ("glu", 512, 512, True),
    ("norm_modulate", 1024, 512, True),
)
SIDES = {"ours": True, "rival": False}


class Process:
    """A child that answers requests; between them it sleeps."""

    def __init__(self, **environ: str) -> None:
        command = [sys.executable, str(Path(child.__file__))]
        # Bytecode is kept as in an installed package: compilation of sources is no part of an import.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        own |= {"PYTHONPATH": str(environment.ROOT)} | environ
        own.pop("OMP_NUM_THREADS", None)
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own, cwd=environment.ROOT
        )

    def send(self, do: str, **request: Any) -> None:
        print(json.dumps({"do": do, **request}), file=self.child.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"a measured process ended with status {self.child.wait()}")
        return json.loads(line)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        self.send(do, **request)
        return self.answer()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.child.stdin.close()
        self.child.wait()


def started(stack: ExitStack, ours: bool, **environ: str) -> Process:
    process = stack.enter_context(Process(**environ))
    for name in ("torch", "mi_kernels") if ours else ("torch",):
        process.ask("import", module=name)
    return process


def imports(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for after, module in ((None, "torch"), ("torch", "mi_kernels"), ("torch", "torch._dynamo")):
        samples = []
        for number in range(options.rounds + 1):
            with Process() as process:
                if after is not None:
                    process.ask("import", module=after)
                found = process.ask("import", module=module)
            if number:  # the first wrote bytecode, and read files that the next find in memory
                samples.append(found)
        yield {"module": module} | {name: _least(samples, name) for name in ("seconds", "cpu")}


def _least(samples: list[dict[str, Any]], name: str) -> float:
    return min(one[name] for one in samples)


def first(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The least first call of several processes and the least of their later calls, forward and then both."""
    rows, features = SIZES
    for form in options.form:
        for dtype in options.dtype:
            found: dict[str, list[list[dict[str, float]]]] = {side: [] for side in SIDES}
            for _, side in product(range(options.rounds), SIDES):
                found[side].append(_first(form, SIDES[side], rows, features, dtype))
            for index, work in enumerate(("forward", "forward+backward")):
                times = {
                    f"{side}_{name}": _least([one[index] for one in found[side]], name)
                    for side in SIDES
                    for name in ("first", "steady")
                }
                ratios = {f"{side}_ratio": times[f"{side}_first"] / times[f"{side}_steady"] for side in SIDES}
                yield {"form": form, "dtype": dtype, "pass": work} | times | ratios


def _first(form: str, ours: bool, rows: int, features: int, dtype: str) -> list[dict[str, float]]:
    with ExitStack() as stack:
        process = started(stack, ours)
        _prepare(process, ours, (form, rows, features, False), dtype, 1)
        passes = []
        for backward in (False, True):
            (begin,) = process.ask("call", backward=backward, count=1)["seconds"]
            later = process.ask("call", backward=backward, count=50)["seconds"]
            passes.append({"first": begin, "steady": min(later)})
        return passes


Case = tuple[str, int, int, bool]  # form, rows, features, backward


def _prepare(process: Process, ours: bool, case: Case, dtype: str, threads: int) -> None:
    form, rows, features, _ = case
    process.ask("prepare", form=form, ours=ours, rows=rows, features=features, dtype=dtype, threads=threads)


def _described(case: Case, dtype: str) -> dict[str, Any]:
    return dict(zip(("form", "rows", "features", "backward"), case, strict=True)) | {"dtype": dtype}


def switch(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Medians of a call right after a change of threads, by the median of later ones."""
    few, many = 1, options.threads
    with ExitStack() as stack:
        sides = {side: started(stack, ours) for side, ours in SIDES.items()}
        for case, dtype in product(_long(options), options.dtype):
            backward = case[-1]
            for side, process in sides.items():
                _prepare(process, SIDES[side], case, dtype, many)
                process.ask("call", backward=backward, count=3)
            samples: dict[tuple[str, int], list[dict[str, Any]]] = {}
            for _, (side, process), threads in product(range(options.changes), sides.items(), (few, many)):
                found = process.ask("switch", backward=backward, threads=threads, count=6)
                samples.setdefault((side, threads), []).append(found)
            for threads in (few, many):
                columns = {}
                for side in SIDES:
                    columns |= _after_a_change(side, samples[side, threads])
                yield _described(case, dtype) | {"to": threads} | columns


def _after_a_change(side: str, samples: list[dict[str, Any]]) -> dict[str, float]:
    steady = statistics.median(min(one["seconds"][1:]) for one in samples)
    return {
        f"{side}_steady": steady,
        f"{side}_after": statistics.median(one["seconds"][0] for one in samples) / steady,
        f"{side}_change": statistics.median(one["change"] for one in samples),
    }


def pairs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Calls a second of two processes together by those of one alone, the best of several rounds each."""
    with ExitStack() as stack:
        two = {side: [started(stack, ours) for _ in range(2)] for side, ours in SIDES.items()}
        for case, dtype, threads in product(
            _long(options), options.dtype, dict.fromkeys((1, options.threads))
        ):
            for side, process in ((name, one) for name in SIDES for one in two[name]):
                _prepare(process, SIDES[side], case, dtype, threads)
                process.ask("call", backward=case[-1], count=3)
            best = {f"{side}_{who}": 0.0 for side in SIDES for who in ("alone", "together")}
            for _, side, who in product(range(options.rounds), SIDES, ("alone", "together")):
                rate = _rate(two[side][: 1 + (who == "together")], case[-1], options.seconds)
                best[f"{side}_{who}"] = max(best[f"{side}_{who}"], rate)
            ratios = {side: best[f"{side}_together"] / best[f"{side}_alone"] for side in SIDES}
            yield _described(case, dtype) | {"threads": threads} | best | ratios


def _rate(processes: list[Process], backward: bool, seconds: float) -> float:
    """Calls a second of all together."""
    for process in processes:
        process.send("run", backward=backward, seconds=seconds)
    answers = [process.answer() for process in processes]
    return sum(one["calls"] / one["seconds"] for one in answers)


def regions(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    library = libgomp()
    if library is None:
        raise scaling.CompilationError("regions: this torch has no OpenMP library of GNU")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        counter = Path(folder) / "regions.so"
        source = Path(child.__file__).with_name("regions.cpp")
        scaling.compiled("-shared", "-fPIC", source, "-ldl", output=counter)
        environ = {"LD_PRELOAD": str(counter), "MI_LIBGOMP": str(library)}
        sides = {side: started(stack, ours, **environ) for side, ours in SIDES.items()}
        cases = [(form, *SIZES, True) for form in options.form] + list(_long(options))
        for case, dtype in product(dict.fromkeys(cases), options.dtype):
            found: dict[str, int] = {}
            for side, process in sides.items():
                _prepare(process, SIDES[side], case, dtype, options.threads)
                for work, backward in (("forward", False), ("both", True)):
                    found[f"{side}_{work}"] = process.ask("regions", backward=backward)["regions"]
            yield _described(case, dtype) | found


def libgomp() -> Path | None:
    """The OpenMP library that comes with PyTorch."""
    folder = Path(torch.__file__).parent
    return next(
        (path for name in ("lib", "../torch.libs") for path in (folder / name).glob("libgomp*")), None
    )


def _long(options: argparse.Namespace) -> Iterator[Case]:
    for form, rows, features, backward in LONG:
        if form in options.form:
            yield form, max(rows // options.divisor, 1), max(features // options.divisor, 1), backward


def scaled(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    entries = shapes.SMOKE if options.divisor > 1 else shapes.FULL
    return scaling.count(entries, [getattr(torch, name) for name in options.dtype])


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


def _import_rows(found: list[dict[str, Any]]) -> list[list[str]]:
    return [[one["module"], f"{one['seconds']:.3f}", f"{one['cpu']:.3f}"] for one in found]


def _first_rows(found: list[dict[str, Any]]) -> list[list[str]]:
    columns = [f"{side}_{name}" for side in SIDES for name in ("first", "steady")]
    return [
        [one["form"], one["dtype"], one["pass"], *(_micro(one[name]) for name in columns)]
        + [f"{one[f'{side}_ratio']:.0f}" for side in SIDES]
        for one in found
    ]


def _cells(one: dict[str, Any]) -> list[str]:
    work = "forward+backward" if one["backward"] else "forward"
    return [one["form"], f"{one['rows']},{one['features']}", one["dtype"], work]


def _switch_rows(found: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [*_cells(one), str(one["to"]), *(_micro(one[f"{side}_steady"]) for side in SIDES)]
        + [f"{one[f'{side}_after']:.2f}" for side in SIDES]
        + [f"{1e6 * one[f'{side}_change']:.1f}" for side in SIDES]
        for one in found
    ]


def _pair_rows(found: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [*_cells(one), str(one["threads"]), *(f"{one[side]:.2f}" for side in SIDES)]
        + [f"{one['ours_together'] / one['rival_together']:.2f}"]
        for one in found
    ]


def _region_rows(found: list[dict[str, Any]]) -> list[list[str]]:
    columns = [f"{side}_{work}" for side in SIDES for work in ("forward", "both")]
    return [[*_cells(one)[:3], *(str(one[name]) for name in columns)] for one in found]


_OF_A_CASE = ["form", "rows,features", "dtype", "pass"]
Rows = Callable[[list[dict[str, Any]]], list[list[str]]]
# What is measured, its columns and its rows.
PARTS: dict[str, tuple[Callable[[argparse.Namespace], Iterator[dict[str, Any]]], list[str], Rows]] = {
    "imports": (imports, ["module", "seconds", "of CPU"], _import_rows),
    "first": (
        first,
        ["form", "dtype", "pass", "ours: first us", "steady", "rival: first", "steady"]
        + ["ours: first / steady", "rival"],
        _first_rows,
    ),
    "switch": (
        switch,
        [*_OF_A_CASE, "threads now", "ours us", "rival", "ours: after / steady", "rival"]
        + ["change, ours us", "rival"],
        _switch_rows,
    ),
    "pairs": (
        pairs,
        [*_OF_A_CASE, "threads of each", "ours: two / one", "rival", "two of ours / of the rival"],
        _pair_rows,
    ),
    "regions": (
        regions,
        [*_OF_A_CASE[:3], "ours: forward", "forward+backward", "rival: forward", "forward+backward"],
        _region_rows,
    ),
    "scaling": (scaled, scaling.COLUMNS, scaling.rows),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--form", nargs="+", choices=tuple(child.FORMS), default=list(child.FORMS))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--threads", type=positive, default=2, help="of each process (2)")
    parser.add_argument("--rounds", type=positive, default=3, help="processes of a kind, or samples (3)")
    parser.add_argument("--changes", type=positive, default=30, help="of the number of threads (30)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a sample of `pairs` (0.3)")
    parser.add_argument("--divisor", type=positive, default=1, help="of sizes, to see that it runs (1)")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args(argv)
    command = ["python", "benchmarks/suites/processes.py", *(sys.argv[1:] if argv is None else argv)]
    result = environment.facts(command)
    for part in options.part:
        measure, columns, rows = PARTS[part]
        result[part] = []
        try:
            for found in measure(options):
                result[part].append(found)
                print(*(cell for row in rows([found]) for cell in row), flush=True)
                if options.output is not None:
                    results.write(options.output, result)
        except scaling.CompilationError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"\n{part}\n" + tables.text_table(columns, rows(result[part]), markdown=True), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
