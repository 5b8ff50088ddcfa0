"""Rows that share a context: every plan's values and derivatives, its memory, and the choice between them."""

from functools import partial

import pytest
import torch
from helpers import Spy
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.functional.interaction import interaction_by
from mi_kernels.ops.interaction import cost_model, reference
from mi_kernels.ops.interaction.cost_model import FUSED, PER_X, PER_Z, Sizes, Wanted
from mi_kernels.ops.interaction.shared import layout_of
from mi_kernels.testing.checks import check_gradients, check_values
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import LAYOUTS, Sample, Shape
from mi_kernels.testing.shared_samples import SHARED, shared_samples

PLANS = (FUSED, PER_Z, PER_X)
GENERATED = (PER_Z, PER_X)
ALL = (True,) * 6
TINY = Shape("tiny", (2, 3, 1), 2, 3, 2, context_batch=(2, 1, 2))
# Large enough for the planner to share, in float32 and bfloat16, with gradients and without.
LARGE = (
    (Shape("one-for-all", (512,), 16, 64, 64, context_batch=()), PER_Z),
    (Shape("tokens", (8, 256), 16, 64, 64, context_batch=(8, 1)), PER_Z),
    (Shape("one-input", (), 64, 16, 64, context_batch=(512,)), PER_X),
    (Shape("candidates", (16, 1), 64, 64, 64, context_batch=(16, 256)), PER_X),
    (Shape("every-row", (64, 8), 16, 64, 64), FUSED),
    (Shape("tiny", (2, 3), 2, 3, 4, context_batch=(2, 1)), FUSED),
    (Shape("two-rows", (512, 2), 2, 64, 64, context_batch=(512, 1)), FUSED),
)


def cases():
    """Each plan where it shares something."""
    for sample in shared_samples():
        shape = sample.shape
        sizes = layout_of(shape.batch, shape.z_batch, shape.lead).sizes(shape.context, shape.width, shape.out)
        there = {PER_Z: sizes.of_x > 1, PER_X: sizes.of_z > 1}
        yield from (pytest.param(plan, sample, id=f"{plan}-{sample}") for plan in GENERATED if there[plan])


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str, scope="module"
)
@pytest.mark.parametrize(("plan", "sample"), list(cases()), scope="module")
def test_error_rule(plan, sample, dtype, place):
    planned = partial(interaction_by, plan)
    y = planned(*sample.arguments(dtype, place.device))
    assert y.dtype == dtype and y.shape == (*sample.shape.lead, sample.shape.out) and y.is_contiguous()
    check_values(sample, dtype, place.device, planned)
    check_gradients(sample, dtype, place.device, planned)


@pytest.mark.parametrize("plan", GENERATED)
def test_gradcheck(plan, place):
    inputs = Sample(TINY).arguments(torch.float64, place.device, requires_grad=True)
    assert gradcheck(
        lambda *a: interaction_by(plan, *a),
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )
    assert gradgradcheck(
        lambda *a: interaction_by(plan, *a), inputs, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("mapped", ["x", "z", "weights", "all"])
@pytest.mark.parametrize("plan", GENERATED)
def test_vmap_and_per_sample_gradients(plan, mapped, place):
    tensors = list(Sample(TINY).arguments(torch.float64, place.device))
    chosen = {"x": [0], "z": [1], "weights": range(2, 6), "all": range(6)}[mapped]
    in_dims = [None] * 6
    for index in chosen:
        in_dims[index] = index % 2
        tensors[index] = torch.stack([tensors[index], 2 * tensors[index], -tensors[index]], index % 2)

    def loss(function):
        return lambda *a: function(*a).pow(2).sum()

    every = tuple(range(6))
    for transform in (
        lambda f: f,
        lambda f: torch.func.grad(f, every),
        lambda f: torch.func.jacfwd(torch.func.grad(f, 1), 0),
        lambda f: torch.func.jacfwd(torch.func.jacfwd(f, 1), 2),
    ):
        found = torch.func.vmap(transform(loss(lambda *a: interaction_by(plan, *a))), tuple(in_dims))(
            *tensors
        )
        expected = torch.func.vmap(transform(loss(reference.interaction)), tuple(in_dims))(*tensors)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("plan", GENERATED)
def test_layout_changes_no_bit(plan, layout, place):
    arguments = Sample(SHARED[6], layout=layout).arguments(torch.float32, place.device)
    copies = [t.clone(memory_format=torch.contiguous_format) for t in arguments]
    copies[2] = arguments[2].clone()  # without gaps, in its order of axes: that is the order of W'
    tolerance = 0 if place.backend == "cpu" else 1e-5
    found, expected = interaction_by(plan, *arguments), interaction_by(plan, *copies)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHARED[:4], ids=lambda s: s.name)
