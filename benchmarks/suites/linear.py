"""Products without W, y = x V^T, with V stored either way, against PyTorch's own matrix product.

    python benchmarks/suites/linear.py --threads 1 --dtype float32

How a case is measured stands in cases.py. All other families have such products within them: U z + V x, the
layers of shared contexts and of the biaffine form, and their gradients. `outputs-last` has V as [X, O] in
memory, so that the outputs are contiguous; its gradient, too. The gradient of V alone, against `torch.mm`:

    python benchmarks/suites/linear.py --family weight-gradient --pass forward --threads 1 --dtype float32
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


def weight_gradients() -> Iterator[Case]:
    def ours(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mi_kernels.cpu_linear_grads(grad, x, None, False, True, False, False)[1]

    for out, x in ((70, 500), (64, 64), (100, 100), (256, 256), (500, 500), (300, 1024), (40, 400)):
        for rows in (16, 40, 70, 128, 200, 300, 600, 2000):
            functions = {OURS: ours, "mm": lambda grad, x: grad.mT @ x}
            yield Case("weight gradient", f"{rows}-{x}x{out}", ((rows, out), (rows, x)), functions, "mm")


FAMILIES = {
    "outputs-first": partial(products, False),
    "outputs-last": partial(products, True),
    "weight-gradient": weight_gradients,
}


def main(argv: list[str] | None = None) -> int:
    parser = cases.parser("Products without W against PyTorch's.", FAMILIES)
    parser.set_defaults(family=["outputs-first", "outputs-last"])  # which have a backward pass
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/linear.py", *(sys.argv[1:] if argv is None else argv)]
    cases.run(FAMILIES, options, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
