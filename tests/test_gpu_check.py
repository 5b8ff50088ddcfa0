"""`make gpu-check` as far as it goes without a GPU: clocks, budgets, what pytest said, figures."""

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import environment, gates, gpu, gpu_check, gpu_figures, measure, shapes, timing

XDIST = """
[gw0] [ 33%] PASSED tests/test_a.py::test_one[triton-cuda]
[gw1] [ 66%] FAILED tests/test_a.py::test_two[triton-cuda]
[gw1] [ 99%] SKIPPED tests/test_b.py::test_three[portable-cuda]
FAILED tests/test_a.py::test_two[triton-cuda] - AssertionError
"""
PLAIN = """
tests/test_a.py::test_one[triton-cuda] PASSED                      [ 33%]
tests/test_a.py::test_two[triton-cuda] ERROR                       [ 66%]
"""


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "result.json"
    assert gpu_check.main(["--output", str(output)]) == 2
    assert "no GPU" in capsys.readouterr().err and not output.exists()


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--skip", "lunch"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_phase_that_takes_too_long_is_stopped():
    begin = time.monotonic()
    script = "import time; print('begun', flush=True); time.sleep(60)"
    status, output = gpu_check._run([sys.executable, "-c", script], 2.0, {})
    assert status is None and output == "begun\n" and time.monotonic() - begin < 20


def test_status_and_output_of_a_phase():
    assert gpu_check._run([sys.executable, "-c", "print(1); exit(3)"], 60.0, {}) == (3, "1\n")


def test_budget_runs_out():
    assert 50 < gpu_check.Budget(60).left() <= 60
    assert gpu_check.Budget(-1).left() == 0


def test_outcomes_of_tests():
    found = gpu_check.outcomes(XDIST)
    assert (found["passed"], found["failed"], found["error"], found["skipped"]) == (1, 1, 0, 1)
    assert found["failures"] == ["tests/test_a.py::test_two[triton-cuda]"]
    found = gpu_check.outcomes(PLAIN)
    assert (found["passed"], found["error"]) == (1, 1)


def test_the_command_has_files_that_exist_and_their_places():
    command = gpu_check.test_command(["triton-cuda", "portable-cuda"], 1)
    assert command[command.index("-k") + 1] == "triton-cuda or portable-cuda"
    files = [word for word in command if word.startswith("tests/")]
    assert len(files) == len(gpu_check.TESTS)


def test_the_clock_is_chosen_by_device():
    assert gpu.clock_of("cpu") is timing.wall
    calls = []
    sample = timing.sample(
        lambda: "run", 3, clock=lambda run, n: calls.append((run, n)) or timing.Sample(2.0, 1.0)
    )
    assert sample.seconds == 2.0 and calls == [("run", 3)]
    taken = list(
        timing.interleave({"a": lambda: "run"}, 2, 1.0, 9.0, clock=lambda *_: timing.Sample(2.0, 1.0))
    )
    assert [(name, calls) for name, calls, _ in taken] == [("a", 1)] * 2


def test_each_backend_of_ours_is_measured():
    place = measure.Place("cpu", timing.wall, ("portable", "reference"))
    limits = measure.Limits(rounds=1, shortest=0)
    entry = shapes.by_name(["tiny"])[0]
    case = measure.measure(entry, torch.float32, "forward+backward", ["einsum"], limits, place)
    found = {c["name"]: c for c in case["candidates"] if c["kind"] == "ours"}
    assert set(found) == {"mi_kernels portable", "mi_kernels reference"}
    assert all(c["error"] < 1e-5 and c["median_s"] > 0 for c in found.values())


def test_modulation_is_measured_on_each_backend():
    place = measure.Place("cpu", timing.wall, ("portable", "reference"))
    case = next(gates.modulations())
    found = gpu_check._gates(case, torch.float32, "forward", place)
    assert [entry["backend"] for entry in found] == ["portable", "reference"]
    result = {
        "cases": [],
        "gates": [e | {"name": "tokens"} for e in found],
        "ceilings": {"copy_bytes_per_s": 1e9},
    }
    shares = [row for row in gpu_figures.figures(result) if "bandwidth" in row["figure"]]
    assert len(shares) == 2 and all(row["measured"] > 0 for row in shares)


