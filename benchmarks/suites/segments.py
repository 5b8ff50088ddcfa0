"""Rows in any order, each with the weights of its group, against what PyTorch users write.

    python benchmarks/suites/segments.py --threads 2 --output benchmarks/results/NAME.json

How a case is measured stands in cases.py. `experts`: a mixture of experts. `many`: groups of a few rows.
`relations`: W by the number of each row. `order`: the rival is our own call for rows in order, after one
index_select of x.
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

# (name, N rows, G groups, X, O)
EXPERTS = (
    ("experts", 2048, 8, 512, 512),
    ("experts-up", 2048, 8, 512, 2048),
    ("experts-down", 1024, 8, 2048, 512),
    ("experts-64", 4096, 64, 256, 256),
)
MANY = (("many", 4500, 1000, 32, 32), ("many-wide", 4500, 1000, 32, 128), ("few-rows", 2000, 1000, 16, 64))
# (name, N, G, Z, X, O)
RELATIONS = tuple((f"relations-{out}", 4096, 40, 64, 64, out) for out in (1, 4, 16))


def numbers(rows: int, groups: int) -> Tensor:
    return torch.randint(groups, (rows,), generator=torch.Generator().manual_seed(0))


def grouped_mm(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """As experts are written: rows in order, PyTorch's grouped product, rows back to their places."""
    ids, order = ids.sort()
    ends = torch.bincount(ids, minlength=weight.shape[0]).cumsum(0).int()
    y = F.grouped_mm(x[order], weight.mT, offs=ends) + bias[ids]
    return torch.empty_like(y).index_copy(0, order, y)


def looped(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for group in range(weight.shape[0]):
        rows = (ids == group).nonzero().squeeze(1)
        y.index_copy_(0, rows, F.linear(x[rows], weight[group], bias[group]))
    return y


def padded(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    ids, order = ids.sort()
    lengths = torch.bincount(ids, minlength=weight.shape[0])
    place = torch.arange(len(ids)) - (lengths.cumsum(0) - lengths)[ids]
    full = x.new_zeros(weight.shape[0], int(lengths.max()), x.shape[1]).index_put((ids, place), x[order])
    y = torch.baddbmm(bias.unsqueeze(1), full, weight.mT)[ids, place]
    return torch.empty_like(y).index_copy(0, order, y)


def composed(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    with mi.backend("portable"):
        return mi.apply_generated(x, weight, bias, segment_ids=ids)


def ours(x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    return mi.apply_generated(x, weight, bias, segment_ids=ids)


def _applied(family: str, shapes: tuple, rivals: dict) -> Iterator[Case]:
    for name, rows, groups, x, out in shapes:
        ids = numbers(rows, groups)
        functions = {
            label: (lambda *a, f=function, ids=ids: f(*a, ids))
            for label, function in ({OURS: ours} | rivals).items()
        }
        sizes = ((rows, x), (groups, out, x), (groups, out))
        yield Case(family, name, sizes, functions, "F.linear loop", scaled=1)


def experts() -> Iterator[Case]:
    return _applied("experts", EXPERTS, {"F.linear loop": looped, "grouped_mm": grouped_mm})


def many() -> Iterator[Case]:
    rivals = {
        "F.linear loop": looped,
        "padded baddbmm": padded,
        "grouped_mm": grouped_mm,
        "portable": composed,
    }
    return _applied("many", MANY, rivals)


def order() -> Iterator[Case]:
    for case in _applied("order", EXPERTS[:3], {"F.linear loop": looped}):
        ids = numbers(case.sizes[0][0], case.sizes[1][0])
        in_order, index = ids.sort()

        def reordered(x, weight, bias, in_order=in_order, index=index):
            return ours(x.index_select(0, index), weight, bias, in_order)

        functions = {OURS: case.functions[OURS], "in order": reordered}
        yield Case("order", case.name, case.sizes, functions, OURS, scaled=1)


def relations() -> Iterator[Case]:
    for name, rows, groups, z, x, out in RELATIONS:
        ids = numbers(rows, groups)

        def ours(x, z, weight, ids=ids):
            return mi.interaction(x, z, weight, weight_ids=ids)

        def gathered(x, z, weight, ids=ids):
            return torch.einsum("nj,ni,noij->no", x, z, weight[ids])

        def looped(x, z, weight, ids=ids):
            y = x.new_zeros(x.shape[0], weight.shape[1])
            for group in range(weight.shape[0]):
                rows = (ids == group).nonzero().squeeze(1)
                y.index_copy_(0, rows, F.bilinear(z[rows], x[rows], weight[group]))
            return y

        sizes = ((rows, x), (rows, z), (groups, out, z, x))
        functions = {OURS: ours, "gathered einsum": gathered, "F.bilinear loop": looped}
        yield Case("relations", name, sizes, functions, "F.bilinear loop", scaled=2)


FAMILIES = {"experts": experts, "many": many, "order": order, "relations": relations}


def main(argv: list[str] | None = None) -> int:
    options = cases.parser("Weights of each row's group against PyTorch.", FAMILIES).parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/segments.py", *(sys.argv[1:] if argv is None else argv)]
    cases.run(FAMILIES, options, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
