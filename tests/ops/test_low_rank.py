"""Low-rank interactions: values, gradients of every order, transforms, messages."""

import re

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels.ops import activations
from mi_kernels.testing.checks import check_gradients, check_second_order, check_values, form_of
from mi_kernels.testing.dual_samples import LOW_RANK, MUTAN, DualSample, dual_samples
from mi_kernels.testing.samples import ODD, THREADED, Shape

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TINY = Shape("tiny", (2,), 2, 3, 2)
TINY_SHARED = Shape("shared", (2, 2), 2, 3, 2, context_batch=(2, 1))


def cases():
    for sample in dual_samples("low_rank"):
        every = sample.shape in (ODD, THREADED) and sample.terms in ("AC", "ACPUVc")
        for dtype in FLOATS if every else (torch.float32, torch.bfloat16):
            yield pytest.param(sample, dtype, id=f"{sample}-{dtype}")


@pytest.mark.parametrize(("sample", "dtype"), list(cases()), scope="module")
def test_error_rule(sample, dtype, place):
    y = form_of(sample).function(*sample.arguments(dtype, place.device))
    assert y.dtype == dtype and y.shape == (*sample.lead, sample.shape.out) and y.is_contiguous()
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_second_order_is_as_exact_as_pytorch(dtype, place):
    check_second_order(DualSample("low_rank", ODD, "AC", activation="tanh"), dtype, place.device)


CHECKED = [
    *(DualSample("low_rank", TINY, "AC", activation=name, other="tanh") for name in activations.ELEMENTWISE),
    *(DualSample("low_rank", TINY, "AC", activation="silu", other=name) for name in activations.ELEMENTWISE),
    *(DualSample("low_rank", shape, "ACPUVc", activation="tanh") for shape in (TINY, TINY_SHARED)),
    *(DualSample("low_rank", shape, "ACP", other="sigmoid", ranks=2) for shape in (TINY, TINY_SHARED)),
]


@pytest.mark.parametrize("sample", CHECKED, ids=str)
def test_gradcheck(sample, place):
    tensors = sample.arguments(torch.float64, place.device, requires_grad=True)
    inputs, there = [t for t in tensors if t is not None], [t is not None for t in tensors]

    def function(*present):
        left = iter(present)
        return form_of(sample).function(*(next(left) if t else None for t in there))

    batched = {"check_batched_grad": True, "check_batched_forward_grad": True} if "P" in sample.terms else {}
    assert gradcheck(function, inputs, check_forward_ad=True, check_undefined_grad=True, **batched)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("mapped", [(0,), (1,), (2,), (0, 1, 2, 3)])
def test_vmap_and_per_sample_gradients(mapped, place):
    tensors = list(LOW_RANK.arguments(torch.float64, place.device)[:4])
    in_dims = tuple(0 if index in mapped else None for index in range(4))
    for index in mapped:
        tensors[index] = torch.stack([tensors[index], 2 * tensors[index], -tensors[index]])

    def y(*tensors):
        return mi.low_rank(*tensors, activation_x="tanh", activation_z="sigmoid")

    def loss(*tensors):
        return y(*tensors).pow(2).sum()

    for transform in (
        y,
        torch.func.grad(loss, (0, 1, 2, 3)),
        torch.func.jacfwd(torch.func.jacfwd(loss, 1), 0),
    ):
        found = torch.vmap(transform, in_dims)(*tensors)
        with mi.backend("reference"):
            expected = torch.vmap(transform, in_dims)(*tensors)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_weight_that_the_factors_make(place):
    """As mi.interaction with W[o,i,j] = sum_r P[o,r] C[r,i] A[r,j]."""
    x, z, a, c, p, u, v, bias = LOW_RANK.arguments(torch.float64, place.device)
    weight = torch.einsum("or,ri,rj->oij", p, c, a)
    found = mi.low_rank(x, z, a, c, p, u, v, bias)
    torch.testing.assert_close(found, mi.interaction(x, z, weight, u, v, bias))


