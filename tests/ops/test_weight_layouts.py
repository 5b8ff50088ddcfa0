"""W with its axes in any order in memory: values, derivatives in the same order, what explain says of it."""

from functools import partial

import pytest
import torch
from helpers import COMPILE, Spy, with_gradients
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.functional.interaction import interaction_by
from mi_kernels.ops.interaction import autograd, memory_order, reference
from mi_kernels.ops.interaction.cost_model import FUSED, PER_X, PER_Z
from mi_kernels.testing.checks import check_gradients, check_second_order, check_values
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import (
    GATE_MIDDLE,
    GATE_ODD,
    MIDDLE,
    ORDERS,
    GateSample,
    Sample,
    Shape,
    ordered_samples,
    stored,
)
from mi_kernels.testing.shared_samples import SHARED

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TINY = Shape("tiny", (3,), 2, 3, 2)
TINY_SHARED = Shape("tiny-shared", (2, 3, 1), 2, 3, 2, context_batch=(2, 1, 2))
ALL = tuple(range(6))


def axes(order):
    """The order as a permutation of a contiguous W, and back."""
    return ["OZX".index(axis) for axis in order], [order.index(axis) for axis in "OZX"]


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("sample", list(ordered_samples()), ids=str, scope="module")
def test_error_rule(sample, dtype, place):
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("order", ORDERS[1:], scope="module")
@pytest.mark.parametrize(
    ("plan", "shape"),
    [(PER_Z, SHARED[2]), (PER_X, SHARED[4]), (PER_Z, SHARED[6])],
    ids=lambda value: getattr(value, "name", value),
    scope="module",
)
def test_error_rule_of_shared_contexts(plan, shape, order, dtype, place):
    sample, planned = Sample(shape, order=order), partial(interaction_by, plan)
    check_values(sample, dtype, place.device, planned)
    check_gradients(sample, dtype, place.device, planned)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("shape", (GATE_ODD, GATE_MIDDLE), ids=lambda s: s.name)
def test_error_rule_of_gates(shape, order, dtype, place):
    sample = GateSample("gated_interaction", shape, "WUVc", order=order)
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("order", ORDERS)
def test_second_order(order, place):
    check_second_order(Sample(MIDDLE, order=order), torch.float32, place.device)
    gate = GateSample("gated_interaction", GATE_MIDDLE, "WUVc", order=order)
    check_second_order(gate, torch.float32, place.device)


# The rules know of two things: the exchange of x and z, and the order of dW.
@pytest.mark.parametrize(
    "plan, order",
    [*((FUSED, order) for order in ("OXZ", "ZXO", "XZO")), (PER_Z, "ZOX"), (PER_Z, "XZO"), (PER_X, "ZXO")],
)
def test_gradcheck(plan, order, place):
    shape = TINY if plan == FUSED else TINY_SHARED
    inputs = Sample(shape, order=order).arguments(torch.float64, place.device, requires_grad=True)
    how = {"check_batched_grad": True, "check_forward_ad": True, "check_undefined_grad": True}
    assert gradcheck(lambda *a: interaction_by(plan, *a), inputs, **how)
    assert gradgradcheck(lambda *a: interaction_by(plan, *a), inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 3])
