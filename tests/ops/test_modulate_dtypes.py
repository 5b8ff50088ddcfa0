"""Modulation of tensors of several dtypes: PyTorch's promotion, and gradients in each argument's dtype."""

import itertools

import pytest
import torch
from helpers import Spy
from torch import nn

import mi_kernels as mi
from mi_kernels.ops import activations
from mi_kernels.ops.modulate import mixed
from mi_kernels.testing.samples import MAPS, TOKENS, Modulation

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIXED = [dtypes for dtypes in itertools.product(FLOATS, repeat=3) if len(set(dtypes)) > 1]
FULL = Modulation("full", (12, 50), (12, 50), (50,))
NUMBERS = Modulation("numbers", (12, 50), (), ())
NUMBER = Modulation("number", (12, 50), (), (50,))
SAMPLES = (TOKENS, MAPS, FULL, NUMBERS, NUMBER)
HALF, SINGLE = (torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.bfloat16, torch.float16)


def draw(sample, dtypes, device="cpu"):
    tensors = sample.arguments(torch.float64, device)
    return [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]


def expression(x, scale, shift, activation="identity", scale_offset=0.0):
    """PyTorch's own promotion."""
    return (activations.value(activation, scale) + scale_offset) * x + shift


def check(y, tensors, **options):
    """The dtype is PyTorch's, and the value exact to a few roundings of it."""
    assert y.dtype == expression(*tensors, **options).dtype
    x, scale, shift = (tensor.double() for tensor in tensors)
    exact = expression(x, scale, shift, **options)
    gate = expression(torch.ones_like(x), scale, torch.zeros_like(shift), **options)
    size = (gate * x).abs() + shift.abs() + (scale * x).abs()
    assert ((y.double() - exact).abs() <= 4 * torch.finfo(y.dtype).eps * size).all()


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_dtype_and_value_are_those_of_the_promotion(sample, dtypes, place):
    tensors = draw(sample, dtypes, place.device)
    check(
        mi.modulate(*tensors, activation="tanh", scale_offset=0.5),
        tensors,
        activation="tanh",
        scale_offset=0.5,
    )
    check(mi.modulate(*tensors), tensors)
    y = mi.modulate(*tensors[:2])
    assert y.dtype == (tensors[1] * tensors[0]).dtype
    with mi.backend("reference"):
        check(mi.modulate(*tensors), tensors)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("sample", SAMPLES[2:], ids=lambda sample: sample.name)
def test_dtypes_are_those_of_the_promotion_by_choice_of_the_package(sample, dtypes):
    """Without a backend by name, where PyTorch's operations may serve."""
    tensors = draw(sample, dtypes)
    copies = [tensor.clone() for tensor in tensors]
    check(
        mi.modulate(*tensors, activation="silu", scale_offset=1.0),
        tensors,
        activation="silu",
        scale_offset=1.0,
    )
    assert all(torch.equal(one, other) for one, other in zip(tensors, copies, strict=True))


def exact_gradients(cotangent, *tensors):
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y = expression(*leaves, activation="sigmoid", scale_offset=0.5)
    return torch.autograd.grad(y, leaves, cotangent)


@pytest.mark.parametrize("dtypes", [*itertools.product(FLOATS, FLOATS, [torch.float32])], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_gradients_have_the_dtypes_of_their_arguments(sample, dtypes, place):
    """Bit for bit those of the cast arguments, cast back; of second order, too."""
    if len(set(dtypes)) == 1:
        pytest.skip("one dtype")
    leaves = [tensor.requires_grad_() for tensor in draw(sample, dtypes, place.device)]
    y = mi.modulate(*leaves, activation="sigmoid", scale_offset=0.5)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, cotangent, create_graph=True)
    assert [grad.dtype for grad in found] == list(dtypes)
    if sample.scale == ():
        eps = torch.finfo(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)).eps
        exact = exact_gradients(cotangent.double(), *leaves)
        sizes = exact_gradients(cotangent.double().abs(), leaves[0].abs(), *leaves[1:])  # of the summands
        for grad, true, size in zip(found, exact, sizes, strict=True):
            assert ((grad.double() - true).abs() <= 4 * eps * size).all()
        return
    cast = [leaf.detach().to(y.dtype).requires_grad_() for leaf in leaves]
    again = mi.modulate(*cast, activation="sigmoid", scale_offset=0.5)
    assert torch.equal(y, again)
    wanted = torch.autograd.grad(again, cast, cotangent, create_graph=True)
    for grad, other in zip(found, wanted, strict=True):
        assert torch.equal(grad, other.to(grad.dtype))
    second = torch.autograd.grad(found[0].double().sin().sum(), leaves[1])
    assert second[0].dtype == dtypes[1] and second[0].isfinite().all()


