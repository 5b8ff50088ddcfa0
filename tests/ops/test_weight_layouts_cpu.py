"""The CPU kernels on W in any layout: all orders of its axes, padded, strided, broadcast, of each group."""

import itertools
import math

import pytest
import torch
from helpers import assert_passes, reference_gradients

import mi_kernels as mi
from mi_kernels import backends, libraries
from mi_kernels.ops.interaction import reference
from mi_kernels.testing.errors import check_errors
from mi_kernels.testing.memory import peak_memory

pytestmark = pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")

OPS = torch.ops.mi_kernels
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ORDERS = ["".join(order) for order in itertools.permutations("OZX")]
# rows, Z, X, O: streamed and blocked, fewer outputs than lanes, tiles of several runs, partial sums.
SIZES = {
    "one-row": (1, 9, 40, 24),
    "three-rows": (3, 24, 33, 10),
    "six-rows": (6, 65, 32, 40),
    "long-context": (4, 700, 5, 17),
    "blocked": (40, 9, 21, 10),
    "threaded": (150, 40, 131, 33),
    "short-width": (70, 70, 5, 7),
    "few-outputs": (33, 21, 30, 3),
    "one-output": (5, 30, 35, 1),
    "one-context": (20, 1, 50, 9),
    "one-width": (20, 50, 1, 9),
    "output-lanes": (41, 9, 40, 31),
}


def stored(weight, order, gaps=0):
    """The same numbers with the axes in another order in memory, outermost first; beyond each row is NaN."""
    lead = weight.dim() - 3
    axes = [*range(lead), *(lead + "OZX".index(name) for name in order)]
    inside = weight.permute(axes)
    sizes = [*inside.shape[:-2], *(size + gaps for size in inside.shape[-2:])]
    memory = torch.full(sizes, math.nan, dtype=weight.dtype)
    part = memory[..., : inside.shape[-2], : inside.shape[-1]]
    return part.copy_(inside).permute([axes.index(axis) for axis in range(weight.dim())])


def drawn(sizes, dtype, terms=True):
    """x, z, W, U, V, c for a seed."""
    rows, context, width, out = sizes

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        weight = normal(out, context, width) / math.sqrt(context * width)
        others = [
            normal(out, context) / math.sqrt(context),
            normal(out, width) / math.sqrt(width),
            normal(out),
        ]
        tensors = (normal(rows, width), normal(rows, context), weight, *others)
        return tuple(t.to(dtype) for t in tensors[: 6 if terms else 3]) + (None,) * (0 if terms else 3)

    return draw


def values(order, gaps):
    return lambda x, z, w, *others: (OPS.interaction(x, z, stored(w, order, gaps), *others),)


def input_grads(order, gaps):
    return lambda g, x, z, w, u, v, c: OPS.interaction_input_grads(
        g, x, z, stored(w, order, gaps), u, v, True, True
    )


def with_cotangent(draw, rows, out, dtype):
    return lambda seed: (
        torch.randn(rows, out, generator=torch.Generator().manual_seed(seed + 1000)).to(dtype),
        *draw(seed),
    )


