"""The dense primitives with z x, or T = g W, in memory: where they are taken, values, bits, memory."""

import math
from itertools import product

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import mi_kernels as mi
from mi_kernels import backends, libraries, planners
from mi_kernels.ops.interaction import reference
from mi_kernels.testing.checks import check_gradients, check_values
from mi_kernels.testing.errors import check_errors
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import ALL_TERMS, LAYOUTS, ORDERS, WEIGHT_ONLY, Sample, Shape, stored

pytestmark = pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")

OPS = torch.ops.mi_kernels
PRIMITIVES = {"forward": 1, "input_grads": 1 | 16 | 32, "weight_grads": 1}
VECTOR_BYTES = {"generic": 16, "avx2": 32, "avx512": 64, "avx512bf16": 64}
ISA = (libraries.cpu_isa() or {}).get("selected", "generic")
# Others are multiplied in a wider dtype, in which P would be another number.
OWN = (torch.float64, torch.float32, *([torch.bfloat16] if ISA == "avx512bf16" else []))
OTHERS = [d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16) if d not in OWN]
UNCACHED = 4 << 20  # bytes
TERMS = tuple(product((False, True), repeat=3))  # of U, V and c
CHOICES = [chosen for chosen in product((False, True), repeat=4) if any(chosen)]


def lanes(dtype):
    """Words in a vector; bfloat16 is multiplied in pairs of the size of a float32."""
    return VECTOR_BYTES[ISA] // max(dtype.itemsize, 4)


def found(primitive, sizes, dtype, strides=(), groups=1):
    text = OPS.cpu_interaction_plan(primitive, [groups, *sizes, *strides], dtype, PRIMITIVES[primitive])
    return planners.fields(text)


def taken(primitive, sizes, dtype, strides=()):
    return found(primitive, sizes, dtype, strides)["algorithm"] == "materialised"


