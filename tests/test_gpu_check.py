"""`make gpu-check` as far as it goes without a GPU: clocks, budgets, what pytest said, figures.

Longer than other files: what stands in for a GPU, and for each way in which a phase can fail, is here too.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    environment,
    gates,
    gpu,
    gpu_cases,
    gpu_check,
    gpu_figures,
    measure,
    run,
    shapes,
    timing,
)
from mi_kernels import backends


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


def test_a_budget_begins_where_the_process_did():
    assert gpu_check.Budget(60, time.monotonic() - 50).left() < 11
    assert time.monotonic() > gpu_check.BEGUN


def test_the_package_is_imported_after_the_build():
    """It looks for its libraries once, so that one that is built later would count as not built."""
    script = (
        "import sys, torch; from benchmarks import gpu_check as g; torch.cuda.is_available = lambda: True\n"
        "def build(*arguments): print('mi_kernels' in sys.modules); sys.exit(7)\n"
        "g.build = build; g.main([])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (7, "False\n"), done.stderr


@pytest.mark.parametrize(("capability", "archs"), [((9, 0), "90a"), ((8, 0), "80"), ((12, 0), "120")])
def test_the_build_is_for_the_architecture_that_is_there(capability, archs, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("MI_KERNELS_CUDA_ARCHS", raising=False)
    (tmp_path / "nvcc").touch()
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    assert gpu_check.build_environment("cuda:0")["MI_KERNELS_CUDA_ARCHS"] == archs
    monkeypatch.setenv("MI_KERNELS_CUDA_ARCHS", "80;90a")
    assert gpu_check.build_environment("cuda:0")["MI_KERNELS_CUDA_ARCHS"] == "80;90a"


SUITE = """
import pytest, time
@pytest.mark.parametrize("text", ["a b", "c - d"])
def test_spaces(text): assert text != "c - d"
def test_skipped(): pytest.skip("why")
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
@pytest.fixture
def torn():
    yield
    raise ValueError
