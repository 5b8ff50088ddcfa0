"""Build, run the tests on the GPU, then the GPU benchmark, in ten minutes: `make gpu-check`.

    python benchmarks/gpu_check.py                               all of it, to benchmarks/results/DEVICE.json
    python benchmarks/gpu_check.py --skip build tests --minutes 3

It uses the Python that runs it, with the packages that are there (torch with CUDA, triton, pytest,
hypothesis, scipy; pytest-xdist, cmake, ninja and pybind11 where they are), and no network. Results are saved
as they come: what is cut off by the time is missing, and the summary says so. Exit status: 0 the build was
made, all tests passed and everything was measured, of what --skip does not name; 1 not; 2 there is no GPU.

The tests are those of tests/ on every backend that runs on this GPU, whatever `auto` may choose there.
Passing them is what an entry in mi_kernels/verified.py means.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BEGUN = time.monotonic()  # before torch is imported, which takes seconds

import torch  # noqa: E402

# Nothing here may import mi_kernels before the build: it looks for its libraries once, when it is imported.

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("build", "tests", "benchmark")
# Files whose tests take a place, those of the kernels themselves first: time may run out.
TESTS = (
    *("interaction", "modulate", "gates", "activations", "gradients", "gpu_streams", "linear", "shared"),
    *("packed", "determinism", "autocast", "overflow", "functional_transforms", "compile"),
    *("gates_compile", "hyper"),
)
BACKENDS = ("triton", "cuda", "portable")  # in the order of their tests
WEIGHTS = {"triton": 2, "cuda": 2, "portable": 1}  # of their shares of the time for tests
BUILD_SHARE, TEST_SHARE = 0.25, 0.6  # of the time that is left then, at most
RESERVE = 5.0  # seconds at the end, to save and to say what there is
GRACE = 3.0  # seconds between asking a phase to end and ending it
CASES = (str(ROOT / "benchmarks" / "gpu_cases.py"),)
OUTCOMES = ("passed", "failed", "error", "skipped")


class Budget:
    """Seconds that are left of the whole, from ``begun`` (now)."""

    def __init__(self, seconds: float, begun: float | None = None):
        self.end = (time.monotonic() if begun is None else begun) + seconds

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
        for number in (signal.SIGTERM, signal.SIGKILL):  # what waits for the GPU may not hear the first
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=GRACE)
        output, _ = process.communicate()
        return None, output


def build_environment(device: str) -> dict[str, str]:
    """This GPU's architecture alone is compiled for, where nothing else is asked for."""
    found = dict(os.environ)
    nvcc = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc += [f"{home}/bin/nvcc" for home in homes if home]
    # Without a compiler, naming an architecture would turn a build without CUDA kernels into a failure.
    if not found.get("MI_KERNELS_CUDA_ARCHS") and any(path and Path(path).exists() for path in nvcc):
        major, minor = torch.cuda.get_device_capability(device)
        found["MI_KERNELS_CUDA_ARCHS"] = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    return found


def build(seconds: float, device: str) -> dict[str, Any]:
    """Compile the native libraries in place. Triton needs none of it."""
    missing = [name for name in ("cmake", "ninja", "pybind11") if find_spec(name) is None]
    if missing:
        return {"status": f"skipped: {', '.join(missing)} not installed"}
    environment = build_environment(device)
    status, output = _run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, environment)
    words = {0: "built", None: "stopped: out of time"}
    return {
        "status": words.get(status, f"failed with status {status}"),
        "archs": environment.get("MI_KERNELS_CUDA_ARCHS"),
        "end": output[-2000:] if status != 0 else "",
    }


def test_command(place: str, workers: int) -> list[str]:
    files = [f"tests/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", "--tb=short"]
    command += ["-p", "benchmarks.gpu_report", "-m", "not slow", "-k", place, "--maxfail=200"]
    if workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    return command + [name for name in files if (ROOT / name).exists()]


def outcomes(lines: str) -> dict[str, Any]:
    """What gpu_report.py wrote, as far as it came: counts, failures, how much of which file is missing."""
    collected: dict[str, None] = {}
    found: dict[str, str] = {}
    for text in lines.splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off
            continue
        if "collected" in line:
            collected |= dict.fromkeys(line["collected"])
        elif line["outcome"] == "failed":
            found[line["id"]] = "failed" if line["when"] == "call" else "error"
        elif line["outcome"] == "skipped" or line["when"] == "call":
            found.setdefault(line["id"], line["outcome"])
    counts = Counter(found.values())
    missing = Counter(name.split("::")[0] for name in collected if name not in found)
    return {word: counts[word] for word in OUTCOMES} | {
        "collected": len(collected),
        "failures": sorted(name for name, word in found.items() if word in ("failed", "error")),
        "missing": dict(missing),
    }


