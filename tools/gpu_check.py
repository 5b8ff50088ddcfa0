"""Build, run every kernel, run the tests, sanitize and measure on the present GPU: `make gpu-check`.

    python tools/gpu_check.py                           all stages, to benchmarks/results/DEVICE.json
    python tools/gpu_check.py smoke sanitize --minutes 3 --output FOLDER/first.json

It uses the current Python and its packages (torch with CUDA, triton; for the tests pytest, hypothesis, scipy,
preferably pytest-xdist and pytest-timeout; for a build cmake, ninja), and no network. Existing
native libraries are used unchanged. Stages:

    build      the native libraries, for this GPU
    smoke      every kernel of every backend once, forward and gradients, each case in its own process
    tests      a selection of the suite on each backend, minutes of which are compilation
    sanitize   compute-sanitizer on some of the CUDA kernels
    benchmark  large shapes and modulation first; an error above twice the best rival's fails

Results are saved incrementally: what the time limit cuts off is missing, and the summary, also in FILE.txt,
lists it. Exit status: 0 all requested stages passed, 1 not, 2 there is no GPU.

A GPU on which `tests` passes gets an entry in mi_kernels/verified.py (CONTRIBUTING.md).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BEGUN = time.monotonic()  # before torch is imported, which takes seconds

import torch  # noqa: E402

# Nothing here may import mi_kernels before the build: it loads its libraries once, at import.

ROOT = Path(__file__).resolve().parents[1]
# Maximum seconds of each stage, in order. The benchmark gets the remaining time.
STAGES = {"build": 180.0, "smoke": 110.0, "tests": 320.0, "sanitize": 60.0, "benchmark": 600.0}
BACKENDS = ("cuda", "triton", "portable")  # in the order of their tests
KEEP = 3.0  # seconds reserved at the end, to save and report results


def _build(seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """gpu_build.py in its own process."""
    command = [sys.executable, str(ROOT / "tools" / "gpu_build.py"), options.device, str(seconds)]
    command += ["--rebuild"] if options.rebuild else []
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds + 30)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"status": f"failed: {type(error).__name__}: {error}"[:300]}


def good(status: str) -> bool:
    """Whether a stage passed. A skipped stage did not."""
    return status in ("built", "prebuilt", "passed")


def faults(result: dict[str, Any]) -> list[str]:
    """The requested stages that did not pass, and requested backends that cannot run."""
    found = [f"backend {name}" for name, reason in result["backends"].items() if reason is not None]
    for stage in result["stages"]:
        if stage == "tests":
            tests = result["tests"] or {}
            passed = bool(tests) and all(good(one["status"]) for one in tests.values())
        elif stage == "benchmark":
            measured = bool(result["cases"] or result["gates"])
            passed = measured and not result["broken"] and not result["unmeasured"]
        else:
            passed = result[stage] is not None and good(result[stage]["status"])
        found += [] if passed else [stage]
    return found


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description="Tests and figures on this GPU.", allow_abbrev=False
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(STAGES)} (all)")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (9.5)")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--rebuild", action="store_true", help="also where libraries are there that run")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--output", type=Path, help="JSON (benchmarks/results/DEVICE.json)")
    options = parser.parse_args(argv)
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"STAGE: expected some of {', '.join(STAGES)}, got {unknown[0]!r}")
    options.stages = [stage for stage in STAGES if stage in (options.stages or STAGES)]
    if not options.minutes > 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes:g}")
    if options.output is not None and options.output.suffix != ".json":
        parser.error(f"--output: expected a name that ends in .json, got {str(options.output)!r}")
    return options


def _wrong_device(name: str) -> str | None:
    """A copy of that in verify.py, which must not be imported before the build."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return f"expected a GPU such as cuda:0, got {name!r}"
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return None
    return f"expected a GPU such as cuda:0 (there are {torch.cuda.device_count()}), got {name!r}"


def _run_stage(
    stage: str, backends: list[str], end: float, options: argparse.Namespace, result: dict, path: Path
) -> dict[str, Any]:
    """One stage after the build; returns the result with its findings."""
    from benchmarks.harness import results
    from tools import gpu_benchmark, gpu_smoke, gpu_tests

    capability = torch.cuda.get_device_capability(options.device)
    until = min(end, time.monotonic() + STAGES[stage])
    say = lambda text: print(text, flush=True)  # noqa: E731
    if stage == "benchmark":
        return gpu_benchmark.benchmark(until, options.device, path, result)
    if stage == "tests" and torch.device(options.device).index:
        result["tests"] = {name: {"status": "left out: the tests run on cuda:0"} for name in backends}
        return result
    if stage == "tests":
        gpu_tests.test(backends, until, result, lambda: results.write(path, result))
        return result
    step = {"smoke": gpu_smoke.smoke, "sanitize": gpu_smoke.sanitize}[stage]
    result[stage] = step(backends, capability, options.device, until, say)
    say(f"{stage}: {result[stage]['status']}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    if not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no CUDA device here, nothing ran"
        print(f"gpu-check: no GPU: {reason}", file=sys.stderr)
        return 2
    wrong = _wrong_device(options.device)
    if wrong is not None:
        print(f"gpu-check: --device: {wrong}", file=sys.stderr)
        return 2
    torch.cuda.set_device(torch.device(options.device).index or 0)
    end = (BEGUN if argv is None else time.monotonic()) + 60 * options.minutes - KEEP
    built = None
    if "build" in options.stages:
        built = _build(max(min(STAGES["build"], end - time.monotonic()), 1.0), options)
        print(f"build: {built['status']}", flush=True)
    from benchmarks.harness import environment, results
    from mi_kernels import backends
    from mi_kernels.testing import isolated
    from tools import gpu, gpu_cases, gpu_figures

    isolated.end_with_this_process()

    command = ["python", "tools/gpu_check.py", *(sys.argv[1:] if argv is None else argv)]
    result = {"schema": 3, **environment.facts(command), "gpu": gpu.facts(options.device)}
    path = options.output or results.FOLDER / f"{gpu.slug(result['gpu']['name'])}.json"
    result |= {"stages": options.stages, "build": built, "smoke": None, "tests": None, "sanitize": None}
    result["backends"] = {name: backends.why_not(name) for name in options.backend}
    result |= {"ceilings": None, "cases": [], "gates": [], "broken": {}, "figures": [], "under way": None}
    measured = "benchmark" in options.stages
    result["unmeasured"] = [gpu_cases.name_of(step) for step in gpu_cases.steps()] if measured else []
    results.write(path, result)
    runs = [name for name, reason in result["backends"].items() if reason is None]
    for stage in options.stages:
        if stage != "build":
            result = _run_stage(stage, runs, end, options, result, path)
            results.write(path, result)
    result["figures"] = gpu_figures.figures(result) if measured else []
    result["failed stages"] = faults(result)
    result["not asked for"] = [stage for stage in STAGES if stage not in options.stages]
    results.write(path, result)
    summary = "\n".join(gpu_figures.summary_lines(result))
    path.with_suffix(".txt").write_text(summary + "\n")
    print(summary, path, sep="\n")
    return 1 if result["failed stages"] else 0


if __name__ == "__main__":
    sys.exit(main())
