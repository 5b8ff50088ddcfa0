"""Child processes with a time limit, of which a hang or a crash costs one alone."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import interruptible

from mi_kernels import verify
from mi_kernels.testing import isolated

pytestmark = pytest.mark.subprocess


def test_a_process_that_ignores_its_end_is_ended():
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    script += "print('x', flush=True); time.sleep(60)"
    begin = time.monotonic()
    assert isolated.run([sys.executable, "-c", script], 2.0) == (None, "x\n")
    assert time.monotonic() - begin < 20


def test_jobs_run_side_by_side_and_none_begins_after_the_end():
    def job(name, seconds):
        return isolated.Job(name, [sys.executable, "-c", f"import time; time.sleep({seconds})"], 30.0)

    begin = time.monotonic()
    ended = list(isolated.run_all([job("a", 1.5), job("b", 1.5)], 2, begin + 60))
    assert {one.name for one in ended} == {"a", "b"} and all(one.status == 0 for one in ended)
    late = list(isolated.run_all([job("a", 100), job("b", 0)], 1, time.monotonic() + 1.0))
    assert [(one.name, one.status) for one in late] == [("a", None)]
    assert list(isolated.run_all([], 4, time.monotonic() + 1)) == []
    missing = isolated.Job("a", ["/no/such/program"], 1.0)
    assert next(isolated.run_all([missing], 1, time.monotonic() + 9)).status == 127


PARENT = """
import signal, sys, time
from mi_kernels.testing import isolated
isolated.end_with_this_process()
job = isolated.Job("x", [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); "
    f"open({sys.argv[1]!r}, 'w').write(str(os.getpid())); time.sleep(1000)"], 1000.0)
list(isolated.run_all([job], 1, time.monotonic() + 1000))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
def test_children_end_with_their_parent(number, tmp_path):
    """A hung kernel must not stay on the GPU when its user gives up or closes the terminal."""
    where = tmp_path / "pid"
    command = [sys.executable, "-W", "ignore", "-c", PARENT, str(where)]
    options = {"env": verify.environment(), "stderr": subprocess.DEVNULL, "preexec_fn": interruptible}
    parent = subprocess.Popen(command, **options)
    deadline = time.monotonic() + 300  # before the child would end by itself
    while not (where.exists() and where.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    pid = int(where.read_text())
    parent.send_signal(number)
    assert parent.wait(timeout=120) != 0
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child lives on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
def test_an_ignored_signal_stays_ignored(number, monkeypatch):
    """What nohup starts goes on when its terminal is closed."""
    handled = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL, number: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", handled.get)
    monkeypatch.setattr(signal, "signal", handled.__setitem__)
    isolated.end_with_this_process()
    assert {one for one, handler in handled.items() if callable(handler)} == handled.keys() - {number}
    assert handled[number] is signal.SIG_IGN


def test_what_was_written_is_known_where_the_pipe_stays_open(monkeypatch):
    """As of a process that hangs in the driver and cannot be ended: here a child of it holds the pipe."""
    monkeypatch.setattr(isolated, "GRACE", 0.5)
    script = "import subprocess, time; print('begun', flush=True)\n"
    script += "subprocess.Popen(['sleep', '6'], start_new_session=True); time.sleep(60)"
    assert isolated.run([sys.executable, "-c", script], 2.0) == (None, "begun\n")