def test_one(backend: str, seconds: float) -> dict[str, Any]:
    """The suite on one backend."""
    command = test_command(f"{backend}-cuda", min(os.cpu_count() or 1, 8))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        report.touch()
        variables = {"PYTHONPATH": str(ROOT), "MI_KERNELS_REPORT": str(report)}
        status, output = _run(command, seconds, os.environ | variables)
        found = outcomes(report.read_text())
    words = {0: "passed", None: "stopped: out of time"}
    word = words.get(status, f"failed with status {status}")
    if status == 0 and (not found["passed"] or found["missing"]):
        word = "failed: no test passed" if not found["passed"] else "failed: tests without an outcome"
    end = output[-6000:] if word != "passed" else ""
    return {"status": word, "command": command, **found, "end": end}


def test(budget: Budget, result: dict[str, Any], save: Callable[[], None]) -> None:
    """The suite on each backend that runs here, the most important files and backends first."""
    missing = [name for name in ("pytest", "hypothesis", "scipy") if find_spec(name) is None]
    names = [name for name in BACKENDS if result["backends"][name] is None]
    end = Budget(TEST_SHARE * budget.left())
    result["tests"] = {name: {"status": "not reached"} for name in names}
    for number, name in enumerate(names):
        if missing:
            result["tests"][name] = {"status": f"skipped: {', '.join(missing)} not installed"}
            continue
        share = WEIGHTS[name] / sum(WEIGHTS[other] for other in names[number:])
        result["tests"][name] = test_one(name, share * end.left())
        print(f"tests on {name}: {result['tests'][name]['status']}", flush=True)
        save()


def benchmark(
    budget: Budget, device: str, path: Path, result: dict[str, Any], program: tuple[str, ...] = CASES
) -> dict[str, Any]:
    """The cases, measured by gpu_cases.py in processes of their own; what they left in ``path``."""
    from benchmarks import run

    end = budget.end - RESERVE - GRACE
    while result["unmeasured"] and (seconds := end - time.monotonic()) > RESERVE:
        result["under way"] = None
        run.save(path, result)
        command = [sys.executable, *program, str(path), device, str(end)]
        status, output = _run(command, seconds, dict(os.environ))
        print(output, end="", flush=True)
        result = json.loads(path.read_text())
        if status in (0, None):
            break
        if result["under way"] is None:  # it failed outside of all steps, and would again
            result["broken"]["benchmark"] = f"status {status}: {output[-500:]}"
            break
        step, backend = result["under way"]["step"], result["under way"]["backend"]
        key = f"{step} on {backend}" if backend else step
        result["broken"].setdefault(key, f"ended with status {status}: {output[-500:]}")
        if backend is None:  # all backends together: there is nothing to leave out
            result["unmeasured"].remove(step)
    return result


def passed(result: dict[str, Any], skipped: Sequence[str]) -> bool:
    """Whether everything that was not skipped by name ran, and passed."""
    if "build" not in skipped and result["build"]["status"] != "built":
        return False
    tests = {} if result["tests"] is None else result["tests"]
    if "tests" not in skipped and (not tests or any(t["status"] != "passed" for t in tests.values())):
        return False
    return not result["broken"] and ("benchmark" in skipped or not result["unmeasured"])


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
    budget = Budget(60 * options.minutes, BEGUN if argv is None else None)
    built = None
    if "build" not in options.skip:
        built = build(BUILD_SHARE * budget.left(), options.device)
        print(f"build: {built['status']}", flush=True)
    from benchmarks import environment, gpu, gpu_cases, gpu_figures, run
    from mi_kernels import backends

    command = ["python", "benchmarks/gpu_check.py", *(sys.argv[1:] if argv is None else argv)]
    result = {"schema": 2, **environment.facts(command), "gpu": gpu.facts(options.device)}
    path = options.output or run.RESULTS / f"{gpu.slug(result['gpu']['name'])}.json"
    result |= {"build": built, "backends": {name: backends.why_not(name) for name in BACKENDS}}
    result |= {"tests": None, "ceilings": None, "cases": [], "gates": [], "broken": {}, "figures": []}
    result |= {"unmeasured": [gpu_cases.name_of(step) for step in gpu_cases.steps()], "under way": None}
    run.save(path, result)
    if "tests" not in options.skip:
        test(budget, result, lambda: run.save(path, result))
    if "benchmark" not in options.skip:
        result = benchmark(budget, options.device, path, result)
    result["figures"] = gpu_figures.figures(result)
    run.save(path, result)
    print("\n".join(gpu_figures.summary_lines(result)))
    print(path)
    return 0 if passed(result, options.skip) else 1


if __name__ == "__main__":
    sys.exit(main())
