"""`make gpu-check` as far as it goes without a GPU: its stages, and each way in which one can fail.

Kernels by themselves are in test_gpu_smoke.py, measurements in test_gpu_cases.py, figures and the summary in
test_gpu_figures.py, what pytest reports in test_gpu_report.py.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import environment, results
from mi_kernels import backends
from mi_kernels.testing import isolated
from tools import gpu, gpu_benchmark, gpu_build, gpu_check, gpu_smoke, gpu_tests

pytestmark = pytest.mark.tools


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "result.json"
    assert gpu_check.main(["--output", str(output)]) == 2
    assert "no GPU" in capsys.readouterr().err and not output.exists()


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0"], ["lunch"], ["--backend", "cpu"], ["--output", "result.log"]]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_stages_run_in_their_order_whatever_that_of_their_names():
    assert gpu_check._options(["benchmark", "smoke"]).stages == ["smoke", "benchmark"]
    assert gpu_check._options([]).stages == list(gpu_check.STAGES)


def test_the_package_is_imported_after_the_build():
    """It looks for its libraries once, so that one that is built later would count as not built."""
    script = (
        "import sys, torch; from tools import gpu_check as g; torch.cuda.is_available = lambda: True\n"
        "torch.cuda.device_count = lambda: 1; torch.cuda.set_device = lambda device: None\n"
        "def build(*arguments): print('mi_kernels' in sys.modules); sys.exit(7)\n"
        "g._build = build; g.main([])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (7, "False\n"), done.stderr


# ---- build ----


@pytest.mark.parametrize(("capability", "archs"), [((9, 0), "90a"), ((8, 0), "80"), ((12, 0), "120")])
def test_the_build_is_for_the_architecture_that_is_there(capability, archs, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("MI_KERNELS_CUDA_ARCHS", raising=False)
    (tmp_path / "nvcc").touch()
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    assert gpu_build.environment("cuda:0")["MI_KERNELS_CUDA_ARCHS"] == archs
    monkeypatch.setenv("MI_KERNELS_CUDA_ARCHS", "80;90a")
    assert gpu_build.environment("cuda:0")["MI_KERNELS_CUDA_ARCHS"] == "80;90a"


@pytest.fixture
def building(monkeypatch, tmp_path):
    """The commands that would build."""
    ran = []

    def run(command, *arguments):
        ran.append(command[1:])
        return 0, ""

    monkeypatch.setattr(isolated, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    (tmp_path / "library.so").write_bytes(b"12")
    monkeypatch.setattr(gpu_build, "LIBRARY", tmp_path / "library.so")
    monkeypatch.setattr(gpu_build, "find_spec", lambda name: name)
    return ran


def test_a_library_that_was_brought_along_and_runs_is_taken(building, monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    assert gpu_build.build("cuda:0", 9.0) == {"status": "prebuilt", "library_bytes": 2} and building == []
    assert gpu_build.build("cuda:0", 9.0, again=True)["status"] == "built" and len(building) == 1


def test_one_that_does_not_run_here_is_built_again(building, monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name: "for another GPU")
    found = gpu_build.build("cuda:0", 9.0)
    assert found["status"] == "built" and found["reason"] == "for another GPU"
    assert building == [["setup.py", "build_ext", "--inplace"]]
    monkeypatch.setattr(gpu_build, "find_spec", lambda name: None if name == "ninja" else name)
    assert gpu_build.build("cuda:0", 9.0)["status"] == "left out: ninja not installed" and len(building) == 1


def test_a_build_that_fails_or_takes_too_long_says_so(building, monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name: "not built")
    for status, words in ((2, "failed with status 2"), (None, "stopped: out of time")):
        monkeypatch.setattr(isolated, "run", lambda *a, status=status: (status, "an error"))
        found = gpu_build.build("cuda:0", 9.0)
        assert found["status"] == words and found["end"] == "an error" and not gpu_check.good(words)


# ---- tests ----

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
    def pretend(command, seconds, variables, folder):
        Path(variables["MI_KERNELS_REPORT"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert variables["MI_KERNELS_TEST_PLACES"] == "triton-cuda"
        return 0, ""

    monkeypatch.setattr(isolated, "run", pretend)
    assert gpu_tests.test_one("triton", 10.0)["status"] == status


def test_outcomes_and_the_texts_of_failures():
    lines = [
        {"collected": ["a", "b", "c", "d", "e"]},
        {"id": "a", "when": "setup", "outcome": "passed"},
        {"id": "a", "when": "call", "outcome": "passed"},
        {"id": "b", "when": "call", "outcome": "failed", "text": "assert 1 == 2"},
        {"id": "c", "when": "setup", "outcome": "failed", "text": "ValueError"},
        {"id": "d", "when": "call", "outcome": "passed"},
        {"id": "d", "when": "teardown", "outcome": "failed", "text": "torn"},
        {"id": "f", "when": "???", "outcome": "failed", "text": "worker died"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"cut": '
    found = gpu_tests.outcomes(text)
    assert [found[word] for word in gpu_tests.OUTCOMES] == [1, 2, 2, 0]
    assert found["failures"] == {"b": "assert 1 == 2", "c": "ValueError", "d": "torn", "f": "worker died"}
    assert found["missing"] == {"e": 1} and found["collected"] == 5


def test_the_command_has_files_that_exist_and_limits():
    command = gpu_tests.command_for(4)
    files = [word for word in command if word.startswith("tests/")]
    assert len(files) == len(gpu_tests.TESTS)
    assert f"--timeout={gpu_tests.ONE}" in command and "--timeout-method=thread" in command
    assert "--max-worker-restart=100" in command and command[command.index("-n") + 1] == "4"
    assert "-n" not in gpu_tests.command_for(1)


def test_each_backend_has_its_limit_and_what_is_not_reached_is_said(monkeypatch):
    given = {}

    def one(backend, seconds):
        given[backend] = seconds
        return {"status": "passed"}

    monkeypatch.setattr(gpu_tests, "test_one", one)
    result = {}
    gpu_tests.test(["cuda", "triton"], time.monotonic() + 1000, result, lambda: None)
    assert given == {name: gpu_tests.LIMITS[name] for name in ("cuda", "triton")}
    gpu_tests.test(["cuda", "triton"], time.monotonic() + 2, result, lambda: None)
    assert {one["status"] for one in result["tests"].values()} == {"not reached"}
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None)
    gpu_tests.test(["cuda"], time.monotonic() + 99, result, lambda: None)
    assert result["tests"]["cuda"]["status"].startswith("left out: pytest")


# ---- benchmark ----


def _empty(unmeasured):
    result = {"ceilings": None, "cases": [], "gates": [], "broken": {}, "figures": [], "under way": None}
    return result | {"unmeasured": list(unmeasured), "backends": {"portable": None}}


# It measures nothing: each step dies, hangs or is done, by its name; one on a backend that broke is left out.
CHILD = """
import json, os, sys, time
path = sys.argv[-3]
while True:
    result = json.load(open(path))
    if not result["unmeasured"]:
        sys.exit(0)
    step = result["unmeasured"][0]
    def save():
        json.dump(result, open(path + ".new", "w"))
        os.replace(path + ".new", path)
    result["under way"] = {"step": step, "backend": "cuda" if step in ("one", "hangs") else None}
    save()
    if f"{step} on cuda" not in result["broken"]:
        if step == "hangs":
            time.sleep(100)
        if step != "three":
            os.kill(os.getpid(), 11)
    result["unmeasured"].pop(0)
    result["under way"] = None
    save()
