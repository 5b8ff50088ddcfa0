"""The plan of a call, as :func:`mi_kernels.explain` returns it."""

from dataclasses import dataclass
from typing import NamedTuple


class Cost(NamedTuple):
    """The cost of one plan: forward pass and all wanted gradients."""

    plan: str
    operations: int
    bytes: int  # traffic of W, of copies and of intermediates: each access counts
    femtoseconds: int

    def __str__(self) -> str:
        time = self.femtoseconds / 1e9
        return f"{self.plan}: {self.operations:,} operations, {self.bytes:,} bytes, {time:,.1f} us"


@dataclass(frozen=True)
class Plan:
    """How an operation will run. Printable; ``backward`` has a plan for each wanted gradient primitive.

    Attributes:
        op: the operation, ``forward``, ``input_grads`` or ``weight_grads``.
        backend: the backend that runs it.
        algorithm: the form chosen by the planner.
        operations: multiplications and additions of the contraction.
        bytes: inputs read once and results written once.
        scratch: bytes allocated beyond the results with the current number of threads, including copies of
            broadcast inputs (these live until the backward pass); for the portable backend only its largest
            chunk; None if unknown.
        why: the reason, in one sentence.
        backward: the plans of the gradients that the arguments require.
        alternatives: where the leading dimensions of x and z differ, the cost of each plan with all wanted
            gradients, including the chosen plan (cost_model.py).
        calls: the plans of the calls of a module that makes several.

    Example:
        >>> plan = mi.explain(mi.modulate, torch.ones(2, 3), torch.ones(3))
        >>> plan.op
        'modulate'
    """

    op: str
    backend: str
    algorithm: str
    operations: int
    bytes: int
    scratch: int | None
    why: str
    backward: "tuple[Plan, ...]" = ()
    alternatives: tuple[Cost, ...] = ()
    calls: "tuple[Plan, ...]" = ()

    def __str__(self) -> str:
        scratch = "unknown" if self.scratch is None else f"{self.scratch:,} bytes"
        lines = [
            f"{self.op}: {self.algorithm} on the {self.backend} backend",
            f"  operations {self.operations:,}, ideal traffic {self.bytes:,} bytes, scratch {scratch}",
            f"  why: {self.why}",
            *(f"  plan {cost}" for cost in self.alternatives),
        ]
        return "\n".join(lines + [str(plan) for plan in (*self.backward, *self.calls)])
