"""No pass holds a tensor of B*Z*X, B*O*X or B*O*Z elements, if it is larger than its operands."""

from itertools import cycle

import pytest
import torch

import mi_kernels as mi
from benchmarks.suites.shapes import FULL
from mi_kernels import backends
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import Sample, Shape

MIB = 1 << 20
# In float32 the smallest of B*Z*X, B*O*X and B*O*Z would take 128 MiB; all tensors together take 12 MiB.
SHAPE = Shape("large", (8192,), 64, 64, 64)

SCRATCH = (
    Shape("plain", (512,), 64, 64, 64),
    Shape("one-context", (512,), 64, 64, 64, context_batch=(1,)),
    Shape("shared-context", (64, 32), 64, 33, 32, context_batch=(64, 1)),
    Shape("outer", (64, 1), 64, 33, 32, context_batch=(1, 32)),
)


def _bytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def limit(outputs, arguments, threads):
    packed = max(_bytes(t) for t in arguments)
    return outputs + packed + 16 * MIB * threads


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SCRATCH, ids=lambda shape: shape.name)
def test_explain_tells_the_scratch_memory(shape, transposed):
    """To the byte, for the compiled kernels."""
    x, z, weight, _, weight_x, _ = Sample(shape).arguments(torch.float32)
    if transposed:
        weight = weight.mT.contiguous().mT
    if backends.choose(x) != "cpu":
        pytest.skip("no compiled kernels")
    # Without V the last of these is the biaffine form.
    weights = weight, None, weight_x if shape.name == "outer" else None
    y = mi.interaction(x, z, *weights)
    assert peak_memory(lambda: mi.interaction(x, z, *weights)) == (
        mi.explain(mi.interaction, x, z, *weights).scratch + _bytes(y)
    )


@pytest.mark.parametrize("width", [1, 256])
@pytest.mark.parametrize("rows", [2, 64, 4096])
@pytest.mark.parametrize("across", ["", "U", "UV"])
def test_explain_tells_the_scratch_memory_without_w(rows, across, width):
    x, z = torch.randn(rows, width), torch.randn(rows, 64)
    if backends.choose(x) != "cpu":
        pytest.skip("no compiled kernels")
    weight_z, weight_x = torch.randn(128, 64), torch.randn(128, width)
    if "U" in across:
        weight_z = weight_z.t().contiguous().t()
    if "V" in across:
        weight_x = weight_x.t().contiguous().t()
    plan = mi.explain(mi.interaction, x, z, None, weight_z, weight_x)
    y = mi.interaction(x, z, None, weight_z, weight_x)
    assert peak_memory(lambda: mi.interaction(x, z, None, weight_z, weight_x)) == plan.scratch + _bytes(y)
    plan = mi.explain(mi.interaction, x.requires_grad_(), z, None, weight_z, weight_x)
    arguments = (y, x.detach(), z, None, weight_z, weight_x, True, False)
    peak = peak_memory(lambda: torch.ops.mi_kernels.interaction_input_grads(*arguments))
    assert peak == plan.backward[0].scratch + _bytes(x)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shift", ["", "C", "c", "Cc"])
def test_explain_tells_the_scratch_memory_of_gates(shift, activation):
    x, z, a = torch.randn(4096, 256), torch.randn(4096, 64), torch.randn(256, 64)
    if backends.choose(x) != "cpu":
        pytest.skip("no compiled kernels")
    shifts = a if "C" in shift else None, x[0] if "c" in shift else None

    def call(function):
        return function(x, z, a, None, *shifts, activation=activation)

    plan = call(lambda *t, **options: mi.explain(mi.diagonal, *t, **options))
    assert peak_memory(lambda: call(mi.diagonal)) == plan.scratch + _bytes(x)


@pytest.fixture
def leaves(place):
    if place.device != "cpu":
        pytest.skip("peak_memory measures the CPU's allocator")
    return Sample(SHAPE).arguments(torch.float32, requires_grad=True)


