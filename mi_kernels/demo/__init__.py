"""The demonstration: a PyTorch model with nn.Bilinear, compared with its converted copy.

The model sees two images of handwritten digits and decides whether they show the same digit. It is
trained with ``nn.Bilinear`` and, from the same seed and on the same batches, after
:func:`mi_kernels.convert`. A gradient check and a small benchmark follow.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.benchmark import Timer

from .. import backends, libraries
from ..testing._package import mi
from ..testing.memory import peak_memory
from .digits import Run, load_images

BATCH = 256
HELD_OUT_PAIRS = 4000
EVALUATIONS = 20
BENCHMARK_SHAPES = (  # B, Z, X, O
    (256, 64, 64, 64),
    (1024, 32, 32, 32),
    (64, 128, 128, 128),
    (512, 128, 128, 8),
)
BENCHMARK_SECONDS = 1.5  # for each shape
NEXT = """
  model = mi.convert(model)                       your own model with nn.Bilinear layers
  mi.nn.MultiplicativeInteraction                 the full form: y = z^T W x + U z + V x + c
  mi.nn.FiLM, mi.nn.DiagonalInteraction           gates and modulation; see examples/film_digits.py
  python -m mi_kernels doctor                     what runs here, and why the rest does not
  python -m mi_kernels demo --compile --seed 1    another seed, and torch.compile checked too
  docs/mathematics.md                             the rules behind the gradient checks"""


class Output:
    """Headings, lines, tables and a progress bar: with rich if it is installed, else plain text."""

    def __init__(self) -> None:
        self.console = None
        if find_spec("rich") is not None:
            from rich.console import Console

            self.console = Console(highlight=False, soft_wrap=True)

    def line(self, text: str = "") -> None:
        print(text, flush=True)

    def heading(self, text: str) -> None:
        if self.console is None:
            self.line(f"\n{text}\n{'-' * len(text)}")
        else:
            self.console.print(f"\n[bold]{text}[/bold]")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column is text, the others are numbers."""
        if self.console is None:
            widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
            for cells in (columns, ["-" * width for width in widths], *rows):
                first, *others = zip(cells, widths, strict=True)
                self.line(
                    "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])
                )
            return
        from rich.table import Table

        table = Table()
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def progress(self, total: int, description: str) -> Iterator[int]:
        if self.console is not None:
            from rich.progress import track

            yield from track(range(total), description=description, console=self.console)
            return
        for step in range(total):
            if step % max(total // 5, 1) == 0:
                self.line(f"{description}: {step} of {total}")
            yield step


def train(steps: int, seed: int, out: Output) -> tuple[Run, Run]:
    """Train both models on the same batches, alternating steps so that machine load affects both alike."""
    images, held_out = load_images(seed)
    test_pairs = held_out.pairs(HELD_OUT_PAIRS, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    runs = (Run.new("nn.Bilinear", seed, lambda model: model), Run.new("converted", seed, mi.convert))
    for step in out.progress(steps, "training both models"):
        batch = images.pairs(BATCH, generator)
        for run in runs if step % 2 == 0 else reversed(runs):
            start = time.perf_counter()
            loss = run.step(*batch)
            run.seconds.append(time.perf_counter() - start)
            run.losses.append(loss)
            if (step + 1) % max(steps // EVALUATIONS, 1) == 0 or step + 1 == steps:
                run.accuracy.append((step + 1, run.evaluate(*test_pairs)))
    for run in runs:
        run.optimizer.zero_grad()  # else the step would free memory at its start
        run.extra_bytes = peak_memory(partial(run.step, *batch))
    return runs


def report_training(runs: tuple[Run, Run], out: Output) -> None:
    theirs, ours = (torch.tensor(run.losses, dtype=torch.float64) for run in runs)
    difference = (theirs - ours).abs()
    out.line(
        f"loss curves: largest difference of a step {difference.max():.2e} absolute, "
        f"{(difference / theirs).max():.2e} relative"
    )
    rows = []
    for run in runs:
        accuracy, memory = 100 * run.accuracy[-1][1], run.extra_bytes / 2**20
        cells = (f"{run.losses[-1]:.6f}", f"{accuracy:.2f} %", f"{run.milliseconds():.2f}", f"{memory:.2f}")
        rows.append((run.name, *cells))
    out.table(("model", "last loss", "accuracy", "ms/step", "extra MiB"), rows)
    out.line(f"accuracy: on {HELD_OUT_PAIRS} pairs of images held out from training; ms/step: median")
    out.line("extra MiB: most memory above the start during one training step")
    before, after = runs
    out.line(
        f"nn.Bilinear/converted: time {before.milliseconds() / after.milliseconds():.2f}, "
        f"extra memory {before.extra_bytes / after.extra_bytes:.2f}"
    )


def plot(runs: tuple[Run, Run], backend: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (losses, accuracy), (seconds, memory) = figure.subplots(2, 2)
    figure.suptitle(f"Same digit or not: nn.Bilinear and the converted model (backend: {backend})")
    styles: tuple[dict[str, Any], ...] = (
        {"color": "C0", "linewidth": 3.5, "alpha": 0.6},
        {"color": "C1", "linewidth": 1.2, "linestyle": "--"},
    )
    for run, style in zip(runs, styles, strict=True):
        steps, values = zip(*run.accuracy, strict=True)
        losses.plot(range(1, len(run.losses) + 1), run.losses, label=run.name, **style)
        percent = [100 * value for value in values]
        accuracy.plot(steps, percent, label=run.name, marker="o", markersize=4, **style)
    losses.set(
        title="Training loss", xlabel="training step", ylabel="binary cross-entropy (nats)", yscale="log"
    )
    accuracy.set(title="Accuracy on pairs of held-out images", xlabel="training step", ylabel="accuracy (%)")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    names = [run.name for run in runs]
    for axes, title, label, bars in (
        (seconds, "Time of a training step", "median time (ms)", [run.milliseconds() for run in runs]),
        (
            memory,
            "Memory of a training step",
            "extra peak memory (MiB)",
            [run.extra_bytes / 2**20 for run in runs],
        ),
    ):
        axes.bar_label(axes.bar(names, bars, color=["C0", "C1"], width=0.5), fmt="%.2f")
        axes.set(title=title, ylabel=label)
        axes.margins(y=0.15)
    figure.savefig(path, dpi=120)


def _float64_arguments(batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 4), (batch, 3), (2, 3, 4), (2, 3), (2, 4), (2,))  # x, z, W, U, V, c
    return [torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes]


def _per_sample_gradients() -> None:
    x, z, *weights = (t.detach() for t in _float64_arguments(5))

    def loss(weights, x, z):
        return mi.interaction(x, z, *weights).pow(2).sum()

    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, z)
    one_by_one = [torch.func.grad(loss)(weights, x[b], z[b]) for b in range(5)]
    for column, singles in zip(mapped, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(column, torch.stack(singles))


def _gates() -> None:
    x, z, *_ = _float64_arguments(3)
    gate, shift = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True).unbind()
    square = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    calls: tuple[tuple[Callable[..., Tensor], tuple[Tensor, ...]], ...] = (
        (lambda *t: mi.modulate(*t, activation="sigmoid"), (x, gate, shift)),
        (lambda *t: mi.diagonal(*t, activation="tanh"), (x, z, square[:, :, 0])),
        (lambda *t: mi.gated_interaction(*t, activation="softmax"), (x, z, square)),
    )
    for function, arguments in calls:
        leaves = [t.detach().requires_grad_() for t in arguments]
        gradcheck(function, leaves, check_forward_ad=True)
        gradgradcheck(function, leaves)


def _compiled_gradients() -> None:
    arguments = _float64_arguments(5)
    compiled = torch.compile(mi.interaction, fullgraph=True, dynamic=True)
    results = [torch.autograd.grad(f(*arguments).pow(2).sum(), arguments) for f in (mi.interaction, compiled)]
    torch.testing.assert_close(*results)


def check_gradients(compiled: bool, out: Output) -> bool:
    """Print a table of checks in float64; True if all of them pass."""
    arguments = _float64_arguments(3)
    forward = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    checks: dict[str, Callable[[], object]] = {
        "gradcheck: reverse mode": lambda: gradcheck(mi.interaction, arguments),
        "gradcheck: forward mode, batched": lambda: gradcheck(mi.interaction, arguments, **forward),
        "gradgradcheck: second derivatives": lambda: gradgradcheck(mi.interaction, arguments),
        "vmap(grad): per-sample = a loop": _per_sample_gradients,
        "modulate, diagonal, gated: all of it": _gates,
    }
    if compiled:
        checks["torch.compile: gradients = eager"] = _compiled_gradients
    rows, held = [], True
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            check()
            result = "holds"
        except Exception as error:  # any failure is the result of the check
            held, result = False, f"FAILS: {type(error).__name__}: {str(error).splitlines()[0]}"
        rows.append((name, result, f"{time.perf_counter() - start:.2f}"))
    out.table(("check (all six arguments, float64)", "result", "seconds"), rows)
    return held


def _einsum(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("bi,oij,bj->bo", input1, weight, input2) + bias


def benchmark(out: Output) -> None:
    """Forward + backward of three implementations, interleaved on four shapes; medians."""
    functions = (F.bilinear, _einsum, mi.bilinear)
    rows = []
    for b, z, x, o in BENCHMARK_SHAPES:
        arguments = [torch.randn(shape, requires_grad=True) for shape in ((b, z), (b, x), (o, z, x), (o,))]
        names = {"grad": torch.autograd.grad, "arguments": arguments, "cotangent": torch.randn(b, o)}
        timers = [
            Timer(
                "grad(function(*arguments), arguments, cotangent)",
                globals={**names, "function": function},
                num_threads=torch.get_num_threads(),
            )
            for function in functions
        ]
        for timer in timers:
            timer.timeit(1)
        samples: list[list[float]] = [[] for _ in timers]
        end = time.perf_counter() + BENCHMARK_SECONDS
        while time.perf_counter() < end or len(samples[0]) < 3:
            for timer, times in zip(timers, samples, strict=True):
                times.append(1e3 * timer.timeit(1).median)
        theirs, einsum, ours = map(statistics.median, samples)
        cells = (theirs, einsum, ours, theirs / ours, einsum / ours)
        rows.append((f"{b}x{z}x{x}x{o}", *(f"{value:.2f}" for value in cells)))
    out.table(("BxZxXxO", "F.bilinear", "einsum", "mi", "F.bilinear/mi", "einsum/mi"), rows)
    out.line("times in ms; a ratio above 1 means that mi is faster")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mi-kernels demo",
        description="Train a model with nn.Bilinear, convert it, train it again, and compare both.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("mi_kernels_demo.png"),
        metavar="PNG",
        help="where the plot goes (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=250, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of model and data (default: %(default)s)")
    parser.add_argument(
        "--compile", action="store_true", help="check torch.compile too (needs a C++ compiler)"
    )
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {options.steps}")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.open("ab").close()
    except OSError as error:
        parser.error(
            f"argument --output: expected a file that can be written, got {options.output} ({error.strerror})"
        )
    return options


def main(argv: Sequence[str]) -> int:
    """Run the demonstration; 0 if everything held, else 1."""
    options = _arguments(argv)
    needed = (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"))
    missing = [name for module, name in needed if find_spec(module) is None]
    if missing:
        print(f"The demo needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    out = Output()
    backend = backends.choose(torch.empty(0))
    reason = backends.why_not(backend)
    if reason is not None:
        print(f"The demo cannot run: {reason}", file=sys.stderr)
        return 1
    isa = libraries.cpu_isa()
    detail = f" ({isa['selected']})" if backend == "cpu" and isa else ""
    if backend == "portable" and isa is None:
        detail = f", because {backends.why_not('cpu')}"
    out.line(f"mi_kernels {mi.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    out.line(f"backend: {backend}{detail}")

    out.heading(f"1. The same model twice: scikit-learn's digits, {options.steps} steps of {BATCH} pairs")
    runs = train(options.steps, options.seed, out)
    report_training(runs, out)
    plot(runs, backend, options.output)
    out.line(f"plot: {options.output}")

    out.heading("2. Gradients of mi.interaction")
    held = check_gradients(options.compile, out)

    out.heading("3. Forward + backward, float32, median of interleaved runs")
    benchmark(out)

    out.heading("What to try next")
    out.line(NEXT[1:])
    out.line(f"\nfinished in {time.perf_counter() - start:.0f} s")
    return 0 if held else 1
