"""Child processes with a time limit, of which a hang or a crash costs one alone."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from helpers import interruptible

from mi_kernels import verify
from mi_kernels.testing import isolated

pytestmark = pytest.mark.subprocess


def test_a_process_that_ignores_its_end_is_ended():
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    script += "print('x', flush=True); time.sleep(60)"
    begin = time.monotonic()
    assert isolated.run([sys.executable, "-c", script], 5.0) == (None, "x\n")
    assert time.monotonic() - begin < 50


def test_jobs_run_side_by_side_and_none_begins_after_the_end(tmp_path):
    def meets(name, other):
        """Ends when the other has begun, too."""
        script = f"import os, time; open({name!r}, 'w').close()\n"
        script += f"while not os.path.exists({other!r}): time.sleep(0.01)"
        return isolated.Job(name, [sys.executable, "-c", script], 100.0)

    def sleeps(name, seconds):
        return isolated.Job(name, [sys.executable, "-c", f"import time; time.sleep({seconds})"], 30.0)

    both = [meets("a", "b"), meets("b", "a")]
    ended = list(isolated.run_all(both, 2, time.monotonic() + 100, folder=tmp_path))
    assert {one.name for one in ended} == {"a", "b"} and all(one.status == 0 for one in ended)
    late = list(isolated.run_all([sleeps("a", 100), sleeps("b", 0)], 1, time.monotonic() + 1.0))
    assert [(one.name, one.status) for one in late] == [("a", None)]
    assert list(isolated.run_all([], 4, time.monotonic() + 1)) == []
    missing = isolated.Job("a", ["/no/such/program"], 1.0)
    assert next(isolated.run_all([missing], 1, time.monotonic() + 9)).status == 127


# Its children hold the pipe for as long as they live: one, or four at a time while others wait.
PARENT = """
import subprocess, sys, time
from mi_kernels.testing import isolated
isolated.end_with_this_process()
pipe, popen = int(sys.argv[1]), subprocess.Popen
subprocess.Popen = lambda *arguments, **options: popen(*arguments, **options, pass_fds=(pipe,))
child = f"import os, time; os.write({pipe}, b'%d ' % os.getpid()); time.sleep(1000)"
command, many = [sys.executable, "-c", child], sys.argv[2:] == ["many"]
jobs = [isolated.Job(str(number), command, 1000.0) for number in range(40)]
list(isolated.run_all(jobs, 4, time.monotonic() + 1000)) if many else isolated.run(command, 1000.0)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", ["one", "many"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_children_end_with_their_parent(name, number):
    """A hung kernel must not stay on the GPU when its user gives up or closes the terminal."""
    here, there = os.pipe()
    command = [sys.executable, "-W", "ignore", "-c", PARENT, str(there), number]
    options = {"env": verify.environment(), "stderr": subprocess.DEVNULL, "pass_fds": (there,)}
    with interruptible():
        parent = subprocess.Popen(command, **options)
    os.close(there)
    written = os.read(here, 1000)
    try:
        assert written, "the parent has failed"
        parent.send_signal(getattr(signal, name))
        assert parent.wait(timeout=120) != 0
        while select.select([here], [], [], 60)[0]:
            more = os.read(here, 1000)
            if not more:
                return
            written += more
        pytest.fail("children live on")
    except BaseException:
        for pid in (parent.pid, *map(int, written.split())):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(here)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_ignored_signal_stays_ignored(name, monkeypatch):
    """What nohup starts goes on when its terminal is closed."""
    number = getattr(signal, name)
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
    script += "subprocess.Popen(['sleep', '30'], start_new_session=True); time.sleep(60)"
    assert isolated.run([sys.executable, "-c", script], 5.0) == (None, "begun\n")
