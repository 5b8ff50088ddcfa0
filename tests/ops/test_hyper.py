"""Generated weights: generate, apply_generated; values and derivatives with groups of unequal length."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.functional.interaction import interaction_by
from mi_kernels.ops.interaction import reference
from mi_kernels.ops.interaction.cost_model import FUSED, PER_Z
from mi_kernels.testing.checks import gradients_of, values_of
from mi_kernels.testing.errors import check_errors
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import BROADCAST, EMPTY, LAYOUTS, Sample, Shape
from mi_kernels.testing.shared_samples import MIXED, RAGGED, SHARED, TINY_RAGGED, Ragged

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TINY = Shape("tiny", (2, 3), 2, 3, 4, context_batch=(2, 1))


def layers_of(shape, dtype, device="cpu", layout="contiguous", seed=0, requires_grad=False):
    """x [..., X], W' [..., O, X] and b' [..., O] of a shape: its contexts are what is generated."""
    x = Sample(shape, layout=layout).arguments(dtype, device, seed)[0]
    sizes = (*shape.z_batch, shape.out)
    merged = Shape("layers", (*sizes[:-1], 1), max(shape.width, 1), shape.out, 1)
    bias, weight = Sample(merged, layout=layout).arguments(dtype, device, seed + 500)[:2]
    bias = bias.squeeze(-2)
    weight = torch.randn(*sizes, shape.width, generator=torch.Generator().manual_seed(seed + 900))
    weight = (weight / max(shape.width, 1) ** 0.5).to(dtype).to(device)
    if layout == "transposed":
        weight = weight.mT.contiguous().mT
    return tuple(t.detach().requires_grad_(requires_grad) for t in (x, weight, bias))


def check(function, oracle, draw, cotangent, name=None, **options):
    """``name`` of the oracle and the draws."""
    check_errors(
        values_of(function),
        values_of(oracle),
        draw,
        oracle=name and ("values", name),
    )
    check_errors(
        gradients_of(function),
        gradients_of(oracle),
        lambda seed: (cotangent(seed + 1000), *draw(seed)),
        enough=300,
        oracle=name and ("gradients", name),
        **options,
    )


def normal(shape, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", (*SHARED, *BROADCAST, *EMPTY), ids=lambda s: s.name)
def test_generate(shape, dtype, place):
    """W' and b' one after the other, for every choice of the terms that make them."""
    for part, terms in (
        (0, (1, 0, 1, 0)),
        (0, (1, 0, 0, 0)),
        (0, (0, 0, 1, 0)),
        (1, (1, 1, 0, 1)),
        (1, (1, 1, 0, 0)),
    ):

        def function(*arguments, part=part):
            return mi.generate(*arguments)[part]

        def oracle(*arguments, part=part):
            return reference.generate(*arguments)[part]

        def draw(seed, terms=terms):
            return Sample(shape, tuple(map(bool, terms))).arguments(dtype, place.device, seed)[1:]

        expected = oracle(*draw(0))
        found = function(*draw(0))
        assert found.shape == expected.shape and found.dtype == dtype
        name = "generate", part, terms, shape, dtype, place.device
        check(
            function, oracle, draw, lambda seed, e=expected: normal(e.shape, dtype, place.device, seed), name
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", (*SHARED, *BROADCAST, *EMPTY), ids=lambda s: s.name)
def test_apply_generated(shape, dtype, place):
    size = (*shape.lead, shape.out)

    def cotangent(seed):
        return normal(size, dtype, place.device, seed)

    for layout in ("contiguous", "transposed"):

        def draw(seed, layout=layout):
            return layers_of(shape, dtype, place.device, layout, seed)

        y = mi.apply_generated(*draw(0))
        assert y.shape == size and y.dtype == dtype and y.is_contiguous()
        name = "apply", layout, shape, dtype, place.device
        check(mi.apply_generated, reference.apply_generated, draw, cotangent, name)
    check(mi.apply_generated, reference.apply_generated, lambda seed: draw(seed)[:2], cotangent)


@pytest.mark.parametrize("shape", SHARED, ids=lambda s: s.name)
def test_both_are_the_interaction(shape, place):
    x, z, *weights = Sample(shape).arguments(torch.float64, place.device)
    expected = mi.interaction(x, z, *weights)
    torch.testing.assert_close(
        mi.apply_generated(x, *mi.generate(z, *weights)), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sample", RAGGED, ids=lambda s: s.name)
def test_ragged(sample, dtype, place):
    ids = sample.segment_ids(place.device)

    def oracle(x, z, *weights):
        return reference.interaction(x, z[ids], *weights)

    def draw(seed):
        return sample.arguments(dtype, place.device, seed)

    for plan in (FUSED, PER_Z):

        def function(*arguments, plan=plan):
            return interaction_by(plan, *arguments, ids)

        assert function(*draw(0)).is_contiguous()
        name = "ragged", sample, dtype, place.device
        check(function, oracle, draw, lambda seed: sample.cotangent(dtype, place.device, seed), name)


@pytest.mark.parametrize("sample", RAGGED, ids=lambda s: s.name)
def test_ragged_layers(sample, place):
    ids = sample.segment_ids(place.device)
    x, z, *weights = sample.arguments(torch.float64, place.device, requires_grad=True)
    layers = [t.detach().requires_grad_() for t in mi.generate(z, *weights)]
    found = mi.apply_generated(x, *layers, segment_ids=ids)
    expected = reference.apply_generated(x, *(t[ids] for t in layers))
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = sample.cotangent(torch.float64, place.device)
    grads = (torch.autograd.grad(y, (x, *layers), grad) for y in (found, expected))
    torch.testing.assert_close(next(grads), next(grads), rtol=1e-11, atol=1e-12)


def test_ragged_without_a_product(place):
    x, z, _, *others = MIXED.arguments(torch.float64, place.device)
    ids = MIXED.segment_ids(place.device)
    expected = reference.interaction(x, z[ids], None, *others)
    torch.testing.assert_close(mi.interaction(x, z, None, *others, segment_ids=ids), expected)


def operations(place):
    x, z, *weights = Sample(TINY).arguments(torch.float64, place.device, requires_grad=True)
    ids = TINY_RAGGED.segment_ids(place.device)
    ragged = TINY_RAGGED.arguments(torch.float64, place.device, requires_grad=True)
    layers = layers_of(TINY, torch.float64, place.device, requires_grad=True)
    yield "generate", lambda *a: mi.generate(*a), (z, *weights)
    yield "apply", lambda *a: mi.apply_generated(*a), layers
    for plan in (FUSED, PER_Z):
        yield plan, lambda *a, plan=plan: interaction_by(plan, *a, ids), ragged


def test_gradcheck(place):
    for _, function, inputs in operations(place):
        assert gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True, check_undefined_grad=False
        )
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


def vmap_against_a_loop(function, inputs, index):
    """The function, and the gradient of the sum of its squares, mapped over one argument."""

    def loss(*arguments):
        return function(*arguments).pow(2).sum()

    stack = torch.stack([inputs[index], -2 * inputs[index]])
    dims = tuple(0 if number == index else None for number in range(len(inputs)))
    for transform in (function, torch.func.grad(loss, index)):
        before, after = inputs[:index], inputs[index + 1 :]
        found = torch.func.vmap(transform, dims)(*before, stack, *after)
        expected = torch.stack([transform(*before, one, *after) for one in stack])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def joined(results):
    return torch.cat([part.flatten() for part in results])


def test_vmap_and_per_sample_gradients(place):
    for name, function, inputs in operations(place):
        one = (lambda *a: joined(mi.generate(*a))) if name == "generate" else function
        for index in range(len(inputs)):
            vmap_against_a_loop(one, [t.detach() for t in inputs], index)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts_agree(layout, place):
    """Not in every bit: for a few contexts the order of a sum is that in which W lies."""
    _, z, *weights = Sample(SHARED[2], layout=layout).arguments(torch.float32, place.device)
    copies = [t.clone(memory_format=torch.contiguous_format) for t in (z, *weights)]
    found, expected = mi.generate(z, *weights), mi.generate(*copies)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_threads_and_order_change_no_bit(place):
    sample, results = Ragged("many", tuple(range(40)), 16, 33, 20, mixed=True), []
    ids = sample.segment_ids(place.device)
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads if place.backend == "cpu" else 1)
        leaves = sample.arguments(torch.float32, place.device, requires_grad=True)
        y = interaction_by(PER_Z, *leaves, ids)
        results.append([y, *torch.autograd.grad(y, leaves, sample.cotangent(torch.float32, place.device))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_shared_layers_are_not_copied_out(place):
    """W' [B, 1, O, X] meets x [B, T, X] in memory for y alone."""
    if place.device != "cpu":
        pytest.skip("peak_memory measures the CPU's allocator")
    x, weight = torch.randn(8, 64, 96), torch.randn(8, 1, 128, 96)
    y = mi.apply_generated(x, weight)
    results = y.nbytes * (1 if place.backend == "cpu" else 2)
    assert peak_memory(lambda: mi.apply_generated(x, weight)) <= results + (1 << 20) < weight.nbytes * 64


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_results_share_no_memory_with_arguments(backend, place):
    for lead in ((3,), ()):
        z, v, c = (torch.ones(*size, device=place.device) for size in ((*lead, 2), (5, 4), (5,)))
        with mi.backend(place.backend if backend == "auto" else backend):
            weight, bias = mi.generate(z, None, None, v, c)
        weight.zero_(), bias.zero_()
        assert v.eq(1).all() and c.eq(1).all()


