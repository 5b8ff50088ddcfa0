"""The double backward that holds Q = z x' + z' x: values, higher orders, transforms, work and memory."""

from itertools import product

import pytest
import torch
from helpers import Spy
from torch.autograd import gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import mi_kernels as mi
from mi_kernels.ops import counts
from mi_kernels.ops.interaction import autograd, reference
from mi_kernels.testing.checks import check_second_order
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import LAYOUTS, ORDERS, WEIGHT_ONLY, Sample, Shape

SMALL = Shape("few-rows", (3,), 2, 4, 5)
FEW = Shape("few", (33,), 17, 31, 40)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def always(monkeypatch, place):
    """Q is held wherever it may be, however small the products are."""
    if place.device != "cpu":
        pytest.skip("Q is held on CPUs alone")
    monkeypatch.setattr(counts, "MIN_PAIRS_WORK", 0)


def second(function, leaves, grad, there=(True, True, True)):
    """The gradients by g and all leaves of a sum over those of x, z and W that are ``there``."""
    wanted = [t for t, one in zip(leaves[:3], there, strict=True) if one]
    y = function(*leaves)
    first = torch.autograd.grad(y, wanted, grad, create_graph=True)
    loss = sum((t * torch.arange(1, t.numel() + 1).view(t.shape).to(t).cos()).sum() for t in first)
    return torch.autograd.grad(loss, (grad, *leaves), allow_unused=True, materialize_grads=True)


def arguments_of(shape, dtype=torch.float64, **options):
    sample = Sample(shape, **options)
    leaves = sample.arguments(dtype, requires_grad=True)
    return leaves, sample.cotangent(dtype).requires_grad_()


@pytest.mark.parametrize("there", [t for t in product((False, True), repeat=3) if any(t)], ids=str)
@pytest.mark.parametrize("shape", [SMALL, FEW, Shape("one-row", (1,), 7, 9, 3)], ids=lambda s: s.name)
def test_equals_the_reference(shape, there, always):
    leaves, grad = arguments_of(shape)
    found, expected = (second(f, leaves, grad, there) for f in (mi.interaction, reference.interaction))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * float(other.abs().max()))


@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone_is_that_of_all(wanted, always):
    leaves, grad = arguments_of(SMALL)
    every = second(reference.interaction, leaves, grad)[1 + wanted]
    first = torch.autograd.grad(mi.interaction(*leaves), leaves[:3], grad, create_graph=True)
    loss = sum((t * torch.arange(1, t.numel() + 1).view(t.shape).to(t).cos()).sum() for t in first)
    (found,) = torch.autograd.grad(loss, leaves[wanted], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, every, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_rule(dtype, always):
    check_second_order(Sample(FEW, WEIGHT_ONLY), dtype)
    check_second_order(Sample(FEW), dtype)


@pytest.mark.parametrize(
    "options", [{"order": o} for o in ORDERS] + [{"layout": o} for o in LAYOUTS], ids=str
)
def test_layouts(options, always):
    """Of any memory order and layout of W, whether it is a matrix as it lies or not."""
    leaves, grad = arguments_of(FEW, **options)
    found, expected = (second(f, leaves, grad) for f in (mi.interaction, reference.interaction))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * float(other.abs().max()))
    if "order" in options:
        assert found[3].stride() == leaves[2].stride()


