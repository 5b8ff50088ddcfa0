"""Shared contexts, generated weights and groups of unequal length against what PyTorch users write.

    python benchmarks/suites/hyper.py --threads 2 --output benchmarks/results/NAME.json
    python benchmarks/suites/hyper.py --threads 2 --crossover --output benchmarks/results/NAME.json

How a case is measured stands in cases.py. `fused` among the candidates is our own pass over all rows, the
plan that was not taken or the one that was. --crossover measures both plans on a grid of sizes and says how
far the chosen one is from the better one.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mi_kernels as mi
from benchmarks.harness import cases, environment, results, timing
from benchmarks.harness.cases import OURS, Case
from mi_kernels.functional.interaction import interaction_by

# (name, G groups, T rows of each, Z, X, O)
SHAPES = (
    ("one-for-all", 1, 4096, 32, 256, 256),
    ("long", 4, 1024, 128, 256, 256),
    ("wide", 8, 128, 64, 512, 512),
    ("tokens", 16, 256, 32, 256, 256),
    ("small-context", 32, 512, 8, 128, 128),
    ("odd", 37, 53, 19, 67, 45),
    ("sequences", 64, 64, 64, 128, 128),
    ("short", 256, 16, 32, 64, 64),
    ("many", 1024, 4, 16, 64, 64),
    ("pairs", 1024, 2, 32, 32, 32),
)


def by_hand(z: Tensor, w: Tensor, u: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """W' [G, O, X] and b' [G, O] by one batched product."""
    weight = torch.baddbmm(v.unsqueeze(1), z.expand(w.shape[0], *z.shape), w).transpose(0, 1)
    return weight, F.linear(z, u, c)


def batched(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def mapped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = nn.Linear(x.shape[-1], weight.shape[-2], device="meta")

    def one(weight, bias, x):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    return torch.vmap(one)(weight, bias, x)


def looped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.stack([F.linear(*one) for one in zip(x, weight, bias, strict=True)])


def einsum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("gtj,goj->gto", x, weight) + bias.unsqueeze(1)


def whole_einsum(x, z, w, u, v, c):
    """Left to right: z meets W once for each group, then x."""
    y = torch.einsum("gi,oij,gtj->gto", z, w, x)
    return y + torch.einsum("gi,oi->go", z, u).unsqueeze(1) + torch.einsum("gtj,oj->gto", x, v) + c


def after(apply: Callable[..., Tensor], contiguous: bool = False) -> Callable[..., Tensor]:
    def function(x, z, *weights):
        weight, bias = by_hand(z, *weights)
        return apply(x, weight.contiguous() if contiguous else weight, bias)

    return function


def shared(shapes: Sequence[tuple] = SHAPES) -> Iterator[Case]:
    functions = {
        OURS: lambda x, z, *weights: mi.interaction(x, z.unsqueeze(1), *weights),
        "fused": lambda x, z, *weights: interaction_by("fused", x, z.unsqueeze(1), *weights),
        "einsum": whole_einsum,
        "baddbmm": after(batched),
        "baddbmm contiguous": after(batched, True),
        "vmap functional_call": after(mapped, True),
        "F.linear loop": after(looped, True),
    }
    for name, groups, rows, z, x, out in shapes:
        sizes = ((groups, rows, x), (groups, z), (out, z, x), (out, z), (out, x), (out,))
        yield Case("shared", name, sizes, functions, "einsum", scaled=2)


def generated(shapes: Sequence[tuple] = SHAPES) -> Iterator[Case]:
    functions = {
        OURS: lambda z, w, v: mi.generate(z, w, None, v)[0],
        "einsum": lambda z, w, v: torch.einsum("gi,oij->goj", z, w) + v,
        "baddbmm": lambda z, w, v: by_hand(z, w, w[:, :, 0], v, v[:, 0])[0],
        "mm": lambda z, w, v: (z @ w.transpose(1, 2).flatten(0, 1).mT).unflatten(1, v.shape) + v,
    }
    for name, groups, _, z, x, out in shapes:
        yield Case("generate", name, ((groups, z), (out, z, x), (out, x)), functions, "einsum", scaled=1)


def applied(shapes: Sequence[tuple] = SHAPES) -> Iterator[Case]:
    functions = {
        OURS: lambda x, w, b: mi.apply_generated(x, w.unsqueeze(1), b.unsqueeze(1)),
        "baddbmm": batched,
        "einsum": einsum,
        "vmap functional_call": mapped,
        "F.linear loop": looped,
    }
    for name, groups, rows, _, x, out in shapes:
        sizes = ((groups, rows, x), (groups, out, x), (groups, out))
        yield Case("apply", name, sizes, functions, "einsum", scaled=1)


def lengths_of(groups: int, rows: int) -> Tensor:
    """Lengths from 1 to twice the mean or so."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 2 * rows, (groups,), generator=generator)


