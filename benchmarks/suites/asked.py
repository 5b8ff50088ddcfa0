"""A backward pass that was asked for less, and autocast with its cache: ratios of times in one run.

    python benchmarks/suites/asked.py [--rounds 30]

Columns of the first table, each in parts of the time of a rule that computes all that requires grad: the rule
as it is, which asks the engine (`wanted` in ops/rules.py); the other way, dW in a node of its own, whose
backward runs if the engine wants it; torch's own nn.functional.bilinear. Rows: forward and backward for all
of x, z and W, and for x alone (forces, saliency, gradient penalties).

The second table: 16 calls of one layer in a region of autocast in bfloat16, in parts of the time of calls
with everything in bfloat16 to begin with.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness.timing import interleave
from mi_kernels.ops.interaction import autograd
from mi_kernels.ops.rules import Rule
from mi_kernels.tune import positive

SHAPES = ((8, 8), (32, 16), (128, 64), (512, 128))  # rows, and features of all three kinds


class Weights(Rule):
    """A zero like y without memory, whose gradient becomes dW."""

    @staticmethod
    def forward(x, z, weight):
        return x.new_zeros(1, 1).expand(x.shape[0], weight.shape[0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        Rule.save(ctx, *inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        return (
            None,
            None,
            autograd.weight_grads("cpu", (True, False, False, False), grad, *ctx.saved_tensors)[0],
        )


class Inputs(Rule):
    @staticmethod
    def forward(x, z, weight, zero):
        return torch.ops.mi_kernels.interaction(x, z, weight, None, None, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        Rule.save(ctx, *inputs[:3])

    @staticmethod
    def backward(ctx, grad):
        want = ctx.needs_input_grad[:2]
        dx, dz = autograd.input_grads("cpu", want, grad, *ctx.saved_tensors, None, None)
        return dx, dz, None, grad


def in_one_node(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return autograd.forward("cpu", x, z, weight, None, None, None)


def in_two_nodes(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return Inputs.call(x, z, weight.detach(), Weights.call(x.detach(), z.detach(), weight))


@contextmanager
def nothing_asked() -> Iterator[None]:
    asked = autograd.wanted
    autograd.wanted = lambda ctx, work: ctx.needs_input_grad
    try:
        yield
    finally:
        autograd.wanted = asked


def medians(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    starts = {name: (lambda run=run: run) for name, run in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for name, _, one in interleave(starts, rounds, 0.005, 60.0):
        samples[name].append(one.seconds)
    return {name: statistics.median(found) for name, found in samples.items()}


def gradients(rounds: int) -> None:
    ways = {"asks the engine": in_one_node, "two nodes": in_two_nodes, "all": in_one_node}
    ways["F.bilinear"] = lambda x, z, weight: torch.nn.functional.bilinear(z, x, weight)
    print("| rows, features | gradients of | " + " | ".join(name for name in ways if name != "all") + " |")
    print("| --- " * (len(ways) + 1) + "|")
    for rows, size in SHAPES:
        x, z, weight = (torch.randn(s, requires_grad=True) for s in ((rows, size), (rows, size), (size,) * 3))
        for asked in ("x, z, W", "x"):
            leaves = [x, z, weight] if asked != "x" else [x]

            def run(way: Callable[..., Tensor], leaves: list[Tensor] = leaves, x=x, z=z, weight=weight):
                return torch.autograd.grad(way(x, z, weight), leaves, torch.ones_like(x))

            def run_all(run=run):
                with nothing_asked():
                    return run(in_one_node)

            candidates = {name: (lambda way=way, run=run: run(way)) for name, way in ways.items()}
            times = medians(candidates | {"all": run_all}, rounds)
            parts = [f"{times[name] / times['all']:.2f}" for name in ways if name != "all"]
            print(f"| {rows}, {size} | {asked} | " + " | ".join(parts) + " |")


def autocast(rounds: int) -> None:
    print("\n| rows, features | autocast | without its cache | packed | packed, frozen |")
    print("| --- " * 5 + "|")
    for rows, size in SHAPES[1:]:
        x, z = (torch.randn(rows, size) for _ in range(2))
        weight = torch.nn.Parameter(torch.randn(size, size, size))
        packed, frozen = mi.pack(weight), mi.pack(weight.detach().clone())
        low = [tensor.detach().bfloat16() for tensor in (x, z, weight)]

        def region(weight: object, cache: bool = True, x=x, z=z) -> None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
                for _ in range(16):
                    mi.interaction(x, z, weight)

        def plain(low=low) -> None:
            for _ in range(16):
                mi.interaction(*low)

        candidates = {
            "plain": plain,
            "autocast": lambda region=region, weight=weight: region(weight),
            "without": lambda region=region, weight=weight: region(weight, False),
            "packed": lambda region=region, packed=packed: region(packed),
            "frozen": lambda region=region, frozen=frozen: region(frozen),
        }
        times = medians(candidates, rounds)
        parts = [f"{times[name] / times['plain']:.2f}" for name in candidates if name != "plain"]
        print(f"| {rows}, {size} | " + " | ".join(parts) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=positive, default=30)
    rounds = parser.parse_args().rounds
    gradients(rounds)
    autocast(rounds)


if __name__ == "__main__":
    main()
