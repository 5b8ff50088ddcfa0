"""The gated forms in pure PyTorch with bounded memory, on any device."""

from torch import Tensor

from .. import activations
from ..interaction import portable as dense

Maybe = Tensor | None


def diagonal(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Maybe,
    shift_weight: Maybe,
    shift_bias: Maybe,
    weight_x: Maybe,
    activation: str,
    scale_offset: float,
    keep_gate: bool,
) -> tuple[Tensor, Tensor]:
    """``mi_kernels::diagonal``."""
    p = dense.forward(x, z, None, weight, weight_x, bias)
    y = activations.value(activation, p)
    if scale_offset != 0:
        y = y + scale_offset
    y = y * x
    if shift_weight is not None or shift_bias is not None:
        y += dense.forward(x, z, None, shift_weight, None, shift_bias)
    return y, p if keep_gate else p.new_empty(0, p.shape[1])


def gated_interaction(
    x: Tensor,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
    activation: str,
    keep_gate: bool,
) -> tuple[Tensor, Tensor]:
    """``mi_kernels::gated_interaction``."""
    p = dense.forward(x, z, weight, weight_z, weight_x, bias)
    return activations.value(activation, p) * x, p if keep_gate else p.new_empty(0, p.shape[1])
