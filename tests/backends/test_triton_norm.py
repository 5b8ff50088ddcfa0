"""The family norm in Triton: its axes, and values and gradients in the interpreter, in a process of its own.

TRITON_INTERPRET is read when the kernels are made, so the tests below `INTERPRETED` run in a second pytest on
this file. The judge is the portable implementation: in float64 to 1e-12, in other dtypes by its own error.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_passes_interpreted
from norm_cases import (
    CASES,
    LARGE,
    LONG,
    MAPS,
    PER_TOKEN,
    TOKENS,
    Case,
    backward,
    check,
    draws,
    forward,
    results,
    statistics_of,
)

from mi_kernels import backends
from mi_kernels.ops import activations
from mi_kernels.ops.norm import portable
from mi_kernels.testing.errors import FLOAT64_LIMIT, relative_error

pytest.importorskip("triton")
from mi_kernels.ops.triton import norm, norm_tiling
from mi_kernels.ops.triton.launch import recording

INTERPRETED = pytest.mark.skipif(not backends.interpreting(), reason="part of test_in_the_interpreter")


@pytest.mark.subprocess
@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter")
def test_in_the_interpreter():
    assert_passes_interpreted(__file__)


@INTERPRETED
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_float64(case):
    check(norm, case, torch.float64)
    operands = case.operands(torch.float64)
    statistics = statistics_of(case, operands)
    for call, *more in ((forward,), (backward, statistics)):
        found = (call(module, case, operands, *more) for module in (norm, portable))
        for ours, theirs in zip(*found, strict=True):
            assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())


@pytest.fixture
def sums_in_a_tree(monkeypatch):
    """As GPUs add the rows of a tile; the interpreter adds one after the other."""
    from triton.runtime import interpreter

    def add(self, tensor):
        rows = np.moveaxis(tensor.handle.data, self.axis, 0)
        while len(rows) > 1:
            rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
        total = np.moveaxis(rows, 0, self.axis)
        return self.to_tensor(total if self.keep_dims else total.squeeze(self.axis), tensor.dtype)

    monkeypatch.setattr(interpreter.ReduceOps, "sum", add)


ROUNDED = ("rms", "one-channel", "many-rows", "groups-of-rows", "maps-last-shared", "large-maps-last")


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("case", [TOKENS, MAPS, LARGE], ids=str)
def test_errors(case, mean, dtype, sums_in_a_tree):
    """Also where the mean is much larger than the spread."""
    check(norm, replace(case, mean=mean), dtype, draws(case))


@INTERPRETED
@pytest.mark.parametrize("case", [PER_TOKEN, LONG, *(c for c in CASES if c.name in ROUNDED)], ids=str)
def test_errors_in_float32(case, sums_in_a_tree):
    check(norm, case, torch.float32, draws(case))


@INTERPRETED
@pytest.mark.parametrize("activation", activations.ELEMENTWISE)
@pytest.mark.parametrize("case", [TOKENS, MAPS], ids=str)
def test_activations(case, activation):
    check(
        norm,
        replace(case, x=(1, *case.x[1:]), context=(1, *case.context[1:]), activation=activation),
        torch.float64,
    )


@INTERPRETED
@pytest.mark.parametrize("case", [TOKENS, PER_TOKEN, MAPS, LARGE, LONG], ids=str)
def test_only_what_is_asked_for(case):
    operands = replace(case, x=(2, *case.x[1:]), context=(min(case.context[0], 2), *case.context[1:]))
    case, operands = operands, operands.operands(torch.float64)
    statistics = statistics_of(case, operands)
    expected = backward(portable, case, operands, statistics)
    for wanted in ({0}, {1}, {2}, {3}, {4}, {5}, {6}, {0, 3}, {1, 4, 5}, {2, 6}, set()):
        found = backward(norm, case, operands, statistics, [index in wanted for index in range(7)])
        for index, (ours, truth) in enumerate(zip(found, expected, strict=True)):
            assert ours.numel() == 0 if index not in wanted else relative_error(ours, truth) <= FLOAT64_LIMIT


@INTERPRETED
@pytest.mark.parametrize("case", [TOKENS, MAPS, LONG], ids=str)
def test_contexts_that_are_views(case):
    """Parts of one linear's output, expanded over samples."""
    operands = case.operands(torch.float64)
    channels = case.context[case.dim]
    parts = torch.randn(3 * channels, dtype=torch.float64).chunk(3)
    for name, part in zip(("gate", "scale", "shift"), parts, strict=True):
        behind = (1,) * (len(case.x) - case.dim - 1)
        operands[name] = part.view(channels, *behind).expand(case.context)
    statistics = statistics_of(case, operands)
    for call, *more in ((forward,), (backward, statistics)):
        found = (call(module, case, operands, *more) for module in (norm, portable))
        for ours, theirs in zip(*found, strict=True):
            assert relative_error(ours, theirs) <= FLOAT64_LIMIT


@INTERPRETED
@pytest.mark.parametrize("case", [TOKENS, MAPS, LARGE], ids=str)
def test_y_is_that_of_the_stored_x_new(case):
    """To the bit: the gradients are taken at what is stored."""
    operands = case.operands(torch.float16)
    y, x_new, *statistics = forward(norm, case, operands)
    again, _, *others = forward(norm, case, operands | {"x": x_new, "h": None, "gate": None})
    for one, other in zip((y, *statistics), (again, *others), strict=True):
        assert torch.equal(one, other)