def padded(context, width, dtype):
    """Elements from one row of P to the next: room for a vector, and an odd number of lines of 64 bytes."""
    lines = -(-(context * width + lanes(dtype)) * dtype.itemsize // 64)
    return (lines | 1) * 64 // dtype.itemsize


def most_rows(context, width, out, dtype):
    """How many rows P may have where W is the largest of the others."""
    rows = out * context * width // padded(context, width, dtype)
    assert rows * max(context, width, out) <= out * context * width
    return rows


# B, Z, X, O in three sizes: X shorter than four vectors of every instruction set, in one task and in several,
# with rows of T by fours and alone; and X of some vectors but the last lanes, of which AVX-512 has that few.
SHORT = Shape("short", (24,), 20, 7, 100)
TASKS = Shape("tasks", (40,), 603, 7, 96)
VECTORS = Shape("vectors", (30,), 21, 29, 130)
SHAPES = (SHORT, TASKS, VECTORS)


def assert_taken(*arguments):
    """Of arguments that all require a gradient."""
    x, z, weight, *_ = arguments
    if weight.shape[-1] >= 4 * lanes(x.dtype):
        return  # an instruction set with vectors that short
    plan = mi.explain(mi.interaction, *arguments)
    assert [step.algorithm for step in (plan, *plan.backward)] == ["materialised"] * 3


@pytest.mark.parametrize("dtype", OWN, ids=str)
def test_where_rows_of_w_are_short(dtype):
    short = 4 * lanes(dtype) - 1
    assert taken("forward", (8, 16, short, 96), dtype)
    assert not taken("forward", (8, 16, short, 95), dtype)
    assert not taken("forward", (20, 16, short + 1, 96), dtype)
    assert taken("input_grads", (40, 16, short, 64), dtype)
    assert not taken("input_grads", (40, 16, short, 63), dtype)
    assert not taken("input_grads", (80, 16, short + 1, 96), dtype)
    assert taken("weight_grads", (16, 16, short, 32), dtype)
    assert not taken("weight_grads", (16, 16, short, 31), dtype)
    assert not taken("weight_grads", (16, 16, short + 1, 199), dtype)
    assert not taken("forward", (8, 16, 1, 1), dtype)


@pytest.mark.parametrize("dtype", OWN, ids=str)
def test_where_w_exceeds_the_cache(dtype):
    width, out = 8 * lanes(dtype), 64
    context = UNCACHED // (dtype.itemsize * out * width)
    for rows, expected in ((1, True), (12, True), (13, False)):
        assert taken("forward", (rows, context, width, out), dtype) == expected
    assert not taken("forward", (12, context - 1, width, out), dtype)
    assert not taken("forward", (12, 2 * context, width, out - 1), dtype)


@pytest.mark.parametrize("dtype", OWN, ids=str)
def test_where_gradients_have_some_rows(dtype):
    width = 4 * lanes(dtype)
    for rows, expected in ((8, False), (9, True), (64, True), (65, False)):
        expected = expected and dtype != torch.bfloat16
        assert taken("input_grads", (rows, 40, width, 128), dtype) == expected
    assert not taken("input_grads", (40, 40, width, 63), dtype)
    for rows, out, longer, expected in (
        (5, 200, 0, True),
        (4, 200, 0, False),
        (5, 199, 0, False),
        (5, 200, 4 * lanes(dtype) - 1, True),
        (5, 200, 4 * lanes(dtype), False),
    ):
        assert taken("weight_grads", (rows, 16, width + longer, out), dtype) == expected


@pytest.mark.parametrize("dtype", OWN, ids=str)
@pytest.mark.parametrize("sizes", [(16, 7, 100), (33, 5, 128), (60, 7, 300)], ids=str)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_p_is_never_the_largest_tensor(primitive, sizes, dtype):
    """Its rows with their padding, against W."""
    rows = most_rows(*sizes, dtype)
    assert taken(primitive, (rows, *sizes), dtype)
    assert not taken(primitive, (rows + 1, *sizes), dtype)


@pytest.mark.parametrize("dtype", OWN, ids=str)
def test_one_w_of_all_groups_counts_once(dtype):
    """Where W is expanded, P of many groups would be the largest tensor."""
    groups, rows, context, width, out = 100, 4, 16, 7, 96
    g, x, z, weight, *_ = _drawn(Shape("expanded", (rows,), context, width, out), groups, dtype)(0)
    shared, product = weight[:1].expand(groups, -1, -1, -1), groups * rows * context * width * dtype.itemsize
    torch.set_num_threads(1)
    for w, expected in ((weight, True), (shared, False)):
        for call in (
            lambda w=w: OPS.interaction(x, z, w, None, None, None),
            lambda w=w: OPS.interaction_input_grads(g, x, z, w, None, None, True, True),
        ):
            assert (max(allocated(call)) >= product) == expected


@pytest.mark.parametrize("dtype", OWN, ids=str)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_nothing_to_compute(primitive, dtype):
    for sizes in ((0, 16, 7, 100), (8, 0, 7, 100), (8, 16, 0, 100), (8, 16, 7, 0)):
        assert not taken(primitive, sizes, dtype)


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_dtypes_that_are_widened_take_the_generated_form(primitive, dtype):
    assert not taken(primitive, (8, 16, 7, 100), dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("primitive", ["forward", "input_grads"])
def test_the_layout_decides(primitive, order):
    """(z, x) have to lie behind each other, in either order; what lies innermost is the width."""
    sizes = 24, 9, 7, 100
    weight = stored(torch.zeros(100, 9, 7), order)
    assert taken(primitive, sizes, torch.float32, weight.stride()) == (order in ("OZX", "OXZ", "ZXO", "XZO"))
    long = stored(torch.zeros(100, 9, 100), order)
    short = order in ("OXZ", "XZO")  # z inside
    assert taken("forward", (24, 9, 100, 100), torch.float32, long.stride()) == short


@pytest.mark.parametrize("primitive", ["forward", "input_grads"])
def test_padded_and_strided_weights(primitive):
    sizes, weight = (24, 9, 7, 100), torch.zeros(2 * 100, 2 * 9, 2 * 7)
    for axis, size, expected in ((0, 100, True), (1, 9, True), (2, 7, False)):
        whole = torch.zeros([2 * s if a == axis else s for a, s in enumerate((100, 9, 7))])
        assert taken(primitive, sizes, torch.float32, whole.narrow(axis, 0, size).stride()) == expected
    assert not taken(primitive, sizes, torch.float32, weight[::2, ::2, ::2].stride())
    assert not taken(primitive, sizes, torch.float32, torch.zeros(100, 9, 1).expand(-1, -1, 7).stride())
    assert taken(primitive, sizes, torch.float32, torch.zeros(200, 9, 7)[::2].stride())


def _samples():
    yield from (Sample(shape) for shape in SHAPES)
    yield from (Sample(SHORT, layout=layout) for layout in LAYOUTS[1:])
    yield from (Sample(SHORT, order=order) for order in ORDERS[1:])
    yield from (Sample(VECTORS, WEIGHT_ONLY, order=order) for order in ORDERS[1:])
    yield from (Sample(SHORT, (True, *terms)) for terms in TERMS[:-1])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("sample", [*_samples()], ids=str)
def test_error_rule(sample, dtype):
    if dtype in OWN and sample.layout == "contiguous" and sample.order == "OZX":
        assert_taken(*sample.arguments(dtype, requires_grad=True))
    check_values(sample, dtype, "cpu")
    check_gradients(sample, dtype, "cpu")


@pytest.mark.parametrize("order", ["OZX", "ZXO"])
@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize("dtype", OWN, ids=str)
def test_error_rule_where_w_exceeds_the_cache(dtype, rows, order):
    width, out = 8 * lanes(dtype), 64
    shape = Shape("uncached", (rows,), UNCACHED // (dtype.itemsize * out * width), width, out)
    for terms in (ALL_TERMS, WEIGHT_ONLY):
        sample = Sample(shape, terms, order=order)
        plan = mi.explain(mi.interaction, *sample.arguments(dtype))
        assert plan.algorithm == "materialised"
        check_values(sample, dtype, "cpu")


@pytest.mark.parametrize("order", ["OZX", "OXZ", "ZXO"])
@pytest.mark.parametrize("rows", [9, 31, 64])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_error_rule_of_some_rows(dtype, rows, order):
    """Input gradients of longer rows of W, whose last vector is whole or not."""
    for more in (0, 1):
        # With z inside of x in memory, it is z that is long.
        sizes = (13, 4 * lanes(dtype) + more)[:: -1 if order == "OXZ" else 1]
        sample = Sample(Shape("some", (rows,), *sizes, 100), order=order)
        plan = mi.explain(mi.interaction, *sample.arguments(dtype, requires_grad=True))
        assert plan.backward[0].algorithm == "materialised"
        check_gradients(sample, dtype, "cpu")


def _reference(terms):
    """The primitives of each group by einsum: y, dx and dz, dW, dU, dV and dc."""

    def call(g, x, z, weight, weight_z, weight_x, bias):
        def given(there, tensor):
            return tensor if there else None

        weights = weight, *map(given, terms, (weight_z, weight_x, bias))

        def of_group(x, z, *weights):
            leaves = [None if t is None else t.detach().requires_grad_() for t in (x, z, *weights)]
            return reference.interaction(*leaves), leaves

        results = []
        for i in range(x.shape[0]):
            y, leaves = of_group(*(None if t is None else t[i] for t in (x, z, *weights)))
            grads = torch.autograd.grad(y, [t for t in leaves if t is not None], g[i])
            results.append((y.detach(), *grads))
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    return call


def _ours(terms, want_x=True, want_z=True):
    def call(g, x, z, weight, *others):
        others = [tensor if there else None for there, tensor in zip(terms, others, strict=True)]
        y = OPS.interaction(x, z, weight, *others)
        grads = OPS.interaction_input_grads(g, x, z, weight, *others[:2], want_x, want_z)
        weights = OPS.interaction_weight_grads(g, x, z, True, *terms)
        return [y, *grads, *(w for w, there in zip(weights, (True, *terms), strict=True) if there)]

    return call


def _drawn(shape, groups, dtype, order="OZX"):
    """g, x, z, W, U, V and c of each group for a seed."""
    rows, context, width, out = shape.rows, shape.context, shape.width, shape.out
    matrices = (out, context, width), (out, context), (out, width), (out,)
    axes = [0, *(1 + "OZX".index(name) for name in order)]

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = [
            torch.randn(groups, *size, generator=generator, dtype=torch.float64).to(dtype)
            for size in ((rows, out), (rows, width), (rows, context), *matrices)
        ]
        back = [axes.index(axis) for axis in range(4)]
        tensors[3] = tensors[3].permute(axes).contiguous().permute(back)
        return tensors

    return draw


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("order", ["OZX", "OXZ", "ZXO"])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_groups(dtype, order, terms):
    """A matrix of each group."""
    shape = Shape("groups", (10,), 9, 6, 97)
    if dtype in OWN:
        for primitive in PRIMITIVES:
            assert found(primitive, (10, 9, 6, 97), dtype, groups=3)["algorithm"] == "materialised"
    check_errors(_ours(terms), _reference(terms), _drawn(shape, 3, dtype, order))


@pytest.mark.parametrize("terms", TERMS[::2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", OWN, ids=str)
def test_dx_or_dz_alone(dtype, shape, terms):
    """The bits of both together where each has its own products, and nothing of the other."""
    g, x, z, weight, *others, _ = (t[0] for t in _drawn(shape, 1, dtype)(0))
    weights = weight, *(t if there else None for t, there in zip(others, terms[:2], strict=True))
    dx, dz = OPS.interaction_input_grads(g, x, z, *weights, True, True)
    only_x, no_z = OPS.interaction_input_grads(g, x, z, *weights, True, False)
    no_x, only_z = OPS.interaction_input_grads(g, x, z, *weights, False, True)
    assert no_x.numel() == no_z.numel() == 0
    if weight.shape[-1] >= 4 * lanes(dtype):
        return  # the two forms of the generated product need not agree
    assert torch.equal(only_x, dx) and torch.equal(only_z, dz)


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_each_subset_of_weight_gradients(shape, chosen):
    g, x, z, *_ = (t[0] for t in _drawn(shape, 1, torch.float64)(0))
    expected = (
        torch.einsum("bo,bz,bx->ozx", g, z, x),
        torch.einsum("bo,bz->oz", g, z),
        torch.einsum("bo,bx->ox", g, x),
        g.sum(0),
    )
    for result, truth, there in zip(
        OPS.interaction_weight_grads(g, x, z, *chosen), expected, chosen, strict=True
    ):
        if there:
            torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)
        else:
            assert result.numel() == 0


def _everything(g, x, z, weight):
    """y, dx, dz and dW."""
    return (
        OPS.interaction(x, z, weight, None, None, None),
        *OPS.interaction_input_grads(g, x, z, weight, None, None, True, True),
        OPS.interaction_weight_grads(g, x, z, True, False, False, False)[0],
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", OWN, ids=str)
def test_nan_and_inf_reach_what_depends_on_them(dtype, shape, value):
    """And change no bit of anything else."""
    clean = [t[0] for t in _drawn(shape, 1, dtype)(0)][:4]
    before = _everything(*clean)
    row, i, j, o = shape.rows - 2, shape.context - 1, shape.width - 1, 3
    for index, place, reached in (
        (0, (row, o), ((), (row,), (row,), (o,))),
        (1, (row, j), ((row,), (), (row,), (..., j))),
        (2, (row, i), ((row,), (row,), (), (slice(None), i))),
        (3, (o, i, j), ((slice(None), o), (slice(None), j), (slice(None), i), ())),
    ):
        tensors = [t.clone() for t in clean]
        tensors[index][place] = value
        for result, old, where in zip(_everything(*tensors), before, reached, strict=True):
            depends = torch.zeros(result.shape, dtype=torch.bool)
            if where:
                depends[where] = True
            assert not result[depends].isfinite().any()
            assert torch.equal(result[~depends], old[~depends])


# Of g, x, z and W, and which of y, dx, dz and dW are sums of products that overflow.
RANGES = {
    "z x": ((1e-5, 1e20, 1e20, 1e-25), (0, 3)),
    "z x of 1e60": ((1.0, 1e30, 1e30, 1e-30), (0,)),
    "g W": ((1e20, 1e-10, 1e-10, 1e20), (1, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RANGES)
def test_products_that_leave_the_range(name, dtype):
    """What has a place in the dtype is computed again in float64: of positive numbers no sum vanishes."""
    magnitudes, again = RANGES[name]
    g, x, z, weight = (
        (t[0].abs() * size).to(dtype)
        for t, size in zip(_drawn(SHORT, 1, torch.float64)(0)[:4], magnitudes, strict=True)
    )
    results = _everything(g, x, z, weight)
    exact = _everything(*(t.double() for t in (g, x, z, weight)))
    for index, (result, truth) in enumerate(zip(results, exact, strict=True)):
        assert torch.equal(result.isfinite(), truth.to(dtype).isfinite())
        if index in again and dtype in OWN:
            assert torch.equal(result, truth.to(dtype))


@pytest.mark.parametrize("order", ["OZX", "OXZ", "ZXO", "XZO"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_pack_gives_the_same_bits(dtype, shape, order):
    x, z, weight, *others = Sample(shape, order=order).arguments(dtype)
    expected = mi.interaction(x, z, weight, *others)
    assert torch.equal(mi.interaction(x, z, mi.pack(weight), *others), expected)


@pytest.mark.parametrize("order", ["OZX", "ZXO"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", OWN, ids=str)
def test_threads_change_no_bit(dtype, shape, order):
    tensors, results = _drawn(shape, 2, dtype, order)(0), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_ours((True,) * 3)(*tensors))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("order", ["OZX", "OXZ", "ZXO"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_explain_tells_the_scratch_memory(shape, order, terms):
    """To the byte, on any number of threads."""
    arguments = Sample(shape, (True, *terms), order=order).arguments(torch.float32, requires_grad=True)
    x, z, *weights = (None if t is None else t.detach() for t in arguments)
    g = torch.randn(shape.rows, shape.out)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        plan = mi.explain(mi.interaction, *arguments)
        peak = peak_memory(lambda: OPS.interaction(x, z, *weights))
        assert peak == plan.scratch + g.nbytes
        peak = peak_memory(lambda: OPS.interaction_input_grads(g, x, z, *weights[:3], True, True))
        assert peak == plan.backward[0].scratch + x.nbytes + z.nbytes
        # With z inside of x in memory, dW is that of the exchanged product (autograd.py).
        swapped = (z, x, True, *terms[1::-1], terms[2]) if order == "OXZ" else (x, z, True, *terms)
        peak = peak_memory(lambda: OPS.interaction_weight_grads(g, *swapped))  # noqa: B023
        assert peak == plan.backward[1].scratch + sum(w.nbytes for w in weights if w is not None)


@pytest.mark.parametrize("chosen", [0, 1], ids=["dx", "dz"])
def test_explain_tells_the_scratch_memory_of_one_gradient(chosen):
    arguments = list(Sample(SHORT).arguments(torch.float32))
    arguments[chosen].requires_grad_()
    plan = mi.explain(mi.interaction, *arguments).backward[0]
    assert plan.algorithm == "materialised"
    x, z, *weights = (t.detach() for t in arguments)
    wanted = chosen == 0, chosen == 1
    g = torch.randn(SHORT.rows, SHORT.out)
    peak = peak_memory(lambda: OPS.interaction_input_grads(g, x, z, *weights[:3], *wanted))
    assert peak == plan.scratch + (x, z)[chosen].nbytes


def allocated(call):
    """The sizes of all allocations of torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


@pytest.mark.parametrize("dtype", OWN, ids=str)
@pytest.mark.parametrize("sizes", [(400, 7, 100), (603, 5, 128), (256, 4, 200)], ids=str)
def test_nothing_is_larger_than_the_largest_operand(sizes, dtype):
    """With as many rows as P may have: W is the largest, and so are the rows of P with their padding."""
    rows = most_rows(*sizes, dtype)
    g, x, z, weight, *others = (t[0] for t in _drawn(Shape("large", (rows,), *sizes), 1, dtype)(0))
    product = rows * padded(*sizes[:2], dtype) * dtype.itemsize
    torch.set_num_threads(1)
    for call, has_product in (
        (lambda: OPS.interaction(x, z, weight, *others), True),
        (lambda: OPS.interaction_input_grads(g, x, z, weight, *others[:2], True, True), False),
        (lambda: OPS.interaction_weight_grads(g, x, z, True, True, True, True), True),
    ):
        found = allocated(call)
        assert max(found) <= weight.nbytes
        assert (product in found) == has_product