def test_gradcheck_of_groups(groups, order, place):
    """The primitives themselves, whose W is [G, O, Z, X]."""
    size = (groups,) * (groups > 1)
    make = partial(torch.randn, dtype=torch.float64, device=place.device)
    weight = torch.stack([stored(make(2, 3, 4), order) for _ in range(groups)])
    weight = (weight if groups > 1 else weight[0]).requires_grad_()
    x, z = make(*size, 5, 4, requires_grad=True), make(*size, 5, 3, requires_grad=True)
    assert gradgradcheck(
        lambda x, z, w: autograd.forward(place.backend, x, z, w, None, None, None), (x, z, weight)
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("plan", (FUSED, PER_Z, PER_X))
@pytest.mark.parametrize("terms", ["W", "WUVc"])
def test_gradient_of_a_buffer_needs_no_copy(terms, plan, order, place):
    """It has the strides of the buffer: what the backward pass computed is what becomes ``grad``."""
    present = tuple(letter in terms for letter in "WUVc")
    shape = Shape("shared", (4, 6), 5, 7, 3, context_batch=(4, 1) if plan == PER_Z else ())
    shape = Shape("shared", (4, 1), 5, 7, 3, context_batch=(4, 6)) if plan == PER_X else shape
    x, z, weight, *others = Sample(shape, present).arguments(torch.float32, place.device)
    there, back = axes(order)
    buffer = weight.permute(there).contiguous().requires_grad_()
    found = []
    buffer.register_hook(lambda grad: found.append((grad.data_ptr(), grad.stride())))
    interaction_by(plan, x, z, buffer.permute(back), *others).sum().backward()
    assert found == [(buffer.grad.data_ptr(), buffer.stride())]


@pytest.mark.parametrize("order", ORDERS)
def test_gradient_of_a_leaf_has_its_strides(order, place):
    for sample in (Sample(TINY, order=order), GateSample("gated_interaction", GATE_ODD, "WUVc", order=order)):
        x, z, weight, *others = sample.arguments(torch.float32, place.device, requires_grad=True)
        function = mi.interaction if isinstance(sample, Sample) else mi.gated_interaction
        y = function(x, z, weight, *others)
        (first,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        assert first.stride() == weight.stride() == second.stride()


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_see_x_inside_z(order, place):
    """And never a copy of W: that is for the kernel to decide."""
    arguments = Sample(TINY, order=order).arguments(torch.float32, place.device, requires_grad=True)
    with Spy() as spy:
        mi.interaction(*arguments).sum().backward()
    read = [args[2 if name == "interaction" else 3] for name, args in spy.calls if "weight" not in name]
    assert len(read) == 2
    for weight in read:
        assert weight.data_ptr() == arguments[2].data_ptr() and weight.stride(-1) < weight.stride(-2)


@pytest.mark.parametrize("order", ORDERS)
def test_transforms(order, place):
    x, z, weight, *others = Sample(TINY, order=order).arguments(torch.float64, place.device)
    tensors = (x, z, weight, *others)
    many = [torch.stack([t, 2 * t]) for t in tensors]
    many[2] = torch.stack([weight.permute(axes(order)[0])] * 2).permute(0, *(1 + a for a in axes(order)[1]))

    def loss(function):
        return lambda *a: function(*a).square().sum()

    for transform in (
        lambda f: torch.func.grad(f, ALL),
        lambda f: torch.func.jacfwd(torch.func.grad(f, 2), 0),
        lambda f: torch.func.vmap(torch.func.grad(f, ALL), (0, 0, None, None, None, None)),
    ):
        found, expected = (transform(loss(f))(*tensors) for f in (mi.interaction, reference.interaction))
        torch.testing.assert_close(found, expected)
    found, expected = (
        torch.func.vmap(torch.func.grad(loss(f), ALL))(*many) for f in (mi.interaction, reference.interaction)
    )
    torch.testing.assert_close(found, expected)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    found, expected = (torch.func.jvp(f, tensors, tangents) for f in (mi.interaction, reference.interaction))
    torch.testing.assert_close(found, expected)


@pytest.mark.compile
@pytest.mark.parametrize("plan, order", [(FUSED, "OXZ"), (PER_Z, "ZXO")])
def test_compile_and_export(plan, order, place, fresh_compiler):
    shape = Shape("rows", (6, 5), 3, 4, 2, context_batch=(6, 5) if plan == FUSED else (6, 1))
    arguments = Sample(shape, order=order).arguments(torch.float32, place.device)
    compiled = torch.compile(partial(interaction_by, plan), **COMPILE)
    for found, true in zip(
        with_gradients(compiled, arguments),
        with_gradients(partial(interaction_by, plan), arguments),
        strict=True,
    ):
        torch.testing.assert_close(found, true)
        assert found.stride() == true.stride()

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return mi.interaction(*tensors)

    axis = torch.export.Dim.DYNAMIC
    dynamic = [{0: axis}, {0: axis}, {1: axis, 2: axis}, {1: axis}, {1: axis}, {}]
    dynamic[0][2] = dynamic[1][2] = axis
    program = torch.export.export(Model(), arguments, dynamic_shapes={"tensors": tuple(dynamic)})
    larger = Sample(
        Shape("rows", (8, 5), 6, 5, 2, shape.z_batch[1:] and (8, *shape.z_batch[1:])), order=order
    )
    tensors = larger.arguments(torch.float32, place.device)
    for called in (program, program.run_decompositions()):
        torch.testing.assert_close(called.module()(*tensors), mi.interaction(*tensors))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("terms", ["WUVc", "W", "WV"])
def test_generate_reads_w_in_place(terms, order, place):
    """One product for all z between, in the same bits as of a contiguous W."""
    shape = Shape("layers", (40,), 24, 65, 33)
    x, z, weight, *others = Sample(shape, tuple(letter in terms for letter in "WUVc")).arguments(
        torch.float32, place.device
    )
    expected, _ = mi.generate(z, weight, *others)
    weight = stored(weight, order)
    with Spy() as spy:
        found, _ = mi.generate(z, weight, *others)
    name, (_, _, _, _, matrix, _) = spy.calls[0]
    assert name == "interaction" and matrix.data_ptr() == weight.data_ptr()
    assert matrix.dim() == (3 if order[1] == "Z" else 2)
    outer, inner = order.replace("Z", "")
    assert found.stride("OX".index(inner) + 1) == 1 and found.stride("OX".index(outer) + 1) != 1
    if place.backend == "cpu":
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)
    with Spy() as spy:
        mi.apply_generated(x, found)
    assert spy.calls[0][1][4].data_ptr() == found.data_ptr()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", (SHARED[2], SHARED[6]), ids=lambda s: s.name)
def test_shared_contexts_copy_neither_w_nor_what_it_generates(shape, order, place):
    x, z, weight, *others = Sample(shape, order=order).arguments(torch.float32, place.device)
    with Spy() as spy:
        interaction_by(PER_Z, x, z, weight, *others)
    read, applied = spy.calls[0][1][4], spy.calls[-1][1][4]
    assert read.data_ptr() == weight.data_ptr()
    assert applied._is_view()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", (SHARED[2], SHARED[5], SHARED[6]), ids=lambda s: s.name)
def test_explain_tells_the_scratch_memory(shape, order):
    x, z, *weights = Sample(shape, order=order).arguments(torch.float32)
    if backends.choose(x) != "cpu":
        pytest.skip("no compiled kernels")
    y = mi.interaction(x, z, *weights)
    explained = mi.explain(mi.interaction, x, z, *weights)
    if explained.algorithm in (PER_Z, PER_X):
        assert peak_memory(lambda: mi.interaction(x, z, *weights)) == explained.scratch + y.nbytes
    made = mi.explain("generate", z, *weights)
    results = sum(t.nbytes for t in mi.generate(z, *weights))
    assert peak_memory(lambda: mi.generate(z, *weights)) == made.scratch + results


def test_explain_tells_how_w_is_read():
    x, z, weight = torch.ones(6, 4), torch.ones(6, 3), torch.ones(5, 3, 4)
    exchanged = "x and z are exchanged, since z is inside x in the memory of W"
    reading = {
        "OZX": "as O groups of a matrix [X, Z]",
        "OXZ": "as a matrix [O*X, Z]",
        "ZOX": "as a matrix [O*X, Z]",
        "ZXO": "as a matrix [X*O, Z]",
        "XOZ": "as a matrix [X*O, Z]",
        "XZO": "as X groups of a matrix [O, Z]",
    }
    for order, text in reading.items():
        w = stored(weight, order)
        assert (exchanged in mi.explain("interaction", x, z, w).why) == (order.index("Z") > order.index("X"))
        assert f"W is read in place, {text}" in mi.explain("generate", z, w).why


@pytest.mark.parametrize("order", ORDERS)
def test_order(order):
    there, back = axes(order)
    for lead in ((), (7,)):
        weight = torch.empty(*lead, *(range(2, 5))).permute(
            *range(len(lead)), *(len(lead) + a for a in there)
        )
        weight = weight.contiguous().permute(*range(len(lead)), *(len(lead) + a for a in back))
        assert memory_order.order(weight) == tuple(there)
        assert memory_order.is_n_major(weight) == (order.index("Z") > order.index("X"))


def test_order_of_axes_of_size_1_or_stride_0():
    for sizes in ((1, 3, 4), (3, 1, 4), (3, 4, 1)):
        assert memory_order.order(torch.empty(sizes)) == (0, 1, 2)
        strides = torch.empty(sizes[::-1]).permute(2, 1, 0).stride()
        assert memory_order.order(torch.empty_strided(sizes, strides)) != (0, 1, 2)
    assert memory_order.order(torch.empty(1, 3, 1).transpose(0, 2)) == (0, 1, 2)
    assert memory_order.order(torch.empty(1, 3, 4).expand(5, 3, 4)) == (0, 1, 2)
    assert memory_order.order(torch.empty(4, 1, 5).expand(4, 3, 5).permute(2, 1, 0)) == (0, 1, 2)
    assert memory_order.order(None) == (0, 1, 2)


def test_triton_reads_w_in_whole_vectors():
    """Along x or the outputs, in each of the orders that reach a kernel."""
    pytest.importorskip("triton")
    from mi_kernels.ops.triton.host import vectorizable

    for order in ORDERS:
        weight = stored(torch.ones(32, 16, 48), order)
        assert vectorizable(weight, -3) == (not memory_order.is_n_major(weight) or order[2] == "O")
