"""The family norm in Triton: its axes, and values and gradients in the interpreter, in a process of its own.

TRITON_INTERPRET is read when the kernels are made, so the tests below `INTERPRETED` run in a second pytest on
this file. The judge is the portable implementation: in float64 to 1e-12, in other dtypes by its own error.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_passes_interpreted

from mi_kernels import backends
from mi_kernels.ops import activations
from mi_kernels.ops.norm import portable
from mi_kernels.testing.errors import FLOAT64_LIMIT, relative_error

pytest.importorskip("triton")
from mi_kernels.ops.triton import norm, norm_tiling
from mi_kernels.ops.triton.launch import recording

INTERPRETED = pytest.mark.skipif(not backends.interpreting(), reason="part of test_in_the_interpreter")
LAST = torch.channels_last


@pytest.mark.subprocess
@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter")
def test_in_the_interpreter():
    assert_passes_interpreted(__file__)


@dataclass(frozen=True)
class Case:
    """Sizes and terms of a call; ``order`` is that of x's dimensions in memory."""

    name: str
    x: tuple[int, ...]
    context: tuple[int, ...]
    dim: int
    groups: int = 1
    center: bool = True
    terms: str = "h gate scale shift weight bias grad_x"
    activation: str = "identity"
    order: tuple[int, ...] | None = None
    mean: float = 0.0

    def __str__(self):
        return self.name

    def like_x(self, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        order = self.order or range(len(self.x))
        made = torch.randn([self.x[d] for d in order], generator=generator, dtype=torch.float64).to(dtype)
        return made.permute([list(order).index(d) for d in range(len(self.x))])

    def operands(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """grad, grad_x and the tensors of a forward call, rounded to the dtype."""
        generator = torch.Generator().manual_seed(seed)
        affine = [self.x[d] if d == self.dim else 1 for d in range(len(self.x))]
        sizes = dict.fromkeys(("gate", "scale", "shift"), self.context) | dict.fromkeys(
            ("weight", "bias"), affine
        )
        found: dict[str, Any] = {"x": self.like_x(generator, dtype) + self.mean}
        found["grad"] = self.like_x(generator, dtype)
        for name in ("h", "grad_x"):
            made = self.like_x(generator, dtype)
            found[name] = made if name in self.terms.split() else None
        for name, size in sizes.items():
            made = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            found[name] = made if name in self.terms.split() else None
        return found


TOKENS = Case("tokens", (3, 19, 33), (3, 1, 33), 2, activation="sigmoid")
PER_TOKEN = Case("per-token", (3, 7, 33), (3, 7, 33), 2, activation="silu")
MAPS = Case("maps", (3, 10, 6, 7), (3, 10, 1, 1), 1, 2, activation="tanh")
LARGE = Case("large-maps", (2, 4, 50, 70), (2, 4, 1, 1), 1, 2)
LONG = Case("long-rows", (2, 9000), (1, 9000), 1)
CASES = (
    *(TOKENS, PER_TOKEN, MAPS, LARGE, LONG),
    Case("rms", (3, 19, 130), (3, 1, 130), 2, center=False, terms="scale shift weight"),
    Case("wide", (2, 5, 1152), (2, 1, 1152), 2, terms="h gate scale shift"),
    Case("no-context", (3, 19, 5), (1, 1, 5), 2, terms="weight bias"),
    Case("alone", (3, 19, 5), (1, 1, 5), 2, terms=""),
    Case("added", (3, 19, 5), (3, 1, 5), 2, terms="h scale grad_x"),
    Case("one-channel", (3, 19, 1), (3, 1, 1), 2),
    Case("one-set", (33,), (33,), 0),
    Case("shared", (3, 19, 33), (1, 1, 33), 2),
    Case("by-time", (3, 7, 33), (1, 7, 33), 2),
    Case("alternating", (2, 3, 2, 2, 5), (2, 1, 2, 1, 5), 4),
    Case("many-rows", (700, 8), (1, 8), 1),
    Case("strided-channels", (3, 19, 33), (3, 1, 33), 2, order=(0, 2, 1)),
    Case("permuted", (2, 3, 4, 19), (2, 1, 4, 19), 3, order=(2, 0, 1, 3)),
    Case("groups-of-rows", (5, 33), (5, 33), 1, 3),
    Case("groups-of-one-row", (1, 33), (1, 33), 1, 11, terms="weight bias"),
    Case("groups-of-a-vector", (33,), (33,), 0, 3),
    Case("instances", (3, 5, 33), (3, 5, 1), 1, 5),
    Case("one-group-rms", (3, 10, 6, 7), (1, 10, 1, 1), 1, center=False, terms="h gate scale shift"),
    replace(MAPS, name="maps-last", order=(0, 2, 3, 1)),
    Case("maps-last-shared", (3, 10, 6, 7), (1, 10, 1, 1), 1, 5, order=(0, 2, 3, 1)),
    Case("maps-transposed", (3, 10, 6, 7), (3, 10, 1, 1), 1, 5, order=(0, 1, 3, 2)),
    replace(LARGE, name="large-maps-last", order=(0, 2, 3, 1), groups=1),
    Case("large-maps-rms", (2, 4, 50, 70), (1, 4, 1, 1), 1, center=False, terms="h scale weight"),
    Case("long-rows-groups", (2, 18000), (2, 18000), 1, 2, center=False),
)  # fmt: skip
ALL = ("x", "h", "gate", "scale", "shift", "weight", "bias")


def forward(module, case, operands):
    tensors = [operands[name] for name in ALL]
    return module.norm_modulate(*tensors, case.dim, case.groups, case.center, 1e-5, case.activation, 1.0)


def backward(module, case, operands, statistics, want=None):
    """The gradients of all that is there; x stands for x_new."""
    given = {name: operands[name] for name in ALL} | {"h": operands["gate"]}
    want = [given[name] is not None for name in ALL] if want is None else want
    names = ("grad", "x", "grad_x", *ALL[1:])
    rule = case.dim, case.groups, case.center, case.activation, 1.0
    return module.norm_modulate_grads(*(operands[name] for name in names), *statistics, *rule, *want)


def widened(value):
    return None if value is None else value.double()


def statistics_of(case, operands):
    """mean and rstd of x, or None and rstd, in the accumulation dtype."""
    wide = {name: widened(t) if name == "x" else None for name, t in operands.items()}
    _, _, mean, rstd = forward(portable, case, wide)
    kept = torch.float64 if operands["x"].dtype == torch.float64 else torch.float32
    return mean.to(kept) if case.center else None, rstd.to(kept)


def results(module, case, dtype, seed=0, exact=False):
    """Forward and backward, of the same rounded numbers in float64 if exact."""
    operands = case.operands(dtype, seed)
    statistics = statistics_of(case, operands)
    if exact:
        operands = {name: widened(t) for name, t in operands.items()}
        statistics = [widened(t) for t in statistics]
    return *forward(module, case, operands), *backward(module, case, operands, statistics)


def check(case, dtype, draws=1):
    """Twice the portable error in L2 over all draws, or the rounding of the result."""
    runs = {
        name: [torch.cat([t.flatten() for t in parts]) for parts in zip(*found, strict=True)]
        for name, found in (
            ("ours", [results(norm, case, dtype, seed) for seed in range(draws)]),
            ("theirs", [results(portable, case, dtype, seed) for seed in range(draws)]),
            ("exact", [results(portable, case, dtype, seed, exact=True) for seed in range(draws)]),
        )
    }
    for index, (ours, theirs, exact) in enumerate(zip(*runs.values(), strict=True)):
        assert ours.shape == exact.shape and ours.dtype == theirs.dtype, index
        own, allowed = relative_error(ours, exact), FLOAT64_LIMIT
        if dtype != torch.float64:
            allowed = max(2 * relative_error(theirs, exact), torch.finfo(ours.dtype).eps / 2)
        assert own <= allowed, f"result {index}: error {own:.3g}, allowed {allowed:.3g}"


@INTERPRETED
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_float64(case):
    check(case, torch.float64)
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


def draws(case):
    """So many that the smallest sums are of hundreds of elements together, or their comparison is luck."""
    return max(1, min(200 // case.x[case.dim], 1 << 17 >> prod(case.x).bit_length(), 12))


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("case", [TOKENS, MAPS, LARGE], ids=str)
def test_errors(case, mean, dtype, sums_in_a_tree):
    """Also where the mean is much larger than the spread."""
    check(replace(case, mean=mean), dtype, draws(case))


@INTERPRETED
@pytest.mark.parametrize("case", [PER_TOKEN, LONG, *(c for c in CASES if c.name in ROUNDED)], ids=str)
def test_errors_in_float32(case, sums_in_a_tree):
    check(case, torch.float32, draws(case))


@INTERPRETED
@pytest.mark.parametrize("activation", activations.ELEMENTWISE)
@pytest.mark.parametrize("case", [TOKENS, MAPS], ids=str)
def test_activations(case, activation):
    check(
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
    y, x_new, mean, rstd = forward(norm, case, operands)
    assert y.shape == x_new.shape == size and mean.shape == rstd.shape == (*size[:2], 1)
    found = backward(norm, case, operands, (mean, rstd))
    assert [t.shape for t in found[:4]] == [size, size, case.context, case.context]
    assert not any(t.any() for t in found)


@INTERPRETED
def test_more_axes_than_the_kernels_take():
    sizes = (2,) * 12
    context = (*(1 + d % 2 for d in range(11)), 2)
    check(Case("axes", sizes, context, 11), torch.float64)


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
