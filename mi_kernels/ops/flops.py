"""FLOP formulas of the operations, for ``torch.utils.flop_counter`` and its users.

By its convention a product counts two operations per multiplication, and elementwise work (all of modulation)
counts zero. The count is that of the formula, whichever plan runs: dx and dz share one T = g W. Groups of
rows are part of B. The formula of an operation is next to its schema.
"""

import math
from collections.abc import Sequence
from typing import Any

from .imports import when_imported

Shape = Sequence[int]


def products(rows: Shape, *weights: Shape | None) -> int:
    """Every row is multiplied by every element of each weight; grouped weights have a leading G."""
    batch = math.prod(rows[:-1])
    if batch == 0:
        return 0
    groups = rows[0] if len(rows) == 3 else 1
    return sum(2 * batch * math.prod(weight) // groups for weight in weights if weight is not None)


def elementwise(*_: Any, **__: Any) -> int:
    return 0


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    from .library import DEFINED, twins

    for name, definition in DEFINED.items():
        for operation in twins(name):
            register_flop_formula(operation.overloadpacket)(definition.flops)


def register() -> None:
    when_imported("torch.utils.flop_counter", _register)
