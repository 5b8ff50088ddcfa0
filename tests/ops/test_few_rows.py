"""Weight gradients of a few rows for each group, which the CPU writes as outer products."""

import pytest
import torch

SIZES = (
    (3, 1, 1, 5, 7),
    (70, 1, 2, 33, 17),
    (5, 2, 3, 4, 1),
    (9, 3, 1, 6, 40),
    (4, 4, 2, 3, 130),
    (2, 5, 2, 3, 20),
)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outer_products(sizes, dtype):
    groups, rows, out, context, width = sizes
    g, z, x = (torch.randn(groups, rows, size, dtype=dtype) for size in (out, context, width))
    found = torch.ops.mi_kernels.interaction_weight_grads(g, x, z, True, True, True, True)
    sums = "gbo,gbz,gbx->gozx", "gbo,gbz->goz", "gbo,gbx->gox", "gbo->go"
    factors = (g, z, x), (g, z), (g, x), (g,)
    for result, formula, operands in zip(found, sums, factors, strict=True):
        exact = torch.einsum(formula, *(t.double() for t in operands))
        size = torch.einsum(formula, *(t.double().abs() for t in operands))
        bound = 8 * torch.finfo(dtype).eps * size
        assert ((result.double() - exact).abs() <= bound).all()