@pytest.mark.parametrize("plan", GENERATED)
def test_threads_change_no_bit(plan, shape, place):
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads if place.backend == "cpu" else 1)
        leaves = Sample(shape).arguments(torch.float32, place.device, requires_grad=True)
        y = interaction_by(plan, *leaves)
        grad = Sample(shape).cotangent(torch.float32, place.device)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("shape", "plan"), LARGE, ids=lambda value: getattr(value, "name", value))
def test_choice(shape, plan, gradients, dtype, place):
    arguments = Sample(shape).arguments(dtype, place.device, requires_grad=gradients)
    explained = mi.explain("interaction", *arguments)
    algorithms = {explained.algorithm, *(step.algorithm for step in explained.backward)}
    assert algorithms == {plan} if plan != FUSED else not algorithms & {*GENERATED}
    assert [step.op for step in explained.backward] == ["input_grads", "weight_grads"] * gradients
    if shape.batch != shape.z_batch:
        names = [cost.plan for cost in explained.alternatives]
        assert names[0] == FUSED and plan in names
        assert all(f"plan {cost}" in str(explained) for cost in explained.alternatives)
    with Spy() as spy, torch.set_grad_enabled(gradients):
        found = mi.interaction(*arguments)
    assert len(spy.names) == (1 if plan == FUSED else 3)  # W', b' and y
    assert torch.equal(found, interaction_by(plan, *arguments))


def test_one_context_takes_the_work_of_a_linear_layer(place):
    """W' once, for 512 rows: no operation sees z and more than one row."""
    x, z, *weights = Sample(LARGE[0][0]).arguments(torch.float32, place.device)
    with Spy() as spy:
        mi.interaction(x, z, *weights)
    shapes = [tuple(arguments[0].shape) for _, arguments in spy.calls]
    assert shapes == [(64, 1, 16), (1, 16), (512, 64)]


def test_dw_is_made_of_sums_over_the_rows(place):
    """Backward: dW' from all rows, then dW, in its memory order, from contexts alone."""
    x, z, weight, *_ = Sample(LARGE[1][0]).arguments(torch.float32, place.device, requires_grad=True)
    y = mi.interaction(x, z, weight)
    with Spy() as spy:
        y.sum().backward()
    grads = [tuple(a[0].shape) for name, a in spy.calls if name == "interaction_weight_grads"]
    assert grads == [(8, 256, 64), (64, 8, 16)]  # g [C, T, O], then z [O, C, Z]


@pytest.mark.parametrize(("shape", "plan"), LARGE[:4], ids=lambda value: getattr(value, "name", value))
def test_memory(shape, plan, place):
    """Nothing of B*Z, and of generated weights no more than one for each context."""
    if place.device != "cpu":
        pytest.skip("peak_memory measures the CPU's allocator")
    torch.utils.deterministic.fill_uninitialized_memory = False
    arguments = Sample(shape).arguments(torch.float32, requires_grad=True)
    contexts = shape.rows // max(*shape.batch[-1:], *shape.z_batch[-1:], 1)
    held = 4 * contexts * shape.out * max(shape.width, shape.context)
    y = mi.interaction(*arguments)
    grad = torch.ones_like(y)
    own = sum(t.nbytes for t in (y, *arguments))
    # What a worker of the engine packs is below 1 MiB. PyTorch's product is added to a result of zeros.
    results = y.nbytes * (1 if place.backend == "cpu" else 2)
    assert peak_memory(lambda: mi.interaction(*arguments)) <= results + 2 * held + (1 << 20)
    peak = peak_memory(lambda: torch.autograd.grad(y, arguments, grad, retain_graph=True))
    assert peak <= own + 4 * held + (2 << 20)


@pytest.mark.parametrize("sample", [Sample(LARGE[1][0]), Sample(SHARED[5])], ids=str)
def test_explain_tells_the_scratch_memory(sample):
    x, z, *weights = sample.arguments(torch.float32)
    if backends.choose(x) != "cpu":
        pytest.skip("no compiled kernels")
    y = mi.interaction(x, z, *weights)
    peak = peak_memory(lambda: mi.interaction(x, z, *weights))
    assert peak == mi.explain(mi.interaction, x, z, *weights).scratch + y.nbytes


