"""Schema and fake of the dense gate, rows B, context Z, features X.

    gated_interaction   y = act(z^T W x + U z + V x + c) * x              [B, X]

Its derivatives are those of the dense interaction and of modulation (ops/gates.py).
"""

from mi_kernels.ops.gated import portable
from mi_kernels.ops.library import define


def _gated_fake(x, z, weight, weight_z, weight_x, bias, activation):
    return x.new_empty(x.shape)


define(
    "gated_interaction",
    "(Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x, Tensor? bias,"
    " str activation) -> Tensor",
    portable.gated_interaction,
    _gated_fake,
)
