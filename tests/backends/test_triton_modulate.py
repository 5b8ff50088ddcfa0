"""Modulation in Triton: its axes, and values and gradients in the interpreter, in a process of its own.

TRITON_INTERPRET is read when the kernels are made, so the tests below `INTERPRETED` run in a second pytest on
this file. The interpreter takes milliseconds for a program: few draws of few samples, where the tests of
test_modulate.py would take half an hour; those run on a GPU.
"""

import functools
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_passes_interpreted
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops import activations
from mi_kernels.ops.modulate import reference
from mi_kernels.testing.checks import form_of, gradients_of, values_of
from mi_kernels.testing.errors import check_errors
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.mix_samples import Mixing, mixings
from mi_kernels.testing.samples import MAPS, TOKENS, Modulation, modulations

pytest.importorskip("triton")
from mi_kernels.ops.triton import modulate as kernels
from mi_kernels.ops.triton import modulate_tiling as axes
from mi_kernels.ops.triton.launch import recording

INTERPRETED = pytest.mark.skipif(not backends.interpreting(), reason="part of test_in_the_interpreter")
SMALL = (TOKENS, Modulation("maps-last", MAPS.x, MAPS.scale, MAPS.shift, "channels_last"))
SPLIT = Modulation("split", (8, 700, 24), (1, 1, 24), (1, 1, 24))


@pytest.mark.subprocess
@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter")
def test_in_the_interpreter():
    assert_passes_interpreted(__file__)


def _collapsed(sample, layout="contiguous"):
    x, scale, _ = Modulation("", sample.x, sample.scale, None, layout).arguments(torch.float32)
    strides = x.stride(), tuple(s if n > 1 else 0 for s, n in zip(scale.stride(), scale.shape, strict=True))
    reduced = [own != size for own, size in zip(scale.shape, x.shape, strict=True)]
    return [(axis.size, axis.reduced) for axis in axes.collapse(x.shape, strides, reduced)]


def test_neighbouring_axes_become_one():
    assert _collapsed(TOKENS) == [(3, False), (19, True), (40, False)]
    assert _collapsed(MAPS) == [(10, False), (42, True)]
    assert _collapsed(MAPS, "channels_last") == [(2, False), (42, True), (5, False)]
    assert _collapsed(Modulation("", (6, 4, 5, 3), (6, 4, 5, 3))) == [(360, False)]
    assert _collapsed(Modulation("", (6, 4, 5, 3), (1, 1, 1, 1)), "transposed") == [(360, True)]
    assert _collapsed(Modulation("", (1, 1), (1, 1))) == []
    kept, reduced = axes.collapse((6, 4), ((4, 1),), (False, True))  # no operand tells them apart
    assert (kept.size, reduced.size) == (6, 4)


