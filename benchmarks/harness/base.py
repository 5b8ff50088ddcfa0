"""Comparison with another revision, built separately and measured in its own process, interleaved."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import measure, timing
from benchmarks.harness.environment import ROOT
from benchmarks.suites.guard import Named

MAIN = (
    "main",
    "origin/main",
)  # the branch that changes go to; a clone of another branch has the second alone
NATIVE = ("csrc", "CMakeLists.txt", "setup.py")  # what the libraries are made of
ADVICE = "name a revision (make guard BASE=REV, or --guard REV)"
TESTS = ("tests/**/test_interaction*.py", "tests/**/test_gradients*.py")


class ComparisonError(RuntimeError):
    """Why nothing is compared; the message is for the user."""


def check_tests() -> None:
    """Runs the operation's tests on the working tree; ComparisonError if they fail or if there are none."""
    files = sorted(str(path.relative_to(ROOT)) for pattern in TESTS for path in ROOT.glob(pattern))
    if not files:
        raise ComparisonError(f"--base: there are no tests of the operation ({', '.join(TESTS)})")
    environment = os.environ | {"PYTHONPATH": _path(ROOT)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise ComparisonError(f"--base: the tests of the operation are red, nothing is compared:\n{last}")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def default_revision() -> str:
    """What a change is compared with: where it left the main branch; on that branch, the commit before."""
    branch = next((name for name in MAIN if not _git("rev-parse", "-q", "--verify", name).returncode), None)
    if branch is None:
        raise ComparisonError(f"--guard: there is no branch {' or '.join(MAIN)} to compare with: {ADVICE}")
    ours, common = _git("rev-parse", "HEAD").stdout.strip(), _git("merge-base", "HEAD", branch).stdout.strip()
    if not common:
        raise ComparisonError(f"--guard: no commit is known where this branch left {branch}: {ADVICE}")
    if common != ours:
        return common
    return "HEAD" if _git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "HEAD~1"


def _has_these_libraries(revision: str) -> bool:
    """Whether the libraries of this working tree are those that the revision would build."""
    if (
        not list((ROOT / "mi_kernels").glob("*.so"))
        or _git("diff", "--quiet", revision, "--", *NATIVE).returncode
    ):
        return False
    return not _git("ls-files", "--others", "--exclude-standard", "--", *NATIVE).stdout.strip()


def _build(folder: Path, revision: str) -> None:
    if _has_these_libraries(revision):
        for made in (*(ROOT / "mi_kernels").glob("*.so"), ROOT / "mi_kernels" / "ops" / "build_facts.py"):
            if made.exists():
                shutil.copy2(made, folder / made.relative_to(ROOT))
        return
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ComparisonError(f"--base: {revision} does not build:\n{(done.stdout + done.stderr)[-3000:]}")


@contextmanager
def built(revision: str) -> Iterator[tuple[Path, str]]:
    """(folder, full hash) of a revision, compiled in a temporary folder that is deleted afterwards.

    Where nothing that is compiled differs, the libraries of this working tree are copied.
    """
    done = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    if done.returncode:
        raise ComparisonError(f"--base: {revision!r} is no revision of this repository")
    full = done.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="mi_kernels_base_") as name:
        # An archive and not a worktree: nothing is left in .git if this process is killed.
        archive, folder = Path(name) / "base.tar", Path(name) / "base"
        subprocess.run(["git", "archive", "-o", str(archive), full], cwd=ROOT, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        _build(folder, full)
        yield folder.resolve(), full


class Worker:
    """A process that measures one revision on request, and sleeps otherwise."""

    def __init__(self, folder: Path):
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder)]
        # Threads of the idle process must sleep, not spin.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        environment.pop("PYTHONPATH", None)
        command.append(str(torch.get_num_threads()))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
        )

    def sample(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ComparisonError(
                f"--base: the process of a revision ended with status {self.process.wait()}"
            )
        return json.loads(line)

    def close(self) -> None:
        with suppress(BrokenPipeError):  # of a process that has ended, and a request that it did not read
            self.process.stdin.close()
        self.process.wait()


def compare(
    folder: Path, cases: Iterable[tuple[measure.Entry | Named, torch.dtype, str]], limits: measure.Limits
) -> Iterator[dict[str, Any]]:
    """For each case, times of the working tree and of the revision in ``folder``, in turns.

    A named case of another suite (suites/guard.py) may be one that the revision does not have: then the
    result says in ``failed`` which side cannot run it, in ``why`` the error, and in ``missing`` whether that
    is one of what is not there.
    """
    workers = {"head": Worker(ROOT), "base": Worker(folder)}
    try:
        for entry, dtype, work in cases:
            yield _compare_one(workers, entry, dtype, work, limits)
    finally:
        for worker in workers.values():
            worker.close()


def _compare_one(
    workers: dict[str, Worker],
    entry: measure.Entry | Named,
    dtype: torch.dtype,
    work: str,
    limits: measure.Limits,
) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    what = {"case": list(entry)} if isinstance(entry, Named) else {"sizes": list(measure.sizes_of(entry))}
    request = what | {"dtype": name, "pass": work, "shortest": limits.shortest}
    shape = str(entry) if isinstance(entry, Named) else entry.shape.name
    calls = {}
    for side, worker in workers.items():
        answer = worker.sample(request | {"calls": 0})
        if "why" in answer:
            failed = "this" if side == "head" else side
            return {"shape": shape, "dtype": name, "pass": work, "failed": failed, **answer}
        calls[side] = answer["calls"]
    samples: dict[str, list[float]] = {side: [] for side in workers}
    cores: dict[str, list[float]] = {side: [] for side in workers}
    for number in range(limits.rounds):
        sides = list(workers) if number % 2 else list(reversed(workers))
        for side in sides:
            answer = workers[side].sample(request | {"calls": calls[side]})
            samples[side].append(answer["seconds"])
            cores[side].append(answer["cores"])
    found = {side: timing.statistics_of(values) | {"samples_s": values} for side, values in samples.items()}
    for side, values in cores.items():
        found[side]["cores"] = statistics.median(values)
    speed_up = found["base"]["median_s"] / found["head"]["median_s"]
    return {"shape": shape, "dtype": name, "pass": work, **found, "base_over_head": speed_up}


def _path(first: Path) -> str:
    return os.pathsep.join([str(first), *filter(None, [os.environ.get("PYTHONPATH")])])
