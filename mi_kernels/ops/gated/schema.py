"""Schema and fake of the dense gate, rows B, context Z, features X.

    gated_interaction   p = z^T W x + U z + V x + c,  y = act(p) * x              [B, X]

It returns y and, with ``keep_gate``, p in the dtype of x, which spares the backward pass a product, or
[0, X] in its place.

Its derivatives are those of the dense interaction and of modulation (ops/gates.py).
"""

from mi_kernels.ops import activations
from mi_kernels.ops.gated import portable
from mi_kernels.ops.library import define
from mi_kernels.validation import FLOATING, check_activation, check_needed


def _gated_fake(x, z, weight, weight_z, weight_x, bias, activation, keep_gate):
    return x.new_empty(x.shape), x.new_empty(x.shape[0] if keep_gate else 0, x.shape[1])


def _check(x, z, weight, weight_z, weight_x, bias, activation, keep_gate):
    check_needed("gated_interaction", _WEIGHTS, (weight, weight_z, weight_x, bias))
    check_activation("gated_interaction", activation, activations.NAMES)


_WEIGHTS = ("weight", "weight_z", "weight_x", "bias")

define(
    "gated_interaction",
    "(Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x, Tensor? bias,"
    " str activation, bool keep_gate) -> (Tensor, Tensor)",
    portable.gated_interaction,
    _gated_fake,
    {"x": "BX", "z": "BZ", "weight": "XZX", "weight_z": "XZ", "weight_x": "XX", "bias": "X"},
    _check,
    dtypes=FLOATING,
)
