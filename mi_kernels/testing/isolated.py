"""Commands in processes of their own, with a limit of time: a hang or a crash costs one of them and is named.

A GPU gives every kernel the chance to hang or to ruin its process (an illegal address makes each later call
fail), so what may do so never runs in the process that has to report it.
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

GRACE = 3.0  # seconds between asking a process to end and ending it


class Job(NamedTuple):
    name: str
    command: Sequence[str]
    limit: float  # seconds


class Ended(NamedTuple):
    """``status`` is None where the time ran out; ``output`` is what there was by then."""

    name: str
    status: int | None
    output: str
    seconds: float


_running: set[subprocess.Popen] = set()


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start(command: Sequence[str], **options: Any) -> subprocess.Popen:
    """A process that leads a session of its own, and is ended with this one."""
    process = subprocess.Popen(
        list(command), stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True, **options
    )
    _running.add(process)
    return process


def end_with_this_process() -> None:
    """What was started ends when this process is interrupted or told to end, hung kernels included."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@atexit.register
def _end_all() -> None:
    for process in [one for one in _running if one.poll() is None]:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run(
    command: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] | None = None,
    folder: str | os.PathLike | None = None,
) -> tuple[int | None, str]:
    """(status, stdout and stderr) of a command; the status is None where it did not end in time."""
    process = start(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, errors="replace")
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.1))
        return process.returncode, output
    except subprocess.TimeoutExpired as late:
        return None, stop(process) or _text(late.output)
    finally:
        _running.discard(process)


def _text(output: Any) -> str:
    """What TimeoutExpired has of it, which may be bytes."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def stop(process: subprocess.Popen) -> str:
    """Ends a process that leads its own session, with all that it started; what it wrote, where piped."""
    written = ""
    for number in (signal.SIGTERM, signal.SIGKILL):  # what waits for the GPU may not hear the first
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=GRACE)[0] or ""
        except subprocess.TimeoutExpired as late:
            written = _text(late.output)
    return written  # a process in a system call that does not return cannot be ended; nobody may wait for it


def run_all(
    jobs: Sequence[Job],
    workers: int,
    end: float,
    environment: Mapping[str, str] | None = None,
    folder: str | os.PathLike | None = None,
) -> Iterator[Ended]:
    """The jobs as they end, ``workers`` at a time, in their order. None is begun after ``end``

    (of ``time.monotonic()``), and those that run then are stopped: what is missing was not reached.
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
