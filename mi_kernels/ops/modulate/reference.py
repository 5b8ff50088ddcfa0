"""Modulation in plain PyTorch: the oracle of every test, and the code that torch.compile fuses."""

from torch import Tensor

from mi_kernels.ops import activations


def modulate(
    x: Tensor,  # [...]
    scale: Tensor,  # broadcasts with x
    shift: Tensor | None = None,  # broadcasts with x
    *,
    activation: str = "identity",
    scale_offset: float = 0.0,
) -> Tensor:
    """y = (act(scale) + s) * x + shift, one operation after the other."""
    factor = gate(scale, activation, scale_offset)
    return factor * x if shift is None else factor * x + shift


def gate(scale: Tensor, activation: str, scale_offset: float) -> Tensor:
    """act(scale) + s."""
    value = activations.value(activation, scale)
    return value if scale_offset == 0 else value + scale_offset
