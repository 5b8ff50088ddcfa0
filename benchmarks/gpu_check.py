"""Build, run the tests on the GPU, then the GPU benchmark, in ten minutes: `make gpu-check`.

    python benchmarks/gpu_check.py                               all of it, to benchmarks/results/DEVICE.json
    python benchmarks/gpu_check.py --skip build tests --minutes 3

It uses the Python that runs it, with the packages that are there (torch with CUDA, triton, pytest,
hypothesis, scipy; pytest-xdist, cmake, ninja and pybind11 where they are), and no network. Results are saved
as they come: what is cut off by the time is missing, and the summary says so. Exit status: 0 all tests
passed and everything ran, 1 not, 2 there is no GPU.

The tests are those of tests/ on every backend that runs on this GPU, whatever `auto` may choose there.
Passing them is what an entry in mi_kernels/verified.py means.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import cases, environment, gates, gpu, gpu_figures, measure, run, shapes
from mi_kernels import backends

ROOT = environment.ROOT
PHASES = ("build", "tests", "benchmark")
# Files whose tests take a place, those of the kernels themselves first: time may run out.
TESTS = (
    *("interaction", "modulate", "gates", "activations", "gradients", "linear", "shared", "packed"),
    *("determinism", "autocast", "overflow", "functional_transforms", "compile", "gates_compile", "hyper"),
)
BUILD_SHARE, TEST_SHARE = 0.25, 0.6  # of the time that is left then, at most
OUTCOME = re.compile(
    r"\b(PASSED|FAILED|ERROR|SKIPPED)\b (tests/\S+)|(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED)\b"
)
# Each takes many seconds to compile, so that they run at one shape.
COMPILED = ("compile:einsum", "compile:materialised", "compile:x-first")
RIVALS = ("einsum", "materialised", "x-first", "z-first")


class Budget:
    """Seconds that are left of the whole."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)


