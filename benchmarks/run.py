"""Measures the dense interaction against its alternatives, and writes the results as JSON.

python benchmarks/run.py --suite quick --output benchmarks/results/today.json
python benchmarks/harness/report.py benchmarks/results/today.json
python benchmarks/run.py --guard main                # whether this working tree is slower, in all families
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import base, environment, guard, measure, passes, peers, results, summary, tables
from benchmarks.suites import guard as guarded
from benchmarks.suites import shapes
from mi_kernels.cli import without_traceback

DTYPES = ("float64", "float32", "bfloat16", "float16")
# What --guard takes: its cases, dtypes and limits are its own.
OF_GUARD = {"guard", "threads", "rounds", "shortest", "threshold", "page"}
OF_GUARD_ALONE = {"threshold", "page"}
SWEEP_RIVALS = ["einsum", "materialised", "x-first", "z-first"]


def _list_of(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}, got {name!r}")
        return names

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mi_kernels bench",
        description="Measure the dense interaction against its alternatives.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--suite", choices=shapes.SUITES, default="full")
    what.add_argument("--shape", nargs="+", metavar="NAME", help="these shapes, instead of a suite")
    what.add_argument("--dtype", type=_list_of(DTYPES), default=["float32", "bfloat16"], metavar="D,D")
    what.add_argument(
        "--pass", dest="passes", type=_list_of(passes.PASSES), default=list(passes.PASSES), metavar="P,P",
        help=f"some of {', '.join(passes.PASSES)} (all)",
    )  # fmt: skip
    what.add_argument(
        "--rivals", nargs="*", metavar="NAME",
        help=f"some of {', '.join(peers.PEERS)} (all); compile:NAME is one under torch.compile",
    )  # fmt: skip
    what.add_argument("--compile", action="store_true", help="add torch.compile of each rival")
    what.add_argument("--overhead", action="store_true", help="the cost of a call at tiny sizes, only")
    what.add_argument("--sweep", action="store_true", help="cost as each of B, Z, X, O grows, only")
    what.add_argument("--base", metavar="REV", help="this working tree against another revision, only")
    what.add_argument(
        "--guard", nargs="?", const="", metavar="REV",
        help="a few cases of each family against a revision (where this one left main), only: 1 if slower, 2"
        " if that cannot be said",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--threads", type=int, default=None, help="of PyTorch (its own default)")
    how.add_argument("--rounds", type=int, default=7, help="samples of each candidate (7)")
    how.add_argument("--shortest", type=float, default=5.0, help="milliseconds of a sample, at least (5)")
    how.add_argument("--longest", type=float, default=10.0, help="seconds for one candidate's samples (10)")
    how.add_argument("--call-limit", type=float, default=60.0, help="seconds of a call, else skipped (60)")
    how.add_argument("--memory-limit", type=float, default=6.0, help="GiB of temporaries, else skipped (6)")
    how.add_argument("--seed", type=int, default=0, help="of the operands and of the order of candidates")
    how.add_argument("--threshold", type=float, default=guard.THRESHOLD, help="of --guard (%(default)s)")
    parser.add_argument("--page", type=Path, default=Path("build/guard.md"), help="of --guard (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON (benchmarks/results/DATE.json)")
    return parser


def _check_used(parser: argparse.ArgumentParser, argv: list[str] | None, options: argparse.Namespace) -> None:
    """Options that are given and would have no effect are errors."""
    unset = object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(options), unset)))
    names = {name for name, value in vars(given).items() if value is not unset}
    unused = names & OF_GUARD_ALONE if options.guard is None else names - OF_GUARD
    shown = ", ".join(
        sorted("--pass" if name == "passes" else f"--{name.replace('_', '-')}" for name in unused)
    )
    if unused and options.guard is None:
        parser.error(f"{shown}: expected with --guard only")
    if unused:
        parser.error(f"--guard has cases and limits of its own: it does not take {shown}")


def _checked(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    chosen = options.overhead, options.sweep, options.base is not None, options.guard is not None
    if sum(chosen) > 1:
        parser.error("--overhead, --sweep, --base and --guard exclude each other")
    _check_used(parser, argv, options)
    if not 0 < options.threshold < 1:
        parser.error(f"--threshold: expected a share between 0 and 1, got {options.threshold}")
    if options.rivals is None:
        options.rivals = SWEEP_RIVALS if options.sweep else list(peers.PEERS)
    try:
        for name in options.rivals:
            peers.find(name)
        options.entries = shapes.by_name(options.shape) if options.shape else shapes.SUITES[options.suite]
    except ValueError as error:
        parser.error(str(error))
    if options.compile:
        options.rivals += [peers.COMPILED + name for name in options.rivals if name in peers.PEERS]
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    options.output = options.output or results.FOLDER / f"{stamp}.json"
    options.limits = measure.Limits(
        options.rounds, options.shortest / 1e3, options.longest, options.call_limit,
        int(options.memory_limit * 2**30), options.seed,
    )  # fmt: skip
    return options


def _cases(options: argparse.Namespace) -> list[tuple[shapes.Entry, torch.dtype, str]]:
    return [
        (entry, getattr(torch, dtype), work)
        for entry in options.entries
        for dtype in options.dtype
        for work in options.passes
    ]


def _progress(steps: list, describe: Callable[[Any], str]) -> Iterator[tuple[Any, Callable[[str], None]]]:
    """(step, print) for each step: with a bar if rich is installed, else with numbered lines."""
    if find_spec("rich") is not None and sys.stdout.isatty():
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            task = bar.add_task("", total=len(steps))
            for step in steps:
                bar.update(task, description=describe(step))
                yield (
                    step,
                    lambda text: bar.console.print(text, markup=False, highlight=False, soft_wrap=True),
                )
                bar.advance(task)
        return
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {describe(step)}", flush=True)
        yield step, lambda text: print(text, flush=True)


def _describe(step: tuple) -> str:
    entry, dtype, work = step[-3:]
    return f"{entry.shape.name} {str(dtype).removeprefix('torch.')} {work}"


def _measure(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fills in the cases of a suite or of a sweep, saving after each, so that a long run can be cut short."""
    if options.sweep:
        steps = [
            (letter, entry, getattr(torch, dtype), work)
            for letter, entry in shapes.sweep(64 if options.suite == "smoke" else 1)
            for dtype in options.dtype
            for work in options.passes
        ]
    else:
        steps = [(None, *case) for case in _cases(options)]
    dtypes = [getattr(torch, dtype) for dtype in options.dtype]
    result["ceilings"] = environment.ceilings(dtypes, 128 if options.suite == "smoke" else 2048)
    for (letter, *case), say in _progress(steps, _describe):
        found = measure.measure(*case, options.rivals, options.limits)
        if letter is not None:
            found["sweep"] = letter
        result["cases"].append(found)
        B, Z, X, O = measure.sizes_of(case[0])  # noqa: E741
        say(f"\n{_describe(case)}: B={B} Z={Z} X={X} O={O}")
        say(tables.text_table(tables.CASE_COLUMNS, tables.case_rows(found)))
        say(tables.not_measured(found))
        starved = summary.starved(found, result["machine"]["threads"])
        if starved:
            say(f"warning: less than 90 % of {result['machine']['threads']} cores for {', '.join(starved)}")
        results.write(options.output, result)
    if not options.sweep:
        _overhead(options, result)


