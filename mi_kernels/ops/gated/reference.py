"""The dense gate as einsum and a product: the oracle of every test, differentiated by PyTorch."""

from torch import Tensor

from mi_kernels.ops import activations
from mi_kernels.ops.interaction.reference import interaction


def gated_interaction(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    weight: Tensor | None,  # [X, Z, X]
    weight_z: Tensor | None = None,  # [X, Z]
    weight_x: Tensor | None = None,  # [X, X]
    bias: Tensor | None = None,  # [X]
    *,
    activation: str = "sigmoid",
) -> Tensor:
    """y = act(z^T W x + U z + V x + c) * x."""
    return activations.value(activation, interaction(x, z, weight, weight_z, weight_x, bias)) * x