def test_torn(torn): pass
@pytest.mark.xfail
def test_known(): assert False
def test_end(): time.sleep(SECONDS)
"""


def _suite(folder, workers, seconds=0, limit=100.0):
    (folder / "test_a.py").write_text(SUITE.replace("SECONDS", str(seconds)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_report"]
    command += [*workers, "--rootdir", str(folder), str(folder / "test_a.py")]
    report = folder / "report"
    variables = {"PYTHONPATH": str(gpu_check.ROOT), "MI_KERNELS_REPORT": str(report)}
    status, output = gpu_check._run(command, limit, os.environ | variables)
    return status, gpu_check.outcomes(report.read_text()), output


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_outcomes_of_tests(workers, tmp_path):
    if workers:
        pytest.importorskip("xdist")
    status, found, output = _suite(tmp_path, workers)
    assert status == 1 and found["collected"] == 7, output
    assert [found[word] for word in gpu_check.OUTCOMES] == [2, 1, 2, 2] and found["missing"] == {}
    assert found["failures"] == [
        "test_a.py::test_error",
        "test_a.py::test_spaces[c - d]",
        "test_a.py::test_torn",
    ]


def test_what_was_not_reached_is_known(tmp_path):
    status, found, _ = _suite(tmp_path, [], seconds=100, limit=6.0)
    assert status is None and found["missing"] == {"test_a.py": 1} and found["passed"] == 1


def test_the_command_has_files_that_exist_and_their_place():
    command = gpu_check.test_command("triton-cuda", 1)
    assert command[command.index("-k") + 1] == "triton-cuda"
    files = [word for word in command if word.startswith("tests/")]
    assert len(files) == len(gpu_check.TESTS)


def test_the_backends_that_matter_are_tested_first(monkeypatch):
    shares = {}

    def one(backend, seconds):
        shares[backend] = seconds
        return {"status": "passed"}

    monkeypatch.setattr(gpu_check, "test_one", one)
    result = {"backends": {"portable": None, "cuda": None, "triton": None}}
    gpu_check.test(gpu_check.Budget(1000), result, lambda: None)
    assert list(shares) == ["triton", "cuda", "portable"] and shares["triton"] == pytest.approx(240, abs=5)
    assert shares["portable"] == pytest.approx(600, abs=5)  # what the others left


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that is not there: all phases end well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_best_capability", lambda: (9, 0))
    monkeypatch.setattr(environment, "facts", lambda command: {"command": command})
    monkeypatch.setattr(gpu, "facts", lambda device: {"name": "Made Up"})
    monkeypatch.setattr(gpu_check, "build", lambda *arguments: {"status": "built"})
    monkeypatch.setattr(gpu_check, "test_one", lambda *arguments: {"status": "passed"})

    def benchmark(budget, device, path, result):
        return json.loads(path.read_text()) | {"unmeasured": []}

    monkeypatch.setattr(gpu_check, "benchmark", benchmark)


def test_a_whole_run(pretended, monkeypatch, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert gpu_check.main(["--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["tests"]["portable"] == {"status": "passed"} and result["build"] == {"status": "built"}
    assert "tests on portable: passed" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "build", lambda *arguments: {"status": "failed with status 1"})
    assert gpu_check.main(["--output", str(path)]) == 1
    assert gpu_check.main(["--output", str(path), "--skip", "build"]) == 0


LINES = {
    "passed": {"id": "a", "when": "call", "outcome": "passed"},
    "skipped": {"id": "a", "when": "setup", "outcome": "skipped"},
}


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([LINES["passed"]], "passed"),
        ([LINES["skipped"]], "failed: no test passed"),
        ([{"collected": ["a", "b"]}, LINES["passed"]], "failed: tests without an outcome"),
    ],
)
def test_a_suite_that_ran_nothing_has_not_passed(lines, status, monkeypatch):
    def pretend(command, seconds, variables):
        Path(variables["MI_KERNELS_REPORT"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0, ""

    monkeypatch.setattr(gpu_check, "_run", pretend)
    assert gpu_check.test_one("triton", 10.0)["status"] == status


def test_exit_status():
    good = {"build": {"status": "built"}, "tests": {"triton": {"status": "passed"}}}
    good |= {"broken": {}, "unmeasured": []}
    assert gpu_check.passed(good, [])
    for change in (
        {"build": {"status": "stopped: out of time"}},
        {"build": {"status": "failed with status 1"}},
        {"tests": {"triton": {"status": "passed"}, "cuda": {"status": "not reached"}}},
        {"tests": {}},
        {"broken": {"a": "b"}},
        {"unmeasured": ["a"]},
    ):
        assert not gpu_check.passed(good | change, []), change
    nothing = {"build": None, "tests": None, "broken": {}, "unmeasured": ["a"]}
    assert gpu_check.passed(nothing, gpu_check.PHASES) and not gpu_check.passed(nothing, ["build", "tests"])


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
    result = _empty([])
    gpu_cases._measure(("modulate", case, torch.float32, "forward"), place, result, lambda found: None)
    assert [entry["backend"] for entry in result["gates"]] == ["portable", "reference"]
    result["gates"] = [entry | {"name": "tokens"} for entry in result["gates"]]
    result["ceilings"] = {"copy_bytes_per_s": 1e9}
    shares = [row for row in gpu_figures.figures(result) if "bandwidth" in row["figure"]]
    assert len(shares) == 2 and all(row["measured"] > 0 for row in shares)


def test_names_of_files():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def _empty(unmeasured):
    result = {"ceilings": None, "cases": [], "gates": [], "broken": {}, "figures": [], "under way": None}
    return result | {"unmeasured": list(unmeasured), "backends": {"portable": None}}


@pytest.fixture
def two_steps(monkeypatch):
    """The benchmark on the CPU, of one tiny shape, with what a GPU would have beside."""
    steps = [
        ("dense", shapes.by_name(["tiny"])[0], torch.bfloat16, work) for work in measure.passes.PASSES[:2]
    ]
    monkeypatch.setattr(gpu_cases, "steps", lambda: iter(steps))
    monkeypatch.setattr(gpu_cases, "RIVALS", ("einsum",))
    ceilings = environment.ceilings
    monkeypatch.setattr(
        environment, "ceilings", lambda dtypes, _, *rest: ceilings(dtypes, 32, 0.01, *rest[1:])
    )
    return [gpu_cases.name_of(step) for step in steps]


def _measure_all(result, save=lambda found: None, names=("portable",), seconds=60.0):
    return gpu_cases.measure_all(time.monotonic() + seconds, "cpu", list(names), result, save)


def test_results_are_saved_as_they_come(two_steps, monkeypatch):
    saved = []
    result = _empty(two_steps)
    assert _measure_all(result, lambda r: saved.append((len(r["cases"]), len(r["figures"]) > 0)))
    assert saved[-1] == (2, True) and (1, True) in saved
    assert result["unmeasured"] == [] and result["ceilings"]["copy_bytes_per_s"] > 0
    monkeypatch.setattr(measure, "measure", lambda *arguments: 1 / 0)
    result = _empty(two_steps)
    assert _measure_all(result) and result["broken"] == dict.fromkeys(
        two_steps, "ZeroDivisionError: division by zero"
    )
    result = _empty(two_steps)
    assert _measure_all(result, seconds=0) and result["unmeasured"] == two_steps


@pytest.fixture
def failing(monkeypatch):
    """The backend `reference` fails before anything is measured."""
    attempt = gpu_cases._try

    def fail(*arguments):
        if backends.choose(torch.empty(0)) == "reference":
            raise RuntimeError("an illegal memory access")
        attempt(*arguments)

    monkeypatch.setattr(gpu_cases, "_try", fail)


def test_a_backend_that_fails_costs_no_other(two_steps, failing):
    result = _empty(two_steps)
    assert _measure_all(result, names=("reference", "portable"))
    assert list(result["broken"]) == [f"{step} on reference" for step in two_steps]
    for case in result["cases"]:
        assert [c["name"] for c in case["candidates"] if c["kind"] == "ours"] == ["mi_kernels portable"]
    assert len(result["cases"]) == 2 and result["unmeasured"] == []


def test_a_backend_that_fails_while_it_is_timed_costs_no_other(monkeypatch):
    def fail(*arguments):
        if backends.choose(torch.empty(0)) == "reference":
            raise RuntimeError("no memory")
        return {}

    monkeypatch.setattr(gpu_cases.cases, "measure", fail)
    result, place = _empty([]), measure.Place("cpu", timing.wall, ("reference", "portable"))
    step = ("modulate", next(gates.modulations()), torch.float32, "forward")
    gpu_cases._measure(step, place, result, lambda found: None)
    assert result["gates"] == [{"backend": "portable"}]
    assert result["broken"] == {f"{gpu_cases.name_of(step)} on reference": "RuntimeError: no memory"}


@pytest.mark.parametrize("phase", ["checked", "timed"])
def test_a_backend_that_fails_in_the_middle_of_a_case_costs_its_own_row(phase, two_steps, monkeypatch):
    """After the trial: in the check against float64, or when it is timed."""
    monkeypatch.setattr(gpu_cases, "ruined", lambda device: False)
    calls, ours = [], measure._ours

    def backend_of_ours(name):
        def call(*arguments):
            calls.append(name)
            if name == "reference" and calls.count(name) > (0 if phase == "checked" else 4):
                raise RuntimeError("no memory")
            return ours(name)(*arguments)

        return call

    monkeypatch.setattr(measure, "_ours", backend_of_ours)
    result = _empty(two_steps[:1])
    assert _measure_all(result, names=("reference", "portable"))
    assert result["broken"] == {f"{two_steps[0]} on reference": "fails: RuntimeError: no memory"}
    rows = {c["name"]: c for c in result["cases"][0]["candidates"]}
    assert rows["mi_kernels portable"]["median_s"] > 0 and rows["einsum"]["median_s"] > 0
    assert "median_s" not in rows["mi_kernels reference"] and result["unmeasured"] == []
    # Where it takes the GPU with it, the case is left to the next process, which leaves that backend out.
    calls.clear()
    monkeypatch.setattr(gpu_cases, "ruined", lambda device: bool(result["broken"]))
    result = _empty(two_steps[:1])
    assert not _measure_all(result, names=("reference", "portable"))
    assert result["cases"] == [] and result["unmeasured"] == two_steps[:1]


def test_a_ruined_process_is_left_and_the_next_goes_on(two_steps, failing, monkeypatch):
    monkeypatch.setattr(gpu_cases, "ruined", lambda device: len(result["broken"]) > len(result["cases"]))
    result = _empty(two_steps)
    assert not _measure_all(result, names=("reference", "portable"))
    assert list(result["broken"]) == [f"{two_steps[0]} on reference"] and result["unmeasured"] == two_steps
    monkeypatch.setattr(gpu_cases, "ruined", lambda device: False)
    assert _measure_all(result, names=("reference", "portable"))
    assert len(result["cases"]) == 2 and result["unmeasured"] == [] and len(result["broken"]) == 2


CHILD = """
import json, os, sys, time
path = sys.argv[-3]
result = json.load(open(path))
step = result["unmeasured"][0] if result["unmeasured"] else None
def save(): json.dump(result, open(path, "w"))
if step == "hangs":
    time.sleep(100)