"""


def test_processes_that_die_or_hang_cost_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_benchmark, "STEP", 2.0)
    child, path = tmp_path / "child.py", tmp_path / "result.json"
    child.write_text(CHILD)
    steps = ["one", "two", "hangs", "three"]
    end, begin = time.monotonic() + 90, time.monotonic()
    result = gpu_benchmark.benchmark(end, "cpu", path, _empty(steps), (str(child),))
    assert list(result["broken"]) == ["one on cuda", "two", "hangs on cuda"]
    assert (
        "status -11" in result["broken"]["two"] and "not done after 2 s" in result["broken"]["hangs on cuda"]
    )
    assert result["unmeasured"] == [] and time.monotonic() - begin < 60
    assert not path.with_suffix(".log").exists()


def test_what_ruins_the_gpu_beside_others_costs_its_own_row(tmp_path):
    """It is told by the process that it ruined; the step is measured again without it."""
    child, path = tmp_path / "child.py", tmp_path / "result.json"
    script = CHILD.replace('"cuda" if step in ("one", "hangs") else None', "None")
    script = script.replace(
        "os.kill(os.getpid(), 11)",
        'result["broken"][f"{step} on cuda"] = "fails"; save(); sys.exit(3)',
    )
    child.write_text(script)
    end = time.monotonic() + 60
    result = gpu_benchmark.benchmark(end, "cpu", path, _empty(["two", "three"]), (str(child),))
    assert result["broken"] == {"two on cuda": "fails"} and result["unmeasured"] == []


def test_the_end_of_the_time_is_no_fault_of_the_step_that_runs(tmp_path):
    child, path = tmp_path / "child.py", tmp_path / "result.json"
    child.write_text(CHILD)
    end = time.monotonic() + gpu_benchmark.RESERVE * 2 + isolated.GRACE + 1
    result = gpu_benchmark.benchmark(end, "cpu", path, _empty(["hangs", "three"]), (str(child),))
    assert result["broken"] == {} and result["unmeasured"] == ["hangs", "three"]
    assert time.monotonic() < end + 5


def test_a_process_that_fails_or_hangs_outside_of_all_steps_is_not_started_again(tmp_path, monkeypatch):
    child, path = tmp_path / "child.py", tmp_path / "result.json"
    child.write_text("1 / 0")
    result = gpu_benchmark.benchmark(time.monotonic() + 60, "cpu", path, _empty(["one"]), (str(child),))
    assert "ZeroDivisionError" in result["broken"]["benchmark"] and result["unmeasured"] == ["one"]
    monkeypatch.setattr(gpu_benchmark, "START", 1.0)
    child.write_text("import time; time.sleep(100)")
    result = gpu_benchmark.benchmark(time.monotonic() + 60, "cpu", path, _empty(["one"]), (str(child),))
    assert "not done" in result["broken"]["benchmark"]


# ---- the whole, and its summary ----


GATES = [
    {
        "backend": "cuda",
        "pass": "forward",
        "dtype": "bfloat16",
        "name": "tokens",
        "sizes": [[8, 10], [1, 10], [1, 10]],
        "candidates": {"mi_kernels": {"median_s": 2.0}},
    }
]


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that is not there: all stages end well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    monkeypatch.setattr(environment, "facts", lambda command: {"command": command})
    monkeypatch.setattr(gpu, "facts", lambda device: {"name": "Made Up"})
    monkeypatch.setattr(gpu_check, "_build", lambda *arguments: {"status": "built"})
    monkeypatch.setattr(gpu_tests, "test_one", lambda *arguments: {"status": "passed"})
    for stage in ("smoke", "sanitize"):
        ended = {"status": "passed", "cases": {}, "missing": []}
        monkeypatch.setattr(gpu_smoke, stage, lambda *a, ended=ended: dict(ended))

    def benchmark(end, device, path, result):
        return results.read(path) | {
            "unmeasured": [],
            "gates": GATES,
            "ceilings": {"copy_bytes_per_s": 1e3},
        }

    monkeypatch.setattr(gpu_benchmark, "benchmark", benchmark)
    return monkeypatch


def test_a_whole_run(pretended, tmp_path, capsys):
    path = tmp_path / "folder" / "result.json"
    assert gpu_check.main(["--output", str(path)]) == 0
    result = results.read(path)
    assert result["build"] == {"status": "built"} and result["failed stages"] == []
    assert result["tests"] == {name: {"status": "passed"} for name in ("cuda", "triton", "portable")}
    printed, summary = capsys.readouterr().out, path.with_suffix(".txt").read_text()
    assert summary in printed and "tests on portable: passed" in printed
    assert "failed: none" in summary


def test_a_backend_that_cannot_run_has_not_passed_unless_it_was_not_asked_for(pretended, tmp_path):
    """Else a build without CUDA kernels, or for another GPU, would pass by what PyTorch computes."""
    pretended.setattr(backends, "why_not", lambda name: None if name == "portable" else "a reason")
    path = tmp_path / "result.json"
    assert gpu_check.main(["--output", str(path)]) == 1
    assert results.read(path)["failed stages"] == ["backend cuda", "backend triton"]
    summary = path.with_suffix(".txt").read_text()
    assert "triton: left out: a reason" in summary and "failed: backend cuda, backend triton" in summary
    assert gpu_check.main(["--output", str(path), "--backend", "portable"]) == 0


@pytest.mark.parametrize("device", ["cpu", "zzz", "cuda:2"])
def test_a_device_that_is_not_there(device, pretended, capsys):
    assert gpu_check.main(["--device", device]) == 2
    assert "--device: expected a GPU such as cuda:0" in capsys.readouterr().err


def test_the_tests_of_another_device_are_left_out_and_said_to_be(pretended, tmp_path):
    path = tmp_path / "result.json"
    assert gpu_check.main(["tests", "--device", "cuda:1", "--output", str(path)]) == 1
    assert "left out: the tests run on cuda:0" in path.with_suffix(".txt").read_text()


@pytest.mark.parametrize("stage", ["build", "smoke", "tests", "sanitize", "benchmark"])
def test_each_stage_alone_and_what_it_costs_to_fail(stage, pretended, tmp_path):
    path = tmp_path / "result.json"
    assert gpu_check.main([stage, "--output", str(path)]) == 0
    result = results.read(path)
    others = [name for name in gpu_check.STAGES if name != stage]
    assert result["not asked for"] == others
    failed = {"status": "1 of 2 failed", "cases": {}, "missing": []}
    pretended.setattr(gpu_check, "_build", lambda *a: {"status": "failed with status 1"})
    pretended.setattr(gpu_smoke, "smoke", lambda *a: failed)
    pretended.setattr(gpu_smoke, "sanitize", lambda *a: failed)
    pretended.setattr(gpu_tests, "test_one", lambda *a: {"status": "stopped: out of time"})
    pretended.setattr(gpu_benchmark, "benchmark", lambda end, device, path, result: result)
    assert gpu_check.main([stage, "--output", str(path)]) == 1
    assert results.read(path)["failed stages"] == [stage]
    assert f"failed: {stage}; not asked for: {', '.join(others)}" in path.with_suffix(".txt").read_text()


def test_what_was_left_out_has_not_passed():
    for status in ("left out: no ninja", "stopped: out of time", "nothing ran", "failed", "not reached"):
        assert not gpu_check.good(status)
    result = {"stages": ["tests", "benchmark"], "tests": {}, "broken": {}, "unmeasured": ["a"]}
    result |= {"backends": {}, "cases": ["a"], "gates": []}
    assert gpu_check.faults(result) == ["tests", "benchmark"]
    result |= {"tests": {"cuda": {"status": "passed"}, "triton": {"status": "not reached"}}}
    assert gpu_check.faults(result | {"unmeasured": []}) == ["tests"]
    measured = result | {"stages": ["benchmark"], "unmeasured": []}
    assert gpu_check.faults(measured) == []
    assert gpu_check.faults(measured | {"broken": {"a": "b"}}) == ["benchmark"]
    assert gpu_check.faults(measured | {"cases": []}) == ["benchmark"]  # nothing that runs was measured
