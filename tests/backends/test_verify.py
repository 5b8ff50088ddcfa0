"""`python -m mi_kernels verify` without a GPU: its suites on the CPU, and children that go wrong."""

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from mi_kernels import backends, records, verify
from mi_kernels.testing import devices, isolated, suite

pytestmark = pytest.mark.subprocess

ROOT = Path(__file__).resolve().parents[2]


def run_suite(backend, dtype, family, chosen=lambda name: True):
    """The lines that it says, by state, and its status."""
    lines = []
    found = suite.suite(family, backend)
    picked = {n: c for n, c in found.items() if suite.takes(n, str(dtype).split(".")[1]) and chosen(n)}
    torch.set_num_threads(1)  # as its own process does
    try:
        status = suite.run_checks(picked, backend, dtype, "cpu", lambda **line: lines.append(line))
    finally:
        torch.use_deterministic_algorithms(False)
    return status, {s: [one for one in lines if one["state"] == s] for s in ("begun", "passed", "failed")}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.bfloat16) for family in records.FAMILIES), ("interaction", torch.float32)],
    ids=str,
)
def test_every_check_passes_on_the_cpu(family, dtype):
    small = ("kernel odd", "kernel few")  # of the sizes for kernels, which test_cuda_values.py has
    status, lines = run_suite("portable", dtype, family, lambda n: not n.startswith("kernel") or n in small)
    assert status == 0 and lines["failed"] == []
    assert len(lines["passed"]) == len(lines["begun"]) > 30
    assert all(0 <= line["error"] <= 1 for line in lines["passed"])
    assert max(line["error"] for line in lines["passed"]) > 0.1


# What a kernel may do wrong, by the family whose suite has to notice it. Done to what the portable backend
# calls.
WRONG = {
    "interaction": """
from mi_kernels.ops.interaction import autograd as a
kernel = a._FORWARD.plain["portable"]
a._FORWARD.plain["portable"] = lambda *args: kernel(*args).mul_(1.02)""",
    "modulate": """
from mi_kernels.ops.modulate import autograd as a
kernel = a._MODULATE_GRADS["portable"]
a._MODULATE_GRADS["portable"] = lambda *args: [t if t is None else t.flip(0) for t in kernel(*args)]""",
    "diagonal": """
from mi_kernels.ops.gate import autograd as a
kernel = a._DIAGONAL["portable"]
a._DIAGONAL["portable"] = lambda x, *args: kernel(x.contiguous().view(-1).as_strided(x.shape, x.stride())
    if x.is_contiguous() else torch.zeros_like(x), *args)""",
    "gated_interaction": """
from mi_kernels.ops.gate import autograd as a
kernel = a._GATED["portable"]
a._GATED["portable"] = lambda *args: [torch.empty_like(t) for t in kernel(*args)]""",
}
CHILD = """
import os, sys, time, torch
from mi_kernels.testing import devices, suite
backend, device, dtype, family = sys.argv[1:]
torch.set_num_threads(1)
whole = suite.suite
suite.suite = lambda *a: {n: c for n, c in whole(*a).items() if not n.startswith("kernel")}
FAULT
sys.exit(suite.main(["portable", "cpu", dtype, family]))
"""


def child(tmp_path, fault):
    path = tmp_path / "child.py"
    path.write_text(CHILD.replace("FAULT", fault))
    return [sys.executable, "-W", "ignore", str(path)]


@pytest.mark.parametrize("family", WRONG)
def test_a_wrong_kernel_is_noticed(family, tmp_path):
    """By values, gradients, one layout alone, and memory that nobody wrote."""
    command = [*child(tmp_path, WRONG[family]), "triton", "cuda:0", "float32", family]
    ended = isolated.Ended("", *isolated.run(command, 120, verify.environment()), 1.0)
    found = verify.outcome(ended)
    assert ended.status == 1 and found.fault, ended.output[-1500:]
    assert found.checks > 0 if family in ("diagonal", "modulate") else found.fault.count(";") == 2


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there, on which both backends run."""
    monkeypatch.setenv("MI_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(records, "device_of", lambda index: ("Made Up", "9.0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(verify, "workers_for", lambda device: 2)
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    for remembered in (backends._auto_choice, records.here):
        remembered.cache_clear()
    yield
    for remembered in (backends._auto_choice, records.here):
        remembered.cache_clear()


# Children that only say what suite.py would, so that they start at once. What goes wrong does so in one
# family of one backend each, with the check that has to be named.
PASSES = """
import json, os, sys, time
backend, device, dtype, family = sys.argv[1:]
where = backend, family
def say(check, state, **more):
    print(json.dumps({"check": check, "state": state} | more), flush=True)
