"""Few outputs in training, W x + U kept: values, derivatives of all orders, the choice, memory, explain."""

from itertools import product

import pytest
import torch
from helpers import Spy
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops.interaction import cost_model, kept, reference
from mi_kernels.testing.checks import check_gradients, check_values
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import LAYOUTS, Sample, Shape

FLOATS = (torch.float64, torch.float32, torch.bfloat16)
TINY = Shape("tiny", (3,), 2, 4, 2)
SHAPES = (
    TINY,
    Shape("one-output", (70,), 33, 17, 1),
    Shape("one-row", (1,), 40, 9, 3),
    Shape("several", (2, 9), 19, 65, 8),
    Shape("no-features", (3,), 0, 4, 2),
    Shape("no-rows", (0,), 3, 4, 2),
)
LARGE = Shape("large", (512,), 96, 128, 1)
TERMS = tuple(product((False, True), repeat=3))  # of U, V and c


@pytest.fixture
def always(monkeypatch):
    """T is kept wherever it may be, whatever it costs."""
    if backends.choose(torch.zeros(1)) != "cpu":
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(kept, "pays", lambda rows, sizes, dtype, want_x: True)


def is_kept(y):
    node = y.grad_fn
    while node is not None and getattr(node, "_forward_cls", None) is not kept.KeptInteractionRule:
        node = node.next_functions[0][0] if node.next_functions else None
    return node is not None


