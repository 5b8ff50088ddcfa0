"""Derivatives in reverse and forward mode, to third order, and what they cost."""

from itertools import product

import pytest
import torch
from helpers import Spy, gradients_of, reference_gradients
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels.ops.interaction import reference
from mi_kernels.testing.checks import check_gradients
from mi_kernels.testing.errors import check_errors, relative_error
from mi_kernels.testing.samples import (
    EMPTY,
    LAYOUTS,
    MIDDLE,
    NAMES,
    ODD,
    WEIGHT_ONLY,
    Sample,
    Shape,
    samples,
    term_subsets,
)

TINY = Shape("tiny", (3,), 2, 3, 2)
TINY_BROADCAST = (
    Shape("1d", (), 2, 3, 2),
    Shape("1d-x", (), 2, 3, 2, context_batch=(3,)),
    Shape("outer", (2, 1), 2, 3, 2, context_batch=(1, 3)),
)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ALL = (True,) * 6


def call(terms):
    """An interaction as a function of its present arguments alone, as the checkers of PyTorch need it."""

    def function(x, z, *weights):
        weights = iter(weights)
        return mi.interaction(x, z, *(next(weights) if there else None for there in terms))

    return function


def letters(chosen):
    return "".join(letter for letter, there in zip("xzWUVc", chosen, strict=True) if there)


def leaves(sample, device="cpu", seed=0):
    arguments = sample.arguments(torch.float64, device, seed, requires_grad=True)
    return tuple(t for t in arguments if t is not None)


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("sample", list(samples()), ids=str, scope="module")
def test_error_rule(sample, dtype, place):
    check_gradients(sample, dtype, place.device)


def test_weight_gradients_are_sums_of_sums(place):
    """Of positive numbers, where the error of one long running sum grows with its length.

    In units of rounding it is 1.2 here, and 10 with one for each eighth of the batch. PyTorch has 6, so
    that the error rule lets such sums pass.
    """
    if place.backend not in ("portable", "cpu"):
        pytest.skip("how GPUs add up is held against PyTorch on the same GPU")
    shapes = (100000, 16), (100000, 1), (16, 1, 16), (100000, 16)
    x, z, weight, grad = (torch.rand(shape, device=place.device) for shape in shapes)
    (found,) = torch.autograd.grad(mi.interaction(x, z, weight.requires_grad_()), weight, grad)
    exact = (grad.double().T @ (z.double() * x.double())).unsqueeze(1)
    assert relative_error(found, exact) < 3 * 2**-24


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_rule_of_second_order(dtype, place):
    """The gradients of <dx, a> + <dz, b> + <dW, C>: sums of products with no coefficients but 1."""
    sample = Sample(MIDDLE, WEIGHT_ONLY)

    def second(function):
        def found(*tensors):
            grad, *inputs = (t.detach().requires_grad_() for t in tensors[:4])
            first = torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)
            return torch.autograd.grad(first, (grad, *inputs), tensors[4:])

        return found

    def draw(seed):
        tensors = (sample.arguments(dtype, place.device, s)[:3] for s in (seed, seed + 2000))
        return (sample.cotangent(dtype, place.device, seed + 1000), *next(tensors), *next(tensors))

    check_errors(second(mi.interaction), second(reference.interaction), draw, enough=300)


