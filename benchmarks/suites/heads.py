"""Layers that a linear head generates, in the form of published code against the head's views.

    python benchmarks/suites/heads.py --threads 2 --rounds 15 --output benchmarks/results/NAME.json

How a case is measured stands in cases.py; the candidates run in one process, in turn. `published` computes
the head's output and cuts it into the weights and biases of each sample, as the layer of that name does; ours
passes views of the head's weight and bias (mi.split_head) to mi.interaction or mi.generate; splitting counts.
The table has the time of each rival in parts of ours, and memory that a call needs beyond its results.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness import cases
from benchmarks.harness.cases import OURS, Case
from benchmarks.harness.tables import format_ratio, text_table

PUBLISHED = "published"


def sizes(x: tuple[int, ...], z: tuple[int, ...], rows: int) -> tuple[tuple[int, ...], ...]:
    """Of x, z, and the weight and bias of the head."""
    return x, z, (rows, z[-1]), (rows,)


def of_edges() -> Iterator[Case]:
    """NNConv of torch_geometric: the message of each edge is x W(edge), W as [X, O]."""
    for name, edges, context, width, out in (
        ("nnconv", 4096, 32, 32, 32),
        ("nnconv-small", 1024, 16, 16, 16),
        ("nnconv-wide", 2048, 64, 64, 64),
    ):

        def published(x, z, weight, bias, width=width, out=out):
            generated = F.linear(z, weight, bias).view(-1, width, out)
            return torch.matmul(x.unsqueeze(1), generated).squeeze(1)

        def ours(x, z, weight, bias, width=width, out=out):
            ((w, v),) = mi.split_head(weight, bias, [(width, out)], order="in,out")
            return mi.interaction(x, z, w, None, v)

        functions = {OURS: ours, PUBLISHED: published}
        shapes = sizes((edges, width), (edges, context), width * out)
        yield Case("edges", name, shapes, functions, PUBLISHED, scaled=2)


def of_samples() -> Iterator[Case]:
    """APG of FuxiCTR: x W(z) + b(z) of each sample, b before W as [X, O]."""
    for name, batch, context, width, out in (
        ("apg", 1024, 16, 64, 64),
        ("apg-long", 1024, 64, 64, 64),
        ("apg-low-rank", 4096, 16, 16, 16),
        ("apg-wide", 512, 16, 256, 128),
    ):

        def published(x, z, weight, bias, width=width, out=out):
            generated = F.linear(z, weight, bias)
            offset, matrix = generated[:, :out], generated[:, out:].reshape(-1, width, out)
            return torch.bmm(x.unsqueeze(1), matrix).squeeze(1) + offset

        def ours(x, z, weight, bias, width=width, out=out):
            (u, c), (w, v) = mi.split_head(weight, bias, [(out,), (width, out)], order="in,out")
            return mi.interaction(x, z, w, u, v, c)

        functions = {OURS: ours, PUBLISHED: published}
        shapes = sizes((batch, width), (batch, context), width * out + out)
        yield Case("samples", name, shapes, functions, PUBLISHED, scaled=2)


def ours_of_layers(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[O, X] and then [O] in the head's output."""
    width = x.shape[-1]
    out = len(weight) // (width + 1)
    (w, v), (u, c) = mi.split_head(weight, bias, [(out, width), (out,)])
    return mi.interaction(x, z, w, u, v, c)


def of_tasks() -> Iterator[Case]:
    """hypnettorch: one context generates a layer for all rows."""

    def published(x, z, weight, bias):
        width = x.shape[-1]
        out = len(weight) // (width + 1)
        generated = F.linear(z, weight, bias)
        return F.linear(x, generated[: out * width].view(out, width), generated[out * width :])

    for name, rows, context, width, out in (
        ("task", 4096, 32, 64, 64),
        ("task-wide", 1024, 64, 256, 256),
        ("task-few-rows", 32, 32, 128, 128),
    ):
        functions = {OURS: ours_of_layers, PUBLISHED: published}
        shapes = sizes((rows, width), (context,), out * width + out)
        yield Case("tasks", name, shapes, functions, PUBLISHED, scaled=2)


def of_contexts() -> Iterator[Case]:
    """Few contexts, many rows of each: hyper-nn, hyperlight."""

    def published(x, z, weight, bias):
        width = x.shape[-1]
        out = len(weight) // (width + 1)
        generated = F.linear(z.squeeze(1), weight, bias)
        layers, offset = generated.split([out * width, out], -1)
        return torch.baddbmm(offset.unsqueeze(1), x, layers.view(-1, out, width).mT)

    for name, groups, rows, context, width, out in (
        ("contexts", 8, 512, 32, 64, 64),
        ("contexts-wide", 8, 128, 64, 256, 256),
        ("contexts-many", 256, 16, 32, 64, 64),
    ):
        functions = {OURS: ours_of_layers, PUBLISHED: published}
        shapes = sizes((groups, rows, width), (groups, 1, context), out * width + out)
        yield Case("contexts", name, shapes, functions, PUBLISHED, scaled=2)


def of_weights() -> Iterator[Case]:
    """The generated weights themselves."""

    def published(z, weight, bias, *, out, width):
        return F.linear(z, weight, bias).view(-1, out, width)

    def ours(z, weight, bias, *, out, width):
        ((w, v),) = mi.split_head(weight, bias, [(out, width)])
        return mi.generate(z, w, None, v)[0]

    for name, batch, context, width, out in (
        ("generate", 256, 32, 64, 64),
        ("generate-one", 1, 64, 256, 256),
    ):

        def fixed(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
            return lambda *a: function(*a, **options)

        both = {OURS: ours, PUBLISHED: published}
        functions = {key: fixed(function, out=out, width=width) for key, function in both.items()}
        shapes = ((batch, context), (out * width, context), (out * width,))
        yield Case("weights", name, shapes, functions, PUBLISHED, scaled=1)


FAMILIES = {
    "edges": of_edges,
    "samples": of_samples,
    "tasks": of_tasks,
    "contexts": of_contexts,
    "weights": of_weights,
}
COLUMNS = [
    "case",
    "sizes",
    "dtype",
    "pass",
    "rival",
    "rival / ours",
    "MiB of ours",
    "MiB of the rival",
    "error",
]


def rows_of(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    for case in found:
        candidates = case["candidates"]
        memory = {name: c["extra_bytes_beyond_results"] / 2**20 for name, c in candidates.items()}
        shapes = " ".join("x".join(map(str, size)) for size in case["sizes"][:-1])
        for name, ratio in cases.ratios(candidates).items():
            yield [
                case["name"],
                shapes,
                case["dtype"],
                case["pass"],
                name,
                format_ratio(ratio),
                f"{memory[OURS]:.1f}",
                f"{memory[name]:.1f}",
                f"{candidates[OURS]['error']:.1e}",
            ]


def main(argv: list[str] | None = None) -> int:
    parser = cases.parser("Layers that a linear head generates, against their published forms.", FAMILIES)
    parser.set_defaults(dtype=["float32"])
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/heads.py", *(sys.argv[1:] if argv is None else argv)]
    result = cases.run(FAMILIES, options, command)
    print(text_table(COLUMNS, list(rows_of(result["cases"])), markdown=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
