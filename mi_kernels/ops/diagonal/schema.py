"""Schema and fake of the diagonal form, rows B, context Z, features X.

    diagonal   p = z A^T + x G^T + a,  y = (act(p) + s) * x + (z C^T + c)        [B, X]

It returns y and, with ``keep_gate``, p in the dtype of x, which spares the backward pass a product, or
[0, X] in its place.

Its derivatives are those of the dense interaction and of modulation (ops/gates.py).
"""

from mi_kernels.ops import activations
from mi_kernels.ops.diagonal import portable
from mi_kernels.ops.library import define
from mi_kernels.validation import FLOATING, check_activation


def _diagonal_fake(
    x, z, weight, bias, shift_weight, shift_bias, weight_x, activation, scale_offset, keep_gate
):
    return x.new_empty(x.shape), x.new_empty(x.shape[0] if keep_gate else 0, x.shape[1])


def _check(x, z, weight, bias, shift_weight, shift_bias, weight_x, activation, scale_offset, keep_gate):
    check_activation("diagonal", activation, activations.NAMES)


define(
    "diagonal",
    "(Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor? shift_weight, Tensor? shift_bias,"
    " Tensor? weight_x, str activation, float scale_offset, bool keep_gate) -> (Tensor, Tensor)",
    portable.diagonal,
    _diagonal_fake,
    {
        "x": "BX",
        "z": "BZ",
        "weight": "XZ",
        "bias": "X",
        "shift_weight": "XZ",
        "shift_bias": "X",
        "weight_x": "XX",
    },
    _check,
    dtypes=FLOATING,
)
