"""The Triton backend without a GPU: its kernels in the interpreter. Tiles are in test_triton_tiles.py.

TRITON_INTERPRET is read when the kernels are made, so the tests marked `INTERPRETED`, and a selection of the
tests of every backend, run in a second pytest. The interpreter takes milliseconds for a program: samples are
small. bfloat16 is refused: the interpreter holds its numbers as integers and computes garbage. It is
compiled ahead of time (test_triton_aot.py) and run on GPUs only.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_passes_interpreted
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops.interaction import reference
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.samples import GATE_MIDDLE, GATE_TERMS, MIDDLE, GateSample, Sample, Shape

pytest.importorskip("triton")
import triton
import triton.language as tl

from mi_kernels.ops.triton import host, interaction, kernels, plan, tile_limits, tiles
from mi_kernels.ops.triton.engine import rounded_to_tf32
from mi_kernels.ops.triton.launch import launch as start
from mi_kernels.ops.triton.launch import target

INTERPRETED = pytest.mark.skipif(not backends.interpreting(), reason="part of test_in_the_interpreter")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CAPABILITIES = (tile_limits.AMD, (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
PRIMITIVES = (
    "forward",
    "linear",
    "dual_linear",
    "sum",
    "input_grads",
    "context_grad",
    "weight_grad",
    "matrix_grad",
)
# Products side by side, rows, columns, and the lengths of both sums.
SIZES = (
    (1, 4096, 256, 32, 256),
    (1, 1000, 75, 17, 100),
    (7, 1, 1, 1, 1),
    (1, 1, 1024, 64, 1024),
    (256, 64, 3, 1, 9000),
)
SPLIT = Shape("split", (20,), 40, 17, 20)

# Tests of every backend, by name; {} stands for each of the words. float64 takes one draw of the arguments,
# other dtypes as many as make hundreds of elements, so they are tested where a few draws have them: gradients
# of each form, and those of second order.
SELECTION = {
    "test_interaction.py::test_values[triton-{}-torch.float64]": (
        "one odd odd-WU odd-Vc odd-c one-output long-context few-rows no-rows no-context no-input no-features"
        " no-output nothing no-context-WU middle-transposed middle-expanded shared-context"
    ),
    "test_interaction.py::test_values[triton-{}-torch.float32]": "past-powers middle-gaps",
    "test_interaction.py::test_values[triton-{}-torch.float16]": "past-powers middle-gaps",
    "test_interaction.py::test_nan_and_inf_reach_what_depends_on_them_and_nothing_else"
    "[triton-odd-{}-torch.float32-nan]": "x z weight weight_z weight_x bias",
    "test_interaction.py::test_{}[triton]": "result_is_contiguous_and_new bilinear_agrees_with_torch",
    "test_gradients.py::test_error_rule[triton-{}-torch.float64]": (
        "one odd odd-WU odd-Vc one-output long-context no-rows no-context no-input no-output middle-gaps 1d-x"
    ),
    "test_gradients.py::test_error_rule[triton-{}]": (
        "past-powers-W-torch.float32 past-powers-W-torch.float16 odd-UV-torch.float32 odd-UV-torch.float16"
    ),
    "test_gradients.py::test_error_rule_of_second_order[triton-torch.{}]": "float64 float32 float16",
    "test_shared.py::test_error_rule[triton-per_z-groups-W-torch.{}]": "float32 float16",
    "test_overflow.py::test_products_leave_the_range_of_float16[triton-{}]": "8-huge 8-tiny 32-small",
    "test_gradients.py::test_gradient_of_nan_input[triton-{}]": "x z weight",
    "test_gradients.py::test_only_what_is_asked_for_is_computed[triton-{}]": "x z W U xzWUVc xW zU",
    "test_gradients.py::test_gradient_layouts[triton-{}]": "gaps expanded",
    "test_gradients.py::test_{}[triton]": (
        "third_order_equals_that_of_einsum nothing_but_the_inputs_is_saved"
    ),
    "test_gates.py::test_error_rule[triton-{}-torch.float64]": (
        "diagonal-odd-AaCcG gated_interaction-odd-WUVc"
    ),
    "test_gates.py::test_error_rule[triton-diagonal-odd-AC-torch.{}]": "float32 float16",
    "test_gates.py::test_error_rule[triton-gated_interaction-odd-WU-torch.{}]": "float32 float16",
    "test_gates.py::test_second_order_is_as_exact_as_pytorch[triton-{}]": (
        "diagonal-torch.float32 diagonal-torch.float16"
        " gated_interaction-torch.float32 gated_interaction-torch.float16"
    ),
    "test_gates.py::test_third_order[triton-{}]": "diagonal-sigmoid gated_interaction-softmax",
    "test_gates.py::test_nan_and_inf[triton-{}]": "diagonal-nan",
    "test_gates.py::test_explain[triton-{}]": "diagonal gated_interaction",
    "test_glu.py::test_error_rule[triton-glu-odd-{}-torch.float32]": "Ga GV",
    "test_glu.py::test_second_order_is_as_exact_as_pytorch[triton-torch.{}]": "float32 float16",
    "test_low_rank.py::test_second_order_is_as_exact_as_pytorch[triton-torch.{}]": "float32 float16",
    "test_modulate.py::test_second_order_is_as_exact_as_pytorch[triton-maps-{}]": (
        "sigmoid-torch.float32 sigmoid-torch.float16 softmax-torch.float32"
    ),
    "test_functional_transforms.py::test_vmap_over_any_arguments[triton-{}-1]": "x W xzWUVc",
    "test_functional_transforms.py::test_{}[triton]": "grad_vjp_jvp",
    "test_shared.py::test_empty[triton-{}]": "shape0 shape1",
    "test_biaffine.py::test_error_rule[triton-{}-torch.float32]": "label-11 label-11-cf arc-10",
}


def names():
    return [name.format(word) for name, words in SELECTION.items() for word in words.split()]


@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter")
@pytest.mark.parametrize(
    "part",
    [
        "few",
        pytest.param("half", marks=pytest.mark.subprocess),
        pytest.param("own", marks=pytest.mark.subprocess),
    ],
)
def test_in_the_interpreter(part):
    """In processes which the workers of one run can share; the inner loop has a few of the selection."""
    chosen = names()
    few = chosen[::8]
    others = [name for name in chosen if name not in few]
    tests, own = {
        "few": (few, []),
        "half": (others[::2], ["test_triton_far.py"]),
        "own": (others[1::2], [Path(__file__).name]),
    }[part]
    assert_passes_interpreted(*tests, *own)


def test_a_grid_too_large_is_refused():
    """A softmax takes a program for each row; nothing is reserved for the rows that are only counted here."""
    rows = 1 << 31
    with pytest.raises(ValueError, match=f"softmax_gate: expected at most {rows - 1} programs .* got {rows}"):
        start(torch.device("cpu"), kernels.softmax_gate, rows, {}, 4, 1)


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 5, 9), (2, 20, 20, 9), (2, 17, 12, 2)], ids=str)
def test_padding_makes_no_nan_of_inf(sizes, dtype):
    """All numbers are positive, so that Inf in one operand is Inf in the results and never NaN."""
    rows, context, width, out = sizes
    for place in range(3):
        operands = [torch.ones(rows, size, dtype=dtype) for size in (out, width, context)]
        operands[place][0, 1] = float("inf")
        grad, x, z = operands
        weight = torch.full((out, context, width), 0.5, dtype=dtype)
        results = (
            interaction.forward(x, z, weight, None, None, None),
            *interaction.input_grads(grad, x, z, weight, None, None, True, True),
            interaction.weight_grads(grad, x, z, True, False, False, False)[0],
        )
        for result in results:
            assert not result.isnan().any()
        infinite = (results[0] if place else results[1]).isinf()
        assert infinite[0].all() and not infinite[1:].any()


@INTERPRETED
@pytest.mark.parametrize("style", ["held", "scaled", "promoted"])
def test_styles_agree(style, monkeypatch):
    """float64 and float32 take every style here; the choice would be one for each dtype."""

    def chosen(problem):
        tile = tiles.choose(problem)
        return replace(tile, style=style) if problem.primitive == "forward" else tile

    monkeypatch.setattr(host, "choose", chosen)
    for shape in (MIDDLE, SPLIT):
        arguments = Sample(shape).arguments(torch.float64)
        with mi.backend("triton"):
            y = mi.interaction(*arguments)
        torch.testing.assert_close(y, reference.interaction(*arguments), rtol=1e-12, atol=1e-12)


@INTERPRETED
def test_bfloat16_is_refused():
    """On the CPU, where alone the interpreter takes tensors, and by autocast too."""
    x, scale = torch.ones(2, 3), torch.ones(2, 1)
    z, w, a = torch.ones(2, 4), torch.ones(3, 4, 3), torch.ones(3, 4)
    calls = {
        mi.interaction: (x, z, w),
        mi.bilinear: (z, x, w),
        mi.diagonal: (x, z, a),
        mi.gated_interaction: (x, z, w),
        mi.generate: (z, w),
        mi.modulate: (x, scale),
    }
    message = "bfloat16 while interpreting: .* garbage; take torch.float32 or torch.float16, or a GPU"
    with mi.backend("triton"):
        for function, arguments in calls.items():
            function(*arguments)
            with pytest.raises(ValueError, match=message):
                function(*(t.bfloat16() for t in arguments))
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
            mi.interaction(x, z, w)
    assert mi.interaction(x.bfloat16(), z.bfloat16(), w.bfloat16()).eq(12).all()


@INTERPRETED
def test_more_rows_than_a_band_has():
    """Nine tiles of rows and two of columns: bands of eight, the second of which is not full."""
    x, z, w, *_ = Sample(Shape("bands", (530,), 2, 3, 70)).arguments(torch.float64)
    launches, _ = plan.record(interaction.forward, (x, z, w, None, None, None), x.device)
    assert len(launches) == 1 and launches[0].programs == 18
    y, truth = interaction.forward(x, z, w, None, None, None), reference.interaction(x, z, w)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)


@triton.jit
def _round_kernel(p, p_rounded, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(p_rounded + lanes, rounded_to_tf32(tl.load(p + lanes)))


@INTERPRETED
def test_rounding_to_tf32():
    """Half away from zero at 10 bits behind the first one; every NaN stays one, GPUs make 0x7fffffff."""
    patterns = [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7F800000, 0x7F7FFFFF, 0x3F801000, 0x3F800FFF]
    values = torch.cat([torch.tensor(patterns, dtype=torch.int32).view(torch.float32), torch.randn(56)])
    rounded = torch.empty_like(values)
    _round_kernel[(1,)](values, rounded, BLOCK=64)
    mantissa, exponent = torch.frexp(values.double())
    expected = torch.ldexp((mantissa.abs() * 2048 + 0.5).floor() / 2048 * mantissa.sign(), exponent)
    expected = torch.where(values.isinf(), values, expected.float())
    assert rounded[:4].isnan().all() and torch.equal(rounded[4:], expected[4:])


def results(sample, dtype, *, arguments=None):
    """y, its gradients, and those of the squared gradients."""
    leaves = [t.detach().requires_grad_() for t in arguments or sample.arguments(dtype)]
    with mi.backend("triton"):
        y = mi.interaction(*leaves)
        first = torch.autograd.grad(y, leaves, sample.cotangent(dtype), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first[:5]), leaves[:5])
    return [y.detach(), *(g.detach() for g in first), *second]


@INTERPRETED
def test_same_bits_where_programs_share_a_sum():
    sample = Sample(SPLIT)
    x, z, w, *_ = sample.arguments(torch.float32)
    launches, scratch = plan.record(interaction.forward, (x, z, w, None, None, None), x.device)
    assert launches[0].arguments["splits"] > 1 and scratch > 0
    assert all(
        torch.equal(a, b) for a, b in zip(*(results(sample, torch.float32) for _ in "ab"), strict=True)
    )


@pytest.mark.parametrize(("context", "wide"), [(8191, "int32"), (8192, "int64")])
def test_which_strides_are_wide(context, wide):
    """W has 512 * Z elements for each output; rows and parts may be further apart, they lead to a tile."""
    x, z, w = plan.without_data((1 << 16, 512), (1 << 16, context), (64, context, 512), dtype=torch.bfloat16)
    launches, _ = plan.record(interaction.forward, (x, z, w, None, None, None), x.device)
    assert launches[0].arguments["INDEX"] == getattr(tl, wide)
    launches, _ = plan.record(interaction.weight_grads, (x, z, x, True, True, True, True), x.device)
    assert {launch.arguments["INDEX"] for launch in launches} == {getattr(tl, wide)} | {tl.int32}


@INTERPRETED
def test_distances_beyond_32_bits(monkeypatch):
    """Strides from 2^22 on are counted in int64 within a tile too."""
    sample = Sample(Shape("far", (3,), 2, 5, 4))
    arguments = sample.arguments(torch.float16)
    room = torch.empty(9 << 20, dtype=torch.float16)
    far = [room[start:].as_strided((3, n), ((1 << 22) - 1, 1)) for start, n in ((0, 5), (64, 2))]
    for tensor, values in zip(far, arguments[:2], strict=True):
        tensor.copy_(values)
    expected = results(sample, torch.float16)
    monkeypatch.setattr(host, "WIDE_STRIDE", 1 << 21)
    found = results(sample, torch.float16, arguments=[*far, *arguments[2:]])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@INTERPRETED
def test_rows_in_pieces_give_the_same_gradients(monkeypatch):
    sample = Sample(Shape("pieces", (37,), 5, 70, 4))
    expected = results(sample, torch.float32)
    monkeypatch.setattr(host, "PARTIAL_BYTES", 300)
    x, z, w, *_ = sample.arguments(torch.float32)
    launches, _ = plan.record(
        interaction.input_grads, (sample.cotangent(torch.float32), x, z, w, None, None, True, True), x.device
    )
    assert sum(launch.arguments["w"] is not None for launch in launches) == 8
    torch.testing.assert_close(results(sample, torch.float32), expected, rtol=1e-5, atol=1e-5)


@INTERPRETED
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "gelu", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", GATE_TERMS)
def test_gates_are_as_exact_as_pytorch(op, dtype, name):
    sample = GateSample(op, GATE_MIDDLE, GATE_TERMS[op], "gaps", name)
    tensors = sample.arguments(dtype)
    options = dict(zip(sample.names[2:], tensors[2:], strict=True)) | sample.options
    with mi.backend("reference"):
        exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        truth = getattr(mi, op)(tensors[0].double(), tensors[1].double(), **exact)
        rival = getattr(mi, op)(*tensors[:2], **options)
    with mi.backend("triton"):
        y = getattr(mi, op)(*tensors[:2], **options)
    assert y.dtype == dtype and relative_error(y, truth) <= 2 * relative_error(rival, truth)


@INTERPRETED
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_the_offset_of_a_gate_keeps_its_digits(name):
    """Triton's own choice for a number is float32, which has no 0.1."""
    x, z, a = torch.ones(3, 5).double(), torch.randn(3, 4).double(), torch.randn(5, 4).double()
    with mi.backend("triton"):
        y = mi.diagonal(x, z, a, activation=name, scale_offset=0.1)
    with mi.backend("reference"):
        truth = mi.diagonal(x, z, a, activation=name, scale_offset=0.1)
    torch.testing.assert_close(y, truth, rtol=1e-14, atol=1e-14)


