"""The primitives with weights of each row's group: values, orders, threads, memory and checks."""

from itertools import product

import pytest
import torch
from helpers import assert_passes

from mi_kernels import backends, libraries
from mi_kernels.ops.interaction import reference
from mi_kernels.ops.interaction.segments import grouping
from mi_kernels.ops.library import overloads
from mi_kernels.testing.errors import check_errors
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import Sample, Shape, lay_out

FORWARD, INPUT_GRADS, WEIGHT_GRADS = map(
    overloads,
    ("interaction_by_segment", "interaction_by_segment_input_grads", "interaction_by_segment_weight_grads"),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Numbers of the groups of N rows, and how many groups there are.
ORDERS = {
    "sorted": (lambda n: torch.arange(n) * 5 // n, 5),
    "mixed": (lambda n: torch.arange(n) * 7 % n % 5, 5),
    "one group": (lambda n: torch.zeros(n, dtype=torch.int64), 1),
    "empty groups": (lambda n: 2 * (torch.arange(n) * 7 % n % 3) + 1, 8),
    "rows alone": (lambda n: torch.arange(n).flip(0), None),
}
SHAPES = (
    Shape("few", (23,), 3, 7, 11),
    Shape("rows", (90,), 5, 16, 33),
    Shape("long", (300,), 4, 24, 40),
    Shape("wide", (40,), 40, 70, 65),
)
TERMS = [terms for terms in product((True, False), repeat=4) if any(terms)]


def order_of(kind, shape):
    numbers, groups = ORDERS[kind]
    groups = shape.rows if groups is None else groups
    return numbers(shape.rows), groups


def arguments_of(shape, groups, terms, dtype, seed=0, layout="contiguous"):
    """x, z, and the weights of each group."""
    x, z, *_ = Sample(shape, layout=layout).arguments(dtype, seed=seed)
    weights = [Sample(shape, terms).arguments(dtype, seed=1000 * (g + 1) + seed)[2:] for g in range(groups)]
    grouped = [None if one[0] is None else torch.stack(one) for one in zip(*weights, strict=True)]
    if layout != "contiguous":
        grouped = [None if w is None else lay_out(w, layout) for w in grouped]
    return x, z, *grouped


def by_group(ids, groups):
    """The reference: a loop over groups, and PyTorch's gradients of it."""

    def forward(x, z, *weights):
        y = x.new_zeros(x.shape[0], next(w for w in weights if w is not None).shape[1])
        for group in range(groups):
            rows = (ids == group).nonzero().squeeze(1)
            own = reference.interaction(x[rows], z[rows], *(None if w is None else w[group] for w in weights))
            y = y.index_copy(0, rows, own)
        return y

    def gradients(grad, *arguments):
        leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
        y = forward(*leaves)
        wanted = [t for t in leaves if t is not None]
        return y, *torch.autograd.grad(y, wanted, grad, materialize_grads=True)

    return gradients


def computed(backend, ids, groups):
    order = grouping(ids, groups)

    def results(grad, x, z, *weights):
        there = [w is not None for w in weights]
        y = FORWARD[backend](x, z, *weights, *order)
        inputs = INPUT_GRADS[backend](grad, x, z, *weights[:3], True, True, *order)
        found = WEIGHT_GRADS[backend](grad, x, z, *there, *order)
        return y, *inputs, *(t for t, want in zip(found, there, strict=True) if want)

    return results


def check(backend, shape, kind, terms, dtype, layout="contiguous", enough=100):
    ids, groups = order_of(kind, shape)

    def draw(seed):
        grad = Sample(shape, layout=layout).cotangent(dtype, seed=seed + 77)
        return grad, *arguments_of(shape, groups, terms, dtype, seed, layout)

    check_errors(computed(backend, ids, groups), by_group(ids, groups), draw, enough=enough)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_values(shape, kind, dtype, place):
    if kind == "rows alone" and shape.name != "few":
        pytest.skip("a loop over each row, and W of each")
    if kind != "mixed" and dtype in (torch.float64, torch.float16):
        pytest.skip("the order is no matter of the dtype")
    check(place.backend, shape, kind, (True,) * 4, dtype)


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "".join("WUVc"[t] for t in range(4) if terms[t]))
@pytest.mark.parametrize("kind", ["mixed", "empty groups"])
def test_values_of_terms(terms, kind, place):
    for shape in SHAPES[:2]:
        check(place.backend, shape, kind, terms, torch.float32)


@pytest.mark.parametrize("layout", ["transposed", "gaps", "offset", "expanded"])
@pytest.mark.parametrize("kind", ["sorted", "mixed"])
def test_values_of_layouts(kind, layout, place):
    for terms in ((True,) * 4, (False, False, True, True)):
        check(place.backend, SHAPES[0], kind, terms, torch.float32, layout)


def test_nothing_to_do(place):
    for n, groups, z, x, out in (
        (0, 3, 2, 3, 4),
        (0, 0, 2, 3, 4),
        (5, 2, 0, 3, 4),
        (5, 2, 2, 0, 4),
        (5, 2, 2, 3, 0),
    ):
        shape = Shape("nothing", (n,), z, x, out)
        ids = torch.arange(n) % max(groups, 1)
        weights = (torch.ones(groups, out, z, x), torch.ones(groups, out, z), torch.ones(groups, out, x))
        arguments = torch.ones(n, x), torch.ones(n, z), *weights, torch.ones(groups, out)
        y, dx, dz, *grads = computed(place.backend, ids, groups)(torch.ones(n, out), *arguments)
        assert torch.equal(y, torch.full((n, out), float(z * x + z + x + 1)))
        assert torch.equal(dx, torch.full((n, x), float(out * (z + 1))))
        assert torch.equal(dz, torch.full((n, z), float(out * (x + 1))))
        lengths = torch.bincount(ids, minlength=groups).float()
        for found, weight in zip(grads, arguments[2:], strict=True):
            assert torch.equal(found, weight * lengths.view(-1, *[1] * (weight.dim() - 1))), shape


def test_only_the_rows_of_a_group_are_read(place):
    """NaN in the rows or in the weights of one group stays in that group."""
    shape = SHAPES[1]
    ids, groups = order_of("mixed", shape)
    for dtype in (torch.float32, torch.bfloat16):
        grad = Sample(shape).cotangent(dtype)
        x, z, *weights = arguments_of(shape, groups, (True,) * 4, dtype)
        clean = computed(place.backend, ids, groups)(grad, x, z, *weights)
        for tensor in (grad, x, z):
            tensor[ids == 2] = float("nan")
        for weight in weights:
            weight[2] = float("nan")
        found = computed(place.backend, ids, groups)(grad, x, z, *weights)
        for one, other in zip(clean, found, strict=True):
            bad = ids == 2 if one.shape[0] == shape.rows else torch.arange(groups) == 2
            assert torch.equal(one[~bad], other[~bad]) and other[bad].isnan().all()


def test_sums_that_leave_the_range_of_float(place):
    """Finite results with products that are not."""
    shape = SHAPES[0]
    ids, groups = order_of("mixed", shape)
    grad, (x, z, *weights) = (
        Sample(shape).cotangent(torch.float32),
        arguments_of(shape, groups, (True,) * 4, torch.float32),
    )
    x, z, weights[0] = x * 2.0**70, z * 2.0**70, weights[0] * 2.0**-100
    found = computed(place.backend, ids, groups)(grad * 2.0**-60, x, z, *weights)
    expected = by_group(ids, groups)((grad * 2.0**-60).double(), *(t.double() for t in (x, z, *weights)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=1e-4, atol=float(other.detach().abs().max()) * 1e-5
        )


def native(test):
    error = backends.cpu_library_error()
    return pytest.mark.skipif(error is not None, reason=f"no compiled library: {error}")(test)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths", [(700, 40, 0, 1, 1100, 3), (300,) * 4, (2,) * 900], ids=["uneven", "even", "many"]
)
def test_bits_for_any_number_of_threads_and_order(lengths, dtype):
    shape = Shape("threads", (sum(lengths),), 12, 32, 40)
    ids = torch.repeat_interleave(torch.tensor(lengths))
    mixed = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    weights = [torch.randn(len(lengths), *s).to(dtype) for s in ((40, 12, 32), (40, 12), (40, 32), (40,))]
    for terms in ((True,) * 4, (False, False, True, True)):
        own = [w if there else None for w, there in zip(weights, terms, strict=True)]
        x, z, *_ = Sample(shape).arguments(dtype)
        grad = Sample(shape).cotangent(dtype)
        results = []
        before = torch.get_num_threads()
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(computed("cpu", ids, len(lengths))(grad, x, z, *own))
        # Where the rows of a group come in the same order, it does not matter where they are.
        places = torch.argsort(ids[mixed], stable=True)
        back = torch.empty_like(mixed)
        back[places] = torch.arange(len(ids))
        y, dx, dz, *rest = computed("cpu", ids[mixed], len(lengths))(grad[back], x[back], z[back], *own)
        results.append((y[places], dx[places], dz[places], *rest))
        torch.set_num_threads(before)
        for found in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], found, strict=True))