def _run(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """(status, output); the status is None where the time ran out."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 15)
        output, _ = process.communicate()
        return None, output


def build(seconds: float) -> dict[str, Any]:
    """Compile the native libraries in place. Triton needs none of it."""
    missing = [name for name in ("cmake", "ninja", "pybind11") if find_spec(name) is None]
    if missing:
        return {"status": f"skipped: {', '.join(missing)} not installed"}
    status, output = _run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, dict(os.environ))
    words = {0: "built", None: "stopped: out of time"}
    return {
        "status": words.get(status, f"failed with status {status}"),
        "end": output[-2000:] if status else "",
    }


def places() -> list[str]:
    """The ids of the tests' places on this GPU (tests/conftest.py), ours first."""
    names = [name for name in ("cuda", "triton", "portable") if backends.why_not(name) is None]
    return [f"{name}-cuda" for name in names]


def test_command(names: list[str], workers: int) -> list[str]:
    files = [f"tests/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no", "--tb=short"]
    command += ["-m", "not slow", "-k", " or ".join(names), "--maxfail=200"]
    if workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    return command + [name for name in files if (ROOT / name).exists()]


def outcomes(output: str) -> dict[str, Any]:
    """What pytest's lines say, as far as it came."""
    found: dict[str, str] = {}
    for match in OUTCOME.finditer(output):
        word, name, other, last = match.groups()
        found[name or other] = word or last
    counts = Counter(found.values())
    failures = sorted(name for name, word in found.items() if word in ("FAILED", "ERROR"))
    return {word.lower(): counts[word] for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")} | {
        "failures": failures
    }


def test(seconds: float) -> dict[str, Any]:
    """The suite on the places of this GPU."""
    missing = [name for name in ("pytest", "hypothesis", "scipy") if find_spec(name) is None]
    if missing:
        return {"status": f"skipped: {', '.join(missing)} not installed", "passed": 0, "failures": []}
    command = test_command(places(), min(os.cpu_count() or 1, 8))
    status, output = _run(command, seconds, os.environ | {"PYTHONPATH": str(ROOT)})
    found = outcomes(output)
    words = {0: "passed", None: "stopped: out of time"}
    end = output[-6000:] if status else ""
    return {
        "status": words.get(status, f"failed with status {status}"),
        "command": command,
        **found,
        "end": end,
    }


def _steps() -> Iterator[tuple[str, shapes.Entry | cases.Case, torch.dtype, str]]:
    """What is measured, the most important first."""
    modulations = {case.name: case for case in gates.modulations()}
    for work in ("forward", "forward+backward"):
        for entry in shapes.GPU_LARGE:
            yield "dense", entry, torch.bfloat16, work
        for case in modulations.values():
            yield "modulate", case, torch.bfloat16, work
    for dtype in (torch.bfloat16, torch.float32):
        for work in ("forward", "forward+backward"):
            for entry in shapes.FULL if dtype == torch.bfloat16 else shapes.SUITES["gpu"]:
                yield "dense", entry, dtype, work


def benchmark(budget: Budget, device: str, result: dict[str, Any], save) -> None:
    """Fills in the cases while there is time, saving after each."""
    clock = gpu.clock_of(device)
    ours = tuple(place.removesuffix("-cuda") for place in places())
    place = measure.Place(device, clock, ours)
    limits = measure.Limits(rounds=5, shortest=0.002, longest=2.0, call=2.0, memory=16 << 30)
    result["ceilings"] = environment.ceilings([torch.bfloat16, torch.float32], 8192, 0.5, device, clock)
    result["unmeasured"] = [f"{kind} {_name(what)} {dtype} {work}" for kind, what, dtype, work in _steps()]
    for kind, what, dtype, work in _steps():
        if budget.left() < 5:
            return
        name = f"{kind} {_name(what)} {dtype} {work}"
        try:
            if isinstance(what, shapes.Entry):
                rivals = [*RIVALS, *(COMPILED if what is shapes.GPU_LARGE[0] else ())]
                result["cases"].append(measure.measure(what, dtype, work, rivals, limits, place))
            else:
                result["gates"] += _gates(what, dtype, work, place)
        except Exception as error:  # a kernel that fails must not cost the other figures
            result["broken"][name] = f"{type(error).__name__}: {error}"[:500]
        result["unmeasured"].remove(name)
        print(f"measured {name}, {budget.left():.0f} s left", flush=True)
        save(result)


def _gates(case: cases.Case, dtype: torch.dtype, work: str, place: measure.Place) -> list[dict[str, Any]]:
    found = []
    for backend in place.backends:
        options = _gate_options(case.name == "tokens" and backend == place.backends[0])
        with backends.backend(backend):
            measured = cases.measure(case, dtype, work, options, place.device, place.clock)
        found.append(measured | {"backend": backend})
    return found


def _name(what: shapes.Entry | cases.Case) -> str:
    return what.shape.name if isinstance(what, shapes.Entry) else what.name


def _gate_options(compiled: bool) -> argparse.Namespace:
    options = ["--rounds", "5", "--shortest", "0.002", *(["--compile"] if compiled else [])]
    return cases.parser("", gates.FAMILIES).parse_args(options)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description="Tests and figures on this GPU.")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (9.5)")
    parser.add_argument("--skip", nargs="+", choices=PHASES, default=[])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--output", type=Path, help="JSON (benchmarks/results/DEVICE.json)")
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes:g}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if not torch.cuda.is_available():
        print(
            f"gpu-check: no GPU: torch {torch.__version__} sees no CUDA device here, nothing ran",
            file=sys.stderr,
        )
        return 2
    budget = Budget(60 * options.minutes)
    command = ["python", "benchmarks/gpu_check.py", *(sys.argv[1:] if argv is None else argv)]
    result = {"schema": 1, **environment.facts(command), "gpu": gpu.facts(options.device)}
    path = options.output or run.RESULTS / f"{gpu.slug(result['gpu']['name'])}.json"
    result |= {
        "build": None,
        "tests": None,
        "ceilings": None,
        "cases": [],
        "gates": [],
        "broken": {},
        "figures": [],
    }
    if "build" not in options.skip:
        result["build"] = build(BUILD_SHARE * budget.left())
        print(f"build: {result['build']['status']}", flush=True)
    if "tests" not in options.skip:
        result["tests"] = test(TEST_SHARE * budget.left())
        run.save(path, result)
    if "benchmark" not in options.skip:
        benchmark(budget, options.device, result, lambda found: run.save(path, found))
    result["figures"] = gpu_figures.figures(result)
    run.save(path, result)
    print("\n".join(gpu_figures.summary_lines(result)))
    print(path)
    passed = result["tests"] is None or result["tests"]["status"] == "passed"
    return 0 if passed and not result["broken"] else 1


if __name__ == "__main__":
    sys.exit(main())
