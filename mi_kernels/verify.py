"""`python -m mi_kernels verify`: checks the compiled kernels on this GPU; `auto` uses what passed.

Values, gradients, layouts and dtypes of every family run in child processes with a time limit, so that a
kernel that hangs or crashes fails only its own family and is named. Results are written to the user's cache
directory (records.py), with the device and the versions; `auto` reads them in every later process.
"""

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import backends, records
from .ops.backend import get, verifiable
from .records import FAMILIES, Record
from .testing import isolated, suite

MINUTES = 3.0
HANGS = 60.0  # seconds after which a check, including start and compilation, counts as hanging
LIMIT = 150.0  # seconds for one family in one dtype: Triton compiles up to 150 kernels for it
MEMORY = 3 << 30  # bytes of the GPU per concurrent process
WORKERS = 8
PROGRAM = (sys.executable, "-m", f"{__package__}.testing.suite")


_REMOVED_VARIABLES = ("PYTHONOPTIMIZE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")


class Outcome(NamedTuple):
    """The result of one child process.

    ``judged``: whether it is a verdict on the kernels. A process that did not start, ran out of memory or was
    merely slow gives none; its fault is printed, but not recorded.
    """

    checks: int
    error: float
    fault: str | None
    judged: bool = True


def outcome(ended: isolated.Ended) -> Outcome:
    """The outcome of one process of suite.py; names the check that was running when it hung or died."""
    passed, worst, faults, begun, spent, lines = 0, 0.0, [], None, 0.0, 0
    for line in _lines(ended.output):
        lines += 1
        if line["state"] == "begun":
            begun = line["check"]
        elif line["state"] == "passed":
            passed, worst, begun = passed + 1, max(worst, line["error"]), None
            spent += line.get("seconds", 0.0)
        else:
            faults.append(f"{line['check']}: {line['fault']}")
            begun = None
    finished = True
    if ended.status is None:
        finished = bool(faults) or ended.seconds - spent >= HANGS  # else it was only slow
        faults.append(f"{begun or 'start'}: not done after {ended.seconds:.0f} s")
    elif ended.status not in (0, 1) or begun is not None or (ended.status == 1 and not faults):
        ruined = ended.status == suite.RUINED
        what = "the GPU gives nothing but errors" if ruined else f"ended with status {ended.status}"
        faults.append(f"{begun or 'after it'}: {what}: {_last_line(ended.output)}")
        finished = lines > 0  # a process that did not start is no verdict on kernels
    elif passed == 0 and not faults:
        faults.append("no check ran")
        finished = False
    short_of_memory = bool(faults) and all("OutOfMemoryError" in fault for fault in faults)
    return Outcome(passed, worst, "; ".join(faults)[:1500] or None, finished and not short_of_memory)


def _lines(output: str) -> Iterator[dict[str, Any]]:
    for text in output.splitlines():
        if text.startswith('{"check"'):
            try:
                yield json.loads(text)
            except ValueError:  # truncated
                continue


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith('{"check"')]
    return lines[-1][:200] if lines else "no message"


