"""Gated linear units and low-rank interactions against the forms that an expert writes in PyTorch.

    python benchmarks/suites/glu.py --threads 2 --rounds 15 --output benchmarks/results/NAME.json

How a case is measured stands in cases.py; the candidates run in one process, in turn. `packed` is one product
with the packed weight, chunk, act * value; `separate` is two products. Of the low-rank forms, `linear` has a
product a factor; `stacked` computes all ranks of MUTAN by one product each and sums. With `--compile` each
rival is measured under torch.compile, too. The table has the time of each rival in parts of ours, and memory
that a call needs beyond its results.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness import cases
from benchmarks.harness.cases import OURS, Case
from benchmarks.harness.tables import text_table
from benchmarks.suites.heads import COLUMNS, rows_of


def packed(x: Tensor, weight: Tensor) -> Tensor:
    gate, value = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * value


def separate(x: Tensor, weight: Tensor) -> Tensor:
    gate, value = weight.chunk(2)
    return F.silu(F.linear(x, gate)) * F.linear(x, value)


GLUS = {OURS: mi.glu, "packed": packed, "separate": separate}


def glu(family: str, rows: int, features: int, hidden: int) -> Case:
    sizes = ((rows, features), (2 * hidden, features))
    name = f"{family}-{rows}-{features}-{hidden}"
    return Case(family, name, sizes, dict(GLUS), "packed", scaled=1)


def glus() -> Iterator[Case]:
    """Tokens of a batch: width and hidden width of small language and vision models."""
    for rows, features, hidden in (
        (256, 512, 1408),
        (1024, 256, 684),
        (1024, 768, 2048),
        (2048, 1024, 2752),
        (4096, 128, 344),
        (16384, 64, 256),
        (1000, 77, 333),
    ):
        yield glu("glu", rows, features, hidden)


def few() -> Iterator[Case]:
    """One token at a time, as a decoder has them, and a few."""
    for rows in (1, 4, 16, 64):
        yield glu("glu-few", rows, 1024, 2752)


def mlb() -> Iterator[Case]:
    """P (tanh(A x) * tanh(C z)), Kim et al. 2017."""

    def linear(x: Tensor, z: Tensor, a: Tensor, c: Tensor, p: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, a)) * torch.tanh(F.linear(z, c)), p)

    def ours(x: Tensor, z: Tensor, a: Tensor, c: Tensor, p: Tensor) -> Tensor:
        return mi.low_rank(x, z, a, c, p, activation_x="tanh", activation_z="tanh")

    for rows, width, context, rank, out in ((512, 2048, 2400, 1200, 2000), (4096, 128, 64, 128, 64)):
        sizes = ((rows, width), (rows, context), (rank, width), (rank, context), (out, rank))
        yield Case("mlb", f"mlb-{rows}-{rank}", sizes, {OURS: ours, "linear": linear}, "linear", scaled=2)


def mutan() -> Iterator[Case]:
    """sum_r (A_r x) * (C_r z), the sum over ranks of MUTAN, MFB and LMF."""

    def loop(x: Tensor, z: Tensor, a: Tensor, c: Tensor) -> Tensor:
        total = F.linear(x, a[0]) * F.linear(z, c[0])
        for of_x, of_z in zip(a[1:], c[1:], strict=True):
            total = total + F.linear(x, of_x) * F.linear(z, of_z)
        return total

    def stacked(x: Tensor, z: Tensor, a: Tensor, c: Tensor) -> Tensor:
        product = F.linear(x, a.flatten(0, 1)) * F.linear(z, c.flatten(0, 1))
        return product.view(len(x), *a.shape[:2]).sum(1)

    functions = {OURS: mi.low_rank, "loop": loop, "stacked": stacked}
    for name, rows, width, context, ranks, out in (
        ("mutan", 512, 310, 310, 5, 510),
        ("mfb", 512, 1024, 1024, 5, 1000),
        ("lmf", 1024, 65, 33, 4, 64),
        ("dcn-mix", 4096, 429, 429, 4, 64),
    ):
        sizes = ((rows, width), (rows, context), (ranks, out, width), (ranks, out, context))
        yield Case("ranks", f"{name}-{rows}-{out}", sizes, functions, "stacked", scaled=2)


def distmult() -> Iterator[Case]:
    """(A x) * (C z) of rank O."""

    def linear(x: Tensor, z: Tensor, a: Tensor, c: Tensor) -> Tensor:
        return F.linear(x, a) * F.linear(z, c)

    for rows, width, context, rank in ((4096, 256, 64, 256), (1024, 512, 512, 512), (16, 512, 512, 512)):
        sizes = ((rows, width), (rows, context), (rank, width), (rank, context))
        functions = {OURS: mi.low_rank, "linear": linear}
        yield Case("rank-one-term", f"product-{rows}-{rank}", sizes, functions, "linear", scaled=2)


FAMILIES = {"glu": glus, "glu-few": few, "mlb": mlb, "ranks": mutan, "product": distmult}


def main(argv: list[str] | None = None) -> int:
    options = cases.parser("Gated linear units and low-rank interactions.", FAMILIES).parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/glu.py", *(sys.argv[1:] if argv is None else argv)]
    result = cases.run(FAMILIES, options, command)
    print(text_table(COLUMNS, list(rows_of(result["cases"])), markdown=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
