"""The stages smoke and sanitize of gpu_check.py: every kernel once, and some of them under compute-sanitizer.

Each case is a process of mi_kernels.testing.suite with a few checks of a family on a backend in one dtype, so
that a hang or a crash costs one case and is named.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from mi_kernels import verify
from mi_kernels.testing import isolated, norm_samples, recurrent_samples, samples, suite
from mi_kernels.testing.dual_samples import GLU
from mi_kernels.testing.isolated import Job
from mi_kernels.testing.samples import GateSample

LIMIT = 25.0  # seconds of a case
SANITIZED = 30.0
WORKERS = 15
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")  # the most useful first


class Case(NamedTuple):
    backend: str
    family: str
    dtype: str
    checks: tuple[str, ...]

    @property
    def name(self) -> str:
        of = self.checks[0].removeprefix("kernel ") if self.family == "interaction" else self.family
        return f"{self.backend} {of} {self.dtype}"

    def command(self, device: str, program: Sequence[str]) -> list[str]:
        return [*program, self.backend, device, self.dtype, self.family, *self.checks]


def _gate(op: str) -> tuple[str, ...]:
    terms = samples.GATE_TERMS[op]
    odd = GateSample(op, samples.GATE_ODD, terms)
    softmax = GateSample(op, samples.GATE_MIDDLE, terms, activation="softmax")
    return f"values {odd}", f"gradients {odd}", f"values {softmax}"


# Of the families whose kernels do not depend on sizes (those of the dense interaction do).
OTHERS = {
    "diagonal": _gate("diagonal"),
    "gated_interaction": _gate("gated_interaction"),
    "glu": (f"values {GLU}", f"gradients {GLU}"),
    "low_rank": ("values low_rank-odd-ACPUVc", "gradients low_rank-odd-ACPUVc"),
    "modulate": ("values tokens", "gradients tokens", "values maps", "gradients maps", "gradients features"),
    "norm": tuple(
        f"{kind} {sample}"
        for sample in (norm_samples.TOKENS, norm_samples.MAPS, norm_samples.RMS)
        for kind in ("values", "gradients")
    ),
    "recurrent": tuple(
        f"{kind} {sample}"
        for sample in (recurrent_samples.MLSTM, recurrent_samples.MI_GRU, recurrent_samples.DENSE_RNN)
        for kind in ("values", "gradients")
    ),
}


def cases(backends: Sequence[str], capability: tuple[int, int]) -> list[Case]:
    """Every kernel of every backend in each of its dtypes, the most important first."""
    found = []
    for backend in backends:
        if backend == "portable":  # PyTorch's kernels, not ours
            found += [Case(backend, "interaction", d, ("values odd", "gradients odd")) for d in suite.DTYPES]
            continue
        for name, _ in suite.kernels(backend, capability):
            found += [Case(backend, "interaction", d, (name,)) for d in suite.DTYPES if suite.takes(name, d)]
    for backend in backends:
        found += [Case(backend, family, d, OTHERS[family]) for family in OTHERS for d in suite.DTYPES]
    return found


def smoke(
    backends: Sequence[str],
    capability: tuple[int, int],
    device: str,
    end: float,
    say: Callable[[str], None],
    program: Sequence[str] = verify.PROGRAM,
    workers: int | None = None,
) -> dict[str, Any]:
    """By case name: checks, error (as a fraction of the allowed one), fault, seconds; and missing cases."""
    wanted = cases(backends, capability)
    jobs = [Job(case.name, case.command(device, program), LIMIT) for case in wanted]
    return _ended(jobs, workers or min(isolated.cores(), WORKERS), end, say)


def _ended(jobs: list[Job], workers: int, end: float, say: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for ended in isolated.run_all(jobs, workers, end, verify.environment()):
        if ended.status is None and time.monotonic() > end:
            continue  # stopped at the end of the total time
        outcome = verify.outcome(ended)
        found[ended.name] = outcome._asdict() | {"seconds": round(ended.seconds, 1)}
        if outcome.fault is not None:
            say(f"{ended.name}: {outcome.fault}")
            found[ended.name]["output"] = ended.output[-2000:]
    missing = [job.name for job in jobs if job.name not in found]
    failed = [name for name, one in found.items() if one["fault"] is not None]
    words = f"{len(failed)} of {len(found)} failed" if failed else "passed" if found else "nothing ran"
    status = f"stopped: out of time, {words}" if missing else words
    return {"status": status, "cases": found, "missing": missing}


def sanitized(backends: Sequence[str], capability: tuple[int, int]) -> Iterator[tuple[str, Case]]:
    """(tool, case): a tile, odd sizes, a few rows, modulation and norms; on 9.0 of the engine for it too.

    Races and barriers, which are looked for more slowly, in the first kernels, modulation and norms alone.
    """
    names = ["kernel odd", "kernel few", "kernel tile"]
    names = (["kernel 64x2", "kernel 64 split 8"] if capability == (9, 0) else []) + names
    for tool in TOOLS if "cuda" in backends else ():
        for name in names if tool == TOOLS[0] else names[:2]:
            yield tool, Case("cuda", "interaction", "bfloat16", (name,))
        for family in ("modulate", "norm"):
            yield tool, Case("cuda", family, "bfloat16", OTHERS[family][:2])


def sanitize(
    backends: Sequence[str],
    capability: tuple[int, int],
    device: str,
    end: float,
    say: Callable[[str], None],
    program: Sequence[str] = verify.PROGRAM,
) -> dict[str, Any]:
    """Reports of compute-sanitizer on the CUDA kernels, each case in its own process."""
    tool = shutil.which(SANITIZER) or shutil.which(f"/usr/local/cuda/bin/{SANITIZER}")
    if tool is None:
        return {"status": f"left out: {SANITIZER} is not installed"}
    if "cuda" not in backends:
        return {"status": "left out: the backend cuda does not run"}
    jobs = []
    for name, case in sanitized(backends, capability):
        # PyTorch's caching allocator would hide out-of-bounds accesses.
        prefix = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, f"--tool={name}", "--error-exitcode=9"]
        # The runtime queries the driver in ways that may return errors, which are not ours.
        prefix += ["--report-api-errors=no"] if name == "memcheck" else []
        jobs.append(Job(f"{name} {case.name}", [*prefix, *case.command(device, program)], SANITIZED))
    return _ended(jobs, min(isolated.cores(), len(jobs)), end, say)  # in one round, where there are cores


if __name__ == "__main__":
    sys.exit("smoke is a stage of tools/gpu_check.py")
