"""Products without W, y = x V^T, with V stored either way, against PyTorch's own matrix product.

    python benchmarks/suites/linear.py --threads 1 --dtype float32

How a case is measured stands in cases.py. All other families have such products within them: U z + V x, the
layers of shared contexts and of the biaffine form, and their gradients. `outputs-last` has V as [X, O] in
memory, so that the outputs are contiguous; its gradient, too.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness import cases
from benchmarks.harness.cases import OURS, Case

ROWS = (20, 70, 200, 2000)
FEATURES = ((64, 256), (100, 100), (500, 500), (1024, 300))  # X, O

Product = Callable[[Tensor, Tensor], Tensor]


def transposed(function: Product) -> Product:
    return lambda x, weight: function(x, weight.mT)


def products(outputs_last: bool) -> Iterator[Case]:
    functions: dict[str, Product] = {OURS: mi.apply_generated, "linear": F.linear}
    if outputs_last:
        functions = {name: transposed(function) for name, function in functions.items()}
    for rows in ROWS:
        for x, out in FEATURES:
            weight = (x, out) if outputs_last else (out, x)
            family = "outputs last" if outputs_last else "outputs first"
            yield Case(family, f"{rows}-{x}x{out}", ((rows, x), weight), functions, "linear", scaled=1)


FAMILIES = {"outputs-first": partial(products, False), "outputs-last": partial(products, True)}


def main(argv: list[str] | None = None) -> int:
    options = cases.parser("Products without W against PyTorch's.", FAMILIES).parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/linear.py", *(sys.argv[1:] if argv is None else argv)]
    cases.run(FAMILIES, options, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