@pytest.mark.parametrize("shape", [(0, 1), (3, 0), (1, 0)])
def test_empty(shape, place):
    x = torch.ones(*shape, 4, device=place.device, requires_grad=True)
    z = torch.ones(shape[0], 1, 3, device=place.device, requires_grad=True)
    weight = torch.ones(5, 3, 4, device=place.device, requires_grad=True)
    for plan in PLANS:
        y = interaction_by(plan, x, z, weight)
        assert y.shape == (*shape, 5)
        grads = torch.autograd.grad(y.sum(), (x, z, weight))
        assert all(g.eq(0).all() for g in grads)


def test_bound_on_generated_weights():
    """W' is held where it is no larger than W, or than B*Z*X, B*O*X and B*O*Z; else it is no choice."""
    arguments = (Wanted(), torch.float32, "cpu", "cpu")
    for sizes in (Sizes(1, 1, 2, 1, 1000, 1000), Sizes(64, 1, 32, 32, 64, 64), Sizes(512, 1, 2, 600, 64, 64)):
        assert cost_model.shared(PER_Z, sizes, *arguments) is not None
    for sizes in (Sizes(64, 1, 2, 1, 1000, 1000), Sizes(64, 1, 2, 2, 64, 64), Sizes(64, 1, 1, 32, 64, 64)):
        assert cost_model.shared(PER_Z, sizes, *arguments) is None
    assert cost_model.shared(PER_X, Sizes(64, 32, 1, 64, 32, 64), *arguments) is not None
    # As many elements as B*O*Z (X = T Z), and in the gradient of z as many as B*Z*X (O = T X).
    for wanted in (Wanted(), Wanted(True, True, True, True, True)):
        assert cost_model.shared(PER_Z, Sizes(32, 1, 64, 4, 256, 256), wanted, *arguments[1:]) is not None
        assert cost_model.shared(PER_Z, Sizes(32, 1, 63, 4, 256, 256), wanted, *arguments[1:]) is None
    # Without the gradient of z all of these fit; with it, the last two would be larger than B*Z*X or B*O*X.
    for sizes, fits in (
        (Sizes(32, 1, 16, 8, 8, 128), True),
        (Sizes(32, 1, 16, 9, 8, 129), False),
        (Sizes(1000, 1, 2, 512, 64, 100), False),
    ):
        assert cost_model.shared(PER_Z, sizes, *arguments) is not None
        assert (cost_model.shared(PER_Z, sizes, Wanted(z=True), *arguments[1:]) is not None) == fits


def test_more_rows_never_lead_back_to_the_fused_plan():
    for size in (16, 64, 256):
        found = []
        for rows in (2, 8, 32, 128, 512, 2048):
            sizes = Sizes(16, 1, rows, 32, size, size)
            found.append(
                cost_model.cheapest(cost_model.all_costs(sizes, Wanted(), torch.float32, "cpu", "cpu")).plan
            )
        assert found[-1] == PER_Z and found == sorted(found)


def test_compiled_with_dynamic_sizes(place):
    """One graph for each plan; sizes on either side of the crossover give the right one."""
    torch._dynamo.reset()

    def function(x, z, *weights):
        return mi.interaction(torch.sin(x), z, *weights).view(-1, 64) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for groups, rows in ((4, 256), (5, 300), (3, 2), (6, 2)):
        sample = Sample(Shape("call", (groups, rows), 16, 64, 64, context_batch=(groups, 1)))
        arguments = sample.arguments(torch.float32, place.device, requires_grad=True)
        found, expected = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        grads = (torch.autograd.grad(y.pow(2).sum(), arguments) for y in (found, expected))
        torch.testing.assert_close(next(grads), next(grads), rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [2, 300])
def test_exported_with_dynamic_sizes(rows, place):
    """The planner puts no bounds on the sizes of an exported graph, whichever plan the example has."""

    class Model(torch.nn.Module):
        def forward(self, x, z, weight):
            return mi.interaction(x, z, weight)

    groups, tokens = (torch.export.Dim(name, min=2) for name in ("groups", "tokens"))
    options = {"dtype": torch.float64, "device": place.device}
    weight = torch.randn(16, 8, 16, **options)

    def arguments(groups, rows):
        sizes = ((groups, rows, 16), (groups, 1, 8))
        return *(torch.randn(*size, **options) for size in sizes), weight

    shapes = ({0: groups, 1: tokens}, {0: groups}, {})
    program = torch.export.export(Model(), arguments(4, rows), dynamic_shapes=shapes, strict=False)
    for sizes in ((2, 2), (3, 800), (40, 3)):
        inputs = arguments(*sizes)
        torch.testing.assert_close(program.module()(*inputs), reference.interaction(*inputs))