def _overhead(options: argparse.Namespace, result: dict[str, Any]) -> None:
    for entry in shapes.OVERHEAD:
        result["overhead"] += measure.overhead(entry, options.limits)
    print(tables.text_table(tables.OVERHEAD_COLUMNS, tables.overhead_rows(result["overhead"])))


def _base(options: argparse.Namespace, result: dict[str, Any]) -> None:
    print("running the tests of the operation", flush=True)
    base.check_tests()
    print(f"building {options.base}", flush=True)
    with base.built(options.base) as (folder, revision):
        result["base"] = {"revision": revision, "cases": []}
        cases = _cases(options)
        compared = base.compare(folder, cases, options.limits)
        for _, say in _progress(cases, _describe):
            found = next(compared)
            result["base"]["cases"].append(found)
            say(f"  base / this: {found['base_over_head']:.3f}")
        compared.close()
    print(tables.text_table(tables.BASE_COLUMNS, tables.base_rows(result["base"])))


def _guard(options: argparse.Namespace) -> int:
    """Writes the page; 1 if some case is slower, 2 if that cannot be said."""
    options.page.unlink(missing_ok=True)  # of an earlier run: there may be none of this one
    revision = options.guard or base.default_revision()
    facts = environment.facts(["make guard"])
    dtype = getattr(torch, guarded.DTYPE)
    names = (*shapes.by_name(list(guarded.DENSE)), *guarded.CASES)
    steps = [(name, dtype, work) for name in names for work in guarded.PASSES]
    print(f"building {revision}", flush=True)
    with base.built(revision) as (folder, full):

        def measured(cases: Sequence[tuple]) -> Iterator[dict[str, Any]]:
            done = 0
            try:
                for found in base.compare(folder, cases, options.limits):
                    said = found.get("why") or f"base / this: {found['base_over_head']:.3f}"
                    print(f"  {found['shape']} {found['pass']}: {said}", flush=True)
                    done += 1
                    yield found
            except (
                base.ComparisonError
            ) as error:  # a process has ended, and with it the measurement of the rest
                print(error, file=sys.stderr)
                for _ in cases[done:]:
                    yield {"failed": "either", "why": str(error)}

        verdicts = guard.judge(steps, measured, options.threshold)
    text = guard.page(verdicts, full, facts, options.threshold)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(text)
    print(f"\n{text}\n{options.page}")
    return guard.status(verdicts)


def main(argv: list[str] | None = None) -> int:
    options = _checked(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.guard is not None:
        try:
            return _guard(options)
        except base.ComparisonError as error:
            print(error, file=sys.stderr)
            return 2
    command = ["benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)]
    settings = vars(options.limits) | {"suite": options.suite, "rivals": options.rivals}
    result = {"schema": 1, **environment.facts(command), "settings": settings}
    result |= {"ceilings": None, "cases": [], "overhead": [], "base": None, "figures": []}
    load = result["machine"]["load_average"][0]
    if load > 0.5:
        print(
            f"warning: other programs are running (load {load:.1f}), times are not to be trusted", flush=True
        )
    begin = time.perf_counter()
    try:
        (_overhead if options.overhead else _base if options.base else _measure)(options, result)
    except base.ComparisonError as error:
        print(error, file=sys.stderr)
        return 1
    if not options.sweep:
        result["figures"] = summary.figures(result["cases"], result["overhead"])
    result["duration_s"] = time.perf_counter() - begin
    results.write(options.output, result)
    if result["figures"]:
        print("\n" + tables.text_table(tables.FIGURE_COLUMNS, tables.figure_rows(result["figures"])))
    print(f"\n{options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(without_traceback("mi-kernels bench", main))
