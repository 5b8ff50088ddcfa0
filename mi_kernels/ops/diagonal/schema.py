"""Schema and fake of the diagonal form, rows B, context Z, features X.

    diagonal   y = (act(z A^T + x G^T + a) + s) * x + (z C^T + c)        [B, X]

Its derivatives are those of the dense interaction and of modulation (ops/gates.py).
"""

from mi_kernels.ops.diagonal import portable
from mi_kernels.ops.library import define


def _diagonal_fake(x, z, weight, bias, shift_weight, shift_bias, weight_x, activation, scale_offset):
    return x.new_empty(x.shape)


define(
    "diagonal",
    "(Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor? shift_weight, Tensor? shift_bias,"
    " Tensor? weight_x, str activation, float scale_offset) -> Tensor",
    portable.diagonal,
    _diagonal_fake,
)
