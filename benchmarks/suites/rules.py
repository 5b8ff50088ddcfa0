"""Layers of other packages, as they are and converted by the ready rules: ratios of times in one run.

    python benchmarks/suites/rules.py [--threads 1] [--rounds 15]

One training step, forward and backward for parameters and inputs, in float32: the time of the package's own
layer in parts of the converted one, which is a copy of it. The least of the samples of each, which are taken
in turn. Rows of packages that cannot be imported are left out; a clone of MultiBench has to be on PYTHONPATH.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

import mi_kernels as mi
from benchmarks.harness.timing import interleave
from mi_kernels.tune import positive

Row = tuple[str, nn.Module, tuple[Any, ...]]  # name, layer, arguments


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def torch_geometric() -> Iterator[Row]:
    from torch_geometric.nn import FastRGCNConv, FiLMConv, NNConv, RGCNConv

    nodes, edges, size = 1000, 5000, 32
    index = torch.randint(0, nodes, (2, edges))
    for context in (0, 16, 64, 128):
        last = nn.Linear(context or 8, size * size)
        network = nn.Sequential(nn.Linear(8, context), nn.ReLU(), last) if context else last
        name = f"NNConv, {edges} edges, {size} features, " + (
            f"context {context}" if context else "nn.Linear"
        )
        yield name, NNConv(size, size, network), (leaf(nodes, size), index, torch.randn(edges, 8))
    for kind in (RGCNConv, FastRGCNConv, FiLMConv):
        for relations in (4, 46, 200):
            name = f"{kind.__name__}, {edges} edges, {relations} relations, {size} features"
            arguments = leaf(nodes, size), index, torch.randint(0, relations, (edges,))
            yield name, kind(size, size, relations), arguments


def pykeen() -> Iterator[Row]:
    from pykeen.nn.modules import TuckERInteraction

    for size, relation, batch in ((64, 32, 256), (200, 30, 128)):
        shapes = {
            "triples": ((batch, size), (batch, relation), (batch, size)),
            "all tails": ((batch, 1, size), (batch, 1, relation), (1, 1000, size)),
            "all heads": ((1, 1000, size), (8, 1, relation), (8, 1, size)),
            "16 negatives": ((batch, 1, size), (batch, 1, relation), (batch, 16, size)),
        }
        for dropout in (0.0, 0.4):
            for scored, given in shapes.items():
                layer = TuckERInteraction(size, relation, relation_dropout=dropout)
                name = f"TuckER {size}, {relation}, dropout of relations {dropout}, {scored}"
                yield name, layer, tuple(leaf(*shape) for shape in given)


def multibench() -> Iterator[Row]:
    from fusions.common_fusions import MultiplicativeInteractions2Modal

    for output, out, batch, sizes in (
        ("matrix", 64, 128, (64, 64)),
        ("matrix", 100, 32, (40, 300)),
        ("matrix", 240, 40, (48, 192)),
        ("matrix3D", [16, 32], 64, (32, 32)),
        ("matrix3D", [64, 10], 32, (30, 40)),
    ):
        layer = MultiplicativeInteractions2Modal(sizes, out, output)
        name = f"MultiplicativeInteractions2Modal {output}, {batch} x {sizes} to {out}"
        yield name, layer, ([leaf(batch, size) for size in sizes],)


def supar() -> Iterator[Row]:
    from supar.modules.affine import Biaffine

    for name, size, out, batch, length in (("arc", 400, 1, 16, 40), ("label", 100, 40, 16, 40)):
        layer = Biaffine(size, out, bias_y=out > 1)
        nn.init.normal_(layer.weight)
        yield (
            f"Biaffine {name}, {batch} x {length}",
            layer,
            (leaf(batch, length, size), leaf(batch, length, size)),
        )


def step(layer: nn.Module, arguments: tuple[Any, ...]) -> Callable[[], None]:
    given = [t for one in arguments for t in (one if isinstance(one, list) else [one])]
    leaves = [*layer.parameters(), *(t for t in given if t.requires_grad)]

    def run() -> None:
        y = layer(*arguments)
        torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print("| layer | its own / converted |\n| --- | --- |")
    for rows in (torch_geometric, pykeen, multibench, supar):
        try:
            rules = getattr(mi.nn.rules, rows.__name__)()
        except ImportError as error:
            print(error, file=sys.stderr)
            continue
        for name, layer, arguments in rows():
            converted = mi.convert(copy.deepcopy(layer), rules=rules)
            runs = {"own": step(layer, arguments), "converted": step(converted, arguments)}
            starts = {key: (lambda run=run: run) for key, run in runs.items()}
            least = dict.fromkeys(runs, float("inf"))
            for key, _, one in interleave(starts, options.rounds, 0.02, 20.0):
                least[key] = min(least[key], one.seconds)
            print(f"| {name} | {least['own'] / least['converted']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
