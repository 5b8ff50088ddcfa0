"""Two products and their epilogue, and its gradients: Triton in the interpreter, CUDA on the emulator.

The operations are called directly, at sizes that reach each way through the kernels. The error rule and the
derivatives of mi.glu and mi.low_rank are tested with those of every backend.
"""

import pytest
import torch
from emulated import backend
from helpers import assert_passes_interpreted

from mi_kernels import backends
from mi_kernels.ops import activations
from mi_kernels.testing.errors import relative_error

INTERPRETED = backends.interpreting()
LIMITS = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# B, X, Z (None: z is x), O, ranks: several tiles, features in whole chunks or not, no features, one row.
SIZES = (
    (5, 7, None, 9, 1),
    (9, 64, 32, 64, 2),
    (70, 33, 20, 75, 3),
    (150, 40, None, 130, 2),
    (1, 16, 16, 1, 5),
    (3, 0, 4, 2, 2),
    (3, 0, None, 2, 1),
    (0, 3, 3, 2, 1),
    (2, 3, 3, 0, 1),
)
PAIRS = (("silu", "identity"), ("tanh", "relu"), ("identity", "identity"))
# Every size once, in one dtype and with one pair of activations, and the first three in all.
CASES = [
    (sizes, dtype, PAIRS[index % 3])
    for index, sizes in enumerate(SIZES)
    for number, dtype in enumerate(LIMITS)
    if index < 3 or index % 2 == number
]


@pytest.fixture(scope="module")
def kernels():
    """An object with both operations."""
    if INTERPRETED:
        from mi_kernels.ops.triton import dual_linear

        return dual_linear
    if backend.COMPILER is None:
        pytest.skip("no C++ compiler")
    return backend.load()


@pytest.mark.subprocess
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    assert_passes_interpreted("test_dual_linear_kernels.py", "-k", "not bfloat16")


def truth(x, z, weight_x, weight_z, bias_x, bias_z, first, second, ranks):
    """y, p and q in float64."""
    x, z, weight_x, weight_z = (t.double() for t in (x, x if z is None else z, weight_x, weight_z))
    p, q = x @ weight_x.T, z @ weight_z.T
    p, q = (t if b is None else t + b.double() for t, b in ((p, bias_x), (q, bias_z)))
    return multiplied(p, q, first, second, ranks), p, q


def multiplied(p, q, first, second, ranks):
    f, h = (activations.ELEMENTWISE[name].value for name in (first, second))
    return (f(p) * h(q)).unflatten(1, (ranks, -1)).sum(1)


def assert_close(found, exact):
    assert found.shape == exact.shape and found.is_contiguous()
    if found.numel():
        assert relative_error(found, exact) < LIMITS[found.dtype]


@pytest.mark.parametrize(("sizes", "dtype", "names"), CASES, ids=str)
def test_values(sizes, names, dtype, kernels):
    """Half of a packed weight, a transposed one, a bias of one number."""
    rows, width, context, out, ranks = sizes
    features = ranks * out
    x = torch.randn(rows, width, dtype=dtype)
    z = None if context is None else torch.randn(rows, context, dtype=dtype)
    weight_x = torch.randn(2 * features, width, dtype=dtype)[:features]
    weight_z = torch.randn(width if context is None else context, features, dtype=dtype).T
    bias_z = torch.randn(1, dtype=dtype).expand(features) if names[0] == "silu" else None
    arguments = x, z, weight_x, weight_z, torch.randn(features, dtype=dtype), bias_z, *names, ranks
    exact = truth(*arguments)
    results = kernels.dual_linear(*arguments, True)
    for found, expected in zip(results, exact, strict=True):
        assert_close(found, expected)
    y, *kept = kernels.dual_linear(*arguments, False)
    assert torch.equal(y, results[0])
    assert [t.shape for t in kept] == [(0, features)] * 2


@pytest.mark.parametrize(("sizes", "dtype", "names"), CASES, ids=str)
def test_gradients(sizes, names, dtype, kernels):
    """Contiguous, transposed and padded operands."""
    rows, _, _, out, ranks = sizes
    features = ranks * out
    by_columns = torch.randn(features, rows, dtype=dtype).T
    padded = torch.randn(rows, features + 3, dtype=dtype)[:, :features]
    grad = torch.randn(rows, out, dtype=dtype)
    operands = (
        (grad, padded.contiguous(), by_columns.contiguous()),
        (grad.T.contiguous().T, padded, by_columns),
    )
    for grad, *kept in operands:
        leaves = [t.double().requires_grad_() for t in kept]
        exact = torch.autograd.grad(multiplied(*leaves, *names, ranks), leaves, grad.double())
        assert_close(kernels.dual_linear_grads(grad, *kept, *names, ranks), torch.cat(exact, 1))


@pytest.mark.parametrize("context", [None, 5])
def test_inf_reaches_its_own_sum_alone(context, kernels):
    """Neither padding nor the other weight makes a NaN of it."""
    x = torch.ones(3, 5)
    x[0, 1] = float("inf")
    z = None if context is None else torch.ones(3, context)
    weight = torch.ones(9, 5)
    y, p, q = kernels.dual_linear(x, z, weight, weight, None, None, "identity", "identity", 1, True)
    assert p[0].isinf().all() and y[0].isinf().all()
    assert (q[0].isinf().all() if z is None else q.eq(5).all()) and y[1:].eq(25).all()


def test_a_slope_of_zero_selects(kernels):
    """relu and hardsigmoid: Inf times f' = 0 is 0, as in PyTorch's backward."""
    inf, p, q = torch.full((1, 2), float("inf")), torch.tensor([[-4.0, 1.0]]), torch.ones(1, 2)
    for name in ("relu", "hardsigmoid"):
        d = kernels.dual_linear_grads(inf, p, q, name, "identity", 1)
        assert d[0, 0] == 0 and d[0, 1] == inf[0, 0]


def test_tf32(kernels):
    """Products alone are rounded to tf32, which the interpreter does not do."""
    if INTERPRETED:
        pytest.skip("the interpreter computes in float32")
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        for context in (None, 20):
            x, z = torch.randn(70, 40), None if context is None else torch.randn(70, context)
            weights = torch.randn(150, 40), torch.randn(150, context or 40)
            arguments = x, z, *weights, None, None, "silu", "identity", 2
            for found, exact in zip(kernels.dual_linear(*arguments, True), truth(*arguments), strict=True):
                assert 1e-5 < relative_error(found, exact) < 1e-3
    finally:
        settings.fp32_precision = before
