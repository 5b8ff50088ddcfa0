"""Weights of each sample, and weights that samples choose by index."""

import itertools
from functools import partial

import pytest
import torch
from published_weights import WEIGHTS
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels.functional.interaction import interaction_by
from mi_kernels.ops.interaction import batched, reference
from mi_kernels.ops.interaction.cost_model import FUSED, PER_X, PER_Z
from mi_kernels.testing import checks
from mi_kernels.testing.batched_samples import BY_INDEX, PER_SAMPLE, Batched
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import LAYOUTS, WEIGHT_ONLY, Sample, term_subsets

SHAPES = (*PER_SAMPLE, *BY_INDEX)
# 16 bits differ in the kernels alone, not in the handling of dimensions.
CASES = [
    *((shape, dtype) for shape in SHAPES for dtype in (torch.float64, torch.float32)),
    *((shape, torch.bfloat16) for shape in (PER_SAMPLE[2], PER_SAMPLE[12], BY_INDEX[3], BY_INDEX[9])),
    *((shape, torch.float16) for shape in (PER_SAMPLE[1], PER_SAMPLE[9], BY_INDEX[0], BY_INDEX[6])),
]
TINY = (
    Batched("tokens", (2, 3), 2, 3, 2, (2, 1), leads=((2, 1), (2, 1), (1,), (2, 1))),
    Batched("rows", (5,), 2, 3, 2, leads=((3,), (3,), (3,), (3,)), ids=(5,)),
    Batched("partly", (2, 3), 2, 3, 2, (2, 1), leads=((3,), (), (3,), ()), ids=(2, 1)),
)


def name_of(shape):
    return f"{'index-' if shape.ids is not None else ''}{shape.name}"


def form_of(sample, device, plan=None):
    """The interaction of a sample, by a plan or by the chosen one, and its oracle."""
    ids = sample.shape.weight_ids(device)

    def ours(*tensors):
        if plan is not None:
            return interaction_by(plan, *tensors, weight_ids=ids)
        return mi.interaction(*tensors, weight_ids=ids)

    def oracle(x, z, *weights):
        return reference.interaction(x, z, *(weights if ids is None else batched.gathered(weights, ids)))

    return checks.Form(ours, oracle)


def check(sample, dtype, device, plan=None):
    form = form_of(sample, device, plan)
    draw = partial(sample.arguments, dtype, device)
    name = "batched", sample, dtype, device
    y = form.function(*draw(0))
    assert y.shape == (*sample.shape.lead, sample.shape.out) and y.is_contiguous()
    assert checks.check_form_values(form, draw, ("values", *name)) <= 1
    if y.requires_grad or y.numel() > 0:
        with_grad = lambda seed: (sample.cotangent(dtype, device, seed + 1000), *draw(seed))  # noqa: E731
        assert checks.check_form_gradients(form, with_grad, oracle=("gradients", *name)) <= 1


@pytest.mark.parametrize("shape, dtype", CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_values_and_gradients(shape, dtype, place):
    check(Sample(shape), dtype, place.device)


@pytest.mark.parametrize("plan", [FUSED, PER_Z, PER_X])
@pytest.mark.parametrize(
    "shape", [PER_SAMPLE[i] for i in (1, 3, 4, 6)] + [BY_INDEX[i] for i in (2, 3, 4)], ids=name_of
)
def test_every_plan(shape, plan, place):
    check(Sample(shape), torch.float64, place.device, plan)
    check(Sample(shape, WEIGHT_ONLY), torch.float32, place.device, plan)


@pytest.mark.parametrize("terms", term_subsets(), ids=str)
def test_terms(terms, place):
    check(Sample(PER_SAMPLE[1], terms), torch.float64, place.device)
    check(Sample(BY_INDEX[0], terms), torch.float64, place.device)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout, place):
    for shape in (PER_SAMPLE[0], PER_SAMPLE[2], BY_INDEX[0], BY_INDEX[2]):
        check(Sample(shape, layout=layout), torch.float64, place.device)


