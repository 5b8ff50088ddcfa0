"""Gates and modulation against eager PyTorch, torch.compile of it, and torch.addcmul forms.

    python benchmarks/gates.py --threads 2 --output benchmarks/results/NAME.json

The candidates of a case run in one process, in turn, in a new random order each round (timing.py); the
results are checked against float64 before. Modulation also meets a copy: `clone` allocates its result as we
do, and `copy_` writes into memory that is there. Memory is the most that was allocated during the call.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mi
from benchmarks import environment, timing
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.memory import peak_memory

OURS = "mi_kernels"
YARDSTICKS = ("clone", "copy_")
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """Arguments of one call and the ways to compute it; each takes the arguments in their order."""

    family: str
    name: str
    sizes: tuple[tuple[int, ...], ...]
    functions: dict[str, Callable[..., Tensor]]

    def arguments(self, dtype: torch.dtype, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        scaled = self.family == "diagonal"
        return [
            (torch.randn(s, generator=generator) * (s[-1] ** -0.5 if scaled and n > 1 else 1)).to(dtype)
            for n, s in enumerate(self.sizes)
        ]


def modulations() -> Iterator[Case]:
    """adaLN on tokens, FiLM on feature maps, one scale for all rows, and a scale of the size of x."""
    functions = {
        OURS: lambda x, s, t: mi.modulate(x, s, t, activation="sigmoid", scale_offset=1.0),
        "eager": lambda x, s, t: (torch.sigmoid(s) + 1) * x + t,
        "addcmul": lambda x, s, t: torch.addcmul(t, torch.sigmoid(s) + 1, x),
    }
    for name, x, scale in (
        ("tokens-cached", (8, 256, 512), (8, 1, 512)),
        ("tokens", (16, 1024, 1024), (16, 1, 1024)),
        ("maps-7x7", (64, 512, 7, 7), (64, 512, 1, 1)),
        ("maps", (16, 256, 64, 64), (16, 256, 1, 1)),
        ("rows", (65536, 256), (256,)),
        ("full", (16384, 1024), (16384, 1024)),
    ):
        yield Case("modulate", name, (x, scale, scale), functions)


def diagonals() -> Iterator[Case]:
    def eager(x, z, a, b, c, d):
        return torch.sigmoid(F.linear(z, a, b)) * x + F.linear(z, c, d)

    def addcmul(x, z, a, b, c, d):
        return torch.addcmul(F.linear(z, c, d), torch.sigmoid(F.linear(z, a, b)), x)

    def one_product(x, z, a, b, c, d):
        gate, shift = F.linear(z, torch.cat([a, c]), torch.cat([b, d])).chunk(2, -1)
        return torch.addcmul(shift, torch.sigmoid(gate), x)

    functions = {
        OURS: lambda x, z, a, b, c, d: mi.diagonal(x, z, a, b, c, d, activation="sigmoid"),
        "eager": eager,
        "addcmul": addcmul,
        "one product": one_product,
    }
    for name, rows, z, x in (
        ("small", 256, 64, 128),
        ("odd", 1000, 33, 77),
        ("middle", 4096, 64, 256),
        ("wide", 2048, 512, 1024),
        ("square", 4096, 256, 512),
        ("long", 32768, 32, 64),
    ):
        yield Case("diagonal", name, ((rows, x), (rows, z), (x, z), (x,), (x, z), (x,)), functions)


def start(function: Callable[..., Tensor], arguments: list[Tensor], work: str) -> timing.Start:
    """What is timed, for timing.py: y alone, or y and the gradients of all arguments."""
    if work == "forward":
        return lambda: torch.no_grad()(lambda: (function(*arguments),))
    leaves = [t.detach().requires_grad_() for t in arguments]
    cotangent = torch.ones_like(function(*arguments))

    def run() -> tuple[Tensor, ...]:
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, cotangent)

    return lambda: run


def measure(case: Case, dtype: torch.dtype, work: str, options: argparse.Namespace) -> dict[str, Any]:
    arguments = case.arguments(dtype, options.seed)
    functions = dict(case.functions)
    if options.compile:
        torch._dynamo.reset()
        names = [name for name in functions if name != OURS]
        functions |= {f"compile({name})": torch.compile(functions[name]) for name in names}
    truth = start(case.functions["eager"], [t.double() for t in arguments], work)()()
    starts, facts = {}, {}
    for name, function in functions.items():
        starts[name] = start(function, arguments, work)
        results = starts[name]()()
        error = max(relative_error(r, t) for r, t in zip(results, truth, strict=True))
        outputs = sum(r.nbytes for r in results)
        del results
        extra = peak_memory(starts[name]()) - outputs
        facts[name] = {"error": error, "extra_bytes_beyond_results": extra}
    if case.family == "modulate" and work == "forward":
        x, target = arguments[0], torch.empty_like(arguments[0])
        starts |= {"clone": lambda: x.clone, "copy_": lambda: lambda: target.copy_(x)}
    samples: dict[str, list[float]] = {name: [] for name in starts}
    for name, _, one in timing.interleave(starts, options.rounds, options.shortest, 20.0, seed=options.seed):
        samples[name].append(one.seconds)
    candidates = {
        name: timing.statistics_of(values) | {"samples_s": values} | facts.get(name, {})
        for name, values in samples.items()
    }
    ours = candidates[OURS]["median_s"]
    ratios = {name: found["median_s"] / ours for name, found in candidates.items() if name != OURS}
    best = min(ratio for name, ratio in ratios.items() if name not in YARDSTICKS)
    return {
        "family": case.family,
        "name": case.name,
        "sizes": case.sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": work,
        "candidates": candidates,
        "ratios": ratios,
        "best_rival_over_ours": best,
    }


def summary(cases: list[dict[str, Any]]) -> Iterator[str]:
    keys = dict.fromkeys((c["family"], c["dtype"], c["pass"]) for c in cases)
    for key in keys:
        group = [c for c in cases if (c["family"], c["dtype"], c["pass"]) == key]
        best = [c["best_rival_over_ours"] for c in group]
        mean, worst = math.exp(statistics.fmean(map(math.log, best))), min(best)
        name = next(c["name"] for c in group if c["best_rival_over_ours"] == worst)
        yield f"{' '.join(key)}: best rival / ours {mean:.2f} (geometric mean), {worst:.2f} at worst ({name})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Gates and modulation against PyTorch.")
    parser.add_argument(
        "--family", nargs="+", choices=("modulate", "diagonal"), default=["modulate", "diagonal"]
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pass", nargs="+", dest="passes", choices=PASSES, default=list(PASSES))
    parser.add_argument("--shape", nargs="+", help="names of cases (all)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each rival, too")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shortest", type=float, default=0.02, help="seconds of a sample, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result = environment.facts(["python", "benchmarks/gates.py", *(sys.argv[1:] if argv is None else argv)])
    result["cases"] = []
    families = {"modulate": modulations, "diagonal": diagonals}
    for case in (case for family in options.family for case in families[family]()):
        if options.shape and case.name not in options.shape:
            continue
        for dtype in options.dtype:
            for work in options.passes:
                found = measure(case, getattr(torch, dtype), work, options)
                result["cases"].append(found)
                ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["ratios"].items())
                print(f"{case.family} {case.name} {dtype} {work}: {ratios}", flush=True)
                if options.output:
                    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(*summary(result["cases"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