@pytest.mark.parametrize("shape", [(16, 1024, 1024), (65536, 48), (3, 10**6), (1 << 21, 8)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_tiles_cover_and_scratch_is_small(shape, itemsize):
    contiguous = torch.empty(shape, device="meta").stride()
    for kept in range(2 ** len(shape)):
        reduced = tuple(not kept >> d & 1 for d in range(len(shape)))
        sums = tuple(0 if r else s for r, s in zip(reduced, contiguous, strict=True))
        made = axes.tiling(shape, (contiguous, sums), reduced, itemsize)
        assert made.BM * made.BN * itemsize <= axes.TILE_BYTES and made.BM & made.BM - 1 == 0
        assert made.programs * made.splits < 2**31 and 1 <= made.splits <= made.steps
        # Sums of the splits, in float32, beside what one operand takes.
        elements = torch.Size(shape).numel()
        results = torch.Size(n for n, r in zip(shape, reduced, strict=True) if not r).numel()
        if made.splits > 1:
            assert 4 * made.splits * results <= itemsize * elements / 4


def test_nothing_waits_for_the_gpu():
    """Meta tensors have no data to wait for, so a call can be captured in a CUDA graph."""
    x, scale, shift = (t.to("meta") for t in TOKENS.arguments(torch.bfloat16))
    with recording((9, 0)) as launches:
        y = kernels.modulate(x, scale, shift, "sigmoid", 1.0)
        assert y.shape == x.shape
        kernels.modulate_grads(x, x, scale, list(shift.shape), "sigmoid", 1.0, True, True, True)
        far = Modulation("far", (8, 70000, 24), (1, 1, 24)).arguments(torch.float32)[0].to("meta")
        kernels.modulate_grads(far, far, far[:1, :1], [1, 1, 24], "sigmoid", 1.0, True, True, True)
    names = [launch.kernel.__name__ for launch in launches]
    assert names[:2] == ["_modulate_kernel", "_modulate_grads_kernel"]
    assert names[2:] == ["_modulate_grads_kernel", "_add_splits_kernel", "_add_splits_kernel"]


@pytest.fixture
def triton():
    with mi.backend("triton"):
        yield


def check(sample, dtype):
    # Few results need more draws, or the comparison of two errors is luck.
    gate = sample.gate if isinstance(sample, Mixing) else sample.scale
    most = 8 if torch.Size(gate).numel() < 20 else 2

    def draw(seed):
        return sample.arguments(dtype, seed=seed)

    form, whole = form_of(sample), sample.arguments(dtype)[0].shape == sample.shape
    check_errors(values_of(form.function), values_of(form.reference), draw, most=most, squares=form.squares)
    if whole:
        check_errors(
            gradients_of(form.function),
            gradients_of(form.reference),
            lambda seed: (sample.cotangent(dtype, seed=seed + 1000), *draw(seed)),
            most=most,
            squares=form.square_gradients,
        )


# Sums over the rows of a tile, which the interpreter's tl.sum adds one after the other where GPUs add them in
# a tree; test_what_the_interpreter_adds has these sums to the bit.
ADDED_IN_ORDER = ("batch-norm-channels_last",)
LARGE = ("threaded", "many-rows", "long-features", "alternating", "tokens-transposed", "different-transposed")


@INTERPRETED
@pytest.mark.parametrize(
    "sample",
    [s for s in modulations() if str(s) not in ADDED_IN_ORDER and not str(s).startswith(LARGE)],
    ids=str,
)
def test_error_rule(sample, triton):
    check(sample, torch.float32)


@INTERPRETED
@pytest.mark.parametrize(
    "sample",
    [s for s in mixings() if not str(s).startswith((*LARGE, "batch-norm", "long-rows", "b-broad"))],
    ids=str,
)
def test_error_rule_of_mixtures(sample, triton):
    check(sample, torch.float32)


def in_a_tree(rows):
    """Sums over the first axis, whose length is a power of two, in the dtype of the rows."""
    while len(rows) > 1:
        rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
    return rows


@pytest.fixture
def sums_in_a_tree(monkeypatch):
    from triton.runtime import interpreter

    def add(self, tensor):
        rows = np.moveaxis(tensor.handle.data, self.axis, 0)
        total = np.moveaxis(in_a_tree(rows), 0, self.axis)
        return self.to_tensor(total if self.keep_dims else total.squeeze(self.axis), tensor.dtype)

    monkeypatch.setattr(interpreter.ReduceOps, "sum", add)


def batch_norm():
    return next(sample for sample in modulations() if str(sample) in ADDED_IN_ORDER)


@INTERPRETED
def test_error_rule_where_the_interpreter_adds_in_order(triton, sums_in_a_tree):
    check(batch_norm(), torch.float32)


@INTERPRETED
@pytest.mark.parametrize("tree", [False, True])
def test_what_the_interpreter_adds(tree, triton, request):
    """To the bit: 90 rows in tiles of 64, added up element by element, then the rows of the tile as said.

    On 60 draws they err by 1.7 times as much as PyTorch's sum in order, and by 0.75 in a tree.
    """
    if tree:
        request.getfixturevalue("sums_in_a_tree")
    sample = batch_norm()
    x, scale, _ = sample.arguments(torch.float32)
    grad = sample.cotangent(torch.float32)
    *_, dshift = kernels.modulate_grads(grad, x, scale, [1, 4, 1, 1], "identity", 0.0, False, False, True)
    rows = np.zeros((128, 4), np.float32)
    rows[:90] = grad.permute(0, 2, 3, 1).reshape(90, 4).numpy()
    tile = rows[:64] + rows[64:]
    total = in_a_tree(tile) if tree else functools.reduce(np.add, tile)
    assert np.array_equal(dshift.flatten().numpy(), total.flatten())


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("sample", SMALL, ids=str)
def test_error_rule_of_other_dtypes(sample, dtype, triton):
    check(sample, dtype)


@INTERPRETED
@pytest.mark.parametrize("name", activations.NAMES)
def test_error_rule_of_activations(name, triton):
    check(Modulation("full", (40, 50), (40, 50), (50,), activation=name, scale_offset=-0.3), torch.float32)


@INTERPRETED
def test_gradcheck(triton):
    inputs = Modulation("", (2, 2, 3), (2, 1, 3), (1, 2, 1)).arguments(torch.float64, requires_grad=True)

    def function(*arguments):
        return mi.modulate(*arguments, activation="tanh", scale_offset=0.5)

    fast = {"fast_mode": True}  # along random directions: a full one takes a minute
    assert gradcheck(function, inputs, check_forward_ad=True, **fast)
    assert gradgradcheck(function, inputs, **fast)


@INTERPRETED
@pytest.mark.parametrize(
    "sizes", [((3, 1, 20), (3, 1, 20)), ((3, 1, 20), (1, 6, 20)), ((3, 6, 20), (1, 1, 20))]
)
@pytest.mark.parametrize("want", range(1, 8))
def test_only_what_is_asked_for(want, sizes):
    want = [bool(want >> bit & 1) for bit in range(3)]
    sample = Modulation("", (3, 6, 20), *sizes)
    x, scale, shift = sample.arguments(torch.float64)
    grad = sample.cotangent(torch.float64)
    expected = gradients_of(partial(reference.modulate, **sample.options))(grad, x, scale, shift)
    found = kernels.modulate_grads(grad, x, scale, list(shift.shape), "sigmoid", 0.5, *want)
    for result, truth, wanted in zip(found, expected, want, strict=True):
        assert result.numel() == 0 if not wanted else torch.allclose(result, truth, rtol=1e-12, atol=1e-12)


@INTERPRETED
@pytest.mark.parametrize("name", ["tanh", "hardswish"])
@pytest.mark.parametrize("gate", [(3, 1, 20), (3, 6, 20), (1, 6, 1)])
@pytest.mark.parametrize("want", range(1, 8))
def test_gradients_of_mixtures_that_are_asked_for(want, gate, name):
    want = [bool(want >> bit & 1) for bit in range(3)]
    sample = Mixing("", (3, 6, 20), (3, 6, 20), gate, activation=name)
    tensors, grad = sample.arguments(torch.float64), sample.cotangent(torch.float64)
    expected = gradients_of(partial(reference.mix, activation=name))(grad, *tensors)
    found = kernels.mix_grads(grad, *tensors, name, *want)
    for result, truth, wanted in zip(found, expected, want, strict=True):
        assert result.numel() == 0 if not wanted else torch.allclose(result, truth, rtol=1e-12, atol=1e-12)


@INTERPRETED
def test_derivatives_of_mixtures_and_of_a_factor(triton):
    inputs = Mixing("", (2, 2, 3), (2, 2, 3), (2, 1, 3)).arguments(torch.float64, requires_grad=True)
    for function in (
        mi.mix,
        lambda a, b, gate: mi.modulate(a, gate, b, activation="sigmoid", scale_factor=2.0),
    ):
        assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(function, inputs, fast_mode=True)


@INTERPRETED
def test_splits_change_no_bit_from_run_to_run_and_little_memory(triton):
    leaves = SPLIT.arguments(torch.float32, requires_grad=True)
    assert axes.tiling((5600, 24), ((24, 1), (0, 1)), (True, False), 4).splits > 1
    grad, y = SPLIT.cotangent(torch.float32), mi.modulate(*leaves)
    first, again = (torch.autograd.grad(y, leaves, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact = gradients_of(reference.modulate)(grad.double(), *(t.double() for t in leaves))
    torch.testing.assert_close(first, exact, rtol=1e-4, atol=1e-4, check_dtype=False)
    results = sum(t.nbytes for t in leaves)
    run = lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)  # noqa: E731
    assert peak_memory(run) <= results + 2 * 24 * 4 * axes.FEW_PROGRAMS + 4096


@INTERPRETED
def test_the_last_split_is_shorter(triton):
    made = axes.tiling((3100, 24), ((24, 1), (0, 1)), (True, False), 8)
    assert made.steps % made.splits
    x, grad = torch.randn(2, 3100, 24, dtype=torch.float64)
    scale = torch.randn(1, 24, dtype=torch.float64)
    found = kernels.modulate_grads(grad, x, scale, [1, 24], "identity", 0.0, True, True, True)
    expected = scale * grad, (grad * x).sum(0, keepdim=True), grad.sum(0, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@INTERPRETED
def test_axes_that_alternate(triton):
    sample = Modulation("", (2, 3, 2, 2, 3), (2, 1, 2, 1, 3), (2, 1, 2, 1, 3))
    leaves = sample.arguments(torch.float64, requires_grad=True)
    y, truth = mi.modulate(*leaves), reference.modulate(*leaves)
    grads = (torch.autograd.grad(t.sin().sum(), leaves) for t in (y, truth))
    torch.testing.assert_close((y, *next(grads)), (truth, *next(grads)), rtol=1e-12, atol=1e-12)


@INTERPRETED
def test_more_axes_than_the_kernels_take(triton):
    sizes = (2,) * 12
    scale = torch.randn([1 + d % 2 for d in range(12)], dtype=torch.float64, requires_grad=True)
    x = torch.randn(sizes, dtype=torch.float64, requires_grad=True)
    y, truth = mi.modulate(x, scale), reference.modulate(x, scale)
    grads = (torch.autograd.grad(t.sum(), (x, scale)) for t in (y, truth))
    torch.testing.assert_close((y, *next(grads)), (truth, *next(grads)), rtol=1e-12, atol=1e-12)


@INTERPRETED
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_far_apart(tokens, triton):
    """The last row, or sample, begins beyond 2^31 elements; untouched memory costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = (1 << 31) + 16
    x = (
        torch.empty(stride + 16 * tokens, dtype=torch.float16)
        .as_strided((2, tokens, 16), (stride, 16, 1))
        .copy_(torch.randn(2, tokens, 16))
    )
    scale, shift = torch.randn(2, 1, 1 if tokens == 1 else 16).half(), torch.randn(16).half()
    near = x.clone(memory_format=torch.contiguous_format)
    assert torch.equal(mi.modulate(x, scale, shift), mi.modulate(near, scale, shift))
    grads = (
        kernels.modulate_grads(t, t, scale, list(scale.shape), "identity", 0.0, True, True, True)
        for t in (x, near)
    )
    assert all(torch.equal(a, b) for a, b in zip(next(grads), next(grads), strict=True))


@INTERPRETED
def test_the_memory_format_of_x(triton):
    x, scale, shift = SMALL[1].arguments(torch.float32)
    y = mi.modulate(x.requires_grad_(), scale, shift)
    (dx,) = torch.autograd.grad(y, x, torch.ones(x.shape))
    assert y.stride() == dx.stride() == x.stride()


@INTERPRETED
def test_what_is_flat_lets_nothing_through_and_nan_does(triton):
    x = torch.full((4, 40), float("inf"), requires_grad=True)
    scale = torch.full((4, 1), -5.0, requires_grad=True)
    for name in activations.MASKED:
        assert torch.autograd.grad(mi.modulate(x, scale, activation=name).sum(), scale)[0].eq(0).all()
    x, scale, _ = TOKENS.arguments(torch.float32)
    scale[1, 0, 7] = float("nan")
    assert mi.modulate(x, scale).isnan().sum() == 19


@INTERPRETED
def test_compiled_dense_calls_triton(triton, fresh_compiler):
    """One graph, whose products are the operations of this backend; modulation itself is left to Inductor."""
    from recorder import Recorder

    from mi_kernels.testing.samples import ODD, Sample

    arguments = Sample(ODD).arguments(torch.float32, requires_grad=True)
    recorder = Recorder()
    compiled = torch.compile(mi.interaction, backend=recorder.backend, fullgraph=True, dynamic=True)
    y = compiled(*arguments)
    y.sum().backward()
    torch.testing.assert_close(y, mi.interaction(*arguments), rtol=0, atol=0)
    forward, backward = recorder.names
    assert forward == ["interaction_triton"]
    assert backward == ["interaction_input_grads_triton", "interaction_weight_grads_triton"]
