"""Products on the way leave the range of the dtype: finite results stay finite, or are at least not wrong."""

import pytest
import torch
from helpers import gradients_of

import mi_kernels as mi
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.samples import WEIGHT_ONLY, GateSample, Sample, Shape

DTYPES = (torch.float32, torch.bfloat16)
# (x, z, W, g): z x overflows; W x overflows; g z overflows; g W overflows. Zeros meet each of them.
MAGNITUDES = (
    (1e20, 1e20, 1e-35, 1e5),
    (1e25, 1e-25, 1e15, 1.0),
    (1e-25, 1e20, 1.0, 1e22),
    (1e-15, 1e-15, 1e20, 1e22),
)


def _arguments(rows, magnitudes, dtype, device):
    generator = torch.Generator().manual_seed(rows)

    def draw(size, *shape):
        # No sum of 12 such products can vanish, and every other one is zero.
        values = size * (1 + torch.rand(shape, generator=generator, dtype=torch.float64))
        values[..., ::2] = 0
        return values.to(dtype).to(device)

    x, z, weight, grad = magnitudes
    return draw(x, rows, 8), draw(z, rows, 6), draw(weight, 5, 6, 8), draw(grad, rows, 5)


def _repeats(place):
    """Whether what overflowed is computed again in float64. On GPUs the host would wait to know it."""
    return place.device == "cpu" and place.backend in ("cpu", "portable")


def _check(result, exact, repeats):
    finite = exact.to(result.dtype).isfinite()
    assert result.isfinite().equal(finite) if repeats else not (result.isfinite() & ~finite).any()
    # bfloat16 rounds z x too, where that is what the product is made of.
    tolerance = 1e-5 if result.dtype == torch.float32 else 2e-2
    keep = result.isfinite()
    torch.testing.assert_close(result[keep].double(), exact[keep], rtol=tolerance, atol=0)


@pytest.mark.parametrize("rows", [1, 4, 40, 300])
@pytest.mark.parametrize("magnitudes", MAGNITUDES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, magnitudes, rows, place):
    x, z, weight, grad = _arguments(rows, magnitudes, dtype, place.device)
    leaves = [t.requires_grad_() for t in (x, z, weight)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = mi.interaction(*leaves)
    with mi.backend("reference"):
        exact_y = mi.interaction(*exact)
        wanted = torch.autograd.grad(exact_y, exact, grad.double())
    _check(y.detach(), exact_y.detach(), _repeats(place))
    for ours, theirs in zip(torch.autograd.grad(y, leaves, grad), wanted, strict=True):
        _check(ours, theirs, _repeats(place))


# Of x, z, W and g: z x beyond 65504; g z around 1e-7, x W beyond 65504; z x around 1e-6, g W beyond 65504.
SCALES = {"huge": (300, 300, 1e-2, 1e-2), "tiny": (300, 1e-3, 2e4, 1e-4), "small": (1e-3, 1e-3, 1e4, 100)}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("width", [8, 32])
def test_products_leave_the_range_of_float16(width, scales, place):
    """z x and g z overflow or vanish in float16; what they add up to does not."""
    sample = Sample(Shape("range", (64,), 3, width, 5), WEIGHT_ONLY)
    tensors = *sample.arguments(torch.float64)[:3], sample.cotangent(torch.float64)
    half = [(t * scale).half().to(place.device) for t, scale in zip(tensors, SCALES[scales], strict=True)]

    def results(*tensors):
        *leaves, grad = (t.detach().requires_grad_() for t in tensors)
        y = mi.interaction(*leaves)
        return [y.detach(), *gradients_of(y, leaves, grad.detach(), (True,) * 3)]

    found = results(*half)
    with mi.backend("reference"):
        exact = results(*(t.double() for t in half))
    for ours, theirs in zip(found, exact, strict=True):
        assert relative_error(ours, theirs) < 1e-3


@pytest.mark.parametrize("scales", [(300, 300, 1e-5), (0.1, 1e-5, 2e4)], ids=("huge", "small"))
@pytest.mark.parametrize("width", [5, 32])
def test_gates_leave_the_range_of_float16(width, scales, place):
    sample = GateSample("gated_interaction", Shape("range", (40,), 3, width, width), "W")
    tensors = sample.arguments(torch.float64)[:3]
    half = [(t * scale).half().to(place.device) for t, scale in zip(tensors, scales, strict=True)]
    found = mi.gated_interaction(*half, activation="tanh")
    with mi.backend("reference"):
        exact = mi.gated_interaction(*(t.double() for t in half), activation="tanh")
    assert relative_error(found, exact) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_rows_keep_their_bits(dtype, place):
    x, z, weight, _ = _arguments(40, (1.0, 1.0, 1.0, 1.0), dtype, place.device)
    y = mi.interaction(x, z, weight)
    x[7], z[7] = 1e30, 1e30
    changed = mi.interaction(x, z, weight)
    assert not changed[7].isfinite().all()
    keep = [row for row in range(40) if row != 7]
    assert torch.equal(changed[keep], y[keep])
