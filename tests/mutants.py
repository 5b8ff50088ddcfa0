"""Mutants: small faults in copies of this checkout, each of which the tests named beside it have to notice.

    python tests/mutants.py [-j PROCESSES] [NAME ...]

mutants.toml lists them. Nothing is changed in the checkout itself. Faults in C++ are compiled for any x86 CPU
alone, in one build folder, where each costs the objects that it changes.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
LIMIT = 120  # seconds of one run of tests; a mutant that makes them hang is noticed too
# To compile faster: one instruction set, and few optimisations.
CMAKE_OPTIONS = ("-DMI_CUDA=OFF", "-DMI_ISAS=", "-DCMAKE_BUILD_TYPE=MinSizeRel")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    tests: tuple[str, ...]  # node ids of pytest, of tests that pass without the fault

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")

    def source(self, root: Path) -> str:
        """The file with the fault."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: expected its old text once in {self.file}, got {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)


class Verdict(NamedTuple):
    mutant: Mutant
    killed: bool
    seconds: float

    def __str__(self) -> str:
        return f"{'killed' if self.killed else 'LIVES ':7} {self.seconds:5.1f} s  {self.mutant.name}"


def listed(path: Path = ROOT / "tests" / "mutants.toml") -> list[Mutant]:
    entries = tomllib.loads(path.read_text())["mutant"]
    mutants = [Mutant(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]
    assert len({mutant.name for mutant in mutants}) == len(mutants), "two mutants have one name"
    return mutants


def _copied(root: Path, folder: Path) -> Path:
    return Path(shutil.copytree(root, tempfile.mkdtemp(dir=folder), ignore=LEFT_OUT, dirs_exist_ok=True))


def _output(command: Sequence[str | Path], copy: Path, limit: float, **variables: str) -> tuple[int, str]:
    """Exit status and output; a run that takes longer than the limit ends like one that was killed."""
    hidden = ("PYTEST_", "MI_KERNELS_")  # of a run of tests around this one
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | variables
    options = {"cwd": copy, "env": environment, "text": True, "start_new_session": True}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=subprocess.STDOUT, **options)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.wait()
        log.seek(0)
        return status, log.read()[-5000:]


def _run(copy: Path, tests: Iterable[str], jobs: int, limit: float = LIMIT) -> tuple[bool, str]:
    """Whether the tests pass on the copy, and what they print. A crash is a failure, and so is a hang."""
    options = ("-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist")
    variables = {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",  # that of a file changed a second ago would be taken
        "PYTEST_XDIST_WORKER_COUNT": str(jobs),  # which share of the cores is a test's (conftest.py)
    }
    status, text = _output((sys.executable, "-m", "pytest", *options, *tests), copy, limit, **variables)
    if status not in (0, 1) and status >= 0:  # nothing was tested: no such test, or what does not even import
        raise RuntimeError(f"pytest ended with status {status}:\n{text}")
    return status == 0, text


def _check_without(mutants: Sequence[Mutant], copy: Path, jobs: int) -> None:
    tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
    passed, text = _run(copy, tests, jobs, 10 * LIMIT)
    if not passed:
        raise RuntimeError(f"the tests do not pass without a mutant:\n{text}")


def _judge(mutant: Mutant, root: Path, folder: Path, jobs: int) -> Verdict:
    start, copy = time.monotonic(), _copied(root, folder)
    (copy / mutant.file).write_text(mutant.source(root))
    passed, _ = _run(copy, mutant.tests, jobs)
    shutil.rmtree(copy)
    return Verdict(mutant, not passed, time.monotonic() - start)


class _Native:
    """A copy whose CPU library is compiled from its sources."""

    def __init__(self, root: Path, folder: Path, jobs: int) -> None:
        self.root, self.copy, self.jobs = root, _copied(root, folder), jobs
        self.path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
        python = f"-DPython_EXECUTABLE={sys.executable}"
        self._cmake("-S", ".", "-B", "build", "-G", "Ninja", python, *CMAKE_OPTIONS)
        self._build()

    def _cmake(self, *arguments: str) -> None:
        program = shutil.which("cmake", path=self.path) or "cmake"
        status, text = _output((program, *arguments), self.copy, 10 * LIMIT, PATH=self.path)
        if status != 0:
            raise RuntimeError(f"cmake ended with status {status}:\n{text}")

    def _build(self) -> None:
        self._cmake("--build", "build", "--target", "mi_kernels_cpu", "--parallel", "1")
        library = "libmi_kernels_cpu.so"
        shutil.copy(self.copy / "build" / library, self.copy / "mi_kernels" / library)

    def judge(self, mutant: Mutant) -> Verdict:
        start, place = time.monotonic(), self.copy / mutant.file
        place.write_text(mutant.source(self.root))
        self._build()
        passed, _ = _run(self.copy, mutant.tests, self.jobs)
        place.write_text((self.root / mutant.file).read_text())  # compiled again together with the next one
        return Verdict(mutant, not passed, time.monotonic() - start)


def _judge_compiled(mutants: Sequence[Mutant], root: Path, folder: Path, jobs: int) -> list[Verdict]:
    if not mutants:
        return []
    native = _Native(root, folder, jobs)
    _check_without(mutants, native.copy, jobs)
    return [_told(native.judge(mutant)) for mutant in sorted(mutants, key=lambda mutant: mutant.file)]


def _told(verdict: Verdict) -> Verdict:
    print(verdict, flush=True)
    return verdict


def judge(mutants: Sequence[Mutant], jobs: int = 2, root: Path = ROOT) -> list[Verdict]:
    """Who is noticed, after a look at whether the tests pass where there is no mutant."""
    for mutant in mutants:
        mutant.source(root)
    compiled, others = ([m for m in mutants if m.compiled is kind] for kind in (True, False))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        slow: Future[list[Verdict]] = pool.submit(_judge_compiled, compiled, root, folder, jobs)
        try:
            if others:
                pool.submit(_check_without, others, _copied(root, folder), jobs).result()
            found = list(pool.map(lambda mutant: _told(_judge(mutant, root, folder, jobs)), others))
            return [*found, *slow.result()]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-j", "--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("names", nargs="*", help="of some mutants; all without any")
    options = parser.parse_args()
    mutants = listed()
    if unknown := {*options.names} - {mutant.name for mutant in mutants}:
        parser.error(
            f"names: expected some of {', '.join(m.name for m in mutants)}, got {', '.join(unknown)}"
        )
    start = time.monotonic()
    chosen = [mutant for mutant in mutants if mutant.name in options.names or not options.names]
    verdicts = judge(chosen, options.jobs)
    killed, minutes = sum(verdict.killed for verdict in verdicts), (time.monotonic() - start) / 60
    print(f"{killed} of {len(verdicts)} mutants killed in {minutes:.1f} minutes, {options.jobs} at a time")
    return 0 if killed == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