@native
@pytest.mark.parametrize("groups", [8, 3, 500])
def test_memory(groups):
    """Beyond the results no more than a copy of x: the rows of W are not copied either."""
    n, width, out = 16384, 128, 128
    ids = torch.randint(groups, (n,), generator=torch.Generator().manual_seed(0))
    order = grouping(ids, groups)
    x, grad, none = torch.randn(n, width), torch.randn(n, out), torch.empty(n, 0)
    weight, bias = torch.randn(groups, out, width), torch.randn(groups, out)
    calls = {
        "forward": lambda: FORWARD["cpu"](x, none, None, None, weight, bias, *order),
        "input_grads": lambda: INPUT_GRADS["cpu"](grad, x, none, None, None, weight, True, False, *order),
        "weight_grads": lambda: WEIGHT_GRADS["cpu"](grad, x, none, False, False, True, True, *order),
    }
    for name, call in calls.items():
        results = call()
        size = sum(t.nbytes for t in (results if isinstance(results, tuple) else (results,)))
        assert peak_memory(call) <= size + x.nbytes, name


def wrong_orders():
    right, offsets = torch.tensor([2, 0, 3, 1]), torch.tensor([0, 1, 4])
    yield "row_index", torch.tensor([2, 0, 4, 1]), offsets
    yield "row_index", torch.tensor([2, 0, -1, 1]), offsets
    yield "row_index", torch.tensor([2, 0, 2**62, 1]), offsets
    yield "row_index", right[:3], offsets
    yield "row_index", right.int(), offsets
    yield "row_index", right.unsqueeze(0), offsets
    yield "offsets", right, torch.tensor([0, 1, 3])
    yield "offsets", right, torch.tensor([1, 1, 4])
    yield "offsets", right, torch.tensor([0, 5, 4])
    yield "offsets", right, torch.tensor([0, -1, 4])
    yield "offsets", right, offsets.double()