def test_the_limit_would_notice(leaves):
    """einsum, which holds such a tensor, is over the limit."""
    with mi.backend("reference"):
        peak = peak_memory(lambda: mi.interaction(*leaves))
    assert peak > limit(SHAPE.rows * SHAPE.out * 4, leaves, torch.get_num_threads())


def test_forward(leaves):
    peak = peak_memory(lambda: mi.interaction(*leaves))
    output = SHAPE.rows * SHAPE.out * 4
    assert output <= peak <= limit(output, leaves, torch.get_num_threads())


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4, 5), (0,), (1,), (2,)], ids=str)
def test_backward(chosen, leaves):
    wanted = [leaves[i] for i in chosen]
    y = mi.interaction(*leaves)
    grad = Sample(SHAPE).cotangent(torch.float32)
    peak = peak_memory(lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True))
    assert _bytes(*wanted) <= peak <= limit(_bytes(*wanted), leaves, torch.get_num_threads())


def test_double_backward(leaves):
    grad = Sample(SHAPE).cotangent(torch.float32).requires_grad_()
    first = torch.autograd.grad(mi.interaction(*leaves), leaves, grad, create_graph=True)
    directions = [torch.ones_like(g) for g in first]
    inputs = (grad, *leaves[:5])  # the first derivatives do not depend on the bias
    peak = peak_memory(lambda: torch.autograd.grad(first, inputs, directions, retain_graph=True))
    # Each result is the sum of two or three terms of its own size, which are held until they are added.
    assert peak <= limit(3 * _bytes(*inputs), inputs, torch.get_num_threads())


def test_shared_context_is_not_copied_out(place):
    """z broadcast over many inputs may cost B*Z, as an argument of the kernel, but never B*Z*X."""
    if place.device != "cpu":
        pytest.skip("peak_memory measures the CPU's allocator")
    shape = Shape("shared", (32, 256), 64, 64, 64, context_batch=(32, 1))
    arguments = Sample(shape).arguments(torch.float32)
    peak = peak_memory(lambda: mi.interaction(*arguments))
    rows = shape.rows * (shape.context + shape.out) * 4
    assert peak <= limit(rows, arguments, torch.get_num_threads())


# Each shape in one dtype, the next in the other: seconds each. In float32 the largest would take many.
BENCHMARKED = [
    pytest.param(dtype, entry.shape, id=f"{dtype}-{entry.shape.name}")
    for entry, dtype in zip(FULL, cycle((torch.float32, torch.bfloat16)), strict=False)
    if (dtype, entry.shape.name) != (torch.float32, "large-512")
]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "shape"), BENCHMARKED)
def test_every_benchmarked_shape(shape, dtype):
    """Of the default backend, in all three passes."""
    sample = Sample(shape)
    leaves = sample.arguments(dtype, requires_grad=True)
    grad = sample.cotangent(dtype).requires_grad_()
    inputs = (grad, *leaves[:5])
    threads = torch.get_num_threads()
    y = mi.interaction(*leaves)
    assert peak_memory(lambda: mi.interaction(*leaves)) <= limit(_bytes(y), leaves, threads)
    peak = peak_memory(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True))
    assert peak <= limit(_bytes(*leaves), inputs, threads)
    first = torch.autograd.grad(y, leaves, grad, create_graph=True)
    directions = [t.detach() for t in leaves]
    peak = peak_memory(lambda: torch.autograd.grad(first, inputs, directions))
    assert peak <= limit(3 * _bytes(*inputs), inputs, threads)


def test_a_weight_shared_by_groups_is_not_copied_for_each():
    """A NaN makes the kernels repeat the call in double: of W as it is, not of one for each group."""
    weight = torch.randn(64, 64, 64)
    x, z, bias = torch.randn(24, 4, 64), torch.randn(24, 4, 64), torch.randn(24, 64)
    x[0, 0, 0] = float("nan")
    run = torch.vmap(lambda x, z, bias: mi.interaction(x, z, weight, None, None, bias))
    assert peak_memory(lambda: run(x, z, bias)) <= 4 * _bytes(weight)
