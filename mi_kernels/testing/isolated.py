"""Child processes with a time limit: a hang or a crash affects only one of them and is reported.

A kernel can hang a GPU or make its process unusable (after an illegal address every later call fails), so
checks of kernels never run in the reporting process.
"""

import atexit
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

GRACE = 3.0  # seconds between SIGTERM and SIGKILL


class Job(NamedTuple):
    name: str
    command: Sequence[str]
    limit: float  # seconds


class Ended(NamedTuple):
    """A finished job. ``status`` is None on a timeout; ``output`` is what was written until then."""

    name: str
    status: int | None
    output: str
    seconds: float


_running: set[subprocess.Popen] = set()
_lock, _ending = threading.Lock(), threading.Event()  # threads may start processes until the interpreter ends


def cores() -> int:
    """The number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start(command: Sequence[str], **options: Any) -> subprocess.Popen:
    """Start a process as leader of its own session; it is killed at the exit of this process."""
    options |= {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
    with _lock:
        if _ending.is_set():
            raise OSError("this process is ending")
        process = subprocess.Popen(list(command), **options)
        _running.add(process)
    return process


def end_with_this_process() -> None:
    """Kill the started processes (also with hung kernels) on SIGTERM and SIGHUP: exit runs what atexit has.

    A signal that is ignored stays ignored, as SIGHUP under nohup.
    """
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda which, frame: sys.exit(128 + which))


@atexit.register
def _end_all() -> None:
    with _lock:
        _ending.set()
        running = list(_running)
    for process in [one for one in running if one.poll() is None]:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run(
    command: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] | None = None,
    folder: str | os.PathLike | None = None,
) -> tuple[int | None, str]:
    """(status, stdout and stderr) of a command; the status is None on a timeout."""
    process = start(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, errors="replace")
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.1))
        return process.returncode, output
    except subprocess.TimeoutExpired as late:
        return None, stop(process) or _text(late.output)
    finally:
        if process.returncode is not None:  # else this process ends
            _running.discard(process)


def _text(output: Any) -> str:
    """Partial output of TimeoutExpired, which may be bytes."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def stop(process: subprocess.Popen) -> str:
    """Terminate a session leader with all its children; returns its piped output."""
    written = ""
    for number in (
        signal.SIGTERM,
        signal.SIGKILL,
    ):  # a process that waits for the GPU may not react to SIGTERM
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=GRACE)[0] or ""
        except subprocess.TimeoutExpired as late:
            written = _text(late.output)
    return written  # an uninterruptible process cannot be killed; do not wait for it


def run_all(
    jobs: Sequence[Job],
    workers: int,
    end: float,
    environment: Mapping[str, str] | None = None,
    folder: str | os.PathLike | None = None,
) -> Iterator[Ended]:
    """Run jobs in order, ``workers`` at a time, and yield them as they end.

    At ``end`` (of ``time.monotonic()``) no more jobs are started and running ones are stopped; jobs that were
    not started are missing from the results.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[Ended | None] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        try:
            while (left := end - time.monotonic()) > 0:
                job = waiting.get_nowait()
                begin = time.monotonic()
                try:
                    status, output = run(job.command, min(job.limit, left), environment, folder)
                except OSError as error:
                    status, output = 127, str(error)
                done.put(Ended(job.name, status, output, time.monotonic() - begin))
        except queue.Empty:
            pass
        finally:
            done.put(None)

    workers = max(min(workers, len(jobs)), 0)
    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()
    while workers:
        ended = done.get()
        if ended is None:
            workers -= 1
        else:
            yield ended