def test_a_number_is_activated_in_its_own_dtype(place):
    """tanh of a float32 parameter gates bfloat16 features: one rounding, that of the gate."""
    x = torch.randn(12, 50, device=place.device).bfloat16()
    scale = torch.tensor(0.1234567, device=place.device, requires_grad=True)
    y = mi.modulate(x, scale, activation="tanh")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, mi.modulate(x, torch.tanh(scale).bfloat16()))
    (grad,) = torch.autograd.grad(y.float().sum(), scale)
    expected = x.double().sum() * (1 - torch.tanh(scale.double()) ** 2)
    assert grad.dtype == torch.float32
    assert abs(grad - expected) <= 2**-8 * x.double().abs().sum()
    with pytest.raises(ValueError, match="^modulate: activation: expected one of .*, got 'swish'$"):
        mi.modulate(x, scale, activation="swish")
    with torch.autocast(place.device, torch.bfloat16):  # as before, and as torch.addcmul
        assert mi.modulate(x, scale).dtype == torch.float32


@pytest.mark.parametrize("dtypes", [HALF, SINGLE], ids=str)
def test_transforms(dtypes, place):
    sample = Modulation("tokens", (6, 3, 4), (6, 1, 4), (6, 1, 4))
    tensors = draw(sample, dtypes, place.device)

    def ours(*given):
        return mi.modulate(*given, activation="tanh")

    def theirs(*given):
        return expression(*given, activation="tanh")

    torch.testing.assert_close(torch.vmap(ours)(*tensors), theirs(*tensors), rtol=2e-2, atol=2e-2)
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    found, expected = (
        torch.func.jvp(function, tuple(tensors), tuple(tangents)) for function in (ours, theirs)
    )
    assert [t.dtype for t in found] == [t.dtype for t in expected] == [torch.float32] * 2
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    grads = [
        torch.vmap(torch.func.grad(lambda *t, f=f: f(*t).sin().sum(), (0, 1, 2)))(*tensors)
        for f in (ours, theirs)
    ]
    assert [t.dtype for t in grads[0]] == list(dtypes)
    torch.testing.assert_close(*grads, rtol=5e-2, atol=5e-2)


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtypes", [HALF, SINGLE], ids=str)
def test_compiled(dtypes, place):
    leaves = [tensor.requires_grad_() for tensor in draw(TOKENS, dtypes, place.device)]
    compiled = torch.compile(mi.modulate, backend="aot_eager", fullgraph=True, dynamic=True)
    results = []
    for function in (compiled, mi.modulate):
        y = function(*leaves, activation="tanh")
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    assert [t.dtype for t in results[0]] == [torch.float32, *dtypes]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_without_derivatives_y_is_the_only_copy():
    from mi_kernels.testing.memory import peak_memory

    torch.utils.deterministic.fill_uninitialized_memory = False
    for sample in (
        Modulation("tokens", (4, 600, 256), (4, 1, 256), (4, 1, 256)),
        Modulation("no shift", (4, 600, 256), (256,)),
    ):
        x, scale, shift = sample.arguments(torch.float32)
        x = x.bfloat16()
        before = x.clone()
        with Spy() as spy:
            y = mi.modulate(x, scale, shift, activation="sigmoid")
        assert spy.names == [] and torch.equal(x, before) and y.stride() == x.stride()
        expected = mi.modulate(x.float(), scale, shift, activation="sigmoid")
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        extra = peak_memory(lambda t=(x, scale, shift): mi.modulate(*t, activation="sigmoid"))
        assert extra <= x.numel() * 4 + (64 << 10)
        assert mi.explain(mi.modulate, x, scale, shift, activation="sigmoid").algorithm == mixed.ALGORITHM


def test_the_plan_counts_the_copies(place):
    x, scale, shift = draw(TOKENS, HALF, place.device)
    same = mi.explain(mi.modulate, x.float(), scale, shift)
    plan = mi.explain(mi.modulate, x, scale, shift)
    assert plan.bytes == same.bytes + x.numel() * (2 + 4)
    assert plan.why == f"{same.why}; x cast to float32 first, as PyTorch promotes dtypes"
    assert plan.scratch == (None if same.scratch is None else same.scratch + 4 * x.numel())
    plan = mi.explain(mi.modulate, x.float(), scale.bfloat16(), shift.half().requires_grad_())
    assert "; scale and shift cast to float32 first" in plan.why and plan.backward
    number = mi.explain(mi.modulate, x, torch.tensor(1.0, device=place.device))
    assert "scale cast to bfloat16 first" in number.why


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_film_takes_features_of_any_dtype(dtype, place):
    layer = mi.nn.FiLM(4, context_features=3, device=place.device)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 4, 6, dtype=dtype, device=place.device, requires_grad=True)
    z = torch.randn(2, 3, device=place.device)
    y = layer(x, z)
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    scale, shift = layer.weight @ z.T, layer.bias
    scale = (scale.T + shift).unsqueeze(-1)
    expected = (1 + scale[:, :4]) * x + scale[:, 4:]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32
    plan = mi.explain(layer, x, z)
    assert ("cast to" in plan.why) == (dtype != torch.float32)
