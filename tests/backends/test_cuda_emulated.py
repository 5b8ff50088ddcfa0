"""The CUDA kernels without a GPU: the same sources on an emulator, under the suite's own tests.

This covers checks, plans, index arithmetic, layouts of fragments and of shared memory, waits, barriers,
epilogues and reductions. It does not show that a GPU does what the PTX ISA says, how it rounds, or its speed.
"""

import re
from functools import partial

import pytest
import torch
from emulated import backend
from helpers import assert_passes

from mi_kernels import planners
from mi_kernels.ops import activations, precision
from mi_kernels.ops.gate import plan as gate_plan
from mi_kernels.ops.gate import portable as gate_portable
from mi_kernels.ops.interaction import plan, portable
from mi_kernels.testing.errors import check_errors, relative_error
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import lay_out, stored

pytestmark = pytest.mark.skipif(backend.COMPILER is None, reason="no C++ compiler")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The cheap cases of each file, and how many there are at least: an emulated thread is slow.
SUITE = {
    "test_interaction": (
        "test_values and (odd or past-powers or outer or no-input or no-features or offset or transposed)"
        " and (bfloat16 or float32) and not threaded or nan_and_inf and middle-weight-torch.bfloat16"
        " or float16 and not bfloat16 and (test_values and past-powers or nan_and_inf and odd)",
        80,
    ),
    "test_gradients": (
        "test_error_rule and ((odd-UVc or no-input) and (float64 or bfloat16) or odd-torch.float16)"
        " or third_order or double_backward",
        8,
    ),
    "test_overflow": ("range_of_float16", 10),
    "test_modulate": ("test_error_rule and not threaded and not long and (float64 or bfloat16)", 100),
    "test_norms": (
        "one_pass or memory_format or test_error_rule and (float64 or bfloat16 and layer-tokens)"
        " and not split and not activations and not threaded and not many and not long and not mean1000",
        100,
    ),
    "test_mix": ("test_error_rule and not threaded and not long and (float64 or bfloat16)", 60),
    "test_gates": ("test_error_rule and odd-AaCcG and (float32 or bfloat16)", 2),
    "test_activations": ("(test_kernels_agree or test_small_values) and not float16", 20),
    "test_functional_transforms": ("hessian or jacfwd-jacrev-jacrev or vmap_over_any and W or nested", 20),
    "test_compile": ("equals_eager or export or batch_size or jacrev-jacfwd or autocast_inside", 8),
    "test_autocast": ("cuda", 10),
    "test_opinfo": ("order and cuda", 2),
    "test_biaffine": ("test_error_rule and (label-11 or arc-10) and float32 and not bias", 6),
    "test_glu": ("test_error_rule and odd-G and (float32 or bfloat16)", 6),
    "test_low_rank": ("test_error_rule and odd and (float32 or bfloat16)", 4),
    "test_weight_layouts": (
        "leaf or kernels_see or transforms"
        " or test_error_rule and middle and (ZXO and float32 or XOZ and bfloat16)",
        22,
    ),
}


@pytest.fixture(scope="module")
def emulated():
    operations = backend.load()
    before = operations.emulated_processors(4)
    yield operations
    operations.emulated_processors(before)


@pytest.fixture
def tf32(emulated):
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    yield emulated
    settings.fp32_precision = before


# In four processes, as most of the time of a short one goes into imports.
PARTS = (
    ("test_interaction", "test_gradients", "test_overflow"),
    ("test_modulate", "test_mix"),
    ("test_norms",),
    tuple(SUITE)[6:],
)


@pytest.mark.subprocess
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part[0])
def test_suite(part):
    """The error rule and the gradients, of the other test files, on the emulator."""
    chosen = " or ".join(f"{name}.py and ({SUITE[name][0]})" for name in part)
    files = [f"{name}.py" for name in part]
    least = sum(SUITE[name][1] for name in part)
    assert_passes("-k", chosen, *files, least=least, MI_KERNELS_TEST_EMULATED="1")


