"""The figures of `make gpu-check`, and its summary."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import gpu_figures

pytestmark = pytest.mark.tools


def _dense(name, out, work, triton, cuda, gemm, rival):
    kinds = {"mi_kernels triton": ("ours", triton), "mi_kernels cuda": ("ours", cuda)}
    kinds |= {"mm": ("gemm", gemm), "einsum": ("rival", rival)}
    candidates = [{"name": n, "kind": k, "status": "ok", "median_s": s} for n, (k, s) in kinds.items()]
    return {"shape": {"name": name, "O": out}, "dtype": "bfloat16", "pass": work, "candidates": candidates}


def test_figures():
    """Of each backend: the fastest of ours at one shape must not hide the slow one at another."""
    gate = {"backend": "triton", "pass": "forward", "dtype": "bfloat16", "name": "tokens"}
    gate |= {"sizes": [[8, 10], [1, 10], [1, 10]], "candidates": {"mi_kernels": {"median_s": 2.0}}}
    passed = {"status": "passed", "passed": 3, "collected": 3, "failures": {}}
    stopped = {
        "status": "stopped: out of time",
        "passed": 1,
        "collected": 9,
        "missing": {"tests/test_a.py": 8},
    }
    result = {
        "gpu": {"name": "made up"},
        "build": {"status": "built"},
        "backends": {"triton": None, "cuda": None, "portable": "a reason"},
        "tests": {"triton": passed, "cuda": stopped},
        "smoke": None,
        "sanitize": None,
        "failed stages": ["tests", "benchmark"],
        "not asked for": ["smoke", "sanitize"],
        "ceilings": {"copy_bytes_per_s": 200.0},
        "cases": [
            _dense("gpu-512", 512, "forward", 1.0, 2.0, 0.7, 1.5),
            _dense("gpu-256", 256, "forward", 1.0, 0.5, 0.5, 0.9),
            _dense("wide", 4096, "forward", 1.0, 1.0, 0.1, 0.1),
        ],
        "gates": [gate],
        "broken": {},
        "unmeasured": ["a case"],
    }
    rows = gpu_figures.figures(result)
    found = {row["figure"]: (row["measured"], row["shape"], row["reached"]) for row in rows}
    share, rival = "cuBLAS of equal work / {}, {}, worst large shape", "best rival / {}, {}, worst shape"
    assert found[share.format("triton", "forward")] == (0.5, "gpu-256", False)
    assert found[rival.format("triton", "forward")] == (0.9, "gpu-256", False)
    assert found[share.format("cuda", "forward")] == (0.35, "gpu-512", False)
    assert found[rival.format("cuda", "forward")] == (0.75, "gpu-512", False)
    for backend in ("triton", "cuda"):  # no backward was measured
        assert found[share.format(backend, "forward+backward")] == (None, None, None)
    # Two bytes each of 80 read, 80 written, 10 + 10 of scale and shift in 2 s, of 200 a second.
    bandwidth = 2 * (80 + 80 + 10 + 10) / 2 / 200
    assert rows[-1]["measured"] == pytest.approx(bandwidth) and rows[-1]["reached"] is True
    lines = list(gpu_figures.summary_lines(result | {"figures": rows}))
    for line in (
        "made up",
        "  portable: left out: a reason",
        "  tests on triton: passed (3 passed of 3)",
        "  tests on cuda: stopped: out of time (1 passed of 9)",
        "    not reached: 8 tests, of tests/test_a.py",
        "  1 cases not measured, a case the first",
        "  failed: tests, benchmark; not asked for: smoke, sanitize",
    ):
        assert line in lines
    assert sum("NOT REACHED" in line for line in lines) == 4
    assert sum(line.endswith(": not measured") for line in lines) == 4


def test_the_summary_is_short_however_much_went_wrong():
    cases = {f"cuda {n} bfloat16": {"fault": "x " * 400, "error": 0.0, "checks": 0} for n in range(200)}
    stage = {"status": "200 of 200 failed", "cases": cases, "missing": ["a"] * 9}
    tests = {
        "status": "failed",
        "failures": {f"test_{n}": "text " * 99 for n in range(99)},
        "missing": {"f": 9},
    }
    result = {
        "gpu": {"name": "made up"},
        "backends": dict.fromkeys("abc", "reason"),
        "build": {"status": "built"},
    }
    result |= {
        "smoke": stage,
        "sanitize": stage,
        "tests": dict.fromkeys(("cuda", "triton", "portable"), tests),
    }
    result |= {
        "broken": {f"case {n}": "text " * 99 for n in range(99)},
        "unmeasured": ["a"],
        "not asked for": [],
    }
    figure = {"figure": "f", "measured": 1.0, "shape": "s", "target": 1.0, "reached": True}
    result |= {"figures": [figure] * 30, "failed stages": ["smoke"]}
    lines = gpu_figures.summary_lines(result)
    assert len(lines) <= gpu_figures.MOST_LINES == 60 and all(len(line) < 330 for line in lines)
    assert lines[-1] == "  failed: smoke" and sum("and 196 more" in line for line in lines) == 2
    assert sum("failed: case" in line for line in lines) == gpu_figures.MOST_FAULTS
