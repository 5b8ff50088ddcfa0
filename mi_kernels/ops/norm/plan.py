"""Plans of normalisation with modulation for :func:`mi_kernels.explain`."""

from dataclasses import replace

from torch import Tensor

from .. import backend as backends
from .. import counts
from ..plan import Plan
from ..rules import gradients_wanted
from . import layout

_WHY = {
    "one pass": "x is read once and y written once; statistics, modulation and residual are computed while"
    " a set is on chip or in the cache",
    "one pass, sums": "x and g are read once; all gradients, and their sums, are computed in the same pass",
    "elementwise": "PyTorch's own operations, one after the other",
}
_COPIED = "; {} is copied first, as its {} do not follow each other in memory"
_BESIDE = "; what differs from pixel to pixel is modulation of its own"


def norm_modulate(
    backend: str,
    op: str,
    center: bool,
    beside: int,
    dim: int,
    x: Tensor,
    h: Tensor | None,
    *parameters: Tensor | None,  # gate, scale, shift, weight, bias
) -> Plan:
    """The plan of checked arguments; ``beside``: passes of modulation before or after it."""
    fused = backends.get(backend).fused
    copied = [name for name, t in (("x", x), ("h", h)) if t is not None and layout.is_copied(t, dim)]
    sizes = [0 if t is None else t.numel() for t in parameters]
    call = center, x.numel(), h is not None, sizes, x.element_size()

    def step(op: str, algorithm: str, count: counts.Count, scratch: int | None, moved: int) -> Plan:
        algorithm = algorithm if fused else "elementwise"
        why = _WHY[algorithm] + (_BESIDE if beside else "")
        if fused and copied:
            elements = "channels" if dim == x.dim() - 1 else "elements of a group"
            why += _COPIED.format(" and ".join(copied), elements)
        traffic = count.bytes + (beside * moved + 2 * len(copied) * fused) * x.numel() * x.element_size()
        return Plan(op, backend, algorithm, count.operations, traffic, scratch, why)

    backward: tuple[Plan, ...] = ()
    if any(gradients_wanted((x, h, *parameters))):
        grads = counts.norm_modulate_grads(*call)
        backward = (step("norm_modulate_grads", "one pass, sums", grads, None, 3),)
    scratch = _scratch(min(beside, 1) + len(copied), x) if fused else None
    return replace(step(op, "one pass", counts.norm_modulate(*call), scratch, 2), backward=backward)


def _scratch(tensors: int, x: Tensor) -> int:
    """What a pass beside it reads, and copies."""
    return tensors * x.numel() * x.element_size()


def residual(backend: str, x: Tensor, h: Tensor) -> Plan:
    """x + h, which is PyTorch's."""
    moved = 3 * x.numel() * x.element_size()
    backward: tuple[Plan, ...] = ()
    if any(gradients_wanted((x, h))):
        why = "both gradients are that of y"
        backward = (Plan("gated_residual_grads", backend, "torch", 0, 0, 0, why),)
    why = "without a gate it is PyTorch's sum"
    return Plan("gated_residual", backend, "torch", x.numel(), moved, 0, why, backward)