def recording(*arguments):
    """The function, of arguments that require gradients, and a contiguous W."""
    x, z, weight, *others = (
        t if t is None or t.requires_grad else t.detach().requires_grad_() for t in arguments
    )
    y = mi.interaction(x, z, weight if weight.mT.is_contiguous() else weight.contiguous(), *others)
    assert is_kept(y)
    return y


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "sample",
    [*(Sample(shape) for shape in SHAPES[:3]), *(Sample(SHAPES[3], layout=layout) for layout in LAYOUTS)],
    ids=str,
)
def test_error_rule(sample, dtype, always):
    check_values(sample, dtype, "cpu", lambda *arguments: recording(*arguments).detach())
    check_gradients(sample, dtype, "cpu", recording)


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_first_and_second_order_equal_the_reference(shape, terms, always):
    arguments = list(Sample(shape).arguments(torch.float64, requires_grad=True))
    arguments[3:] = [t if there else None for t, there in zip(arguments[3:], terms, strict=True)]
    leaves = [t for t in arguments if t is not None]
    grad = Sample(shape).cotangent(torch.float64).requires_grad_()
    results = []
    for function in (recording, reference.interaction):
        y = function(*arguments)
        first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        again = torch.autograd.grad(y, leaves, grad, create_graph=True)
        loss = sum(t.pow(2).sum() for t in again)
        results.append([y, *first, *again, *torch.autograd.grad(loss, (grad, *leaves[:3]))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chosen", [c for c in product((False, True), repeat=6) if any(c)], ids=str)
def test_each_gradient_alone_is_that_of_all(chosen, always):
    leaves = Sample(TINY).arguments(torch.float64, requires_grad=True)
    grad = Sample(TINY).cotangent(torch.float64)
    expected = torch.autograd.grad(reference.interaction(*leaves), leaves, grad)
    y = mi.interaction(*leaves)
    wanted = [t for t, there in zip(leaves, chosen, strict=True) if there]
    for_wanted = [t for t, there in zip(expected, chosen, strict=True) if there]
    found = torch.autograd.grad(y, wanted, grad)
    torch.testing.assert_close(found, tuple(for_wanted), rtol=1e-12, atol=1e-12)
    only = [t.detach().requires_grad_(there) for t, there in zip(leaves, chosen, strict=True)]
    y = mi.interaction(*only)
    assert is_kept(y) == chosen[1]  # without the gradient of z nothing is saved
    found = torch.autograd.grad(y, [t for t in only if t.requires_grad], grad)
    torch.testing.assert_close(found, tuple(for_wanted), rtol=1e-12, atol=1e-12)


def test_dw_of_the_fused_pass(always, monkeypatch):
    """Of a large W: the same gradients."""
    monkeypatch.setattr(kept, "MAX_WEIGHT", 0)
    leaves = Sample(TINY).arguments(torch.float64, requires_grad=True)
    grad = Sample(TINY).cotangent(torch.float64)
    found, expected = (
        torch.autograd.grad(function(*leaves), leaves, grad)
        for function in (recording, reference.interaction)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["OZX", "OXZ"])
def test_derivatives(order, always):
    """With z inside x in the memory of W it is z W that is kept."""
    leaves = list(Sample(TINY).arguments(torch.float64, requires_grad=True))
    if order == "OXZ":
        leaves[2] = leaves[2].detach().mT.contiguous().mT.requires_grad_()
        assert torch.autograd.grad(recording(*leaves).sum(), leaves[2])[0].shape == leaves[2].shape
    recording(*leaves)
    gradcheck(
        mi.interaction,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    gradgradcheck(mi.interaction, leaves, check_fwd_over_rev=True)


def test_transforms_take_the_fused_pass(always):
    leaves = Sample(TINY).arguments(torch.float64, requires_grad=True)
    plain = [t.detach() for t in leaves]
    expected = torch.func.grad(lambda *a: reference.interaction(*a).pow(2).sum(), tuple(range(6)))(*plain)
    found = torch.func.grad(lambda *a: mi.interaction(*a).pow(2).sum(), tuple(range(6)))(*plain)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    stacked = torch.stack((plain[0], 2 * plain[0])).requires_grad_()
    y = torch.func.vmap(mi.interaction, (0, *[None] * 5))(stacked, *leaves[1:])
    expected = [reference.interaction(x, *leaves[1:]) for x in stacked]
    torch.testing.assert_close(y, torch.stack(expected), rtol=1e-12, atol=1e-12)
    with Spy() as spy:
        y = mi.interaction(*leaves)
    assert not is_kept(y) and spy.names == ["interaction"]


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    results = []
    for number in (1, threads):
        torch.set_num_threads(number)
        leaves = Sample(LARGE).arguments(torch.float32, requires_grad=True)
        y = mi.interaction(*leaves)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("sizes", "want_x", "expected"),
    [
        ((16, 3, 384, 384), True, True),  # W is larger than T
        ((1024, 1, 400, 400), True, True),  # as large as x
        ((1024, 2, 400, 400), True, False),  # T would be the largest tensor
        ((1024, 2, 200, 400), True, True),
        ((64, 9, 256, 256), True, False),  # dx and dz are one product of the fused pass
        ((64, 9, 256, 256), False, True),
        ((4, 1, 16, 16), True, False),  # one product less is not worth two more calls
        ((20000, 1, 16, 16), True, False),  # nor reading T
    ],
)
def test_choice(sizes, want_x, expected):
    rows, out, context, width = sizes
    assert kept.pays(rows, (out, context, width), torch.float32, want_x) == expected
    assert not kept.pays(rows, (out, context, width), torch.float16, want_x)
    x, z, weight = torch.zeros(rows, width), torch.zeros(rows, context), torch.zeros(out, context, width)
    if backends.choose(x) != "cpu":
        pytest.skip("no compiled kernels")
    x.requires_grad_(want_x), z.requires_grad_()
    assert is_kept(mi.interaction(x, z, weight)) == expected
    plan = mi.explain(mi.interaction, x, z, weight)
    assert (plan.algorithm == cost_model.PER_X) == expected == ("is kept" in plan.why)
    with torch.no_grad():
        assert mi.explain(mi.interaction, x, z, weight).algorithm not in (cost_model.PER_X, cost_model.PER_Z)


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_memory(terms):
    """What is saved is no larger than the largest of inputs, outputs and weights; explain counts it."""
    x, z, weight, *others = Sample(LARGE).arguments(torch.float32, requires_grad=True)
    if backends.choose(x) != "cpu":
        pytest.skip("no compiled kernels")
    arguments = x, z, weight, *(t if there else None for t, there in zip(others, terms, strict=True))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = mi.interaction(*arguments)
    assert is_kept(y)
    given = [t for t in (*arguments, y) if t is not None]
    addresses = {t.data_ptr() for t in given}
    own = [t for t in saved if t.data_ptr() not in addresses]
    assert [t.numel() for t in own] == [512 * 96] and own[0].numel() <= max(t.numel() for t in given)
    peak = peak_memory(lambda: mi.interaction(*arguments))
    assert peak == mi.explain(mi.interaction, *arguments).scratch + y.nbytes
