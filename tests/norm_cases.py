"""Calls of the operations of the family norm, judged by the portable implementation.

In float64 to 1e-12, in other dtypes by its own error. ``module`` is what has norm_modulate and
norm_modulate_grads: a module, or a namespace of torch.ops.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from mi_kernels.ops.norm import portable
from mi_kernels.testing.errors import FLOAT64_LIMIT, relative_error


@dataclass(frozen=True)
class Case:
    """Sizes and terms of a call; ``order`` is that of x's dimensions in memory, ``every`` its step between
    samples."""

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
    every: int = 1

    def __str__(self):
        return self.name

    def like_x(self, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        order = self.order or range(len(self.x))
        sizes = (self.x[0] * self.every, *self.x[1:])
        made = torch.randn([sizes[d] for d in order], generator=generator, dtype=torch.float64).to(dtype)
        return made.permute([list(order).index(d) for d in range(len(self.x))])[:: self.every]

    def operands(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """grad, grad_x and the tensors of a forward call, rounded to the dtype."""
        generator = torch.Generator().manual_seed(seed)
        affine = [self.x[d] if d == self.dim else 1 for d in range(len(self.x))]
        sizes = dict.fromkeys(("gate", "scale", "shift"), self.context) | dict.fromkeys(
            ("weight", "bias"), affine
        )
        found: dict[str, Any] = {"x": self.like_x(generator, dtype).add_(self.mean)}
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
    replace(MAPS, name="some-maps-last", order=(0, 2, 3, 1), every=2),
    replace(MAPS, name="some-maps", every=2),
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


def check(module, case, dtype, draws=1):
    """Twice the portable error in L2 over all draws, or the rounding of the result."""
    runs = {
        name: [torch.cat([t.flatten() for t in parts]) for parts in zip(*found, strict=True)]
        for name, found in (
            ("ours", [results(module, case, dtype, seed) for seed in range(draws)]),
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


def draws(case):
    """So many that the smallest sums are of hundreds of elements together, or their comparison is luck."""
    return max(1, min(200 // case.x[case.dim], 1 << 17 >> prod(case.x).bit_length(), 12))