@pytest.mark.compile
@pytest.mark.parametrize("name", ["interaction", "generate", "apply"])
def test_compiled_with_dynamic_sizes(name, place):
    torch._dynamo.reset()

    def function(sample, x, z, *weights):
        ids = sample.segment_ids(place.device)
        if name == "interaction":
            return lambda *a: mi.interaction(*a, segment_ids=ids), (x, z, *weights)
        if name == "generate":
            return lambda *a: joined(mi.generate(*a)), (z, *weights)
        layers = [t.detach().requires_grad_() for t in mi.generate(z, *weights)]
        return lambda *a: mi.apply_generated(*a, segment_ids=ids), (x, *layers)

    for sample in RAGGED[2:4]:
        eager, arguments = function(
            sample, *sample.arguments(torch.float64, place.device, requires_grad=True)
        )
        compiled = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=True)
        found, expected = compiled(*arguments), eager(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        grads = (torch.autograd.grad(y.pow(2).sum(), arguments) for y in (found, expected))
        torch.testing.assert_close(next(grads), next(grads), rtol=1e-11, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
@pytest.mark.parametrize("gradients", [False, True])
def test_explain_generate_and_apply(gradients, backend):
    x, z, *weights = Sample(TINY).arguments(torch.float32, requires_grad=gradients)
    layers = [t.detach().requires_grad_(gradients) for t in mi.generate(z, *weights)]
    with mi.backend(backend):
        generated, applied = mi.explain(mi.generate, z, *weights), mi.explain("apply_generated", x, *layers)
    contexts, rows, width, out, context = 2, 6, TINY.width, TINY.out, TINY.context
    assert generated.operations == contexts * out * (2 * width * context + 2 * context + 1)
    assert applied.operations == rows * out * (2 * width + 1)
    for plan in (generated, applied):
        assert [step.op for step in plan.backward] == ["input_grads", "weight_grads"] * gradients
        assert plan.algorithm == ("einsum" if backend == "reference" else "linear")
    ids = torch.tensor([0, 1, 1, 0, 1, 1])
    grouped = mi.explain("apply_generated", x.flatten(0, 1), layers[0].squeeze(1), segment_ids=ids)
    assert grouped.operations == 2 * rows * out * width
    if backend != "reference":
        assert "the rows of a layer are one product" in grouped.why
    with pytest.raises(ValueError, match="^generate: weight: expected shape"):
        mi.explain("generate", z, weights[0][:, :0])


@pytest.mark.parametrize("terms", ["WUVc", "W", "Wc", "UVc", "V"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_explain_tells_the_scratch_memory_of_generate(layout, terms):
    if backends.cpu_library_error() is not None:
        pytest.skip("no compiled kernels")
    present = tuple(letter in terms for letter in "WUVc")
    sample = Sample(Shape("layers", (40, 30), 24, 65, 33), present, layout)
    _, z, *weights = sample.arguments(torch.float32)
    results = sum(t.nbytes for t in mi.generate(z, *weights) if t is not None)
    peak = peak_memory(lambda: mi.generate(z, *weights))
    assert peak == mi.explain("generate", z, *weights).scratch + results


def test_autocast(place):
    x, z, *weights = Sample(TINY).arguments(torch.float32, place.device)
    with torch.autocast(place.device, torch.bfloat16):
        weight, bias = mi.generate(z, *weights)
        assert weight.dtype == bias.dtype == torch.bfloat16
        assert mi.apply_generated(x, weight.float(), bias).dtype == torch.bfloat16
