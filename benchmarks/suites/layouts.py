"""W as other code stores it, passed as a view [O, Z, X]: ratios of times in one run.

    python benchmarks/suites/layouts.py [--rounds 15] [--shape NAME ...] [--layout NAME ...] [--cpu-time]

Each row is a layout, a shape, a dtype and a pass (forward, or forward and backward of x, z and W).
`rival / ours` compares with the fastest of the ways to write the product on the tensor that is stored:
einsum, the outer product of z and x in one matmul, a matmul that contracts one input first, and
nn.functional.bilinear on the view. `permuted / contiguous` compares our call with our call on a contiguous W.
The second table (--samples: alone) has weights of each sample: one row a group, W [G, ...].
--cpu-time counts the CPU time of one thread, which other processes lengthen less.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness.timing import Clock, cpu, interleave, wall
from mi_kernels.tune import positive

# rows, Z, X, O
SHAPES = {
    "multibench": (64, 512, 512, 64),
    "stanza": (128, 400, 400, 40),
    "small": (256, 64, 64, 64),
    "one-row": (1, 512, 512, 64),
    "few-rows": (4, 256, 256, 128),
    "many-rows": (1024, 128, 128, 96),
    "more-rows": (2048, 64, 64, 64),
    "short-context": (1024, 16, 256, 128),
}
# How the stored tensor becomes [O, Z, X]; "flat" is stored with two axes.
LAYOUTS = {"ZXO": (2, 0, 1), "XZO": (2, 1, 0), "OXZ": (0, 2, 1), "flat": (2, 0, 1)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMIT = 1 << 29  # elements of the outer product
GROUPS = ((4096, 4, 16, 16), (4096, 9, 16, 16), (1024, 16, 32, 32))  # G, Z, X, O

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    sizes: tuple[int, int, int, int]
    layout: str
    dtype: torch.dtype

    def stored(self) -> Tensor:
        _, z, x, o = self.sizes
        axes = {"Z": z, "X": x, "O": o}
        shape = (z * x, o) if self.layout == "flat" else tuple(axes[name] for name in self.layout)
        return (torch.randn(shape) / math.sqrt(z * x)).to(self.dtype)

    def view(self, stored: Tensor) -> Tensor:
        _, z, x, o = self.sizes
        stored = stored.view(z, x, o) if self.layout == "flat" else stored
        return stored.permute(LAYOUTS[self.layout])

    def rivals(self) -> dict[str, Product]:
        rows, z_size, x_size, o_size = self.sizes

        def outer(x: Tensor, z: Tensor, stored: Tensor) -> Tensor:
            if self.layout == "OXZ":
                return F.linear((x[:, :, None] * z[:, None, :]).flatten(1), stored.flatten(1))
            first, second = (x, z) if self.layout == "XZO" else (z, x)
            return (first[:, :, None] * second[:, None, :]).flatten(1) @ stored.view(-1, o_size)

        def one_first(x: Tensor, z: Tensor, stored: Tensor) -> Tensor:
            if self.layout == "OXZ":
                return torch.bmm(F.linear(z, stored.flatten(0, 1)).view(rows, o_size, x_size), x[:, :, None])[
                    ..., 0
                ]
            first, second = (x, z) if self.layout == "XZO" else (z, x)
            stored = stored.view(first.shape[-1], -1, o_size)
            return (first.t()[:, :, None] * torch.matmul(second, stored)).sum(0)

        found: dict[str, Product] = {
            "einsum": lambda x, z, stored: torch.einsum("bz,ozx,bx->bo", z, self.view(stored), x),
            "one first": one_first,
            "F.bilinear": lambda x, z, stored: F.bilinear(z, x, self.view(stored)),
        }
        if rows * z_size * x_size <= LIMIT:
            found["outer"] = outer
        return found


def medians(
    candidates: dict[str, Callable[[], object]], rounds: int, clock: Clock = wall
) -> dict[str, float]:
    starts = {name: (lambda run=run: run) for name, run in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for name, _, one in interleave(starts, rounds, 0.002, 20.0, clock=clock):
        samples[name].append(one.seconds)
    return {name: statistics.median(found) for name, found in samples.items()}


def calls(
    training: bool, products: dict[str, tuple[Product, Tensor]], x: Tensor, z: Tensor
) -> dict[str, Callable[[], object]]:
    """A call of each product with its weight."""

    def forward(product: Product, weight: Tensor) -> object:
        with torch.no_grad():
            return product(x, z, weight)

    def both(product: Product, weight: Tensor) -> object:
        y = product(x, z, weight)
        return torch.autograd.grad(y, (x, z, weight), torch.ones_like(y))

    for tensor in (x, z, *(weight for _, weight in products.values())):
        tensor.requires_grad_(training)
    run = both if training else forward
    return {name: (lambda args=args: run(*args)) for name, args in products.items()}


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def layouts(options: argparse.Namespace) -> None:
    print("| layout | shape | dtype | pass | rival | rival / ours | permuted / contiguous |")
    print("| --- " * 7 + "|")
    ratios, costs = [], []
    chosen = itertools.product(options.shape, options.dtype, options.layout, (False, True))
    for shape, dtype, layout, training in chosen:
        if options.only is not None and training != (options.only == "training"):
            continue
        case = Case(SHAPES[shape], layout, DTYPES[dtype])
        rows, z_size, x_size, _ = case.sizes
        x, z = (torch.randn(rows, size).to(case.dtype) for size in (x_size, z_size))
        stored = case.stored()
        products = {name: (product, stored) for name, product in case.rivals().items()}
        products["ours"] = (lambda x, z, stored, case=case: mi.interaction(x, z, case.view(stored)), stored)
        products["contiguous"] = (mi.interaction, case.view(stored).detach().contiguous())
        times = medians(calls(training, products, x, z), options.rounds, options.clock)
        ours, contiguous = times.pop("ours"), times.pop("contiguous")
        rival = min(times, key=times.__getitem__)
        ratios.append(times[rival] / ours)
        costs.append(ours / contiguous)
        name = "training" if training else "forward"
        print(
            f"| {layout} | {shape} | {dtype} | {name} | {rival} | {ratios[-1]:.2f} | {costs[-1]:.2f} |",
            flush=True,
        )
    print(f"\nworst rival / ours {min(ratios):.2f}, geometric mean {geometric_mean(ratios):.2f}; ", end="")
    print(f"largest permuted / contiguous {max(costs):.2f}, geometric mean {geometric_mean(costs):.2f}")


def samples(options: argparse.Namespace) -> None:
    """Forward and input gradients of one row a group, by the registered operations."""
    print("\n| groups, Z, X, O | dtype | layout | forward: rival / ours | input gradients: rival / ours |")
    print("| --- " * 5 + "|")
    ops = torch.ops.mi_kernels
    for (groups, z_size, x_size, o_size), dtype, order in itertools.product(
        GROUPS, options.dtype, ("ZXO", "OZX")
    ):
        like = DTYPES[dtype]
        x, z, g = (torch.randn(groups, 1, size).to(like) for size in (x_size, z_size, o_size))
        sizes = (z_size, x_size, o_size) if order == "ZXO" else (o_size, z_size, x_size)
        stored = torch.randn(groups, *sizes).to(like)
        weight = stored.permute(0, 3, 1, 2) if order == "ZXO" else stored
        ones = (x[:, 0], z[:, 0], g[:, 0])

        def products(x: Tensor, z: Tensor, stored: Tensor = stored, order: str = order) -> Tensor:
            if order == "ZXO":
                return torch.bmm((z.mT * x).flatten(1)[:, None], stored.flatten(1, 2))
            return torch.bmm(stored.flatten(2), (z.mT * x).flatten(1)[:, :, None])

        def grads(
            x: Tensor, z: Tensor, g: Tensor, stored: Tensor = stored, order: str = order
        ) -> tuple[Tensor, ...]:
            flat = stored.flatten(1, 2) if order == "ZXO" else stored.flatten(2).mT
            t = torch.bmm(flat, g.mT).view(z.shape[0], z.shape[-1], x.shape[-1])
            return torch.bmm(z, t), torch.bmm(t, x.mT)

        forward = medians(
            {
                "einsum": lambda o=ones, w=weight: torch.einsum("bx,bz,bozx->bo", o[0], o[1], w),
                "bmm": lambda x=x, z=z, run=products: run(x, z),
                "ours": lambda x=x, z=z, w=weight: ops.interaction(x, z, w, None, None, None),
            },
            options.rounds,
            options.clock,
        )
        backward = medians(
            {
                "bmm": lambda x=x, z=z, g=g, run=grads: run(x, z, g),
                "ours": lambda x=x, z=z, g=g, w=weight: ops.interaction_input_grads(
                    g, x, z, w, None, None, True, True
                ),
            },
            options.rounds,
            options.clock,
        )
        found = [
            min(t for name, t in times.items() if name != "ours") / times["ours"]
            for times in (forward, backward)
        ]
        sizes_text = f"{groups}, {z_size}, {x_size}, {o_size}"
        print(f"| {sizes_text} | {dtype} | G{order} | {found[0]:.2f} | {found[1]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", choices=("forward", "training"), help="one of the passes")
    parser.add_argument("--samples", action="store_true", help="the second table alone")
    parser.add_argument("--cpu-time", dest="clock", action="store_const", const=cpu, default=wall)
    options = parser.parse_args()
    if options.clock is cpu:
        torch.set_num_threads(1)
    if not options.samples:
        layouts(options)
    samples(options)


if __name__ == "__main__":
    main()
