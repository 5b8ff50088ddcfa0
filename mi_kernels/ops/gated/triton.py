"""The dense gate on Triton: the kernel of the interaction with the gate for its epilogue.

Compiled ahead of time and interpreted, not yet run on a GPU.
"""

from torch import Tensor

from mi_kernels.ops.triton.products import Gate, gated

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
    gate = Gate(activation, 0.0, x, None, None, keep_gate)
    return gated(gate, z, weight, weight_z, weight_x, bias)