def ragged(device: str = "cpu", shapes: Sequence[tuple] = SHAPES[1:]) -> Iterator[Case]:
    """Groups of unequal length, their rows in order."""
    for name, groups, rows, z, x, out in shapes:
        lengths = lengths_of(groups, rows)
        ids = torch.repeat_interleave(lengths).to(device)
        ends = lengths.cumsum(0).to(device, torch.int32)
        sizes = ((len(ids), x), (groups, z), (out, z, x), (out, z), (out, x), (out,))

        def ours(*a, ids=ids):
            return mi.interaction(*a, segment_ids=ids)

        def gathered(x, z, *weights, ids=ids):
            return interaction_by("fused", x, z, *weights, ids)

        def split(x, z, *weights, lengths=lengths):
            weight, bias = by_hand(z, *weights)
            rows = x.split(lengths.tolist())
            return torch.cat([F.linear(*one) for one in zip(rows, weight.contiguous(), bias, strict=True)])

        def padded(x, z, *weights, lengths=lengths):
            weight, bias = by_hand(z, *weights)
            full = nn.utils.rnn.pad_sequence(x.split(lengths.tolist()), batch_first=True)
            inside = torch.arange(full.shape[1], device=device) < lengths.to(device).unsqueeze(1)
            return batched(full, weight.contiguous(), bias)[inside]

        def grouped(x, z, *weights, ids=ids, ends=ends):
            weight, bias = by_hand(z, *weights)
            return F.grouped_mm(x, weight.contiguous().mT, offs=ends) + bias[ids]

        functions = {OURS: ours, "fused": gathered, "F.linear loop": split, "padded baddbmm": padded}
        if device != "cpu":  # PyTorch's grouped product: bfloat16, rows of whole 16 bytes
            functions["grouped_mm"] = grouped
        yield Case("ragged", name, sizes, functions, "F.linear loop", scaled=2)


FAMILIES = {"shared": shared, "generate": generated, "apply": applied, "ragged": ragged}
# T, G, Z and (X, O) of --crossover.
GRID = ((2, 4, 16, 64, 256), (1, 16, 256), (4, 32, 128), ((32, 32), (128, 128), (256, 64)))
MOST = 1 << 34  # operations of the fused plan; larger cases are far from any crossover


def crossover(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Both plans on the grid: how much longer the chosen one takes than the better one."""
    result = environment.facts(command)
    result["crossover"] = []
    for dtype, work in itertools.product(options.dtype, options.passes):
        for rows, groups, z, (x, out) in itertools.product(*GRID):
            if 2 * groups * rows * z * x * out > MOST:
                continue
            sizes = ((groups, rows, x), (groups, 1, z), (out, z, x), (out, z), (out, x), (out,))
            case = Case("crossover", f"T{rows} G{groups} Z{z} X{x} O{out}", sizes, {}, scaled=2)
            arguments = case.arguments(getattr(torch, dtype), options.seed)
            explained = mi.explain("interaction", *(t.requires_grad_(work != "forward") for t in arguments))
            starts = {
                plan: cases.start(lambda *a, plan=plan: interaction_by(plan, *a), arguments, work)
                for plan in ("fused", "per_z")
            }
            samples: dict[str, list[float]] = {plan: [] for plan in starts}
            for plan, _, one in timing.interleave(starts, options.rounds, options.shortest, 20.0):
                samples[plan].append(one.seconds)
            seconds = {plan: timing.statistics_of(found)["median_s"] for plan, found in samples.items()}
            chosen = explained.algorithm if explained.algorithm in starts else "fused"
            loss = seconds[chosen] / min(seconds.values())
            entry = {"name": case.name, "dtype": dtype, "pass": work, "chosen": chosen, "loss": loss}
            entry |= {f"{plan}_s": found for plan, found in seconds.items()}
            estimated = {f"{c.plan}_estimated_s": c.femtoseconds / 1e15 for c in explained.alternatives}
            result["crossover"].append(entry | estimated)
            times = ", ".join(f"{plan} {1e6 * found:.0f} us" for plan, found in seconds.items())
            print(f"{case.name} {dtype} {work}: {times}; {chosen} is {loss:.2f} of the better", flush=True)
            if options.output is not None:
                results.write(options.output, result)
    losses = [entry["loss"] for entry in result["crossover"]]
    print(
        f"{sum(loss > 1.2 for loss in losses)} of {len(losses)} more than 20 % off, worst {max(losses):.2f}"
    )
    return result


def main(argv: list[str] | None = None) -> int:
    parser = cases.parser("Hypernetworks against PyTorch.", FAMILIES)
    parser.add_argument("--crossover", action="store_true", help="both plans on a grid of sizes, instead")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/hyper.py", *(sys.argv[1:] if argv is None else argv)]
    if options.crossover:
        crossover(options, command)
    else:
        cases.run(FAMILIES, options, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