def workers_for(device: str) -> int:
    """The number of concurrent processes, limited by cores and by the free memory of the GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return max(min(isolated.cores(), WORKERS, free // MEMORY), 1)


def environment() -> dict[str, str]:
    """The environment of the children, in which they import this copy of the package.

    Variables that would disable assertions or allow tf32 in float32 products are removed.
    """
    found = {name: value for name, value in os.environ.items() if name not in _REMOVED_VARIABLES}
    found["PYTHONSAFEPATH"] = "1"  # not a copy in the current directory
    root = Path(__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # on the path already, and might shadow modules
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), found.get("PYTHONPATH"))))
    found.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return found


def verify(
    names: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    end: float,
    workers: int,
    say: Callable[[str], None],
    program: Sequence[str] = PROGRAM,
) -> Iterator[tuple[tuple[str, str, str], Outcome]]:
    """((backend, family, dtype), outcome) as processes end; without those not reached before ``end``."""
    wanted = [(b, f, d) for f in FAMILIES for d in dtypes for b in names if f not in get(b).lacks]
    jobs = [isolated.Job(" ".join(one), [*program, one[0], device, one[2], one[1]], LIMIT) for one in wanted]
    keys = {job.name: one for job, one in zip(jobs, wanted, strict=True)}
    for ended in isolated.run_all(jobs, workers, end, environment()):
        found = outcome(ended)
        if (
            ended.status is None
            and time.monotonic() > end - isolated.GRACE
            and (found.fault or "").count(";") == 0
        ):
            found = found._replace(judged=False)  # the total time was over
        if found.fault is None:
            say(
                f"{ended.name}: passed, {found.checks} checks, worst error {found.error:.2f} of what is"
                f" allowed, {ended.seconds:.0f} s"
            )
        elif found.judged:
            say(f"{ended.name}: FAILED after {found.checks} checks: {found.fault}")
        else:
            say(f"{ended.name}: not finished, {found.checks} checks passed: {found.fault}")
        if found.judged:
            yield keys[ended.name], found


def record_of(key: tuple[str, str, str], found: Outcome, index: int | None) -> Record:
    backend, family, dtype = key
    name, capability = records.device_of(index)
    today = datetime.date.today().isoformat()
    kernels = records.fingerprint(backend)
    facts = (name, capability, records.versions(backend), kernels, today)
    return Record(backend, family, dtype, *facts, found.fault, found.checks, found.error)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mi-kernels verify",
        description="Check the compiled kernels on this GPU; `auto` uses those that pass, from then on.",
        allow_abbrev=False,
    )
    parser.add_argument("--backend", nargs="+", choices=verifiable(), default=list(verifiable()))
    parser.add_argument("--dtype", nargs="+", choices=suite.DTYPES, default=list(suite.DTYPES))
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything ({MINUTES:g})")
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args(None if argv is None else list(argv))
    if not options.minutes > 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes:g}")
    wrong = wrong_device(options.device)
    if wrong is not None:
        parser.error(wrong)
    return options


def wrong_device(name: str) -> str | None:
    """Why a device cannot be checked; None if it can, or if there are no GPUs."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return f"--device: expected a GPU such as cuda:0, got {name!r}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else None
    if device.type != "cuda" or (count is not None and (device.index or 0) >= count):
        return f"--device: expected a GPU such as cuda:0 (there are {count or 0}), got {name!r}"
    return None


def _complain(text: str) -> None:
    print(f"verify: {text}", file=sys.stderr)


def main(argv: Sequence[str] | None = None, program: Sequence[str] = PROGRAM) -> int:
    """Exit status: 0 everything that can run here passed, 1 not, 2 nothing can be checked here."""
    isolated.end_with_this_process()
    options = _options(argv)
    end = time.monotonic() + 60 * options.minutes
    if not torch.cuda.is_available():
        _complain(f"no GPU: torch {torch.__version__} sees none here")
        return 2
    runs = []
    for name in options.backend:
        reason = backends.why_not(name) or ("interpreted" if backends.interpreting() else None)
        if reason is None:
            runs.append(name)
        else:
            print(f"{name}: cannot run: {reason}")
    try:
        index = torch.device(options.device).index or 0
        device, capability = records.device_of(index)
        records.write([])  # fail before the work if the file cannot be written
    except (OSError, RuntimeError, AssertionError) as error:
        _complain(str(error))
        return 2
    if not runs:
        _complain("no compiled backend can run here")
        return 2
    print(f"{device}, compute capability {capability}: {', '.join(runs)}", flush=True)
    families = sum(family not in get(name).lacks for name in runs for family in FAMILIES)
    passed, expected = 0, families * len(options.dtype)
    say = lambda text: print(text, flush=True)  # noqa: E731
    jobs = verify(runs, options.dtype, options.device, end, workers_for(options.device), say, program)
    for key, found in jobs:
        records.write([record_of(key, found, index)])
        passed += found.fault is None
    print(f"{passed} of {expected} passed; written to {records.path()}")
    if passed < expected:
        print(
            "What failed or was not reached stays on the portable path; `mi_kernels doctor` lists failures."
        )
    return 0 if passed == expected else 1