@pytest.mark.parametrize(
    ("order", "gaps"), [*((order, 0) for order in ORDERS), ("OZX", 3), ("ZOX", 3), ("ZXO", 3)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_error_rule(sizes, dtype, order, gaps):
    draw = drawn(sizes, dtype)
    check_errors(
        values(order, gaps),
        lambda *arguments: (reference.interaction(*arguments),),
        draw,
        oracle=("layouts", sizes, dtype),
    )
    check_errors(
        input_grads(order, gaps),
        reference_gradients((True, True, False, False, False, False)),
        with_cotangent(draw, sizes[0], sizes[3], dtype),
        oracle=("layouts, gradients", sizes, dtype),
    )


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize(("order", "gaps"), [("ZXO", 0), ("XZO", 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(270, 66, 66, 64), (7, 33, 600, 16), (64, 35, 17, 200)], ids=str)
def test_outputs_in_the_lanes(sizes, dtype, order, gaps, terms):
    """Several blocks of rows, of outputs, of the context and of the width; panels that are not whole."""
    check_errors(
        values(order, gaps),
        lambda *arguments: (reference.interaction(*arguments),),
        drawn(sizes, dtype, terms),
        oracle=("outputs in the lanes", sizes, dtype, terms),
    )


@pytest.mark.parametrize("one", ["strided", "broadcast-O", "broadcast-Z", "broadcast-X", "broadcast"])
@pytest.mark.parametrize("sizes", [SIZES["three-rows"], SIZES["blocked"]], ids=["streamed", "blocked"])
def test_no_axis_is_contiguous(sizes, one):
    x, z, weight, *others = drawn(sizes, torch.float64)(0)
    if one == "strided":
        weight = torch.full((*weight.shape, 2), math.nan, dtype=torch.float64)[..., 0].copy_(weight)
    for axis, name in enumerate("OZX"):
        if one == "broadcast" or one.endswith("-" + name):
            weight = weight.narrow(axis, 0, 1).expand_as(weight) if weight.shape[axis] > 1 else weight
    y = OPS.interaction(x, z, weight, *others)
    torch.testing.assert_close(y, reference.interaction(x, z, weight, *others), rtol=1e-12, atol=1e-12)
    dx, dz = OPS.interaction_input_grads(y, x, z, weight, None, None, True, True)
    torch.testing.assert_close(dx, torch.einsum("bo,ozx,bz->bx", y, weight, z), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(dz, torch.einsum("bo,ozx,bx->bz", y, weight, x), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_groups(dtype, order, rows, shared):
    """Each group is the call of its own."""
    groups, context, width, out = 5, 6, 16, 12
    x, z, g = (torch.randn(groups, rows, size).to(dtype) for size in (width, context, out))
    weight = stored(torch.randn(1 if shared else groups, out, context, width).to(dtype), order)
    weight = weight.expand(groups, -1, -1, -1)
    y = OPS.interaction(x, z, weight, None, None, None)
    dx, dz = OPS.interaction_input_grads(g, x, z, weight, None, None, True, True)
    for i in range(groups):
        alone = OPS.interaction_input_grads(g[i], x[i], z[i], weight[i], None, None, True, True)
        for found, expected in zip(
            (y[i], dx[i], dz[i]),
            (OPS.interaction(x[i], z[i], weight[i], None, None, None), *alone),
            strict=True,
        ):
            torch.testing.assert_close(
                found, expected, rtol=1e-14 if dtype == torch.float64 else 1e-2, atol=1e-2
            )


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "softmax"])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("order", ORDERS)
def test_gates(order, rows, activation):
    x, z, weight, *others = drawn((rows, 13, 24, 24), torch.float64)(0)
    call = lambda weight: OPS.gated_interaction(x, z, weight, *others, activation, True)  # noqa: E731
    for found, expected in zip(call(stored(weight, order, 1)), call(weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["blocked", "three-rows", "short-width", "threaded", "output-lanes"])
def test_packed(name, dtype, order):
    """The same bits as from W itself."""
    x, z, weight, *others = drawn(SIZES[name], dtype)(0)
    weight = stored(weight, order)
    assert torch.equal(mi.interaction(x, z, mi.pack(weight), *others), mi.interaction(x, z, weight, *others))


@pytest.mark.parametrize("name", ["three-rows", "threaded"])
def test_z_innermost_is_the_exchanged_product(name):
    x, z, weight, u, v, c = drawn(SIZES[name], torch.float32)(0)
    weight = stored(weight, "OXZ")
    y = OPS.interaction(x, z, weight, u, v, c)
    assert torch.equal(y, OPS.interaction(z, x, weight.mT, v, u, c))
    dx, dz = OPS.interaction_input_grads(y, x, z, weight, u, v, True, True)
    other_z, other_x = OPS.interaction_input_grads(y, z, x, weight.mT, v, u, True, True)
    assert torch.equal(dx, other_x) and torch.equal(dz, other_z)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [2, 300])
def test_no_copy_of_w_and_explain_says_so(rows, order):
    x, z, weight, *_ = drawn((rows, 96, 160, 192), torch.float32, terms=False)(0)
    weight, g = stored(weight, order), torch.randn(rows, 192)
    plan = mi.explain(mi.interaction, x.requires_grad_(), z.requires_grad_(), weight)
    x, z = x.detach(), z.detach()
    size = weight.numel() * 4
    forward = peak_memory(lambda: OPS.interaction(x, z, weight, None, None, None))
    assert forward == plan.scratch + g.numel() * 4
    assert forward < size
    backward = peak_memory(lambda: OPS.interaction_input_grads(g, x, z, weight, None, None, True, True))
    assert backward == plan.backward[0].scratch + (x.numel() + z.numel()) * 4


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [3, 130])
def test_threads_change_no_bit(rows, order):
    x, z, weight, *others = drawn((rows, 130, 140, 96), torch.float32)(0)
    weight, g, found = stored(weight, order), torch.randn(rows, 96), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = OPS.interaction(x, z, weight, *others)
            found.append((y, *OPS.interaction_input_grads(g, x, z, weight, *others[:2], True, True)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [2, 40])
def test_overflow_and_nan(rows, order):
    x, z, weight, *_ = drawn((rows, 20, 24, 18), torch.float32, terms=False)(0)
    large = OPS.interaction(x * 1e25, z * 1e15, stored(weight * 1e-25, order), None, None, None)
    expected = reference.interaction((x * 1e25).double(), (z * 1e15).double(), (weight * 1e-25).double())
    torch.testing.assert_close(large.double(), expected, rtol=1e-3, atol=1e11)
    weight[5, 3, 7] = math.nan
    y = OPS.interaction(x, z, stored(weight, order), None, None, None)
    assert torch.equal(y.isnan().any(0), torch.arange(18) == 5)
    g = torch.ones(rows, 18)
    dx, dz = OPS.interaction_input_grads(g, x, z, stored(weight, order), None, None, True, True)
    assert torch.equal(dx.isnan().any(0), torch.arange(24) == 7)
    assert torch.equal(dz.isnan().any(0), torch.arange(20) == 3)


@pytest.mark.subprocess
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16"])
def test_other_instruction_sets(isa):
    if isa not in libraries.cpu_isa()["supported"] or isa == libraries.cpu_isa()["selected"]:
        pytest.skip(f"this machine or build has no {isa}, or every other test runs on it")
    sizes = "three-rows or blocked or short-width or output-lanes"
    chosen = f"test_error_rule and ({sizes}) and 3 and not float16"
    assert_passes("-k", chosen, "test_weight_layouts_cpu.py", least=20, MI_KERNELS_CPU_ISA=isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_outputs_in_the_lanes(rows, dtype):
    """Contiguous outputs that fill no vector, in a W shorter than one: nothing around it may be read."""
    for out, context, width in itertools.product((1, 2, 3, 5, 7), (1, 2, 3), (1, 2, 4)):
        buffer = torch.full((3 * 64,), float("nan"), dtype=dtype)
        stored = (
            buffer[64 : 64 + out * context * width]
            .view(width, context, out)
            .copy_(torch.randn(width, context, out))
        )
        x, z = (torch.randn(rows, size).to(dtype) for size in (width, context))
        weight = stored.permute(2, 1, 0)
        expected = torch.einsum("bi,oij,bj->bo", z.double(), weight.double(), x.double())
        found = mi.interaction(x, z, weight)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 5e-2)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        g = torch.randn(rows, out).to(dtype)
        leaves = x.requires_grad_(), z.requires_grad_()
        dx, dz = torch.autograd.grad(mi.interaction(*leaves, weight), leaves, g)
        t = torch.einsum("bo,oij->bij", g.double(), weight.double())
        torch.testing.assert_close(
            dx.double(), torch.einsum("bij,bi->bj", t, z.double()), rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(
            dz.double(), torch.einsum("bij,bj->bi", t, x.double()), rtol=tolerance, atol=tolerance
        )
