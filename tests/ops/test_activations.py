"""Activations: the derivatives are those of the values, and extremes are PyTorch's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import mi_kernels as mi
from mi_kernels.ops import activations

TORCH = {
    "identity": lambda t: t,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
}
EXTREMES = (
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, -1e-30, 1e-40, -1e-40, 3.0, -3.0, 3.0001, -2.9999),
    *(
        1e4,
        -1e4,
        1e30,
        -1e30,
        16.7,
        -16.7,
        17.4,
        -17.4,
        87.9,
        -87.9,
        88.8,
        -88.8,
        104.0,
        -104.0,
        800.0,
        -800.0,
    ),
    *(0.6, -0.6, 0.93, -0.93, 4.0, -4.0, 9.1, -9.1),
)


def test_every_name_is_known():
    assert set(activations.ELEMENTWISE) == set(TORCH)
    assert activations.NAMES == (*TORCH, "softmax")


@pytest.mark.parametrize("name", TORCH)
def test_first_and_second_derivative(name):
    act = activations.ELEMENTWISE[name]
    t = torch.linspace(-6.03, 6.01, 301, dtype=torch.float64, requires_grad=True)
    assert torch.equal(act.value(t), TORCH[name](t)) or name == "hardsigmoid"
    (first,) = torch.autograd.grad(act.value(t).sum(), t)
    torch.testing.assert_close(act.first(t), first, rtol=1e-12, atol=1e-14)
    if act.first(t).requires_grad:
        (second,) = torch.autograd.grad(act.first(t).sum(), t)
        torch.testing.assert_close(act.second(t), second, rtol=1e-11, atol=1e-13)
    else:
        assert act.second(t).eq(0).all()
    if name not in ("relu", "hardsigmoid", "hardswish", "identity"):
        assert gradcheck(act.second, t)


def scales_of(dtype, device):
    tiny = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    fine = torch.linspace(-1.5, 1.5, 1501, dtype=torch.float64)
    return torch.cat([torch.tensor(EXTREMES, dtype=torch.float64), tiny, fine]).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_kernels_agree_with_torch_everywhere(name, dtype, place):
    """act(t) * 1 and act'(t) * 1, on a grid and at extremes, within a few units of the last place."""
    t = scales_of(dtype, place.device).requires_grad_()
    ones = torch.ones_like(t, requires_grad=True)
    y = mi.modulate(ones, t, activation=name)
    grad = torch.autograd.grad(y, (ones, t), torch.ones_like(y))
    exact = t.detach().double().requires_grad_()
    value = activations.ELEMENTWISE[name].value(exact)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    torch_t = t.detach().requires_grad_()
    torch_value = TORCH[name](torch_t)
    (torch_slope,) = torch.autograd.grad(torch_value.sum(), torch_t)
    eps = torch.finfo(dtype).eps
    # gelu and silu are x times a number near 0 there, and f' a difference of two numbers: absolute errors.
    scale = (1 + t.detach().double().abs()).clamp(max=20).nan_to_num(1)
    for found, truth, rival in (
        (y, value, torch_value),
        (grad[0], value, torch_value),
        (grad[1], slope, torch_slope),
    ):
        # PyTorch may disagree with itself: F.gelu(inf) is inf in float64, NaN in its float32 loop.
        nan, inf = (truth.isnan(), rival.isnan()), (truth.isinf(), rival.isinf())
        assert not (found.isnan() & ~(nan[0] | nan[1])).any() and found.isnan()[nan[0] & nan[1]].all()
        assert not (found.isinf() & ~(inf[0] | inf[1])).any() and found.isinf()[inf[0] & inf[1]].all()
        keep = found.isfinite() & truth.isfinite()
        error = (found.detach().double() - truth.detach()).abs()[keep]
        limit = eps * (1.5 * truth.detach().abs() + 0.75 * scale)[keep]
        if dtype == torch.float64:
            limit *= 8  # the truth is rounded too
        if dtype == torch.float16:
            limit += 2**-24
        if dtype != torch.float64:  # where PyTorch itself is further off
            limit = torch.maximum(limit, 2 * (rival.detach().double() - truth.detach()).abs()[keep])
        assert (error <= limit).all(), float((error / limit).max())


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "relu", "identity"])
def test_small_values_keep_their_digits(name, place):
    """Relative accuracy where the value itself is small: within 3 units of the last place."""
    t = torch.logspace(-35, 1, 4001, dtype=torch.float64).float()
    t = torch.cat([t, -t]).to(place.device)
    found = mi.modulate(torch.ones_like(t), t, activation=name).double()
    exact = activations.ELEMENTWISE[name].value(t.double())
    error = (found - exact).abs() / exact.abs().clamp(min=1e-37)
    assert float(error.max()) <= 3 * torch.finfo(torch.float32).eps


