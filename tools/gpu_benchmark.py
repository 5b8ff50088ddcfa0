"""The benchmark stage of gpu_check.py: runs gpu_cases.py, and restarts it after a crash or hang."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from mi_kernels.testing.isolated import GRACE, start, stop

ROOT = Path(__file__).resolve().parents[1]
CASES = (str(ROOT / "tools" / "gpu_cases.py"),)
STEP = 60.0  # seconds of a case on all backends, including compilation, after which it hangs
START = 60.0  # seconds until the first step, including the measurement of the machine's ceilings
RESERVE = 5.0  # seconds reserved at the end, to save and report results
TICK = 0.5


def benchmark(
    end: float, device: str, path: Path, result: dict[str, Any], program: tuple[str, ...] = CASES
) -> dict[str, Any]:
    """Measure the cases by gpu_cases.py in child processes; returns the content of ``path``."""
    end -= RESERVE + GRACE
    while result["unmeasured"] and end - time.monotonic() > RESERVE:
        result["under way"], known = None, set(result["broken"])
        results.write(path, result)
        status, output, slow = _watched([sys.executable, *program, str(path), device, str(end)], end, path)
        print(output, end="", flush=True)
        result = results.read(path)
        if status == 0 or (status is None and not slow):
            break
        what = f"not done after {STEP:.0f} s" if slow else f"ended with status {status}"
        if result["under way"] is None:  # it failed outside of all steps, and would fail again
            result["broken"]["benchmark"] = f"{what}: {output[-500:]}"
            break
        step, backend = result["under way"]["step"], result["under way"]["backend"]
        if backend is None and any(name.startswith(f"{step} on ") for name in set(result["broken"]) - known):
            continue  # a backend measured together with others crashed the GPU: the next process skips it
        key = f"{step} on {backend}" if backend else step
        result["broken"].setdefault(key, f"{what}: {output[-500:]}")
        if backend is None:  # all backends together: none can be skipped
            result["unmeasured"].remove(step)
    return result


def _watched(command: list[str], end: float, path: Path) -> tuple[int | None, str, bool]:
    """(status, output, whether one step took too long); the status is None if it was stopped."""
    log = path.with_suffix(".log")
    with log.open("w") as out:
        process = start(command, cwd=ROOT, env=dict(os.environ), stdout=out)
        slow, now, since = False, _step(path), time.monotonic()
        while (status := process.poll()) is None:
            step = _step(path)
            if step != now:
                now, since = step, time.monotonic()
            slow = time.monotonic() - since > (START if now is None else STEP)
            if slow or time.monotonic() > end:
                stop(process)
                break
            time.sleep(TICK)
    output = log.read_text(errors="replace")
    log.unlink()
    return status, output, slow


def _step(path: Path) -> dict[str, Any] | None:
    """The step in progress; the file may be incomplete while it is being written."""
    try:
        return results.read(path)["under way"]
    except (OSError, ValueError):
        return None