@INTERPRETED
def test_a_gradient_that_is_expanded():
    for case in (TOKENS, MAPS, LARGE):
        operands = case.operands(torch.float64)
        operands["grad"] = torch.ones((), dtype=torch.float64).expand(case.x)
        statistics = statistics_of(case, operands)
        found = (backward(module, case, operands, statistics) for module in (norm, portable))
        for ours, theirs in zip(*found, strict=True):
            # dx is a difference that vanishes where there is no context
            assert relative_error(ours, theirs) <= FLOAT64_LIMIT


@INTERPRETED
@pytest.mark.parametrize("case", [TOKENS, PER_TOKEN, LARGE, LONG], ids=str)
def test_the_same_bits_twice(case):
    first, again = (results(norm, case, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@INTERPRETED
@pytest.mark.parametrize("size", [(0, 3, 5), (3, 0, 5), (3, 4, 0)])
def test_nothing(size):
    case = Case("", size, (size[0], 1, size[2]), 2)
    operands = case.operands(torch.float32)
    found = forward(norm, case, operands)
    torch.testing.assert_close(found, forward(portable, case, operands), rtol=0, atol=0, equal_nan=True)
    *_, mean, rstd = found
    assert mean.isnan().all() and rstd.isnan().all()
    found = backward(norm, case, operands, (mean, rstd))
    assert [t.shape for t in found[:4]] == [size, size, case.context, case.context]
    assert not any(t.any() for t in found)


@INTERPRETED
def test_more_axes_than_the_kernels_take():
    sizes = (2,) * 12
    context = (*(1 + d % 2 for d in range(11)), 2)
    check(norm, Case("axes", sizes, context, 11), torch.float64)


@INTERPRETED
def test_rows_far_apart():
    """The last sample begins beyond 2^31 elements; untouched memory costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    case = Case("far", (2, 3, 16), (2, 1, 16), 2)
    operands = case.operands(torch.float16)
    stride = (1 << 31) + 16
    far = torch.empty(stride + 16 * 3, dtype=torch.float16).as_strided((2, 3, 16), (stride, 16, 1))
    apart = operands | {"x": far.copy_(operands["x"])}
    statistics = statistics_of(case, operands)
    for call, *more in ((forward,), (backward, statistics)):
        found = (call(norm, case, one, *more) for one in (operands, apart))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@INTERPRETED
@pytest.mark.parametrize("case", [TOKENS, MAPS, LARGE], ids=str)
def test_nan_stays_in_its_set(case):
    operands = case.operands(torch.float32)
    operands["x"][1, 0] = float("nan")
    mean, rstd = forward(portable, case, operands | {"h": None, "gate": None})[2:]
    first = forward(norm, case, operands), backward(norm, case, operands, (mean, rstd))
    truth = forward(portable, case, operands), backward(portable, case, operands, (mean, rstd))
    for ours, theirs in zip(sum(first, ()), sum(truth, ()), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@INTERPRETED
def test_the_registered_operations_call_these_kernels():
    operands = TOKENS.operands(torch.float32)
    mean, rstd = forward(norm, TOKENS, operands)[2:]
    ops = torch.ops.mi_kernels

    class Registered:
        norm_modulate = ops.norm_modulate_triton
        norm_modulate_grads = ops.norm_modulate_grads_triton

    found = (forward(module, TOKENS, operands) for module in (norm, Registered))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    found = (backward(module, TOKENS, operands, (mean, rstd)) for module in (norm, Registered))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def launched(case, dtype=torch.bfloat16):
    """The names of the kernels of a forward and a backward pass on meta tensors, which have no data to wait
    for: a call can be captured in a CUDA graph."""
    operands = {name: None if t is None else t.to("meta") for name, t in case.operands(dtype).items()}
    with recording((9, 0)) as launches:
        _, _, mean, rstd = forward(norm, case, operands)
        backward(norm, case, operands, (mean if case.center else None, rstd))
    return [launch.kernel.__name__.removeprefix("_norm_").removesuffix("_kernel") for launch in launches]


def test_which_kernels_run():
    """x and h are read once where a set fits a tile."""
    assert launched(TOKENS) == launched(PER_TOKEN) == ["rows", "rows_grads"]
    assert launched(MAPS) == launched(replace(MAPS, order=(0, 2, 3, 1))) == ["maps", "maps_grads"]
    assert launched(LONG) == ["maps", "maps", "row_means", "rows_grads"]
    assert launched(LARGE) == ["maps", "maps", "maps_grads", "maps_grads"]


@pytest.mark.parametrize("rows", [1, 40, 1000, 65536])
@pytest.mark.parametrize("columns", [1, 33, 384, 1152, 4096])
def test_sums_are_short_and_scratch_is_small(rows, columns):
    BM, BN = norm_tiling.row_tile(rows, 1, columns)
    steps = -(-rows // BM)
    splits = norm_tiling.splits(steps, 1)
    assert BN >= columns and BM * BN <= max(norm_tiling.FEW, BN)
    assert 1 <= splits <= steps and -(-steps // splits) <= norm_tiling.STEPS
    assert splits <= max(rows / 2, 1)
