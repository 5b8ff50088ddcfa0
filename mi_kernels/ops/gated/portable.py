"""The dense gate in pure PyTorch with bounded memory, on any device."""

from torch import Tensor

from mi_kernels.ops import activations
from mi_kernels.ops.interaction import portable as dense

Maybe = Tensor | None


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
