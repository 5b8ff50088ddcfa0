"""The diagonal form on Triton: the kernel of the interaction without W, gate and shift in one pass over z.

Compiled ahead of time and interpreted, not yet run on a GPU.
"""

from torch import Tensor

from mi_kernels.ops.triton.products import Gate, gated

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
    gate = Gate(activation, scale_offset, x, shift_weight, shift_bias, keep_gate)
    return gated(gate, z, None, weight, weight_x, bias)
