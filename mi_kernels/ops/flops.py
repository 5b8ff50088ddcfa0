"""How many operations each operation takes, for ``torch.utils.flop_counter`` and what builds on it.

By its convention products count twice their multiplications, and elementwise work, so all of modulation,
counts nothing. Counted is what the formula needs, whichever plan runs: backward makes dx and dz of one
T = g W. Groups of rows are part of B. The formula of an operation stands beside its schema.
"""

import math
from collections.abc import Sequence
from typing import Any

from mi_kernels.ops.imports import when_imported

Shape = Sequence[int]


def products(rows: Shape, *weights: Shape | None) -> int:
    """Each row meets each element of each weight once; weights of groups have one dimension more."""
    batch = math.prod(rows[:-1])
    if batch == 0:
        return 0
    groups = rows[0] if len(rows) == 3 else 1
    return sum(2 * batch * math.prod(weight) // groups for weight in weights if weight is not None)


def elementwise(*_: Any, **__: Any) -> int:
    return 0


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    from mi_kernels.ops.library import DEFINED, twins

    for name, definition in DEFINED.items():
        for operation in twins(name):
            register_flop_formula(operation.overloadpacket)(definition.flops)


def register() -> None:
    when_imported("torch.utils.flop_counter", _register)
