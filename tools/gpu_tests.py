"""The tests stage of gpu_check.py: a selection of the suite on each backend (tests/selection.py)."""

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mi_kernels.testing import isolated

ROOT = Path(__file__).resolve().parents[1]
# Files whose tests have a parameter ``place``, those of the kernels first: time may run out.
TESTS = (
    *("interaction", "modulate", "gates", "activations", "gradients", "gpu_streams", "linear"),
    *(
        "shared",
        "packed",
        "determinism",
        "autocast",
        "overflow",
        "compile",
        "gates_compile",
        "hyper",
        "ragged",
    ),
)
LIMITS = {"cuda": 100.0, "triton": 150.0, "portable": 60.0}  # maximum seconds of each backend
WORKERS = 15
ONE = 60  # seconds of a test, including compilation: none needs more than 22 kernels
OUTCOMES = ("passed", "failed", "error", "skipped")
NEEDED = ("pytest", "hypothesis", "scipy")


def files() -> list[str]:
    """The files of TESTS, in any folder of tests/."""
    found = [path for name in TESTS for path in ROOT.glob(f"tests/**/test_{name}.py")]
    return [str(path.relative_to(ROOT)) for path in found]


def command_for(workers: int) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", "--tb=short"]
    command += ["-p", "tools.gpu_report", "-m", "not slow", "--maxfail=200"]
    if find_spec("pytest_timeout") is not None:  # in a thread: signals do not interrupt hanging C code
        command += [f"--timeout={ONE}", "--timeout-method=thread"]
    if workers > 1 and find_spec("xdist") is not None:  # a worker that ends is replaced
        # In the order of the files, as time may run out; in small parts, lest workers compile a kernel twice.
        command += ["-n", str(workers), "--dist=load", "--maxschedchunk=2", "--max-worker-restart=100"]
    return command + files()


def outcomes(lines: str) -> dict[str, Any]:
    """The content of gpu_report.py's file: counts, failures with their text, number of missing tests."""
    collected: dict[str, None] = {}
    found: dict[str, str] = {}
    texts: dict[str, str] = {}
    for text in lines.splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # truncated
            continue
        if "collected" in line:
            collected |= dict.fromkeys(line["collected"])
            continue
        name = line["id"]
        if line["outcome"] == "failed":
            found[name] = "error" if line["when"] in ("setup", "teardown", "collect") else "failed"
            texts.setdefault(name, line.get("text", ""))
        elif line["outcome"] == "skipped" or line["when"] == "call":
            found.setdefault(name, line["outcome"])
    counts = Counter(found.values())
    missing = Counter(name.split("::")[0] for name in collected if name not in found)
    failures = {n: texts.get(n, "") for n, word in sorted(found.items()) if word in ("failed", "error")}
    counted = {word: counts[word] for word in OUTCOMES}
    return counted | {"collected": len(collected), "failures": failures, "missing": dict(missing)}


def test_one(backend: str, seconds: float) -> dict[str, Any]:
    """The selection on one backend."""
    command = command_for(min(isolated.cores(), WORKERS))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        report.touch()
        variables = {
            "PYTHONPATH": str(ROOT),
            "MI_KERNELS_REPORT": str(report),
            "MI_KERNELS_TEST_PLACES": f"{backend}-cuda",
            "MI_KERNELS_TEST_SELECTION": "gpu",
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        begin = time.monotonic()
        status, output = isolated.run(command, seconds, os.environ | variables, ROOT)
        found = outcomes(report.read_text())
    words = {0: "passed", None: "stopped: out of time"}
    word = words.get(status, f"failed with status {status}")
    if status == 0 and (not found["passed"] or found["missing"]):
        word = "failed: no test passed" if not found["passed"] else "failed: tests without an outcome"
    facts = {"command": command, "seconds": round(time.monotonic() - begin, 1)}
    return {"status": word, **facts, **found, "end": output[-4000:] if word != "passed" else ""}


def test(
    backends: Sequence[str], end: float, result: dict[str, Any], save: Callable[[], None]
) -> dict[str, Any]:
    """The selection on each backend, each within its limit, until ``end``."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    result["tests"] = {name: {"status": "not reached"} for name in backends}
    for name in backends:
        if missing:
            result["tests"][name] = {"status": f"left out: {', '.join(missing)} not installed"}
            continue
        seconds = min(LIMITS[name], end - time.monotonic())
        if seconds < 5:
            break
        result["tests"][name] = test_one(name, seconds)
        print(f"tests on {name}: {result['tests'][name]['status']}", flush=True)
        save()
    return result["tests"]
