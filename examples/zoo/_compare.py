"""What all examples of the zoo share: one way to compare a published layer with ours. No example itself."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.memory import peak_memory

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the harness is in the checkout alone
from benchmarks.harness import timing

# Both sides are within 1e-12 of the formula or so (mi_kernels.testing.errors), in sums of another order.
LIMIT = 1e-11


def need(module: str, package: str) -> Any:
    """The module, or one line that says what to install, and exit code 2."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not (error.name and f"{module}.".startswith(f"{error.name}.")):
            raise  # the package is there, and misses one of its own
        print(f"this example needs {package}: pip install {package}", file=sys.stderr)
        raise SystemExit(2) from None


class Step(NamedTuple):
    """A training step of a layer without its optimiser: forward, and the gradients of the leaves."""

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]

    def results(self) -> tuple[Tensor, ...]:
        y = self.forward()
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return y, *torch.autograd.grad(y, self.leaves, cotangent)


def steps_of(ours: nn.Module, theirs: nn.Module, *inputs: Tensor) -> tuple[Step, Step]:
    """Of two layers with the same parameters in the same order."""

    def step(layer: nn.Module) -> Step:
        leaves = [*(x for x in inputs if x.requires_grad), *layer.parameters()]
        return Step(lambda: layer(*inputs), leaves)

    return step(ours), step(theirs)


def fit(loss: Callable[[int], Tensor], optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """``loss`` of each step's batch, before the step."""
    losses = []
    for number in range(steps):
        value = loss(number)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


class Comparison(NamedTuple):
    name: str
    ratio: float  # ours / theirs, of a training step: the median of rounds that have both
    quartiles: tuple[float, float]
    memory: tuple[int, int]  # peak bytes of ours and theirs
    outputs: float  # the relative difference of the outputs in float64
    gradients: float  # and the largest of those of the gradients

    def __str__(self) -> str:
        (low, high), (ours, theirs) = self.quartiles, (size / 2**20 for size in self.memory)
        return (
            f"{self.name}: time of a training step, ours / theirs {self.ratio:.2f} "
            f"({low:.2f} to {high:.2f}); "
            f"memory {ours:.1f} against {theirs:.1f} MiB; "
            f"float64 differences: output {self.outputs:.1e}, gradients {self.gradients:.1e}"
        )


class Result(NamedTuple):
    comparisons: list[Comparison]
    losses: dict[str, list[float]]  # of "theirs" and "ours", step by step, from the same start
    scores: dict[str, str]


def compare(name: str, make: Callable[[torch.dtype], tuple[Step, Step]], quick: bool) -> Comparison:
    """``make`` returns ours and theirs, with leaves in the same order, of the same parameters."""
    torch.manual_seed(0)
    ours, theirs = (step.results() for step in make(torch.float64))
    output, *gradients = (relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.manual_seed(0)
    runs = {name: step.results for name, step in zip(("ours", "theirs"), make(torch.float32), strict=True)}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    rounds, shortest, longest = (3, 0.005, 1) if quick else (21, 0.02, 8)
    clock = timing.cpu if torch.get_num_threads() == 1 else timing.wall
    starts = {side: (lambda run=run: run) for side, run in runs.items()}
    for side, _, sample in timing.interleave(starts, rounds, shortest, longest, clock=clock):
        seconds[side].append(sample.seconds)
    memory = peak_memory(runs["ours"]), peak_memory(runs["theirs"])
    # Where one side is so slow that it sat out later rounds, these have no ratio.
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=False)]
    ratio, low, high = timing.statistics_of(ratios).values()
    return Comparison(name, ratio, (low, high), memory, output, max(gradients))


def main(
    document: str | None, run: Callable[[int, bool], Result], steps: int, argv: Sequence[str] | None = None
) -> int:
    """The command line of an example; 1 if ours differs from the published layer."""
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, help=f"training steps (default: {steps})")
    parser.add_argument("--quick", action="store_true", help="small sizes and a few steps, for a test")
    given = parser.parse_args(argv)
    if given.steps is not None and given.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {given.steps}")
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}, float32")
    result = run(given.steps or (steps // 10 if given.quick else steps), given.quick)
    for comparison in result.comparisons:
        print(comparison)
    ours, theirs = result.losses["ours"], result.losses["theirs"]
    apart = [abs(a - b) / theirs[0] for a, b in zip(ours, theirs, strict=True)]
    print(f"losses of {len(ours)} steps, theirs: {curve(theirs)}")
    print(f"losses of {len(ours)} steps, ours:   {curve(ours)}")
    print(
        f"they differ by {max(apart[:20]):.1e} of the first loss in the first 20 steps, "
        f"by {max(apart):.1e} in all: training magnifies what rounding changes"
    )
    for name, score in result.scores.items():
        print(f"{name}: {score}")
    return int(not all(c.outputs <= LIMIT and c.gradients <= LIMIT for c in result.comparisons))


def curve(losses: list[float]) -> str:
    return " ".join(f"{losses[index * (len(losses) - 1) // 4]:.4f}" for index in range(5))