def test_every_file_of_the_suite_has_a_part():
    assert {name for part in PARTS for name in part} == {*SUITE}


def draw(sizes, dtype, groups=()):
    """x, z, W, U, V, c, g for sizes B, Z, X, O."""
    b, i, j, o = sizes
    shapes = ((b, j), (b, i), (o, i, j), (o, i), (o, j), (o,), (b, o))
    return [torch.randn(*groups, *shape, dtype=torch.float64).to(dtype) for shape in shapes]


def primitives(operations, x, z, w, u, v, c, g):
    return (
        operations.interaction(x, z, w, u, v, c),
        *operations.interaction_input_grads(g, x, z, w, u, v, True, True),
        *operations.interaction_weight_grads(g, x, z, True, True, True, True),
    )


def truth(x, z, w, u, v, c, g):
    x, z, w, u, v, c, g = (t.double() for t in (x, z, w, u, v, c, g))
    return (
        portable.forward(x, z, w, u, v, c),
        *portable.input_grads(g, x, z, w, u, v, True, True),
        *portable.weight_grads(g, x, z, True, True, True, True),
    )


LIMITS = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


SPLITS = [
    *((sizes, 40, dtype) for sizes in ((70, 6, 32, 140), (131, 5, 72, 20)) for dtype in FLOATS),
    *((sizes, 1, torch.bfloat16) for sizes in ((131, 5, 72, 130), (37, 5, 13, 11))),
    ((300, 9, 16, 24), 5, torch.bfloat16),
    ((200, 9, 13, 5), 40, torch.float16),
    # A few rows: vectorized or not, one block of rows and two, more than one split.
    *((sizes, 3, dtype) for sizes in ((3, 70, 64, 9), (1, 5, 7, 4)) for dtype in FLOATS),
    ((8, 40, 33, 6), 60, torch.float32),
    ((4, 301, 24, 3), 60, torch.float16),
    ((5, 3, 1100, 2), 9, torch.float32),
    ((2, 5, 40, 600), 2, torch.float64),
]


@pytest.mark.parametrize(("sizes", "processors", "dtype"), SPLITS, ids=str)
def test_every_split_of_the_work(sizes, processors, dtype, emulated):
    """Several tiles in each direction, vectorized or not, reductions that are split or not."""
    emulated.emulated_processors(processors)
    arguments = draw(sizes, dtype)
    for index, (found, exact) in enumerate(
        zip(primitives(emulated, *arguments), truth(*arguments), strict=True)
    ):
        assert relative_error(found, exact) < LIMITS[dtype], index
    assert emulated.emulated_conflicts() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [20, 3])
def test_groups_and_shared_weights(rows, dtype, emulated):
    arguments = draw((rows, 3, 16, 24), dtype, groups=(3,))
    for shared in (False, True):
        if shared:
            arguments[2:6] = [t[:1].expand_as(t) for t in arguments[2:6]]
        for found, exact in zip(primitives(emulated, *arguments), truth(*arguments), strict=True):
            assert relative_error(found, exact) < LIMITS[dtype]


@pytest.mark.parametrize("activation", ["tanh", "softmax"])
def test_a_few_rows(activation, emulated):
    """Gates on the small-batch kernel, and products z x that overflow float16."""
    x, z, w, u, v, c, _ = draw((3, 40, 72, 72), torch.float16)
    arguments = (400 * x, 400 * z, w / 160000, u / 400, v / 400, c)
    expected = gate_portable.gated_interaction(*(t.double() for t in arguments), activation, True)
    for found, true in zip(emulated.gated_interaction(*arguments, activation, True), expected, strict=True):
        assert relative_error(found, true) < 2 * LIMITS[torch.float16]
    plan = emulated.cuda_interaction_plan("forward", [1, 3, 40, 72, 72], torch.float16, 15, 90, 132)
    assert plan.startswith("algorithm=stream;scratch=")
    plan = emulated.cuda_interaction_plan("input_grads", [1, 4, 40, 72, 72], torch.bfloat16, 63, 90, 132)
    assert plan.startswith("algorithm=stream;scratch=")