@INTERPRETED
def test_derivatives_against_differences():
    """The derivatives of einsum stand in elsewhere: an exact check costs minutes here."""
    sample = Sample(Shape("tiny", (2,), 2, 3, 2))
    inputs = [t.requires_grad_() for t in sample.arguments(torch.float64)[:3]]
    with mi.backend("triton"):
        assert gradcheck(mi.interaction, inputs, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(mi.interaction, inputs, fast_mode=True)


@INTERPRETED
def test_explained_as_launched():
    x, z, w, *_ = Sample(SPLIT).arguments(torch.float32, requires_grad=True)
    with mi.backend("triton"):
        explained = mi.explain(mi.interaction, x, z, w)
        assert mi.explain(mi.interaction, x, z, None, weight_x=w[:, 0]).algorithm == "linear"
        assert mi.explain(mi.interaction, x, z, w[:1]).algorithm == "reduced"
    _, scratch = plan.record(interaction.forward, (x, z, w, None, None, None), x.device)
    assert explained.algorithm == "promoted" and explained.scratch == scratch
    assert [step.algorithm for step in explained.backward] == ["fused", "k_scaled"]


def test_a_gpu_of_amd_takes_small_tiles_and_no_tf32(monkeypatch):
    """Its capability is a number of another kind, which must not be read as one of NVIDIA's."""
    from mi_kernels.ops import precision
    from mi_kernels.ops.triton import launch

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    launch._device_target.cache_clear()
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        assert target(torch.device("cuda", 0)).capability == launch.AMD
        assert precision.precision(torch.float32) == "ieee"
        monkeypatch.setattr(torch.version, "hip", None)
        assert precision.precision(torch.float32) == "tf32"
    finally:
        settings.fp32_precision = before
    launch._device_target.cache_clear()
    assert tile_limits.available_shared_memory(launch.AMD) <= 64 << 10


@INTERPRETED
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_small_values_keep_their_digits_beside_approximations(name, sign, monkeypatch):
    """As far off as a GPU's may be: quotients by two units, exp2 by one but where it is a power of two."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    divide, power = builder.create_fdiv, builder.create_exp2

    def off(tensor, units, where=True):
        factor = 1 + sign * units * 2.0**-23 * where
        tensor.data = (tensor.data * factor).astype(tensor.data.dtype)
        return tensor

    monkeypatch.setattr(builder, "create_fdiv", lambda self, a, b: off(divide(self, a, b), 2))
    monkeypatch.setattr(
        builder, "create_exp2", lambda self, a: off(power(self, a), 1, a.data != a.data.round())
    )
    t = torch.logspace(-35, 1, 20001, dtype=torch.float64).float()
    t = torch.cat([t, -t])
    with mi.backend("triton"):
        found = mi.modulate(torch.ones_like(t), t, activation=name).double()
    exact = getattr(torch, name)(t.double())
    error = (found - exact).abs() / exact.abs().clamp(min=1e-37)
    assert float(error.max()) <= 3 * torch.finfo(torch.float32).eps
