"""What a measurement depends on: revision, machine, versions, load; and the limits of the machine."""

import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import peers, timing
from mi_kernels import backends, doctor, libraries

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ("benchmarks/results", "studies/results", "docs/studies")
PACKAGES = ("opt_einsum", "cuequivariance-torch", "e3nn")


def facts(command: list[str]) -> dict[str, Any]:
    """Everything that belongs to a result, before anything is measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "commit": commit(),
        "machine": machine(),
        "versions": doctor.report()["versions"] | {name: peers.installed(name) for name in PACKAGES},
        "instruction_sets": libraries.cpu_isa(),
        "backend": backends.choose(torch.empty(0)),
    }


def commit() -> dict[str, Any]:
    """Revision of the checkout, and whether files other than results differ from it; None outside of git."""
    revision = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", *(f":!{folder}" for folder in RESULTS))
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
    }


def ceilings(
    dtypes: list[torch.dtype],
    size: int = 2048,
    seconds: float = 0.5,
    device: str = "cpu",
    clock: timing.Clock = timing.wall,
) -> dict[str, Any]:
    """Copy bandwidth (bytes read and written) and the rate of a large square torch.mm, the best of many."""
    source = torch.ones(size * size * 16, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), seconds, clock)
    rates = {}
    if device == "cpu" and torch.float32 in dtypes and torch.backends.mkldnn.is_available():
        square = peers.Sizes(size, 1, size, size)
        rates["float32 oneDNN"] = 2 * size**3 / _best(peers.onednn_gemm("forward", square), seconds)
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=dtype, device=device)
        best = _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds, clock)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / best
    return {"copy_bytes_per_s": 2 * source.nbytes / copy, "mm_operations_per_s": rates, "mm_size": size}


def _best(run, seconds: float, clock: timing.Clock = timing.wall) -> float:
    run()
    end = time.perf_counter() + seconds
    best = timing.sample(lambda: run, 1, clock=clock).seconds
    while time.perf_counter() < end:
        best = min(best, timing.sample(lambda: run, 1, clock=clock).seconds)
    return best


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    details = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return f"{found.get('model name', platform.machine())} ({', '.join(details)})"


def _caches() -> dict[str, str]:
    """Size of each cache that the first core sees, such as {"L1 Data": "48K"}."""
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind}"] = size
    return caches
