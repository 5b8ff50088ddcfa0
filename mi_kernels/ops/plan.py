"""What a call will do, as :func:`mi_kernels.explain` returns it."""

from dataclasses import dataclass
from typing import NamedTuple


class Cost(NamedTuple):
    """Of one way to run a call: forward and all the gradients wanted."""

    plan: str
    operations: int
    bytes: int  # what is copied or held beyond the results, as often as it is touched; and W
    femtoseconds: int

    def __str__(self) -> str:
        time = self.femtoseconds / 1e9
        return f"{self.plan}: {self.operations:,} operations, {self.bytes:,} bytes, {time:,.1f} us"


@dataclass(frozen=True)
class Plan:
    """How an operation will run: printable, with one more plan for each gradient primitive wanted.

    Attributes:
        op: the operation, ``forward``, ``input_grads`` or ``weight_grads``.
        backend: the backend that runs it.
        algorithm: the form chosen by the planner.
        operations: multiplications and additions of the contraction.
        bytes: inputs read once and results written once.
        scratch: bytes allocated beyond the results at the present number of threads, copies of broadcast
            inputs included (these live until the backward pass); of the portable backend its largest chunk
            alone, and None if not known.
        why: the reason, in one sentence.
        backward: the plans of the gradients that the arguments ask for.
        alternatives: where x and z do not have the same leading dimensions, what each plan costs with all
            gradients wanted, the chosen one included (cost_model.py).
        calls: of a module that makes several calls, their plans.

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