@native
def test_orders_are_checked_before_anything_is_read():
    x, z, grad = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 5)
    weights = torch.randn(2, 5, 2, 3), torch.randn(2, 5, 2), torch.randn(2, 5, 3), torch.randn(2, 5)
    orders = [*wrong_orders(), ("row_index", torch.tensor([2, 0, 2, 1]), torch.tensor([0, 1, 4]))]
    for blamed, *order in orders:
        for call in (
            lambda order: FORWARD["cpu"](x, z, *weights, *order),
            lambda order: INPUT_GRADS["cpu"](grad, x, z, *weights[:3], True, True, *order),
            lambda order: WEIGHT_GRADS["cpu"](grad, x, z, True, True, True, True, *order),
        ):
            with pytest.raises(RuntimeError, match=f"interaction_by_segment.*: {blamed}: expected"):
                call(order)
    order = torch.tensor([2, 0, 3, 1]), torch.tensor([0, 1, 4])
    for index, name in enumerate(("weight", "weight_z", "weight_x", "bias")):
        wrong = [w[:1] if i == index else w for i, w in enumerate(weights)]
        with pytest.raises(RuntimeError, match=f"interaction_by_segment: {name}: expected 2 groups, got 1"):
            FORWARD["cpu"](x, z, *wrong, *order)
    with pytest.raises(RuntimeError, match="expected at least one of weight"):
        FORWARD["cpu"](x, z, None, None, None, None, *order)


def test_order_of_segments():
    for n, groups in ((0, 0), (0, 3), (1, 1), (1000, 7), (1000, 5000)):
        ids = torch.randint(max(groups, 1), (n,))
        ordered, row_index = ids.sort(stable=True)
        found = grouping(ids, groups)
        assert torch.equal(found[0], row_index)
        assert torch.equal(found[1], torch.searchsorted(ordered, torch.arange(groups + 1)))
        compiled = torch.compile(grouping, fullgraph=True, backend="aot_eager", dynamic=True)
        assert all(torch.equal(a, b) for a, b in zip(found, compiled(ids, groups), strict=True))
    mapped = torch.vmap(lambda x: x[grouping(ids, groups)[0]])(torch.arange(2 * n).view(2, n))
    assert torch.equal(mapped, torch.arange(2 * n).view(2, n)[:, found[0]])


@native
def test_order_of_numbers_that_are_out_of_range():
    for wrong in (-1, 3, 2**62):
        with pytest.raises(RuntimeError, match=f"segment_ids: expected values from 0 to 2, got {wrong}"):
            grouping(torch.tensor([0, wrong, 2]), 3)


@native
@pytest.mark.subprocess
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16"])
def test_values_on_each_instruction_set(isa):
    if isa not in libraries.cpu_isa()["supported"]:
        pytest.skip(f"this machine or build has no {isa}")
    if isa == libraries.cpu_isa()["selected"]:
        pytest.skip(f"{isa} is what every other test runs on here")
    chosen = "test_values and cpu and mixed and not portable and not instruction or test_bits and uneven"
    assert_passes("-k", chosen, "test_by_segment.py", least=20, MI_KERNELS_CPU_ISA=isa)
