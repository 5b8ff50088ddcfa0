"""Modulation and mixtures in plain PyTorch: the oracle of the tests, and what torch.compile fuses."""

from torch import Tensor

from .. import activations


def modulate(
    x: Tensor,  # [...]
    scale: Tensor,  # broadcasts with x
    shift: Tensor | None = None,  # broadcasts with x
    *,
    activation: str = "identity",
    scale_offset: float = 0.0,
    scale_factor: float = 1.0,
) -> Tensor:
    """y = (c act(scale) + s) * x + shift, one operation after the other."""
    factor = gate(scale, activation, scale_offset, scale_factor)
    return factor * x if shift is None else factor * x + shift


def mix(a: Tensor, b: Tensor, gate: Tensor, *, activation: str = "sigmoid") -> Tensor:
    """y = b + act(gate) * (a - b)."""
    return b + activations.value(activation, gate) * (a - b)


def gate(scale: Tensor, activation: str, scale_offset: float, scale_factor: float = 1.0) -> Tensor:
    """c act(scale) + s."""
    value = activations.value(activation, scale)
    value = value if scale_factor == 1 else value * scale_factor
    return value if scale_offset == 0 else value + scale_offset