result["under way"] = {"step": step, "backend": "cuda" if step == "one" else None}
if f"{step} on cuda" in result["broken"]:
    result["unmeasured"].pop(0)
    result["under way"] = None
    save()
    sys.exit(0 if len(result["unmeasured"]) == 0 else os.execv(sys.executable, [sys.executable, *sys.argv]))
save()
os.kill(os.getpid(), 11)
"""


def test_processes_that_die_or_hang_cost_one_step(tmp_path):
    child, path = tmp_path / "child.py", tmp_path / "result.json"
    child.write_text(CHILD)
    budget = gpu_check.Budget(18)
    begin = time.monotonic()
    result = gpu_check.benchmark(budget, "cpu", path, _empty(["one", "two", "hangs"]), (str(child),))
    assert list(result["broken"]) == ["one on cuda", "two"] and "status -11" in result["broken"]["two"]
    assert result["unmeasured"] == ["hangs"] and time.monotonic() - begin < 30


def test_a_process_that_fails_outside_of_all_steps_is_not_started_again(tmp_path):
    (tmp_path / "child.py").write_text("1 / 0")
    result = gpu_check.benchmark(
        gpu_check.Budget(60), "cpu", tmp_path / "result.json", _empty(["one"]), (str(tmp_path / "child.py"),)
    )
    assert "ZeroDivisionError" in result["broken"]["benchmark"] and result["unmeasured"] == ["one"]


def test_the_process_measures_what_is_left(two_steps, tmp_path):
    path = tmp_path / "result.json"
    run.save(path, _empty(two_steps[1:]))
    assert gpu_cases.main([str(path), "cpu", str(time.monotonic() + 60)]) == 0
    result = json.loads(path.read_text())
    assert [case["pass"] for case in result["cases"]] == ["forward+backward"] and result["unmeasured"] == []


def _dense(name, out, work, triton, cuda, gemm, rival):
    kinds = {"mi_kernels triton": ("ours", triton), "mi_kernels cuda": ("ours", cuda)}
    kinds |= {"mm": ("gemm", gemm), "einsum": ("rival", rival)}
    candidates = [{"name": n, "kind": k, "status": "ok", "median_s": s} for n, (k, s) in kinds.items()]
    return {"shape": {"name": name, "O": out}, "dtype": "bfloat16", "pass": work, "candidates": candidates}


def test_figures():
    """Of each backend: the fastest of ours at one shape must not hide the slow one at another."""
    gate = {"backend": "triton", "pass": "forward", "dtype": "bfloat16", "name": "tokens"}
    gate |= {"sizes": [[8, 10], [1, 10], [1, 10]], "candidates": {"mi_kernels": {"median_s": 2.0}}}
    passed = {"status": "passed", "passed": 3, "collected": 3, "failures": []}
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
        "  portable: neither tested nor measured: a reason",
        "  tests on triton: passed (3 passed of 3)",
        "  tests on cuda: stopped: out of time (1 passed of 9)",
        "    not reached: 8 tests of tests/test_a.py",
        "  1 cases were not measured, a case the first",
    ):
        assert line in lines
    assert sum("NOT REACHED" in line for line in lines) == 4
    assert sum(line.endswith(": not measured") for line in lines) == 4
