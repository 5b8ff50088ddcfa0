"""The report of a suite on a GPU: what hangs, dies or ruins the GPU costs the test that did it and no other.

Each test runs a small suite with the plugin in a second pytest; there is no GPU, so what is asked of it is
answered by a conftest.py of that suite.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mi_kernels.testing import devices

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parents[2]
# Stands for mi_kernels/testing/devices.py, and is there at once. The device is ruined for a process from the
# moment on when it has left a mark.
CONFTEST = """
import os, sys, types
from pathlib import Path

def mark():
    return Path(__file__).with_name(f"ruined-{os.getpid()}")

def finish(device):
    if mark().exists():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

devices = types.ModuleType("mi_kernels.testing.devices")
devices.finish, devices.ruined = finish, lambda device: mark().exists()
sys.modules[devices.__name__] = devices
"""
BEGIN = """
import ctypes, os, time
from typing import NamedTuple
import pytest
from conftest import mark

class Here(NamedTuple):
    backend: str
    device: str

on_gpu = pytest.mark.parametrize("place", [Here("triton", "cuda")], ids=["triton-cuda"])
on_cpu = pytest.mark.parametrize("place", [Here("triton", "cpu")], ids=["triton"])
"""
AROUND = """
@on_gpu
@pytest.mark.parametrize("number", range(6))
def test_before(number, place): pass

{test}

@on_gpu
@pytest.mark.parametrize("number", range(6))
def test_after(number, place): pass
"""


def run(folder, test, *options, workers=2):
    """The lines of the report, and the status and output of pytest."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_a.py").write_text(BEGIN + AROUND.format(test=test))
    report = folder / "report"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.gpu_report"]
    command += ["-n", str(workers), "--max-worker-restart=9"] if workers else ["-p", "no:xdist"]
    command += [*options, "--rootdir", str(folder), str(folder / "test_a.py")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT), "MI_KERNELS_REPORT": str(report)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    return lines, done.returncode, done.stdout + done.stderr


def failures(lines):
    return {line["id"].split("::")[1] for line in lines if line.get("outcome") == "failed"}


def passes(lines):
    return [line["id"] for line in lines if line.get("when") == "call" and line["outcome"] == "passed"]


@pytest.fixture(autouse=True)
def _needs_xdist():
    pytest.importorskip("xdist")


def test_a_failure_has_its_text(tmp_path):
    test = "@on_gpu\ndef test_wrong(place): assert [1, 2] == [1, 3], 'the numbers differ'"
    lines, status, output = run(tmp_path, test)
    assert status == 1 and failures(lines) == {"test_wrong[triton-cuda]"}, output
    (line,) = (line for line in lines if line.get("outcome") == "failed")
    assert "the numbers differ" in line["text"] and len(line["text"].splitlines()) <= 15
    assert line["when"] == "call" and "ruined" not in line and line["seconds"] >= 0
    assert all("text" not in line for line in lines if line.get("outcome") == "passed")


RUINS = {
    "raises": "mark().touch(); raise RuntimeError('CUDA error: unspecified launch failure')",
    "is-late": "mark().touch()",  # the kernel runs on while the test returns
}


@pytest.mark.parametrize("way", RUINS)
def test_a_ruined_gpu_costs_one_test(way, tmp_path):
    lines, status, output = run(tmp_path, f"@on_gpu\ndef test_ruins(place): {RUINS[way]}")
    assert status == 1 and failures(lines) == {"test_ruins[triton-cuda]"}, output
    assert len(passes(lines)) == 12, output  # on the worker that came in place of the other
    own, crash = (line for line in lines if line.get("outcome") == "failed")
    assert own["ruined"] and "CUDA error: " in own["text"]
    assert crash["when"] == "???" and "crashed while running" in crash["text"]


def test_every_test_may_ruin_its_gpu(tmp_path):
    test = "@on_gpu\n@pytest.mark.parametrize('n', range(5))\ndef test_ruins(n, place): mark().touch()"
    lines, _, output = run(tmp_path, test)
    assert len(failures(lines)) == 5 and len(passes(lines)) == 12, output


def test_without_workers_nothing_more_is_blamed(tmp_path):
    lines, status, output = run(tmp_path, f"@on_gpu\ndef test_ruins(place): {RUINS['raises']}", workers=0)
    assert status == 1 and failures(lines) == {"test_ruins[triton-cuda]"}, output
    assert len(passes(lines)) == 6  # those before it; what comes after has no outcome


def test_nothing_is_asked_of_a_gpu_on_the_cpu(tmp_path):
    test = f"@on_cpu\ndef test_wrong(place): {RUINS['raises']}\n@on_cpu\ndef test_wrong_too(place): 1 / 0"
    lines, _, output = run(tmp_path, test, "-k", "wrong", workers=0)
    assert failures(lines) == {"test_wrong[triton]", "test_wrong_too[triton]"}, output


def test_the_stand_in_answers_what_is_asked():
    assert devices.ruined("cpu") is False and devices.ruined("no device") is True
    assert inspect.signature(devices.finish).parameters.keys() == {"device"}


def test_a_worker_that_dies_costs_one_test(tmp_path):
    lines, _, output = run(tmp_path, "@on_gpu\ndef test_dies(place): os.kill(os.getpid(), 11)")
    assert failures(lines) == {"test_dies[triton-cuda]"} and len(passes(lines)) == 12, output


def test_what_hangs_in_c_costs_one_test_and_its_limit(tmp_path):
    """A call that keeps the interpreter's lock could not be left; one that waits for a GPU gives it back."""
    pytest.importorskip("pytest_timeout")
    test = "@on_gpu\ndef test_hangs(place): ctypes.CDLL(None).sleep(100)"
    lines, _, output = run(tmp_path, test, "--timeout=2", "--timeout-method=thread")
    assert failures(lines) == {"test_hangs[triton-cuda]"} and len(passes(lines)) == 12, output
    (line,) = (line for line in lines if line.get("outcome") == "failed")
    assert "crashed while running" in line["text"]
    seconds = float(line["text"].rsplit(" s after")[0].split(", ")[-1])
    assert 1.9 <= seconds < 20
