"""Cases of the smaller benchmarks (gates.py, hyper.py): what is called, how it is timed, the command line.

The candidates of a case run in one process, in turn, in a new random order each round (timing.py); the
results are checked against float64 before. Memory is the most that was allocated during the call.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import environment, results, timing
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.memory import peak_memory

OURS = "mi_kernels"
# Not rivals: copies of the first argument, our own other plan, and our call under torch.compile.
YARDSTICKS = ("clone", "copy_", "fused", "compile(ours)")
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Yardstick:
    """Another function, of arguments of its own; its time is scaled by ``work``: ours by its operations."""

    function: Callable[..., Tensor]
    sizes: tuple[tuple[int, ...], ...]
    work: float


@dataclass(frozen=True)
class Case:
    """Arguments of one call and the ways to compute it; each takes the arguments in their order."""

    family: str
    name: str
    sizes: tuple[tuple[int, ...], ...]
    functions: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    oracle: str = "eager"  # the function whose float64 result is the oracle
    scaled: int | None = None  # the first argument that is a weight: divided by the root of its last sizes
    copies: bool = False  # whether a copy of the first argument is timed, too
    mixed: bool = False  # whether all but the first argument are float32, whatever the dtype
    channels_last: bool = False  # whether feature maps have their channels last
    yardsticks: Mapping[str, Yardstick] = field(default_factory=dict)  # no rivals

    def arguments(self, dtype: torch.dtype, seed: int, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        drawn = (torch.randn(size, generator=generator, device=device) for size in self.sizes)
        dtypes = (torch.float32 if self.mixed and number else dtype for number in range(len(self.sizes)))
        pairs = enumerate(zip(drawn, dtypes, strict=True))
        made = [(t * self._scale(number)).to(own) for number, (t, own) in pairs]
        if not self.channels_last:
            return made
        return [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in made]

    def _scale(self, number: int) -> float:
        if self.scaled is None or number < self.scaled:
            return 1.0
        size = self.sizes[number]
        return math.prod(size[1:] if len(size) > 1 else size) ** -0.5


def start(function: Callable[..., Any], arguments: list[Tensor], work: str) -> timing.Start:
    """What is timed, for timing.py: the results alone, or they and the gradients of all arguments."""

    def results(given: list[Tensor]) -> tuple[Tensor, ...]:
        found = function(*given)
        return found if isinstance(found, tuple) else (found,)

    if work == "forward":
        return lambda: torch.no_grad()(lambda: results(arguments))
    leaves = [t.detach().requires_grad_() for t in arguments]
    cotangents = [torch.ones_like(y) for y in results(arguments)]

    def run() -> tuple[Tensor, ...]:
        found = results(leaves)
        return *found, *torch.autograd.grad(found, leaves, cotangents)

    return lambda: run


def measure(
    case: Case,
    dtype: torch.dtype,
    work: str,
    options: argparse.Namespace,
    device: str = "cpu",
    clock: timing.Clock = timing.wall,
) -> dict[str, Any]:
    arguments = case.arguments(dtype, options.seed, device)
    functions = dict(case.functions)
    if options.compile:
        torch._dynamo.reset()
        names = [name for name in functions if name != OURS]
        functions |= {f"compile({name})": torch.compile(functions[name]) for name in names}
    truth = start(case.functions[case.oracle], [t.double() for t in arguments], work)()()
    starts, facts, failures = {}, {}, {}
    for name, function in functions.items():
        try:
            run = start(function, arguments, work)
            values = run()()
            error = max(relative_error(v, t) for v, t in zip(values, truth, strict=True))
            outputs = sum(v.nbytes for v in values)
            del values
            extra = peak_memory(run(), device) - outputs
        except Exception as problem:  # a rival that fails is reported and does not affect other cases
            if name in (OURS, case.oracle):
                raise
            failures[name] = f"{type(problem).__name__}: {problem}"[:200]
            continue
        starts[name] = run
        facts[name] = {"error": error, "extra_bytes_beyond_results": extra}
    for name, other in case.yardsticks.items():
        given = replace(case, sizes=other.sizes).arguments(dtype, options.seed, device)
        starts[name] = run = start(other.function, given, work)
        outputs = sum(v.nbytes for v in run()())
        facts[name] = {
            "extra_bytes_beyond_results": peak_memory(run(), device) - outputs,
            "work": other.work,
        }
    if case.copies and work == "forward":
        x, target = arguments[0], torch.empty_like(arguments[0])
        starts |= {"clone": lambda: x.clone, "copy_": lambda: lambda: target.copy_(x)}
    samples: dict[str, list[float]] = {name: [] for name in starts}
    for name, _, one in timing.interleave(
        starts, options.rounds, options.shortest, 20.0, seed=options.seed, clock=clock
    ):
        samples[name].append(one.seconds)
    candidates = {
        name: timing.statistics_of(values) | {"samples_s": values} | facts.get(name, {})
        for name, values in samples.items()
    }
    no_rivals = {*YARDSTICKS, *case.yardsticks}
    best = min(ratio for name, ratio in ratios(candidates).items() if name not in no_rivals)
    return {
        "family": case.family,
        "name": case.name,
        "sizes": case.sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": work,
        "candidates": candidates,
        "failures": failures,
        "best_rival_over_ours": best,
    }


def ratios(candidates: dict[str, Any]) -> dict[str, float]:
    """Each other candidate's time by ours, a yardstick's for as many operations."""
    ours = candidates[OURS]["median_s"]
    return {
        name: found["median_s"] * found.get("work", 1.0) / ours
        for name, found in candidates.items()
        if name != OURS
    }


def summary(cases: list[dict[str, Any]]) -> Iterator[str]:
    keys = dict.fromkeys((c["family"], c["dtype"], c["pass"]) for c in cases)
    for key in keys:
        group = [c for c in cases if (c["family"], c["dtype"], c["pass"]) == key]
        best = [c["best_rival_over_ours"] for c in group]
        mean, worst = math.exp(statistics.fmean(map(math.log, best))), min(best)
        name = next(c["name"] for c in group if c["best_rival_over_ours"] == worst)
        yield f"{' '.join(key)}: best rival / ours {mean:.2f} (geometric mean), {worst:.2f} at worst ({name})"


def parser(description: str, families: Iterable[str]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    made.add_argument("--family", nargs="+", choices=list(families), default=list(families))
    made.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    made.add_argument("--pass", nargs="+", dest="passes", choices=PASSES, default=list(PASSES))
    made.add_argument("--shape", nargs="+", help="names of cases (all)")
    made.add_argument("--compile", action="store_true", help="torch.compile of each rival, too")
    made.add_argument("--threads", type=int, default=None)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--cpu-time", action="store_true", help="of one thread, not the clock on the wall")
    made.add_argument("--shortest", type=float, default=0.02, help="seconds of a sample, at least")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output", type=Path)
    return made


def run(
    families: Mapping[str, Callable[[], Iterator[Case]]], options: argparse.Namespace, command: list[str]
) -> dict[str, Any]:
    """Measures, prints and saves the requested cases."""
    result = environment.facts(command)
    result["cases"] = []
    for case in (case for family in options.family for case in families[family]()):
        if options.shape and case.name not in options.shape:
            continue
        for dtype in options.dtype:
            for work in options.passes:
                clock = timing.cpu if options.cpu_time else timing.wall
                found = measure(case, getattr(torch, dtype), work, options, clock=clock)
                result["cases"].append(found)
                times = ", ".join(f"{n} {ratio:.2f}" for n, ratio in ratios(found["candidates"]).items())
                print(f"{case.family} {case.name} {dtype} {work}: {times}", flush=True)
                if options.output is not None:
                    results.write(options.output, result)
    print(*summary(result["cases"]), sep="\n")
    return result
