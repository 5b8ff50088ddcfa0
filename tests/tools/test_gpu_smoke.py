"""The stages smoke and sanitize of `make gpu-check`: each way in which a kernel can go wrong."""

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mi_kernels.testing import isolated, kernel_sizes, suite
from tools import gpu_check, gpu_figures, gpu_smoke

pytestmark = pytest.mark.tools


def test_smoke_has_every_kernel_of_every_backend_once():
    found = gpu_smoke.cases(["cuda", "triton"], (9, 0))
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    for size in (*kernel_sizes.SM90, *kernel_sizes.MMA):
        for dtype in size.dtypes:
            assert f"cuda {size.name} {dtype}" in names
            assert (f"triton {size.name} {dtype}" in names) == (size in kernel_sizes.MMA)
    for backend in ("cuda", "triton"):
        for family in ("diagonal", "gated_interaction", "modulate", "norm"):
            assert {f"{backend} {family} {dtype}" for dtype in suite.DTYPES} <= set(names)
    assert len(gpu_smoke.cases(["cuda"], (8, 0))) < len(gpu_smoke.cases(["cuda"], (9, 0)))


def test_what_smoke_asks_for_exists():
    for case in gpu_smoke.cases(["cuda", "triton", "portable"], (9, 0)):
        known = suite.suite(case.family, case.backend, (9, 0))
        assert set(case.checks) <= set(known), case
        assert all(suite.takes(check, case.dtype) for check in case.checks)


# A stand-in for suite.py: modulation goes wrong in another way in each dtype, and one size is wrong in all.
FAULTY = """
import json, os, sys, time
backend, device, dtype, family, *checks = sys.argv[1:]
def say(check, state, **more): print(json.dumps({"check": check, "state": state} | more), flush=True)
for check in checks:
    say(check, "begun")
    if family == "modulate" and dtype == "bfloat16": time.sleep(100)
    if family == "modulate" and dtype == "float16":
        say(check, "failed", fault="CUDA error: an illegal memory access was encountered"); sys.exit(3)
    if family == "modulate" and dtype == "float32": os.kill(os.getpid(), 9)
    if check == "kernel odd": say(check, "failed", fault="result 0: error 1"); sys.exit(1)
    say(check, "passed", error=0.25)
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_smoke, "LIMIT", 4.0)
    monkeypatch.setattr(gpu_smoke, "SANITIZED", 4.0)
    (tmp_path / "faulty.py").write_text(FAULTY)
    return [sys.executable, str(tmp_path / "faulty.py")]


def test_a_hang_a_crash_and_a_wrong_kernel_cost_one_case_each(faulty):
    said = []
    end = time.monotonic() + 100
    found = gpu_smoke.smoke(["triton"], (9, 0), "cuda:0", end, said.append, faulty, workers=4)
    faults = {name: one["fault"] for name, one in found["cases"].items() if one["fault"]}
    assert "values tokens: not done after " in faults.pop("triton modulate bfloat16")
    assert "illegal memory access" in faults.pop("triton modulate float16")
    assert "ended with status -9" in faults.pop("triton modulate float32")
    assert set(faults) == {f"triton odd {dtype}" for dtype in suite.DTYPES}
    assert found["status"] == f"7 of {len(found['cases'])} failed" and len(said) == 7
    assert found["missing"] == [] and len(found["cases"]) == len(gpu_smoke.cases(["triton"], (9, 0)))
    lines = list(gpu_figures.lines_of_cases("smoke", found))
    (worst,) = [line for line in lines if "worst error" in line]
    assert "triton" in worst and "tile 0.25, many rows 0.25" in worst and "odd" not in worst
    assert any("triton odd float64: kernel odd: result 0: error 1" in line for line in lines)


def test_smoke_that_runs_out_of_time_has_not_passed(faulty):
    found = gpu_smoke.smoke(["triton"], (9, 0), "cuda:0", time.monotonic() - 1, print, faulty, workers=2)
    assert found["status"].startswith("stopped: out of time") and len(found["missing"]) > 10
    assert not gpu_check.good(found["status"])
    nothing = gpu_smoke.smoke([], (9, 0), "cuda:0", time.monotonic() + 9, print, faulty)
    assert nothing["status"] == "nothing ran" and not gpu_check.good(nothing["status"])


def test_a_real_case_of_smoke_on_the_cpu(tmp_path):
    """The process itself, its checks, and what it says; on the portable backend."""
    program = tmp_path / "here.py"
    program.write_text(
        "import sys; from mi_kernels.testing import suite\n"
        "sys.exit(suite.main(['portable', 'cpu', *sys.argv[3:]]))"
    )
    case = gpu_smoke.Case("portable", "modulate", "float32", gpu_smoke.OTHERS["modulate"])
    command = case.command("cuda:0", [sys.executable, "-W", "ignore", str(program)])
    found = gpu_smoke._ended([isolated.Job("x", command, 100.0)], 1, time.monotonic() + 100, print)
    assert found["status"] == "passed" and found["cases"]["x"]["checks"] == len(case.checks)


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """A stand-in that says what it was called with, and finds an error in modulation."""
    tool = tmp_path / gpu_smoke.SANITIZER
    tool.write_text(
        '#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> "$0.log"\n'
        'while [ "${1#--}" != "$1" ]; do shift; done\n"$@" || exit 1\n'
        'case "$*" in *modulate*) echo "Invalid __global__ read"; exit 9;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tool


def test_sanitize_names_what_the_tool_found(sanitizer, tmp_path):
    line = "{'check': c, 'state': 'passed', 'error': 0}"
    (tmp_path / "good.py").write_text(f"import sys, json\nfor c in sys.argv[5:]: print(json.dumps({line}))")
    program = [sys.executable, str(tmp_path / "good.py")]
    found = gpu_smoke.sanitize(["cuda"], (9, 0), "cuda:0", time.monotonic() + 60, print, program)
    faults = {name: one["fault"] for name, one in found["cases"].items() if one["fault"]}
    assert set(faults) == {f"{tool} cuda modulate bfloat16" for tool in gpu_smoke.TOOLS}
    assert all("Invalid __global__ read" in fault for fault in faults.values())
    assert len(found["cases"]) == 15  # one round on 16 cores, within the limit of the stage
    calls = sanitizer.with_suffix(".log").read_text()
    assert "1 --tool=memcheck --error-exitcode=9 --report-api-errors=no" in calls and "kernel 64x2" in calls
    assert "1 --tool=racecheck --error-exitcode=9 /" in calls


def test_sanitize_is_left_out_where_there_is_no_tool(monkeypatch):
    monkeypatch.setattr(gpu_smoke.shutil, "which", lambda name: None)
    found = gpu_smoke.sanitize(["cuda"], (9, 0), "cuda:0", time.monotonic() + 9, print)
    assert found["status"].startswith("left out") and not gpu_check.good(found["status"])
