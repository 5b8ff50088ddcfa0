"""The command: `python -m studies NAME`."""

import argparse
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from mi_kernels.cli import without_traceback
from mi_kernels.testing.isolated import end_with_this_process
from studies.core import runner

DESCRIPTION = (
    "Small studies of what multiplicative interactions are good for; docs/studies.md has their results."
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m studies", description=DESCRIPTION, allow_abbrev=False)
    made.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(runner.STUDIES)}, or all; none: say what they are",
    )
    made.add_argument(
        "--quick", action="store_true", help="a few steps in seconds: the code is tried, figures mean nothing"
    )
    made.add_argument("--seeds", type=int, metavar="N", help="runs of each model (5; 2 with --quick)")
    made.add_argument("--workers", type=int, metavar="N", help="processes of one thread each (one a core)")
    made.add_argument(
        "--output", type=Path, default=Path("build/studies"), help="folder of results (build/studies)"
    )
    made.add_argument(
        "--record", action="store_true", help="also write studies/results, docs/studies.md and its pictures"
    )
    made.add_argument(
        "--render", action="store_true", help="write docs/studies.md from studies/results; train nothing"
    )
    return made


def checked(argv: list[str] | None) -> argparse.Namespace:
    made = parser()
    options = made.parse_args(argv)
    options.names = list(runner.STUDIES) if options.names == ["all"] else list(dict.fromkeys(options.names))
    for name in options.names:
        if name not in runner.STUDIES:
            made.error(f"NAME: expected some of {', '.join(runner.STUDIES)}, or all alone, got {name!r}")
    options.seeds = options.seeds if options.seeds is not None else 2 if options.quick else 5
    options.workers = options.workers if options.workers is not None else _cores()
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            made.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.record and (options.quick or options.seeds < 5):
        made.error("--record: expected at least 5 seeds and no --quick, as the page is of full runs")
    if not options.names and (options.quick or options.record):
        made.error(f"NAME: expected some of {', '.join(runner.STUDIES)}, or all, got none")
    if options.render and options.names:
        made.error("--render: expected no study, as it trains nothing")
    return options


def main(argv: list[str] | None = None) -> int:
    options = checked(argv)
    missing = _missing()
    if missing:
        print(f'python -m studies: needs {", ".join(missing)}: pip install ".[bench]"', file=sys.stderr)
        return 2
    if "sequence" in options.names and find_spec("pydoc_data") is None:
        print("python -m studies sequence: needs pydoc_data, which this Python came without", file=sys.stderr)
        return 2
    from studies.core import report

    if options.render:
        try:
            report.render()
        except FileNotFoundError as error:
            print(f"python -m studies: {error}", file=sys.stderr)
            return 2
        print(f"wrote {report.PAGE.relative_to(report.ROOT)}")
        return 0
    if not options.names:
        for name in runner.STUDIES:
            print(f"{name:12} {runner.find(name).title}")
        print("python -m studies NAME runs one, python -m studies all every one")
        return 0
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"python -m studies: --output: expected a folder, got {options.output} ({error})", file=sys.stderr
        )
        return 2
    end_with_this_process()
    with runner.workers(options.workers) as executor:
        for name in options.names:
            _run(name, executor, options)
    return 0


def _cores() -> int:
    """Of those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _missing() -> list[str]:
    needed = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}
    return [package for module, package in needed.items() if find_spec(module) is None]


def _run(name: str, executor, options: argparse.Namespace) -> None:
    from benchmarks.harness import environment
    from studies.core import report

    study = runner.find(name)
    command = ["python -m studies", name, *(["--quick"] if options.quick else [])]
    command += [] if options.seeds == (2 if options.quick else 5) else [f"--seeds {options.seeds}"]
    facts = environment.facts(command)
    start = time.perf_counter()
    tuning, records = runner.run(study, executor, options.seeds, options.quick)
    result = report.summary(study, tuning, records, time.perf_counter() - start, options.quick, facts)
    paths = report.write(options.output, study, result)
    print(report.section(study, result))
    print(f"{', '.join(str(path) for path in paths)}", flush=True)
    if options.record:
        report.record(study, result)


if __name__ == "__main__":
    sys.exit(without_traceback("python -m studies", main))
