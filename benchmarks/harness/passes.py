"""What is timed: one function of the benchmarks, in one of the passes. Needs PyTorch alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PASSES = ("forward", "forward+backward", "double-backward")
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Operands:
    """Arguments of an interaction, the gradient of y, and the cotangents of dx, dz and dW."""

    x: Tensor
    z: Tensor
    weight: Tensor
    grad: Tensor
    x_c: Tensor
    z_c: Tensor
    weight_c: Tensor

    def arranged(self, arrange: Callable[[Tensor], Tensor]) -> "Operands":
        """The same with W, and what belongs to it, in another layout."""
        return replace(self, weight=arrange(self.weight), weight_c=arrange(self.weight_c))

    def rows(self, start: int, stop: int) -> "Operands":
        cut = {name: getattr(self, name)[start:stop] for name in ("x", "z", "grad", "x_c", "z_c")}
        return replace(self, **cut)

    def to(self, dtype: torch.dtype) -> "Operands":
        return Operands(*(tensor.to(dtype) for tensor in vars(self).values()))


def start(work: str, function: Callable, operands: Operands) -> Callable[[], Run]:
    """A function that prepares, untimed, and returns what is timed; that may be called many times.

    forward           y, without autograd
    forward+backward  y, dx, dz, dW
    double-backward   the gradients by g, x, z and W of <x', dx> + <z', dz> + <W', dW>; the graph of the
                      first derivatives is prepared
    """
    o = operands
    if work == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(o.x, o.z, o.weight),)

        return lambda: forward
    x, z, weight = leaves = [t.detach().requires_grad_() for t in (o.x, o.z, o.weight)]
    if work == "forward+backward":

        def forward_backward() -> tuple[Tensor, ...]:
            y = function(x, z, weight)
            return (y.detach(), *torch.autograd.grad(y, leaves, o.grad))

        return lambda: forward_backward
    if work != "double-backward":
        raise ValueError(f"pass: expected one of {', '.join(PASSES)}, got {work!r}")
    grad = o.grad.detach().requires_grad_()

    def build() -> Run:
        first = torch.autograd.grad(function(x, z, weight), leaves, grad, create_graph=True)
        cotangents = (o.x_c, o.z_c, o.weight_c)
        return lambda: torch.autograd.grad(first, (grad, *leaves), cotangents, retain_graph=True)

    return build


def start_with_graph(function: Callable, operands: Operands) -> Callable[[], Run]:
    """The forward pass alone while gradients are wanted, for the benchmark of call overhead."""
    leaves = [t.detach().requires_grad_() for t in (operands.x, operands.z, operands.weight)]
    return lambda: lambda: (function(*leaves),)


def random_operands(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> Operands:
    """Normal values, with W scaled so that y is of order 1; sizes are (B, Z, X, O)."""
    B, Z, X, O = sizes  # noqa: E741
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(B, X), (B, Z), (O, Z, X), (B, O), (B, X), (B, Z), (O, Z, X)]
    x, z, weight, *rest = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    return Operands(x, z, weight * (Z * X) ** -0.5, *rest).to(dtype)