def test_sum_over_ranks(place):
    x, z, a, c, p, *_ = MUTAN.arguments(torch.float64, place.device)
    product = torch.einsum("...j,roj->...ro", x, a).tanh() * torch.einsum("...i,roi->...ro", z, c).sigmoid()
    found = mi.low_rank(x, z, a, c, p, **MUTAN.options)
    torch.testing.assert_close(found, product.sum(-2) @ p.mT)


def test_saved_for_backward(place):
    """Both products and the arguments alone."""
    x, z, a, c, *_ = LOW_RANK.arguments(torch.float32, place.device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mi.low_rank(x, z, a, c, activation_x="tanh", activation_z="tanh")
    arguments = {t.data_ptr() for t in (x, z, a, c)}
    assert [t.shape for t in saved if t.data_ptr() not in arguments] == [(5, 6)] * 2


def good(**changed):
    tensors = {"x": torch.ones(5, 7), "z": torch.ones(5, 3)}
    factors = {"factor_x": torch.ones(6, 7), "factor_z": torch.ones(6, 3), "factor_out": torch.ones(4, 6)}
    terms = {"weight_z": torch.ones(4, 3), "weight_x": torch.ones(4, 7), "bias": torch.ones(4)}
    return tensors | factors | terms | changed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (good(x=1), TypeError, "x: expected a torch.Tensor, got int"),
        (good(x=torch.ones(())), ValueError, "x: expected at least 1 dimension(s), got shape []"),
        (
            good(z=torch.ones(4, 3)),
            ValueError,
            "z: expected leading dimensions that broadcast with those of x",
        ),
        (good(z=torch.ones(5, 3).half()), TypeError, "z: expected torch.float32 (the dtype of x)"),
        (good(factor_x=None), TypeError, "factor_x: expected a torch.Tensor, got NoneType"),
        (good(factor_x=torch.ones(6, 8)), ValueError, "factor_x: expected shape [R, X=7], got [6, 8]"),
        (good(factor_x=torch.ones(0, 6, 7)), ValueError, "factor_x: expected a sum of at least one term"),
        (good(factor_z=torch.ones(5, 3)), ValueError, "factor_z: expected shape [R=6, Z=3], got [5, 3]"),
        (good(factor_z=torch.ones(2, 6, 3)), ValueError, "factor_z: expected shape [R=6, Z=3]"),
        (
            good(factor_x=torch.ones(2, 6, 7)),
            ValueError,
            "factor_z: expected shape [S=2, R=6, Z=3], got [6, 3]",
        ),
        (good(factor_out=torch.ones(4, 5)), ValueError, "factor_out: expected shape [O, R=6], got [4, 5]"),
        (good(weight_z=torch.ones(5, 3)), ValueError, "weight_z: expected shape [O=4, Z=3], got [5, 3]"),
        (good(weight_x=torch.ones(4, 8)), ValueError, "weight_x: expected shape [O=4, X=7], got [4, 8]"),
        (good(bias=torch.ones(5)), ValueError, "bias: expected shape [O=4], got [5]"),
        (good(activation_x="softmax"), ValueError, "activation_x: expected one of identity, sigmoid"),
        (good(activation_z=None), ValueError, "activation_z: expected one of identity, sigmoid"),
    ],
)
def test_messages(arguments, error, message):
    for call in (mi.low_rank, lambda **given: mi.explain(mi.low_rank, **given)):
        with pytest.raises(error, match=re.escape(f"low_rank: {message}")):
            call(**arguments)


@pytest.mark.compile
def test_compiles_whole(place):
    tensors = LOW_RANK.arguments(torch.float64, place.device, requires_grad=True)
    compiled = torch.compile(mi.low_rank, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), mi.low_rank(*tensors))
    found = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    torch.testing.assert_close(found, torch.autograd.grad(mi.low_rank(*tensors).sum(), tensors))