def rounded(tensor):
    """float32 rounded to tf32, to nearest with ties away from zero."""
    if tensor is None or tensor.dtype != torch.float32:
        return tensor
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("groups", [(), (2,)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
@pytest.mark.parametrize(
    ("sizes", "processors"), [((131, 5, 72, 140), 1), ((70, 6, 32, 20), 40), ((37, 5, 13, 11), 4)]
)
def test_error_rule_in_tf32(sizes, processors, layout, groups, tf32):
    """Against einsum on operands rounded to tf32."""
    tf32.emulated_processors(processors)
    arguments = [lay_out(t, layout) for t in draw(sizes, torch.float32, groups)]

    def einsum(*tensors):
        x, z, w, u, v, c, g = map(rounded, tensors)
        leaves = [t.detach().requires_grad_() for t in (x, z, w, u, v, c)]
        subscripts = "gbi,goij,gbj->gbo" if groups else "bi,oij,bj->bo"
        y = torch.einsum(subscripts, leaves[1], leaves[2], leaves[0]) + leaves[1] @ leaves[3].mT
        y = y + leaves[0] @ leaves[4].mT + leaves[5].unsqueeze(-2)
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    check_errors(lambda *t: primitives(tf32, *t), einsum, lambda _: arguments, most=1)
    assert tf32.emulated_conflicts() == 0


def test_tf32_is_rounded_not_truncated(tf32):
    """All numbers are positive, so truncation would make every result smaller, by about 7e-4."""
    arguments = [t.abs() + 1 for t in draw((70, 3, 40, 24), torch.float32)]
    x, z, _, u, v, _, _ = arguments
    found, exact = [*primitives(tf32, *arguments)], [*truth(*arguments)]
    gate = (x, z, torch.cat((u, u))[:40], None, torch.cat((u, u))[:40], None, torch.cat((v, v))[:40])
    found += tf32.diagonal(*gate, "identity", 0.0, True)
    exact += gate_portable.diagonal(*(t if t is None else t.double() for t in gate), "identity", 0.0, True)
    for ours, theirs in zip(found, exact, strict=True):
        assert abs(float(((ours - theirs) / theirs).mean())) < 5e-5
        assert relative_error(ours, theirs) < 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(20, 3, 32, 9), (37, 5, 13, 11)], ids=str)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800000], ids=("nan", "inf"))
def test_nan_and_inf_reach_what_depends_on_them(bits, sizes, dtype, tf32):
    """Numbers are positive, so that Inf stays Inf; adding to the NaN of GPUs would make it -0."""
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for index in range(7):
        arguments = [t.abs() + 0.5 for t in draw(sizes, dtype)]
        arguments[index].view(-1)[-1] = value
        for found, exact in zip(primitives(tf32, *arguments), truth(*arguments), strict=True):
            assert torch.equal(found.isnan(), exact.isnan()) and torch.equal(found.isinf(), exact.isinf())