def test_softmax_is_stable(place):
    x = torch.ones(2, 5, device=place.device)
    scale = torch.tensor([[1e4, 1e4 - 1, -1e4, 0, 3], [-1e4] * 5], device=place.device)
    y = mi.modulate(x, scale, activation="softmax")
    torch.testing.assert_close(y, torch.softmax(scale, -1), rtol=1e-6, atol=0)


def tangents_and_curvatures(name, t, ones):
    """f' and f'' by the rules of this package: forward mode, and backward of backward."""

    def function(s):
        return mi.modulate(ones, s, activation=name)

    slope = torch.func.jvp(function, (t,), (ones,))[1]
    curved = torch.func.grad(lambda s: torch.func.grad(lambda u: function(u).sum())(s).sum())(t)
    return slope, curved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_derivatives_beyond_reverse_mode(name, dtype, place):
    """As accurate as one rounding of the exact ones, and finite wherever t is."""
    wide = [0.0, 12, 30, 50, 100, 300, 1e3, 6e4, *torch.linspace(-12, 12, 2001).tolist()]
    t = torch.tensor([*wide, *(-value for value in wide)]).to(dtype).to(place.device)
    found = tangents_and_curvatures(name, t, torch.ones_like(t))
    act, exact = activations.ELEMENTWISE[name], t.double()
    for result, truth in zip(found, (act.first(exact), act.second(exact)), strict=True):
        # f' of sigmoid and tanh is a difference from 1, whose digits float32 does not have.
        limit = torch.finfo(dtype).eps * truth.abs() + 3e-6 * truth.abs().clamp(min=0.5) + 2**-24
        assert ((result.double() - truth).abs() <= limit).all()


@pytest.mark.parametrize("size", [(30, 40), (1, 40), (30, 1)], ids=str)
@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("name", ["relu", "hardsigmoid"])
def test_nothing_comes_through_where_it_is_flat(name, mode, size, place):
    """PyTorch selects there and does not multiply: f' = 0 makes no NaN of Inf."""
    x = torch.full((30, 40), math.inf, device=place.device)
    scale = torch.full(size, -5.0, device=place.device)
    if mode == "forward":
        y = torch.func.jvp(
            lambda s: mi.modulate(torch.ones_like(x), s, activation=name), (scale,), (scale.abs() * math.inf,)
        )[1]
        assert y.eq(0).all()
    else:
        scale.requires_grad_()
        (grad,) = torch.autograd.grad(mi.modulate(x, scale, activation=name).sum(), scale)
        assert grad.eq(0).all()


@pytest.mark.parametrize("size", [(2, 40), (1, 40), (2, 1)], ids=str)
def test_a_slope_that_vanishes_beside_inf(size, place):
    """f' (g x), not (f' g) x: f' g would vanish, and 0 * Inf is NaN."""
    x = torch.full((2, 40), math.inf, device=place.device)
    scale = torch.full(size, -69.0, device=place.device, requires_grad=True)
    y = mi.modulate(x, scale, activation="sigmoid")
    (grad,) = torch.autograd.grad(y, scale, torch.full_like(x, 1e-20))
    assert grad.eq(math.inf).all()
