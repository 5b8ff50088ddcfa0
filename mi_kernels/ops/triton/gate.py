"""The gated forms on Triton: the kernel of the interaction with a gate epilogue.

The diagonal form computes gate and shift in one pass over z. Compiled ahead of time and interpreted, not yet
run on a GPU.
"""

from torch import Tensor

from .host import GateEpilogue, gated

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
    gate = GateEpilogue(activation, scale_offset, x, shift_weight, shift_bias, keep_gate)
    return gated(gate, z, None, weight, weight_x, bias)


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
    gate = GateEpilogue(activation, 0.0, x, None, None, keep_gate)
    return gated(gate, z, weight, weight_z, weight_x, bias)
