"""The measurements of gpu_check.py, in their own process: a crash affects only one case of one backend.

    python tools/gpu_cases.py FILE DEVICE END       measures what FILE does not have yet

END is the time to be done at, by time.monotonic(). Everything is in FILE, which is saved before and after
each step. Exit status: 0 nothing is left or the time is over, RUINED the GPU gives nothing but errors any
more; whoever started this starts it again.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import cases, environment, measure, passes, peers, results
from benchmarks.suites import gates, hyper, shapes
from mi_kernels import backends
from mi_kernels.testing.devices import ruined
from tools import gpu, gpu_figures

RUINED = 3
RESERVE = 5.0  # seconds; a step needs more
# Each takes many seconds to compile, so they run at one shape.
COMPILED = ("compile:einsum", "compile:materialised", "compile:x-first")
RIVALS = ("einsum", "opt_einsum", "materialised", "x-first", "z-first", *peers.GPU_PEERS)
# Groups of unequal length: (name, G groups, T rows of each in the mean, Z, X, O)
SEGMENTS = (("segments-wide", 64, 512, 64, 512, 512), ("segments-many", 1024, 64, 32, 256, 256))
Result = dict[str, Any]
Step = tuple[str, shapes.Entry | cases.Case, torch.dtype, str]


def steps(device: str = "cpu") -> Iterator[Step]:
    """The cases to measure, the most important first."""
    modulations = list(gates.modulations())
    for work in ("forward", "forward+backward"):
        for entry in shapes.GPU_LARGE:
            yield "dense", entry, torch.bfloat16, work
        for case in modulations:
            yield "modulate", case, torch.bfloat16, work
        for case in hyper.ragged(device, SEGMENTS):
            yield "segments", case, torch.bfloat16, work
    for dtype in (torch.bfloat16, torch.float32):
        for work in ("forward", "forward+backward"):
            for entry in shapes.FULL if dtype == torch.bfloat16 else shapes.SUITES["gpu"]:
                yield "dense", entry, dtype, work


def name_of(step: Step) -> str:
    kind, what, dtype, work = step
    name = what.shape.name if isinstance(what, shapes.Entry) else what.name
    return f"{kind} {name} {dtype} {work}"


def broken(result: Result, step: str, backend: str | None, reason: str) -> None:
    """Record a failure; without a backend, the whole step failed."""
    result["broken"][f"{step} on {backend}" if backend else step] = reason


def measure_all(
    end: float, device: str, names: list[str], result: Result, save: Callable[[Result], None]
) -> bool:
    """Measure the cases in result["unmeasured"]; False if the GPU is unusable."""
    clock = gpu.clock_of(device)
    if result["ceilings"] is None:
        result["ceilings"] = environment.ceilings([torch.bfloat16, torch.float32], 8192, 0.5, device, clock)
    for step in steps(device):
        name = name_of(step)
        if name not in result["unmeasured"]:
            continue
        if end - time.monotonic() < RESERVE:
            break
        try:
            _measure(step, measure.Environment(device, clock, tuple(names)), result, save)
        except Exception as error:  # a failure must not affect the other measurements
            broken(result, name, result["under way"]["backend"], _reason(error))
        if ruined(device):
            save(result)
            return False
        result["unmeasured"].remove(name)
        result["under way"] = None
        result["figures"] = gpu_figures.figures(result)
        print(f"measured {name}, {end - time.monotonic():.0f} s left", flush=True)
        save(result)
    return True


def _under_way(result: Result, save: Callable[[Result], None], name: str, backend: str | None) -> None:
    result["under way"] = {"step": name, "backend": backend}
    save(result)


def _measure(step: Step, place: measure.Environment, result: Result, save: Callable[[Result], None]) -> None:
    kind, what, dtype, work = step
    name = name_of(step)
    sound = []
    for backend in place.backends:
        if f"{name} on {backend}" in result["broken"]:  # by an earlier process
            continue
        _under_way(result, save, name, backend)
        try:
            with backends.backend(backend):
                _try(what, dtype, work, place.device)
            place.finish()
        except Exception as error:
            broken(result, name, backend, _reason(error))
            if ruined(place.device):
                return
            gc.collect()  # frees operands that the traceback references
            continue
        sound.append(backend)
    _under_way(result, save, name, None)
    if not sound:
        return
    if isinstance(what, shapes.Entry):
        limits = measure.Limits(rounds=5, shortest=0.002, longest=2.0, call=2.0, memory=16 << 30)
        rivals = [*RIVALS, *(COMPILED if what is shapes.GPU_LARGE[0] else ())]
        ours = measure.Environment(place.device, place.clock, tuple(sound), spared=True)
        case = measure.measure(what, dtype, work, rivals, limits, ours)
        for candidate in case["candidates"]:
            wrong = _wrong(candidate, case["candidates"], dtype)
            if wrong is not None:
                candidate["status"] = wrong
        failed = {c["name"].split()[-1]: c["status"] for c in case["candidates"] if _failed(c)}
        for backend, reason in failed.items():
            broken(result, name, backend, reason)
        if not (failed and ruined(place.device)):  # else the next process measures the others
            result["cases"].append(case)
        return
    for backend in sound:
        options = gate_options(what.name == "tokens" and backend == sound[0])
        try:
            with backends.backend(backend):
                found = cases.measure(what, dtype, work, options, place.device, place.clock)
            rows = [{"name": n, "kind": "rival", "status": "ok", **c} for n, c in found["candidates"].items()]
            ours = next(row for row in rows if row["name"] == cases.OURS) | {"kind": "ours"}
            wrong = _wrong(ours, [r for r in rows if r["name"] not in (cases.OURS, *cases.YARDSTICKS)], dtype)
            if wrong is not None:
                broken(result, name, backend, wrong)
                continue
            result["gates"].append(found | {"backend": backend})
        except Exception as error:
            broken(result, name, backend, _reason(error))


def _failed(candidate: dict[str, Any]) -> bool:
    return candidate["kind"] == "ours" and candidate["status"] != "ok"


def _wrong(candidate: dict[str, Any], others: Iterable[dict[str, Any]], dtype: torch.dtype) -> str | None:
    """What is wrong with a result of ours: its error is above twice the best rival's, or a few roundings.

    Speed is worth nothing where the values are not: such a case fails.
    """
    if candidate["kind"] != "ours" or candidate["status"] != "ok":
        return None
    errors = [o["error"] for o in others if o["kind"] == "rival" and o["status"] == "ok" and "error" in o]
    best = min((error for error in errors if math.isfinite(error)), default=0.0)
    allowed = max(2 * best, 2 * torch.finfo(dtype).eps)
    if candidate["error"] <= allowed:  # False for NaN
        return None
    return f"wrong: error {candidate['error']:.3g}, allowed {allowed:.3g} (best rival {best:.3g})"


def _try(what: shapes.Entry | cases.Case, dtype: torch.dtype, work: str, device: str) -> None:
    """One call on the selected backend."""
    if isinstance(what, shapes.Entry):
        operands = passes.random_operands(measure.sizes_of(what), dtype, 0, device)
        passes.start(work, measure.mi.interaction, operands)()()
    else:
        cases.start(what.functions[cases.OURS], what.arguments(dtype, 0, device), work)()()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def gate_options(compiled: bool) -> argparse.Namespace:
    options = ["--rounds", "5", "--shortest", "0.002", *(["--compile"] if compiled else [])]
    return cases.parser("", gates.FAMILIES).parse_args(options)


def main(argv: list[str] | None = None) -> int:
    path, device, end = sys.argv[1:] if argv is None else argv
    result = results.read(Path(path))
    names = [name for name, reason in result["backends"].items() if reason is None]
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)  # whose streams the clock's events are on
    save = lambda found: results.write(Path(path), found)  # noqa: E731
    return 0 if measure_all(float(end), device, names, result, save) else RUINED


if __name__ == "__main__":
    sys.exit(main())
