"""Gated linear units: values, gradients of every order, transforms, messages."""

import re

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels.ops import activations
from mi_kernels.testing.checks import check_gradients, check_second_order, check_values, form_of
from mi_kernels.testing.dual_samples import GLU, DualSample, dual_samples
from mi_kernels.testing.samples import MIDDLE, THREADED, Shape

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TINY = Shape("tiny", (2,), 2, 3, 2)


def cases():
    for sample in dual_samples("glu"):
        every = sample.shape in (GLU.shape, THREADED) and sample.terms in ("Ga", "GV")
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
    check_second_order(DualSample("glu", MIDDLE, "Ga"), dtype, place.device)


@pytest.mark.parametrize("name", activations.NAMES)
@pytest.mark.parametrize("terms", ["Ga", "GaVc", "GV"])
def test_gradcheck(terms, name, place):
    sample = DualSample("glu", TINY, terms, activation=name)
    tensors = sample.arguments(torch.float64, place.device, requires_grad=True)
    inputs, there = [t for t in tensors if t is not None], [t is not None for t in tensors]

    def function(*present):
        left = iter(present)
        return form_of(sample).function(*(next(left) if t else None for t in there))

    batched = {"check_batched_grad": True, "check_batched_forward_grad": True} if name == "silu" else {}
    assert gradcheck(function, inputs, check_forward_ad=True, check_undefined_grad=True, **batched)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("mapped", [(0,), (1,), (0, 1, 2)])
def test_vmap_and_per_sample_gradients(mapped, place):
    tensors = list(GLU.arguments(torch.float64, place.device)[:3])
    in_dims = tuple(0 if index in mapped else None for index in range(3))
    for index in mapped:
        tensors[index] = torch.stack([tensors[index], 2 * tensors[index], -tensors[index]])

    def loss(x, weight, bias):
        return mi.glu(x, weight, bias).pow(2).sum()

    for transform in (
        mi.glu,
        torch.func.grad(loss, (0, 1, 2)),
        torch.func.jacrev(torch.func.grad(loss, 0), 1),
        torch.func.jacfwd(torch.func.jacfwd(loss, 0), 1),
    ):
        found = torch.vmap(transform, in_dims)(*tensors)
        with mi.backend("reference"):
            expected = torch.vmap(transform, in_dims)(*tensors)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_packed_weight_is_two(dtype, place):
    """To the bit, in either order; and torch's own glu has the value first."""
    x, weight, bias, *_ = DualSample("glu", THREADED, "Ga").arguments(dtype, place.device)
    (g, v), (a, c) = weight.chunk(2), bias.chunk(2)
    y = mi.glu(x, weight, bias)
    assert torch.equal(mi.glu(x, g, a, weight_value=v, bias_value=c), y)
    exchanged = mi.glu(x, torch.cat((v, g)), torch.cat((c, a)), gate_first=False)
    torch.testing.assert_close(exchanged, y)
    torchs = torch.nn.functional.glu(torch.nn.functional.linear(x.double(), weight.double(), bias.double()))
    found = mi.glu(x.double(), weight.double(), bias.double(), activation="sigmoid", gate_first=False)
    torch.testing.assert_close(found, torchs)


def test_saved_for_backward(place):
    """Both products and the arguments: no half of a packed weight, no third tensor of their size."""
    x, weight, bias, *_ = GLU.arguments(torch.float32, place.device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mi.glu(x, weight, bias)
    arguments = {t.data_ptr() for t in (x, weight, bias)}
    kept = [t.shape for t in saved if t.data_ptr() not in arguments]
    assert kept == [(*GLU.lead, GLU.shape.out)] * 2


def test_biases_of_one_number(place):
    x, weight, *_ = GLU.arguments(torch.float64, place.device)
    one = torch.ones((), dtype=torch.float64, device=place.device)
    torch.testing.assert_close(mi.glu(x, weight, one), mi.glu(x, weight, one.expand(len(weight))))


def good(**changed):
    return {"x": torch.ones(5, 7), "weight": torch.ones(6, 7), "bias": torch.ones(6)} | changed


def separate(**changed):
    return good(weight_value=torch.ones(6, 7), bias_value=torch.ones(6)) | changed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (good(x=1), TypeError, "glu: x: expected a torch.Tensor, got int"),
        (good(x=torch.ones(())), ValueError, "glu: x: expected at least 1 dimension(s), got shape []"),
        (good(x=torch.ones(5, 7).long()), TypeError, "glu: x: expected a dtype of float64, float32"),
        (good(weight=None), TypeError, "glu: weight: expected a torch.Tensor, got NoneType"),
        (good(weight=torch.ones(6, 8)), ValueError, "glu: weight: expected shape [2H, X=7], got [6, 8]"),
        (good(weight=torch.ones(5, 7)), ValueError, "glu: weight: expected an even number 2H of rows"),
        (good(weight=torch.ones(6, 7).half()), TypeError, "glu: weight: expected torch.float32"),
        (good(bias=torch.ones(5)), ValueError, "glu: bias: expected shape [2H=6], got [5]"),
        (good(bias=torch.ones(6).to_sparse()), TypeError, "glu: bias: expected a dense (strided) tensor"),
        (good(bias_value=torch.ones(6)), ValueError, "glu: bias_value: expected None without weight_value"),
        (separate(weight_value=torch.ones(5, 7)), ValueError, "glu: weight_value: expected shape [H=6, X=7]"),
        (separate(bias_value=torch.ones(5)), ValueError, "glu: bias_value: expected shape [H=6], got [5]"),
        (separate(gate_first=False), ValueError, "glu: gate_first: expected True with weight_value"),
        (good(gate_first=1), TypeError, "glu: gate_first: expected a bool, got int"),
        (good(activation="nope"), ValueError, "glu: activation: expected one of identity, sigmoid"),
    ],
)
def test_messages(arguments, error, message):
    for call in (mi.glu, lambda **given: mi.explain(mi.glu, **given)):
        with pytest.raises(error, match=re.escape(message)):
            call(**arguments)


def test_explain_says_how_softmax_is_computed():
    x, weight = torch.ones(5, 7), torch.ones(6, 7)
    assert mi.explain(mi.glu, x, weight, activation="softmax").algorithm == "rows after both products"


@pytest.mark.compile
def test_compiles_whole(place):
    tensors = GLU.arguments(torch.float64, place.device, requires_grad=True)[:3]
    compiled = torch.compile(mi.glu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), mi.glu(*tensors))
    found = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    torch.testing.assert_close(found, torch.autograd.grad(mi.glu(*tensors).sum(), tensors))
