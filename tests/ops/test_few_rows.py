"""Few rows for each group: weight gradients written as outer products, input gradients and y of one row."""

import pytest
import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (
    (3, 1, 1, 5, 7),
    (70, 1, 2, 33, 17),
    (5, 2, 3, 4, 1),
    (9, 3, 1, 6, 40),
    (4, 4, 2, 3, 130),
    (2, 5, 2, 3, 20),
    (300, 1, 40, 9, 3),  # rows of dW shorter than a vector, in several tasks
    (2, 4, 3, 50, 9),
    (2, 4, 3, 50, 8),  # as many terms as elements: not as outer products
)
# One row: x of a vector, of eight vectors (of each dtype on each instruction set), and between.
ROWS = [
    (3, out, context, width)
    for width in (4, 8, 16, 31, 32, 64, 128, 129)
    for out, context in ((1, 6), (5, 3))
]


def assert_near(result, formula, *operands):
    """Within a few roundings of the sum of magnitudes, which are no finer than the subnormal numbers."""
    exact = torch.einsum(formula, *(t.double() for t in operands))
    size = torch.einsum(formula, *(t.double().abs() for t in operands))
    assert result.dtype == operands[0].dtype
    finfo = torch.finfo(result.dtype)
    assert ((result.double() - exact).abs() <= 8 * finfo.eps * (size + finfo.tiny)).all()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_products(sizes, dtype):
    groups, rows, out, context, width = sizes
    g, z, x = (torch.randn(groups, rows, size, dtype=dtype) for size in (out, context, width))
    found = torch.ops.mi_kernels.interaction_weight_grads(g, x, z, True, True, True, True)
    sums = "gbo,gbz,gbx->gozx", "gbo,gbz->goz", "gbo,gbx->gox", "gbo->go"
    for result, formula, operands in zip(found, sums, ((g, z, x), (g, z), (g, x), (g,)), strict=True):
        assert_near(result, formula, *operands)


@pytest.mark.parametrize("sizes", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row(sizes, dtype):
    groups, out, context, width = sizes
    g, z, x = (torch.randn(groups, 1, size, dtype=dtype) for size in (out, context, width))
    weight = torch.randn(groups, out, context, width, dtype=dtype)
    y = torch.ops.mi_kernels.interaction(x, z, weight, None, None, None)
    assert_near(y, "gbz,gozx,gbx->gbo", z, weight, x)
    dx, dz = torch.ops.mi_kernels.interaction_input_grads(g, x, z, weight, None, None, True, True)
    assert_near(dx, "gbo,gozx,gbz->gbx", g, weight, z)
    assert_near(dz, "gbo,gozx,gbx->gbz", g, weight, x)


@pytest.mark.parametrize("width", [5, 37, 64])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_an_infinite_gradient_of_one_row(width, dtype):
    """Lanes beyond the end of a row hold zeros, which it must not be multiplied by."""
    z, x = torch.rand(2, 1, 3, dtype=dtype) + 1, torch.rand(2, 1, width, dtype=dtype) + 1
    g, weight = torch.full((2, 1, 1), torch.inf, dtype=dtype), torch.rand(2, 1, 3, width, dtype=dtype) + 1
    for result in torch.ops.mi_kernels.interaction_input_grads(g, x, z, weight, None, None, True, True):
        assert (result == torch.inf).all()