@pytest.mark.parametrize("shape", TINY, ids=name_of)
@pytest.mark.parametrize("plan", [FUSED, PER_Z])
def test_gradcheck(shape, plan, place):
    inputs = Sample(shape).arguments(torch.float64, place.device, requires_grad=True)
    function = form_of(Sample(shape), place.device, plan).function
    assert gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True, check_undefined_grad=False
    )
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("shape", TINY, ids=name_of)
@pytest.mark.parametrize("index", range(6))
def test_vmap(shape, index, place):
    """The function, and a gradient of it, mapped over one argument."""
    inputs = Sample(shape).arguments(torch.float64, place.device)
    function = form_of(Sample(shape), place.device).function
    stack = torch.stack([inputs[index], -2 * inputs[index]])
    dims = tuple(0 if number == index else None for number in range(6))
    before, after = inputs[:index], inputs[index + 1 :]
    for wanted in (0, 1, 2):
        gradient = torch.func.grad(lambda *a: function(*a).pow(2).sum(), wanted)
        for transform in (function, gradient):
            found = torch.func.vmap(transform, dims)(*before, stack, *after)
            expected = torch.stack([transform(*before, one, *after) for one in stack])
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_vmap_over_the_indices(place):
    x, z, *weights = Sample(BY_INDEX[0]).arguments(torch.float64, place.device)
    ids = BY_INDEX[0].weight_ids(place.device)
    stack = torch.stack([ids, ids.flip(0)])
    found = torch.func.vmap(lambda i: mi.interaction(x, z, *weights, weight_ids=i))(stack)
    expected = [mi.interaction(x, z, *weights, weight_ids=i) for i in stack]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.compile
@pytest.mark.parametrize("shape", TINY, ids=name_of)
def test_compiled(shape, place, fresh_compiler):
    inputs = Sample(shape).arguments(torch.float64, place.device, requires_grad=True)
    function = form_of(Sample(shape), place.device).function
    compiled = torch.compile(function, fullgraph=True)
    found, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    grads = [torch.autograd.grad(y, inputs, grad) for y in (found, expected)]
    torch.testing.assert_close(*grads)