print("a line of a library", flush=True)
say("a", "passed", error=0.5, seconds=0.1)
"""
FAULTS = """
if where == ("cuda", "interaction"):
    say("b", "begun")
    time.sleep(100)
if where == ("triton", "diagonal"):
    say("b", "begun")
    os.kill(os.getpid(), 11)
if where == ("cuda", "modulate"):
    print("Traceback...\\nImportError: no such library")
    sys.exit(1)
if where == ("triton", "modulate"):
    say("c", "failed", fault="RuntimeError: an illegal memory access")
    sys.exit(3)
"""


def saying(tmp_path, what=""):
    path = tmp_path / "child.py"
    path.write_text(PASSES + what)
    return [sys.executable, str(path)]


def test_a_ruined_device_ends_a_process_and_the_check_is_named(tmp_path):
    fault = """
devices.ruined = lambda device: True
def broken(dtype, device): raise RuntimeError("an illegal memory access")
sys.exit(suite.run_checks({"c": broken, "d": broken}, "portable", torch.float32, "cpu"))"""
    command = [*child(tmp_path, fault), "triton", "cuda:0", "float32", "modulate"]
    ended = isolated.Ended("", *isolated.run(command, 120, verify.environment()), 1.0)
    assert ended.status == suite.RUINED and '"d"' not in ended.output
    fault = verify.outcome(ended).fault
    assert "c: RuntimeError: an illegal memory access" in fault and "nothing but errors" in fault


def test_what_goes_wrong_costs_its_own_family(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verify, "LIMIT", 4.0)
    monkeypatch.setattr(verify, "HANGS", 3.0)
    begin = time.monotonic()
    status = verify.main(["--dtype", "bfloat16"], saying(tmp_path, FAULTS))
    assert status == 1 and time.monotonic() - begin < 100
    found = {(r.backend, r.family): r.fault for r in records.read()[0]}
    assert len(found) == 15
    for key, texts in {
        ("cuda", "interaction"): ("b: not done after ",),
        ("triton", "diagonal"): ("b: ended with status -11",),
        ("triton", "modulate"): ("c: RuntimeError: an illegal memory access", "nothing but errors"),
        ("cuda", "modulate"): ("after it: ended with status 1", "ImportError: no such library"),
    }.items():
        fault = found.pop(key)
        assert all(text in fault for text in texts), fault
    assert set(found.values()) == {None}
    output = capsys.readouterr().out
    assert "triton interaction bfloat16: passed, 1 checks, worst error 0.50 of what is allowed" in output
    assert "cuda interaction bfloat16: FAILED after 1 checks: b: not done after " in output
    assert "11 of 15 passed; written to" in output


def test_auto_takes_what_passed_in_a_later_process(gpu, tmp_path, monkeypatch):
    assert verify.main(["--dtype", "bfloat16", "--backend", "triton"], saying(tmp_path)) == 0
    (one,) = {(r.device, r.capability, r.dtype) for r in records.read()[0]}
    assert one == ("Made Up", "9.0", "bfloat16")
    tensor = type("T", (), {"device": torch.device("cuda", 0), "dtype": torch.bfloat16})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {backends.choose(tensor, family) for family in records.FAMILIES} == {"triton"}


def test_what_the_time_does_not_reach_is_no_failure(gpu, tmp_path, capsys):
    """It has no record, and a later run can add it."""
    slow = "if family != 'interaction': time.sleep(100)"
    arguments = ["--dtype", "float16", "--backend", "triton", "--minutes", "0.1"]
    status = verify.main(arguments, saying(tmp_path, slow))
    assert status == 1 and [r.family for r in records.read()[0]] == ["interaction"]
    assert "1 of 8 passed" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert verify.main([]) == 2 and "no GPU" in capsys.readouterr().err


def test_where_nothing_can_run_it_says_why(gpu, monkeypatch, capsys):
    monkeypatch.setattr(backends, "why_not", lambda name: f"no {name}")
    assert verify.main([]) == 2
    printed = capsys.readouterr()
    assert "cuda: cannot run: no cuda" in printed.out and "no compiled backend" in printed.err


def test_it_refuses_a_place_that_others_can_write_before_it_works(gpu, monkeypatch, capsys, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o777)
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setattr(verify, "verify", lambda *arguments: 1 / 0)
    assert verify.main([]) == 2
    assert "others may write" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--backend", "cpu"], ["--dtype", "int8"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        verify.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_command_line_has_it():
    done = subprocess.run(
        [sys.executable, "-m", "mi_kernels", "verify", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "--minutes" in done.stdout


def test_a_check_that_is_not_there_is_named(capsys):
    assert suite.main(["portable", "cpu", "float32", "modulate", "values typo"]) == 2
    assert "has no check 'values typo'" in capsys.readouterr().err


def test_the_largest_engine_is_checked_where_it_runs():
    names = list(suite.suite("interaction", "cuda", (9, 0)))
    assert names[0].startswith("kernel 64x1") and len(names) > len(
        suite.suite("interaction", "triton", (9, 0))
    )
    assert not suite.takes("kernel 256x1", "float16") and suite.takes("kernel 256x1", "bfloat16")


def test_output_that_was_cut_off_counts_as_far_as_it_came():
    cut = json.dumps({"check": "a", "state": "passed", "error": 0.25}) + '\n{"check": "b", "sta'
    assert verify.outcome(isolated.Ended("x", 0, cut, 1.0)) == (1, 0.25, None, True)
    assert verify.outcome(isolated.Ended("x", 0, "", 1.0)).fault == "no check ran"


def test_a_device_that_answers_is_not_ruined(monkeypatch):
    assert not devices.ruined("cpu")
    monkeypatch.setattr(torch, "ones", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("sticky")))
    assert devices.ruined("cpu")


OUT_OF_MEMORY = '{"check": "b", "state": "failed", "fault": "OutOfMemoryError: no space"}'


@pytest.mark.parametrize(
    ("status", "output", "told"),
    [
        (1, "Traceback\nImportError: no such library", "no such library"),
        (
            1,
            '{"check": "a", "state": "failed", "fault": "OutOfMemoryError: CUDA out of memory"}',
            "out of memory",
        ),
        (None, '{"check": "a", "state": "passed", "error": 0.1, "seconds": 99.0}', "not done after 100 s"),
        (0, "", "no check ran"),
    ],
)
def test_what_says_nothing_of_the_kernels_is_told_and_not_recorded(status, output, told):
    """Else a busy GPU would keep them from being used, and nobody would say so again."""
    found = verify.outcome(isolated.Ended("x", status, output, 100.0))
    assert not found.judged and told in found.fault


@pytest.mark.parametrize(
    ("status", "output"),
    [
        (None, '{"check": "a", "state": "begun"}'),
        (0, '{"check": "a", "state": "begun"}'),
        (-11, '{"check": "a", "state": "begun"}'),
        (1, '{"check": "a", "state": "failed", "fault": "result 0"}'),
        (1, '{"check": "a", "state": "failed", "fault": "result 0"}\n' + OUT_OF_MEMORY),
    ],
)
def test_what_does_is_recorded(status, output):
    found = verify.outcome(isolated.Ended("x", status, output, 100.0))
    assert found.judged and found.fault.startswith("a: ")


def test_no_variable_of_the_environment_lets_a_wrong_kernel_pass(tmp_path, monkeypatch):
    """Assertions that are left out, tf32 for float32, or another package in the current directory."""
    for name, value in (("PYTHONOPTIMIZE", "1"), ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")):
        monkeypatch.setenv(name, value)
    (tmp_path / "mi_kernels").mkdir()
    (tmp_path / "mi_kernels" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    wrong = WRONG["modulate"] + "\nassert torch.backends.cuda.matmul.fp32_precision != 'tf32'"
    command = [*child(tmp_path, wrong), "triton", "cuda:0", "float32", "modulate"]
    for optimized in (command, [command[0], "-O", *command[1:]]):
        status, output = isolated.run(optimized, 120, verify.environment(), tmp_path)
        assert status == 1 and '"state": "failed"' in output, output[-1500:]
    ask = [sys.executable, "-m", "mi_kernels.testing.suite", "portable", "cpu", "float32", "modulate", "typo"]
    assert "has no check 'typo'" in isolated.run(ask, 120, verify.environment(), tmp_path)[1]


def test_float32_is_checked_without_tf32_whatever_is_set():
    settings, seen = torch.backends.cuda.matmul, []
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        checks = {"a": lambda dtype, device: seen.append(settings.fp32_precision) or 0.5}
        assert suite.run_checks(checks, "portable", torch.float32, "cpu", lambda **line: None) == 0
        assert seen == ["ieee"]
        nan = {"a": lambda dtype, device: float("nan")}
        assert suite.run_checks(nan, "portable", torch.float32, "cpu", lambda **line: None) == 1
    finally:
        settings.fp32_precision = before
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["cpu", "zzz", "cuda:9"])
def test_a_device_that_cannot_be_checked(device, gpu, capsys):
    with pytest.raises(SystemExit):
        verify.main(["--device", device])
    assert "--device: expected a GPU such as cuda:0" in capsys.readouterr().err