@pytest.mark.parametrize("terms", term_subsets(), ids=lambda terms: letters((False, False, *terms)))
def test_gradcheck_of_every_term(terms, place):
    inputs = leaves(Sample(TINY, terms), place.device)
    assert gradcheck(
        call(terms),
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )
    assert gradgradcheck(
        call(terms), inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("shape", [*TINY_BROADCAST, *EMPTY], ids=lambda shape: shape.name)
def test_gradcheck_of_shapes(shape, place):
    sample = Sample(shape)
    assert gradcheck(
        call(sample.terms), leaves(sample, place.device), check_forward_ad=True, check_batched_grad=True
    )
    assert gradgradcheck(call(sample.terms), leaves(sample, place.device), check_fwd_over_rev=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_of_layouts(layout, place):
    if layout == "expanded":
        # gradcheck perturbs elements in place, so it needs them apart; the expansion is part of the function.
        x, z, *weights = leaves(Sample(Shape("tiny", (1,), 2, 3, 2)), place.device)
        assert gradcheck(
            lambda x, z, *w: mi.interaction(x.expand(3, 3), z.expand(3, 2), *w), (x, z, *weights)
        )
        return
    inputs = leaves(Sample(TINY, layout=layout), place.device)
    assert gradcheck(call(ALL[2:]), inputs, check_forward_ad=True)
    assert gradgradcheck(call(ALL[2:]), inputs, check_fwd_over_rev=True)


def test_third_order(place):
    """A directional third derivative through the second one, checked by differences."""
    sample = Sample(Shape("tiny", (2,), 2, 2, 2))
    inputs = leaves(sample, place.device)
    directions = [torch.randn_like(t, requires_grad=True) for t in inputs]

    def second(*tensors):
        tensors, along = tensors[:6], tensors[6:]
        y = mi.interaction(*tensors)
        first = torch.autograd.grad(y.pow(2).sum(), tensors, create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(first, along, strict=True))
        return torch.autograd.grad(slope, tensors, create_graph=True)

    assert gradcheck(second, (*inputs, *directions))


def test_third_order_equals_that_of_einsum(place):
    def third(function, seed=3):
        tensors = leaves(Sample(MIDDLE), place.device)
        value = function(*tensors).pow(3).sum()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(
                (g * torch.randn(g.shape, generator=generator, dtype=g.dtype).to(g.device)).sum()
                for g in grads
            )
        return value

    ours, theirs = third(mi.interaction), third(reference.interaction)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def needs_of(operation, arguments):
    """Which results an operation was asked for: its trailing booleans."""
    return {
        "interaction_input_grads": tuple(arguments[6:8]),
        "interaction_weight_grads": tuple(arguments[3:7]),
    }[operation]


@pytest.mark.parametrize(
    "needs", [needs for needs in product((False, True), repeat=6) if any(needs)], ids=letters
)
def test_only_what_is_asked_for_is_computed(needs, place):
    sample = Sample(ODD)
    tensors = sample.arguments(torch.float64, place.device)
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    y = mi.interaction(*tensors)
    grad = sample.cotangent(torch.float64, place.device)
    with Spy() as spy:
        y.backward(grad)
    expected = []
    if any(needs[:2]):
        expected.append(("interaction_input_grads", needs[:2]))
    if any(needs[2:]):
        expected.append(("interaction_weight_grads", needs[2:]))
    assert [(name, needs_of(name, args)) for name, args in spy.calls] == expected
    truth = reference_gradients(needs)(grad, *tensors)
    for tensor, need in zip(tensors, needs, strict=True):
        assert (tensor.grad is not None) == need
    for tensor, exact in zip((t for t, need in zip(tensors, needs, strict=True) if need), truth, strict=True):
        torch.testing.assert_close(tensor.grad, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_computes_one_direction_only(name, place):
    """The second derivative by one argument leaves out what belongs to the others."""
    tensors = Sample(ODD).arguments(torch.float64, place.device)
    index = NAMES.index(name)
    tensors[index].requires_grad_()
    (first,) = torch.autograd.grad(mi.interaction(*tensors).pow(2).sum(), tensors[index], create_graph=True)
    with Spy() as spy:
        torch.autograd.grad(first.pow(2).sum(), tensors[index])
    wanted = [needs_of(op, args) for op, args in spy.calls if op != "interaction"]
    positions = {"x": (0,), "z": (1,)}.get(name, (index - 2,))
    for needs in wanted:
        assert sum(needs) == 1
        assert needs[positions[0]]
    assert spy.names.count("interaction") == 1


def test_no_call_without_need(place):
    tensors = Sample(ODD).arguments(torch.float64, place.device)
    with Spy() as spy:
        y = mi.interaction(*tensors)
    assert spy.names == ["interaction"]
    assert not y.requires_grad
    tensors[0].requires_grad_()
    with torch.no_grad():
        assert not mi.interaction(*tensors).requires_grad
    with torch.inference_mode():
        assert mi.interaction(*tensors).is_inference()


def test_nothing_but_the_inputs_is_saved(place):
    tensors = Sample(ODD).arguments(torch.float32, place.device, requires_grad=True)
    addresses = {t.data_ptr() for t in tensors}
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mi.interaction(*tensors)
        assert saved, "the hook saw nothing, so it proves nothing"
        assert all(t.data_ptr() in addresses for t in saved)
        saved.clear()
        grad = torch.ones_like(y, requires_grad=True)
        torch.autograd.grad(y, tensors, grad, create_graph=True)
    addresses.add(grad.data_ptr())
    assert saved and all(t.data_ptr() in addresses for t in saved)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_gradient_layouts(layout, place):
    """The incoming gradient in another layout; .sum() makes one whose strides are all 0."""
    sample = Sample(MIDDLE)
    tensors = sample.arguments(torch.float64, place.device, requires_grad=True)
    grad = sample.cotangent(torch.float64, place.device, layout=layout)
    found = torch.autograd.grad(mi.interaction(*tensors), tensors, grad)
    expected = reference_gradients(ALL)(grad.contiguous(), *tensors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(mi.interaction(*tensors).sum(), tensors)
    expected = reference_gradients(ALL)(torch.ones_like(grad), *tensors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_tensor_as_several_arguments(place):
    """z = x: both parts of the gradient arrive."""
    x = torch.randn(4, 3, dtype=torch.float64, device=place.device, requires_grad=True)
    w = torch.randn(2, 3, 3, dtype=torch.float64, device=place.device)
    u = torch.randn(2, 3, dtype=torch.float64, device=place.device, requires_grad=True)
    assert gradcheck(lambda x, u: mi.interaction(x, x, w, u, u), (x, u), check_forward_ad=True)
    assert gradgradcheck(lambda x, u: mi.interaction(x, x, w, u, u), (x, u), check_fwd_over_rev=True)


@pytest.mark.parametrize("name", NAMES)
def test_tangent_of_one_argument(name, place):
    """Forward mode with a single dual argument is the formula with the tangent in its place."""
    tensors = list(Sample(ODD).arguments(torch.float64, place.device))
    index = NAMES.index(name)
    direction = torch.randn_like(tensors[index])
    step = 1e-6
    lower, upper = list(tensors), list(tensors)
    lower[index], upper[index] = tensors[index] - step * direction, tensors[index] + step * direction
    expected = (reference.interaction(*upper) - reference.interaction(*lower)) / (2 * step)
    with forward_ad.dual_level():
        tensors[index] = forward_ad.make_dual(tensors[index], direction)
        tangent = forward_ad.unpack_dual(mi.interaction(*tensors)).tangent
        assert tangent is not None
    torch.testing.assert_close(tangent, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_tangents_of_gradients_along_one_argument(name, place):
    """Forward over reverse with a single dual argument: the others have no tangent, not one of zeros."""

    def tangents(function):
        tensors = list(Sample(ODD).arguments(torch.float64, place.device, requires_grad=True))
        index = NAMES.index(name)
        direction = torch.linspace(-1, 2, tensors[index].numel(), dtype=torch.float64, device=place.device)
        with forward_ad.dual_level():
            tensors[index] = forward_ad.make_dual(tensors[index], direction.view(tensors[index].shape))
            first = torch.autograd.grad(function(*tensors).pow(2).sum(), tensors, create_graph=True)
            found = [forward_ad.unpack_dual(gradient).tangent for gradient in first]
        return [torch.zeros_like(f) if t is None else t for f, t in zip(first, found, strict=True)]

    found, expected = tangents(mi.interaction), tangents(reference.interaction)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_nan_input(name, place):
    """A NaN reaches the gradients that depend on it and no other."""
    sample = Sample(ODD)

    def draw(_):
        tensors = sample.arguments(torch.float32, place.device)
        tensors[NAMES.index(name)].view(-1)[-1] = torch.nan
        return sample.cotangent(torch.float32, place.device), *tensors

    def gradients(grad, *tensors):
        copies = [t.clone().requires_grad_() for t in tensors]
        return gradients_of(mi.interaction(*copies), copies, grad, ALL)

    check_errors(gradients, reference_gradients(ALL), draw, most=1)


def test_backend_of_the_forward_serves_the_backward():
    """backward() outside the with block runs on what the forward ran on."""
    tensors = Sample(ODD, WEIGHT_ONLY).arguments(torch.float32, requires_grad=True)
    with mi.backend("portable"):
        y = mi.interaction(*tensors)
    with Spy() as spy:
        y.sum().backward()
    assert spy.raw and all(name.endswith("_portable") for name in spy.raw)
