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
) -> Tensor:
    """y of ``mi_kernels::gated_interaction``."""
    return activations.value(activation, dense.forward(x, z, weight, weight_z, weight_x, bias)) * x