def test_with_segments(place):
    """Contexts of groups, and weights of each row besides."""
    x, z, *weights = Sample(BY_INDEX[0]).arguments(torch.float64, place.device)
    ids, segments = BY_INDEX[0].weight_ids(place.device), torch.arange(40, device=place.device) % 7
    z = z[:7]
    found = mi.interaction(x, z, *weights, segment_ids=segments, weight_ids=ids)
    expected = reference.interaction(x, z[segments], *(w[ids] for w in weights))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = mi.interaction(x, z, *(w[ids] for w in weights), segment_ids=segments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_scalar_and_single_biases(place):
    x, z, weight, *_ = Sample(PER_SAMPLE[0]).arguments(torch.float64, place.device)
    for bias in (torch.tensor(2.0), torch.randn(1, 4), torch.randn(4), torch.randn(7, 4)):
        bias = bias.to(x)
        torch.testing.assert_close(
            mi.interaction(x, z, weight, bias=bias), mi.interaction(x, z, weight) + bias
        )


def test_no_weight_is_copied(place):
    if place.device != "cpu" or place.backend != "cpu":
        pytest.skip("the CPU kernels are those that copy nothing")
    x, z, weight = torch.randn(600, 32), torch.randn(600, 24), torch.randn(40, 16, 24, 32)
    ids = torch.arange(600) % 40
    assert peak_memory(lambda: mi.interaction(x, z, weight, weight_ids=ids)) < weight.nbytes / 2
    rows = x[:40], z[:40]
    assert peak_memory(lambda: mi.interaction(*rows, weight)) < weight.nbytes / 2


def test_shared_contexts_copy_no_weight(place):
    """W' of a few contexts, in every memory order of W."""
    if place.backend != "cpu":
        pytest.skip("the CPU kernels are those that copy nothing")
    x, z, ids = torch.randn(16, 256, 64), torch.randn(16, 1, 64), (torch.arange(16) % 7).unsqueeze(1)
    for order in itertools.permutations(range(3)):
        back = [order.index(axis) + 1 for axis in range(3)]
        weight = torch.randn(16, *(torch.Size((32, 64, 64))[axis] for axis in order)).permute(0, *back)
        calls = (
            lambda w=weight: interaction_by(PER_Z, x, z, w, weight_ids=ids),
            lambda w=weight: interaction_by(PER_Z, x, z, w.unsqueeze(1)),
        )
        for call in calls:
            assert peak_memory(call) < weight.nbytes / 2


@pytest.mark.parametrize("lead", [(1,), (1, 1), (1, 1, 1)], ids=str)
def test_leading_dimensions_of_size_1_stay(lead, place):
    x, z, *weights = Sample(PER_SAMPLE[0]).arguments(torch.float64, place.device)
    weights = [w[0].expand(*lead, *w.shape[1:]) for w in weights]
    for rows in ((x, z), (x[0], z[0])):
        common = [weights[0][(0,) * len(lead)], None, None, weights[3]]
        # A bias [1, O] beside weights of all samples is one [O].
        for given in (weights, [None, *weights[1:]], *([common] if len(lead) > 1 else [])):
            found, expected = mi.interaction(*rows, *given), reference.interaction(*rows, *given)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_group_with_a_bias_of_its_own():
    x, z, weight, bias = torch.randn(4, 5), torch.randn(4, 3), torch.randn(2, 3, 5), torch.randn(1, 2)
    found = mi.interaction(x, z, weight, None, None, bias, weight_ids=torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(found, mi.interaction(x, z, weight, None, None, bias))


def test_a_lone_bias_is_contiguous():
    x, z, bias = torch.randn(4, 5), torch.randn(4, 3), torch.randn(2, 1).expand(2, 4).t()
    assert mi.interaction(x, z, None, None, None, bias).is_contiguous()


def test_a_row_with_nan_reaches_only_its_result(place):
    x, z, *weights = Sample(BY_INDEX[0]).arguments(torch.float32, place.device)
    ids = BY_INDEX[0].weight_ids(place.device)
    clean = mi.interaction(x, z, *weights, weight_ids=ids)
    x[3] = float("nan")
    found = mi.interaction(x, z, *weights, weight_ids=ids)
    others = torch.arange(40, device=place.device) != 3
    assert found[3].isnan().all() and torch.equal(found[others], clean[others])


MESSAGES = (
    ({"weight": torch.ones(4, 3, 2, 5)}, "weight: expected leading dimensions that broadcast with \\[6\\]"),
    ({"weight": torch.ones(6, 3, 2, 4)}, "weight: expected shape \\[\\.\\.\\., O, Z=2, X=5\\]"),
    ({"weight_z": torch.ones(6, 2, 2)}, "weight_z: expected shape \\[\\.\\.\\., O=3, Z=2\\]"),
    (
        {"weight_ids": torch.tensor([0] * 6)},
        "weight_ids: expected one of weight, weight_z, weight_x, bias to have",
    ),
    (
        {"weight": torch.ones(4, 3, 2, 5), "weight_ids": torch.tensor([0, 4] * 3)},
        "weight_ids: expected numbers from",
    ),
    ({"weight": torch.ones(4, 3, 2, 5), "weight_ids": torch.zeros(5).long()}, "weight_ids: expected leading"),
    (
        {"weight": torch.ones(1, 4, 3, 2, 5), "weight_ids": torch.zeros(6).long()},
        "weight: expected shape \\[G, O",
    ),
    (
        {"weight": torch.ones(4, 3, 2, 5), "bias": torch.ones(5, 3), "weight_ids": torch.zeros(6).long()},
        "bias: expected shape \\[G=4, O=3\\]",
    ),
)


@pytest.mark.parametrize("changed, message", MESSAGES, ids=range(len(MESSAGES)))
def test_messages(changed, message):
    arguments = {"weight": torch.ones(3, 2, 5), "weight_z": torch.ones(3, 2)} | changed
    with pytest.raises(ValueError, match="^interaction: " + message):
        mi.interaction(torch.ones(6, 5), torch.ones(6, 2), **arguments)


def test_indices_of_a_wrong_type():
    x, z, weight = torch.ones(6, 5), torch.ones(6, 2), torch.ones(4, 3, 2, 5)
    with pytest.raises(TypeError, match="weight_ids: expected torch.int64, got torch.int32"):
        mi.interaction(x, z, weight, weight_ids=torch.zeros(6, dtype=torch.int32))
    with pytest.raises(TypeError, match="weight_ids: expected a torch.Tensor, got list"):
        mi.interaction(x, z, weight, weight_ids=[0] * 6)


def test_explain(place):
    for shape, plan, word in (
        (PER_SAMPLE[0], FUSED, "one weight for each sample"),
        (BY_INDEX[0], FUSED, "are one product"),
        (Batched("scores", (1, 4000), 64, 64, 1, (50, 1), leads=((50, 1),) * 4), PER_Z, "generated once"),
        (
            Batched("tails", (1, 4000), 64, 64, 1, (50, 1), leads=((9,),) * 4, ids=(50, 1)),
            PER_Z,
            "generated once",
        ),
    ):
        tensors = Sample(shape).arguments(torch.float32, place.device, requires_grad=True)
        explained = mi.explain(mi.interaction, *tensors, weight_ids=shape.weight_ids(place.device))
        assert explained.algorithm == plan and word in explained.why
        assert [step.op for step in explained.backward] == ["input_grads", "weight_grads"]
        o, i, j = shape.out, shape.context, shape.width
        if plan == FUSED:
            rows = shape.rows
            assert explained.operations == 2 * rows * o * (i * j + i + j) + rows * o


def test_explain_says_what_each_product_is(place):
    x, z, *weights = Sample(PER_SAMPLE[9]).arguments(torch.float32, place.device)  # leads of different kinds
    with mi.backend(place.backend):
        assert mi.explain("interaction", x, z, *weights).why.count("one weight for each sample") == 2
        x, z, weight, *_, bias = Sample(PER_SAMPLE[10]).arguments(torch.float32, place.device)
        why = mi.explain("interaction", x, z, weight, None, None, bias).why
        assert why.startswith("weights of all samples") and "a bias of each sample" in why
        x, z, *weights = Sample(BY_INDEX[0]).arguments(torch.float32, place.device)
        why = mi.explain("interaction", x, z, *weights, weight_ids=BY_INDEX[0].weight_ids(place.device)).why
        assert ("is read in place" in why) == (place.backend == "cpu")
        assert ("are copied" in why) == (place.backend != "cpu")


def test_autocast(place):
    x, z, *weights = Sample(BY_INDEX[0]).arguments(torch.float32, place.device)
    ids = BY_INDEX[0].weight_ids(place.device)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        assert mi.interaction(x, z, *weights, weight_ids=ids).dtype == torch.bfloat16


@pytest.mark.parametrize("name", WEIGHTS)
def test_published_layers(name, place):
    """In float64, with their gradients and the gradients of these."""
    layer = WEIGHTS[name]
    tensors = {key: t.to(place.device) for key, t in layer.draw(0, torch.float64).items()}
    leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
    found = layer.finish(mi.interaction(**layer.arguments(**tensors)), **tensors)
    expected = layer.formula(**tensors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(y.sin().sum(), leaves, create_graph=True) for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)
    second = [torch.autograd.grad(sum(g.pow(2).sum() for g in one), leaves) for one in grads]
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("lead", [(), (5,), (5, 1)])
@pytest.mark.parametrize("name", ["x", "z"])
def test_missing_inputs_are_named(lead, name, place):
    x, z, weight = torch.randn(5, 7), torch.randn(5, 3), torch.randn(*lead, 1, 3, 7)
    x, z = (None if name == "x" else x), (None if name == "z" else z)
    with pytest.raises(TypeError, match=f"^interaction: {name}: expected a torch.Tensor, got NoneType$"):
        mi.interaction(x, z, weight)