def test_names_of_files():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_results_are_saved_as_they_come(monkeypatch):
    """The benchmark on the CPU, of one tiny shape, with what a GPU would have beside."""
    steps = [("dense", shapes.by_name(["tiny"])[0], torch.bfloat16, "forward")] * 2
    monkeypatch.setattr(gpu_check, "_steps", lambda: iter(steps))
    monkeypatch.setattr(gpu_check, "places", lambda: ["portable-cuda"])
    monkeypatch.setattr(gpu_check, "RIVALS", ("einsum",))
    ceilings = environment.ceilings
    monkeypatch.setattr(
        environment, "ceilings", lambda dtypes, _, *rest: ceilings(dtypes, 32, 0.01, *rest[1:])
    )
    saved = []
    result = {"cases": [], "gates": [], "broken": {}, "figures": []}
    gpu_check.benchmark(gpu_check.Budget(60), "cpu", result, lambda r: saved.append(len(r["cases"])))
    assert saved == [1, 2] and result["unmeasured"] == [] and result["ceilings"]["copy_bytes_per_s"] > 0
    monkeypatch.setattr(measure, "measure", lambda *arguments: 1 / 0)
    gpu_check.benchmark(gpu_check.Budget(60), "cpu", result, lambda r: None)
    assert (
        list(result["broken"].values()) == ["ZeroDivisionError: division by zero"]
        and len(result["cases"]) == 2
    )
    gpu_check.benchmark(gpu_check.Budget(0), "cpu", result, saved.append)
    assert saved == [1, 2] and len(result["unmeasured"]) == 2


def _dense(name, out, work, ours, gemm, rival):
    kinds = {"mi_kernels triton": ("ours", ours), "mm": ("gemm", gemm), "einsum": ("rival", rival)}
    candidates = [{"name": n, "kind": k, "status": "ok", "median_s": s} for n, (k, s) in kinds.items()]
    return {"shape": {"name": name, "O": out}, "dtype": "bfloat16", "pass": work, "candidates": candidates}


def test_figures():
    gate = {"backend": "triton", "pass": "forward", "dtype": "bfloat16", "name": "tokens"}
    gate |= {"sizes": [[8, 10], [1, 10], [1, 10]], "candidates": {"mi_kernels": {"median_s": 2.0}}}
    result = {
        "gpu": {"name": "made up"},
        "tests": {"status": "passed", "passed": 3, "failures": []},
        "ceilings": {"copy_bytes_per_s": 200.0},
        "cases": [
            _dense("gpu-512", 512, "forward", 1.0, 0.7, 1.5),
            _dense("gpu-256", 256, "forward", 1.0, 0.5, 0.9),
            _dense("wide", 4096, "forward", 1.0, 0.1, 0.1),
        ],
        "gates": [gate],
    }
    rows = gpu_figures.figures(result)
    share, rival, *rest = rows
    assert (share["measured"], share["shape"], share["reached"]) == (0.5, "gpu-256", False)
    assert (rival["measured"], rival["shape"], rival["reached"]) == (0.9, "gpu-256", False)
    assert [row["reached"] for row in rest[:2]] == [None, None]  # no backward was measured
    # Two bytes each of 80 read, 80 written, 10 + 10 of scale and shift in 2 s, of 200 a second.
    assert (
        rest[2]["measured"] == pytest.approx(2 * (80 + 80 + 10 + 10) / 2 / 200) and rest[2]["reached"] is True
    )
    lines = list(gpu_figures.summary_lines(result | {"figures": rows}))
    assert lines[0] == "made up: tests: passed (3 passed)"
    assert (
        sum("NOT REACHED" in line for line in lines) == 2
        and sum("not measured" in line for line in lines) == 2
    )
