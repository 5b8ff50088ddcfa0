"""Value checks of the kernels that a size reaches (kernel_sizes.py), on a GPU or emulated.

The operations are those of `torch.ops.mi_kernels` on GPU tensors, or the emulated ones on the host; results
are compared with the einsum reference under the error rule (errors.py). The reference works in chunks where
its intermediates of B Z X, B O X or B O Z elements would be large.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.interaction import reference
from .errors import check_errors, require
from .kernel_sizes import KernelSize

Maybe = Tensor | None
CHUNK_ELEMENTS = 1 << 26  # of an intermediate result of the reference


def check_interaction(
    operations: Any, size: KernelSize, dtype: torch.dtype, device: str | torch.device
) -> float:
    """The largest error as a multiple of the allowed one; raises AssertionError on a failure.

    Checks y with all terms and with W alone, each twice for equal bits; the gradients if ``size.gradients``;
    for sizes of the mma engine also both without W, which other kernels compute there.
    """

    def forward(x: Tensor, z: Tensor, *weights: Maybe) -> tuple[Tensor]:
        y, again = (operations.interaction(x, z, *weights) for _ in range(2))
        require(torch.equal(y, again), "NaN, or other bits in a second run")
        return (y,)

    def gradients(grad: Tensor, x: Tensor, z: Tensor, *weights: Maybe) -> tuple[Tensor, ...]:
        return (
            *operations.interaction_input_grads(grad, x, z, *weights[:3], True, True),
            *operations.interaction_weight_grads(grad, x, z, True, True, True, True),
        )

    present = ["WUVc", "W", *(["UVc"] if size.kernel is None else [])]
    worst = 0.0
    for terms in present:
        draw = _Draw(size, dtype, device, terms)
        worst = max(worst, _check(f"y ({terms})", forward, _forward, draw.inputs))
        if size.gradients and terms != "W":
            worst = max(worst, _check(f"gradients ({terms})", gradients, _gradients, draw.with_grad))
    return worst


def _check(name: str, function: Any, oracle: Any, draw: Any) -> float:
    try:
        return check_errors(function, oracle, draw, enough=300, most=50)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


class _Draw:
    """Arguments from a seed; every term of y is of order 1. A single group has no group dimension."""

    def __init__(self, size: KernelSize, dtype: torch.dtype, device: str | torch.device, terms: str):
        self.size, self.dtype, self.device, self.terms = size, dtype, device, terms

    def inputs(self, seed: int) -> tuple[Maybe, ...]:
        """x, z, W, U, V and c."""
        return self.with_grad(seed)[1:]

    def with_grad(self, seed: int) -> tuple[Maybe, ...]:
        """The cotangent of y, then the inputs."""
        groups, b, i, j, o = self.size.sizes
        generator = torch.Generator(self.device).manual_seed(seed)
        # Drawn in the wider of dtype and float32: W of the largest size would be a gigabyte in float64.
        wide = torch.promote_types(self.dtype, torch.float32)

        def tensor(*shape: int, scale: float = 1.0) -> Tensor:
            shape = shape if groups == 1 else (groups, *shape)
            values = torch.randn(shape, generator=generator, dtype=wide, device=self.device)
            return values.mul_(scale).to(self.dtype)

        return (
            tensor(b, o),
            tensor(b, j),
            tensor(b, i),
            tensor(o, i, j, scale=(i * j) ** -0.5) if "W" in self.terms else None,
            tensor(o, i, scale=i**-0.5) if "U" in self.terms else None,
            tensor(o, j, scale=j**-0.5) if "V" in self.terms else None,
            tensor(o) if "c" in self.terms else None,
        )


def _groups(tensors: Sequence[Maybe], grouped: bool) -> Iterator[list[Maybe]]:
    """The tensors of each group."""
    if not grouped:
        yield list(tensors)
        return
    count = next(t for t in tensors if t is not None).shape[0]
    for index in range(count):
        yield [None if t is None else t[index] for t in tensors]


def _rows(x: Tensor, z: Tensor, out: int) -> Iterator[slice]:
    """Ranges of rows with small intermediate results."""
    of_a_row = max(out * x.shape[-1], z.shape[-1] * x.shape[-1], out * z.shape[-1], 1)
    step = max(CHUNK_ELEMENTS // of_a_row, 1)
    return (slice(start, start + step) for start in range(0, x.shape[-2], step))


def _out(weights: Sequence[Maybe]) -> int:
    """O of one group."""
    return next(w for w in weights if w is not None).shape[0]


def _forward(*tensors: Maybe) -> tuple[Tensor]:
    assert tensors[0] is not None
    grouped = tensors[0].dim() == 3
    results = []
    for x, z, *weights in _groups(tensors, grouped):
        assert x is not None and z is not None
        parts = [reference.interaction(x[rows], z[rows], *weights) for rows in _rows(x, z, _out(weights))]
        results.append(torch.cat(parts))
    return (torch.stack(results) if grouped else results[0],)


def _gradients(*tensors: Maybe) -> tuple[Tensor, ...]:
    """dx, dz, dW, dU, dV and dc of every group by PyTorch, with the absent weights taken as zeros."""
    assert tensors[0] is not None
    grouped = tensors[0].dim() == 3
    groups = [_gradients_of_group(*group) for group in _groups(tensors, grouped)]
    return tuple(torch.stack(results) if grouped else results[0] for results in zip(*groups, strict=True))


def _gradients_of_group(grad: Any, x: Any, z: Any, *weights: Maybe) -> list[Tensor]:
    o, i, j = grad.shape[-1], z.shape[-1], x.shape[-1]
    shapes = ((o, i, j), (o, i), (o, j), (o,))
    leaves = [
        (x.new_zeros(shape) if w is None else w.detach()).requires_grad_()
        for w, shape in zip(weights, shapes, strict=True)
    ]
    # The float64 oracle may sum over rows in parts; a reference in a narrower dtype sums them at once.
    ranges = _rows(x, z, o) if grad.dtype == torch.float64 else [slice(None)]
    inputs: list[tuple[Tensor, ...]] = []
    sums: list[Tensor] = []
    for rows in ranges:
        pair = x[rows].detach().requires_grad_(), z[rows].detach().requires_grad_()
        found = torch.autograd.grad(reference.interaction(*pair, *leaves), (*pair, *leaves), grad[rows])
        inputs.append(found[:2])
        sums = [a + b for a, b in zip(sums, found[2:], strict=True)] if sums else list(found[2:])
    return [*(torch.cat(parts) for parts in zip(*inputs, strict=True)), *sums]
