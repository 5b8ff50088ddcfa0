"""How many operations each operation takes, for ``torch.utils.flop_counter`` and what builds on it.

By its convention products count twice their multiplications, and elementwise work, so all of modulation,
counts nothing. Counted is what the formula needs, whichever plan runs: backward makes dx and dz of one
T = g W. Groups of rows are part of B.
"""

import math
from collections.abc import Callable, Sequence

from mi_kernels.ops.imports import when_imported
from mi_kernels.ops.library import overloads

Shape = Sequence[int]


def _weights(rows: Shape, *weights: Shape | None) -> int:
    """Each row meets each element of each weight once; weights of groups have one dimension more."""
    batch = math.prod(rows[:-1])
    if batch == 0:
        return 0
    groups = rows[0] if len(rows) == 3 else 1
    return sum(2 * batch * math.prod(weight) // groups for weight in weights if weight is not None)


def _forward(x, z, weight, weight_z, weight_x, bias, **_):
    return _weights(x, weight, weight_z, weight_x)


def _packed_forward(x, z, weight, words, weight_z, weight_x, bias, **_):
    return _weights(x, weight, weight_z, weight_x)


def _input_grads(grad, x, z, weight, weight_z, weight_x, want_x, want_z, **_):
    return _weights(x, weight, weight_z if want_z else None, weight_x if want_x else None)


def _weight_grads(grad, x, z, want_weight, want_weight_z, want_weight_x, want_bias, **_):
    out, context, width = grad[-1], z[-1], x[-1]
    each = want_weight * context * width + want_weight_z * context + want_weight_x * width
    return 2 * math.prod(grad[:-1]) * out * each


def _diagonal(x, z, weight, bias, shift_weight, shift_bias, weight_x, *_, **__):
    return _weights(x, weight, shift_weight, weight_x)


def _gated(x, z, weight, weight_z, weight_x, *_, **__):
    return _weights(x, weight, weight_z, weight_x)


FORMULAS: dict[str, Callable[..., int]] = {
    "interaction": _forward,
    "interaction_packed": _packed_forward,
    "interaction_input_grads": _input_grads,
    "interaction_weight_grads": _weight_grads,
    "diagonal": _diagonal,
    "gated_interaction": _gated,
    "modulate": lambda *_, **__: 0,
    "modulate_grads": lambda *_, **__: 0,
}


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in FORMULAS.items():
        for operation in set(overloads(name).values()):
            register_flop_formula(operation.overloadpacket)(formula)


when_imported("torch.utils.flop_counter", _register)