def test_third_order_and_transforms(always):
    leaves, grad = arguments_of(Shape("tiny", (2,), 2, 3, 2))

    def first(grad, *tensors):
        with torch.enable_grad():
            y = mi.interaction(*tensors)
            return torch.autograd.grad(y, tensors[:3], grad, create_graph=True)

    assert gradgradcheck(first, (grad, *leaves), check_fwd_over_rev=True, atol=1e-4)

    def loss(function, x, z, weight):
        gradients = torch.func.grad(lambda *t: function(*t).pow(3).sum(), (0, 1, 2))(x, z, weight)
        return sum(t.pow(2).sum() for t in gradients)

    plain = [t.detach() for t in leaves[:3]]
    stacked = [torch.stack((t, 2 * t)) for t in plain]
    for transform in (
        lambda f: torch.func.grad(f, (0, 1, 2)),
        lambda f: torch.func.jacfwd(torch.func.grad(f, 1), 0),
    ):
        for in_dims, tensors in (
            ((0, 0, None), [*stacked[:2], plain[2]]),
            ((None, 0, 0), [plain[0], *stacked[1:]]),
        ):
            found, expected = (
                torch.func.vmap(transform(lambda *t, f=f: loss(f, *t)), in_dims)(*tensors)
                for f in (mi.interaction, reference.interaction)
            )
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def doubled(shape):
    """What computes the second derivatives alone."""
    leaves, grad = arguments_of(shape, torch.float32, terms=WEIGHT_ONLY)
    leaves = leaves[:3]
    first = torch.autograd.grad(mi.interaction(*leaves), leaves, grad, create_graph=True)
    inputs, cotangents = (grad, *leaves), [torch.ones_like(t) for t in first]
    return inputs, lambda: torch.autograd.grad(first, inputs, cotangents, retain_graph=True)


@pytest.mark.parametrize(("rows", "products"), [(64, 5), (65, 7)])
def test_products_and_memory(rows, products, place):
    """Five products where Q is no larger than W, seven where it is; memory stays that of the results."""
    if place.device != "cpu":
        pytest.skip("Q is held on CPUs alone")
    shape = Shape("large", (rows,), 64, 64, 64)
    inputs, run = doubled(shape)
    pairs = rows * 64 * 64
    with FlopCounterMode(display=False) as counter:
        run()
    q = 4 * pairs if products == 5 else 0  # itself is a product of two rows
    assert counter.get_total_flops() == products * 2 * pairs * 64 + q
    expected = counts.double_backward(shape, torch.float32, (True, False, False, False))
    assert expected.operations == products * 2 * pairs * 64
    largest = max(t.nbytes for t in inputs)
    with Spy() as spy:
        run()
    tensors = [t for _, arguments in spy.calls for t in arguments if isinstance(t, torch.Tensor)]
    assert max(t.nbytes for t in tensors) <= largest
    assert peak_memory(run) <= sum(t.nbytes for t in inputs) + 3 * largest + (16 << 20)


def test_groups_and_segments_hold_nothing(always):
    """Groups of rows stay with seven products."""
    x, z, weight = torch.randn(2, 3, 4), torch.randn(2, 3, 2), torch.randn(2, 5, 2, 4)
    pairs = autograd._pairs("portable", torch.randn(2, 3, 5), x, z, weight, x, z)
    assert pairs is None
    pairs = autograd._pairs("portable", torch.randn(3, 5), x[0], z[0], weight[0], x[1], z[1])
    expected = torch.einsum("bi,bj->bij", z[0], x[1]) + torch.einsum("bi,bj->bij", z[1], x[0])
    torch.testing.assert_close(pairs, expected.flatten(1))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_values_whose_pairs_leave_the_range(dtype, always):
    """z x' overflows where g z x' does not: the products are made one by one, as without Q."""
    x, z, weight = (t.detach() for t in arguments_of(FEW, dtype)[0][:3])
    large = torch.finfo(dtype).max ** 0.5 * 4
    leaves = [(t * s).requires_grad_() for t, s in ((x, large), (z, large), (weight, 1 / large))]
    grad = torch.full((33, 40), 1 / large, dtype=dtype, requires_grad=True)
    first = torch.autograd.grad(mi.interaction(*leaves), leaves[:2], grad, create_graph=True)
    cotangents = [torch.full_like(t, large) for t in (x, z)]
    found = torch.autograd.grad(first, (grad, leaves[2]), cotangents)
    assert found[1].isfinite().all()
