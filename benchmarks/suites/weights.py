"""Weights of each sample, and weights that samples choose by index, against what published layers write.

    python benchmarks/suites/weights.py --threads 2 --output benchmarks/results/NAME.json

How a case is measured is described in cases.py.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness import cases
from benchmarks.harness.cases import OURS, Case


def einsum(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("...i,...oij,...j->...o", z, weight, x)


def matmul(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """z W by one batched product, then x: with the smaller intermediate first."""
    if x.shape[-1] <= z.shape[-1]:
        return (weight @ x[..., None, :, None]).squeeze(-1).matmul(z.unsqueeze(-1)).squeeze(-1)
    return (z[..., None, None, :] @ weight).squeeze(-2).matmul(x.unsqueeze(-1)).squeeze(-1)


def scores(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """All x against each z: z W first, then one product."""
    generated = (z.squeeze(1).unsqueeze(1) @ weight.flatten(0, 2)).squeeze(1)
    return (generated @ x.squeeze(0).mT).unsqueeze(-1)


def edges(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Weights [E, X, Z, O] of edges: the outer product meets W as a vector."""
    outer = (x.unsqueeze(2) * z.unsqueeze(1)).flatten(1).unsqueeze(1)
    return (outer @ weight.flatten(1, 2)).squeeze(1)


def of_samples() -> Iterator[Case]:
    rivals = {"einsum": einsum, "matmul": matmul}
    functions = {OURS: mi.interaction, **rivals}
    for name, rows, o, z, x in (
        ("ntn", 512, 4, 64, 64),
        ("rescal", 1024, 1, 64, 64),
        ("diag-bilinear", 4096, 8, 16, 16),
        ("wide", 16, 64, 64, 128),
        ("few", 4, 64, 128, 128),
    ):
        yield Case("samples", name, ((rows, x), (rows, z), (rows, o, z, x)), functions, "einsum", scaled=2)
    sizes = ((16, 128, 64), (16, 1, 32), (16, 1, 64, 32, 64))
    yield Case("samples", "tokens", sizes, functions, "einsum", scaled=2)
    sizes = ((16, 128, 64), (16, 128, 32), (16, 1, 64, 32, 64))
    yield Case("samples", "tokens-contexts", sizes, functions, "einsum", scaled=2)
    sizes = ((1, 4000, 64), (64, 1, 64), (64, 1, 1, 64, 64))
    functions = {OURS: mi.interaction, "einsum": einsum, "matmul": scores}
    yield Case("samples", "all-tails", sizes, functions, "einsum", scaled=2)
    functions = {
        OURS: lambda x, z, weight: mi.interaction(x, z, weight.permute(0, 3, 2, 1)),
        "einsum": lambda x, z, weight: torch.einsum("ej,ei,ejio->eo", x, z, weight),
        "outer": edges,
    }
    for name, rows, o, z, x in (("edges", 8192, 16, 4, 16), ("edges-scalar", 8192, 32, 1, 32)):
        yield Case("samples", name, ((rows, x), (rows, z), (rows, x, z, o)), functions, "einsum", scaled=2)


def by_index() -> Iterator[Case]:
    for name, rows, groups, o, z, x in (
        ("ntn", 2048, 20, 4, 32, 32),
        ("rescal", 4096, 200, 1, 64, 64),
        ("relations", 8192, 40, 16, 16, 32),
        ("many-weights", 2048, 1000, 8, 16, 16),
    ):
        ids = torch.randint(groups, (rows,), generator=torch.Generator().manual_seed(0))

        def looped(x, z, weight, ids=ids):
            y = x.new_empty(len(x), weight.shape[1])
            for group in ids.unique().tolist():
                rows = (ids == group).nonzero().squeeze(1)
                w = weight[group]
                outer = (z[rows].unsqueeze(2) * x[rows].unsqueeze(1)).flatten(1)
                y = y.index_copy(0, rows, outer @ w.flatten(1).mT)
            return y

        functions = {
            OURS: lambda x, z, weight, ids=ids: mi.interaction(x, z, weight, weight_ids=ids),
            "gathered einsum": lambda x, z, weight, ids=ids: einsum(x, z, weight[ids]),
            "gathered matmul": lambda x, z, weight, ids=ids: matmul(x, z, weight[ids]),
            "loop": looped,
        }
        yield Case("index", name, ((rows, x), (rows, z), (groups, o, z, x)), functions, "gathered einsum", 2)
    for name, rows, groups, o, x in (("rgcn", 20000, 40, 64, 64), ("rgcn-small", 20000, 40, 16, 16)):
        ids = torch.randint(groups, (rows,), generator=torch.Generator().manual_seed(0))

        def relations(x, weight, ids=ids):
            """A product for each relation, as graph libraries write it."""
            y = x.new_zeros(len(x), weight.shape[1])
            for group in range(len(weight)):
                rows = (ids == group).nonzero().squeeze(1)
                y = y.index_add(0, rows, x[rows] @ weight[group].mT)
            return y

        functions = {
            OURS: lambda x, w, ids=ids: mi.interaction(x, x[:, :0], None, None, w, weight_ids=ids),
            "loop": relations,
            "gathered bmm": lambda x, w, ids=ids: (w[ids] @ x.unsqueeze(-1)).squeeze(-1),
        }
        yield Case("index", name, ((rows, x), (groups, o, x)), functions, "loop", scaled=1)


FAMILIES = {"samples": of_samples, "index": by_index}


def main(argv: list[str] | None = None) -> int:
    options = cases.parser("Weights of each sample against PyTorch.", FAMILIES).parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/weights.py", *(sys.argv[1:] if argv is None else argv)]
    cases.run(FAMILIES, options, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