def test_the_setting_for_tf32_is_that_of_pytorch(emulated):
    """The older spellings too, and one answer for both GPU backends."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    plan = partial(
        emulated.cuda_interaction_plan, "forward", [1, 64, 8, 64, 64], arch=80, processors=4, terms=1
    )
    try:
        for name, value, expected in (
            ("fp32_precision", "tf32", "tf32"),
            ("fp32_precision", "ieee", "ieee"),
            ("fp32_precision", "none", "ieee"),
            ("allow_tf32", True, "tf32"),
            ("allow_tf32", False, "ieee"),
        ):
            setattr(settings, name, value)
            assert precision.precision(torch.float32) == expected
            algorithm = "mma-tf32" if expected == "tf32" else "fma"
            assert plan(dtype=torch.float32).startswith(f"algorithm={algorithm};")
            for dtype in (torch.float64, torch.bfloat16, torch.float16):
                assert precision.precision(dtype) == "ieee"
                assert "tf32" not in plan(dtype=dtype)
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize(
    ("width", "forward"), [(1, "widened"), (15, "widened"), (16, "exact"), (40, "exact"), (256, "exact")]
)
def test_algorithms_of_float16(width, forward, emulated):
    """Per context unless half of the stages would be padding; dW uses products in float32."""

    def algorithm(primitive, terms):
        sizes = [1, 300, 9, width, 24]
        text = emulated.cuda_interaction_plan(primitive, sizes, torch.float16, terms, 80, 108)
        return re.match("algorithm=([^;]*);", text)[1]

    assert algorithm("forward", 63) == f"mma-{forward}"
    assert algorithm("weight_grads", 63) == "mma-widened"
    assert {algorithm("input_grads", 63), algorithm("forward", 62), algorithm("weight_grads", 62)} == {"mma"}


@pytest.mark.parametrize("width", [13, 40])
def test_groups_in_float16(width, emulated):
    arguments = draw((20, 9, width, 24), torch.float16, groups=(3,))
    arguments[2:4] = [t[:1].expand_as(t) for t in arguments[2:4]]
    for found, exact in zip(primitives(emulated, *arguments), truth(*arguments), strict=True):
        assert relative_error(found, exact) < LIMITS[torch.float16]
    assert emulated.emulated_conflicts() == 0


@pytest.mark.parametrize(
    ("sizes", "processors"),
    [((64, 300, 64, 8), 132), ((8, 2000, 33, 4), 132), ((4, 16, 16, 2000), 132), ((9, 2000, 8, 4), 1)],
)
@pytest.mark.parametrize("along_outputs", [False, True])
def test_long_sums_of_positive_numbers(sizes, processors, along_outputs, emulated):
    """Rounding errors add up if nothing cancels: the error rule holds for long summation blocks too."""
    emulated.emulated_processors(processors)
    x, z, w, *_, g = (t.abs() for t in draw(sizes, torch.float32))
    w = stored(w, "ZXO") if along_outputs else w

    def ours(x, z, w, g):
        y = emulated.interaction(x, z, w, None, None, None)
        return y, *emulated.interaction_input_grads(g, x, z, w, None, None, True, True)

    def einsum(x, z, w, g):
        leaves = x.clone().requires_grad_(), z.clone().requires_grad_()
        y = torch.einsum("bi,oij,bj->bo", leaves[1], w, leaves[0])
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    check_errors(ours, einsum, lambda _: (x, z, w, g), most=2)


def test_the_same_bits_again(emulated):
    arguments = draw((70, 6, 32, 24), torch.bfloat16)
    first, second = (primitives(emulated, *arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", activations.NAMES)
def test_gates_of_every_activation(activation, dtype, emulated):
    """Two tiles in each direction; the saved preactivations too."""
    x, z, _, a, g, c, _ = draw((70, 6, 72, 72), dtype)
    shift_weight, shift_bias = torch.randn(72, 6).to(dtype), torch.randn(72).to(dtype)
    w = torch.randn(72, 6, 72).to(dtype)
    g, w = g / 8, w / 20
    for shift in ((shift_weight, shift_bias), (None, shift_bias)):
        arguments = (x, z, a, c, *shift, g)
        exact = (None if t is None else t.double() for t in arguments)
        expected = gate_portable.diagonal(*exact, activation, 0.5, True)
        for found, true in zip(emulated.diagonal(*arguments, activation, 0.5, True), expected, strict=True):
            assert relative_error(found, true) < LIMITS[dtype]
    arguments = (x, z, w, a, g, c)
    expected = gate_portable.gated_interaction(*(t.double() for t in arguments), activation, True)
    for found, true in zip(emulated.gated_interaction(*arguments, activation, True), expected, strict=True):
        assert relative_error(found, true) < 2 * LIMITS[dtype]
    assert emulated.emulated_conflicts() == 0


EXPLAINED = [
    (dtype, rows, activation, shift)
    for dtype in (torch.float32, torch.float16)
    for rows in (3, 70)
    for activation in ("tanh", "softmax")
    for shift in ("", "C")
]


@pytest.mark.parametrize(("dtype", "rows", "activation", "shift"), EXPLAINED, ids=str)
def test_explain_tells_the_scratch_memory(dtype, rows, activation, shift, emulated, monkeypatch):
    """To the byte."""
    monkeypatch.setattr(planners, "query", partial(getattr, emulated))
    monkeypatch.setattr(planners, "gpu", lambda device: (80, 40))
    emulated.emulated_processors(40)
    x, z, w, a, v, c, _ = draw((rows, 40, 72, 72), dtype)

    def bytes_of(*tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    explained = gate_plan.gated("cuda", activation, x.shape[:-1], x, z, w, None, v, c)
    peak = peak_memory(lambda: emulated.gated_interaction(x, z, w, None, v, c, activation, False))
    assert peak == explained.scratch + bytes_of(x)
    c_weight = a if shift else None
    explained = gate_plan.diagonal("cuda", activation, x.shape[:-1], x, z, a, c, c_weight, c, None)
    arguments = (x, z, a, c, c_weight, c, None, activation, 0.0, False)
    assert peak_memory(lambda: emulated.diagonal(*arguments)) == explained.scratch + bytes_of(x)
    if rows == 3:  # chunks, or elements where W begins between boundaries
        odd = torch.empty(w.numel() + 1, dtype=dtype)[1:].view_as(w)
        grads = plan.plan("cuda", x.clone().requires_grad_(), z, (odd, None, None, None)).backward[0]
        peak = peak_memory(lambda: emulated.interaction_input_grads(x, x, z, odd, None, None, True, False))
        assert peak == grads.scratch + bytes_of(x)
    explained = plan.plan("cuda", x.requires_grad_(), z, (w, None, v, c))
    forward, grads = explained, explained.backward[0]
    x = x.detach()
    y = torch.empty_like(x)
    assert peak_memory(lambda: emulated.interaction(x, z, w, None, v, c)) == forward.scratch + bytes_of(y)
    peak = peak_memory(lambda: emulated.interaction_input_grads(y, x, z, w, None, v, True, False))
    assert peak == grads.scratch + bytes_of(x)


def test_explain_knows_alignment(emulated):
    whole = torch.zeros(5, 24, dtype=torch.bfloat16)
    assert all(emulated.cuda_aligned(t) for t in (whole, whole[:, :16], whole[1:], whole[:, 8:], whole[0]))
    assert emulated.cuda_aligned(whole[:1, :13].contiguous()), "one row"
    for t in (whole[:, 1:], whole.t(), torch.zeros(5, 12, dtype=torch.bfloat16), whole[:, ::2]):
        assert not emulated.cuda_aligned(t)


@pytest.mark.parametrize("primitive", ["forward", "input_grads", "weight_grads"])
def test_plans(primitive, emulated):
    def plan(sizes, processors):
        text = emulated.cuda_interaction_plan(primitive, sizes, torch.bfloat16, 63, 90, processors)
        return dict(field.split("=") for field in text.split(";"))

    large, small = plan([1, 8192, 64, 512, 512], 132), plan([1, 128, 64, 512, 128], 132)
    assert large["algorithm"] == small["algorithm"] == "mma"
    assert int(small["blocks"]) >= 64, "a small product is split over the chip"
    assert int(plan([1, 128, 64, 512, 128], 1)["splits"]) <= 2, "nor where there is nothing to fill"
    for sizes in ([0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 5, 1 << 20, 1 << 20, 3], [70000, 3, 4, 5, 6]):
        assert int(plan(sizes, 132)["blocks"]) >= 0
