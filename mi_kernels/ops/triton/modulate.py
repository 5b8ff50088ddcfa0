"""Modulation, mixtures and their gradients in Triton: one read of each operand, one write of each result.

Compiled ahead of time and run in Triton's interpreter, not on a GPU. Axes and tiles: modulate_tiling.py;
kernels: modulate_kernels.py.

The gradients are computed in one pass. dscale and dshift are summed over the axes in which scale does not
vary, so a program loads its scale once, loops over the tiles of its part of a sum, and keeps elementwise
partial sums in registers. Where several programs share a sum, their partial sums go to scratch (at most
``axes.FEW_PROGRAMS`` tiles) and a second kernel adds them in a fixed order: no atomics.
"""

import torch
import triton
from torch import Tensor

from ..dtypes import accumulation_dtype
from ..modulate import portable
from . import modulate_kernels as kernels
from . import modulate_tiling as axes
from .launch import cdiv, launch

Maybe = Tensor | None
# The second kernel's tile: its rows are splits. Few columns, so that few results still use several programs.
FINISH, FINISH_COLUMNS = 1024, 64
_OUTER, _DEPTH = kernels.OUTER, kernels.DEPTH


def _strides(tensor: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Strides, 0 where the tensor broadcasts to this shape."""
    pairs = zip(tensor.stride(), tensor.shape, shape, strict=True)
    return tuple(0 if own != size else stride for stride, own, size in pairs)


def _sizes(plan: axes.Tiling, *names: tuple[str, ...]) -> dict[str, int]:
    """The arguments M and N, and the sizes of the other axes by their names."""
    M, N, *others = plan.sizes
    sizes = {"M": M, "N": N}
    for group, values in zip(names, others, strict=False):
        sizes |= dict(zip(group, values, strict=True))
    return sizes


def modulate(
    x: Tensor, scale: Tensor, shift: Maybe, activation: str, scale_offset: float, scale_factor: float = 1.0
) -> Tensor:
    """y of ``mi_kernels::modulate``; shapes as in schema.py."""
    y = _forward(x, scale, shift, activation, scale_offset, scale_factor, False)
    return portable.modulate(x, scale, shift, activation, scale_offset, scale_factor) if y is None else y


def mix(a: Tensor, b: Tensor, gate: Tensor, activation: str) -> Tensor:
    """y of ``mi_kernels::mix``."""
    y = _forward(a, gate, b, activation, 0.0, 1.0, True)
    return portable.mix(a, b, gate, activation) if y is None else y


def _forward(
    x: Tensor,
    scale: Tensor,
    shift: Maybe,
    activation: str,
    scale_offset: float,
    scale_factor: float,
    mixes: bool,
) -> Maybe:
    """y, or None if there are too many axes."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    operands = [y, x, scale] if shift is None else [y, x, scale, shift]
    strides = tuple(_strides(t, x.shape) for t in operands)
    plan = axes.tiling(tuple(x.shape), strides, (False,) * x.dim(), x.element_size())
    if plan is None:
        return None
    arguments = {
        **{"p_x": x, "p_y": y, "p_scale": scale, "p_shift": shift},
        **{"scale_offset": scale_offset, "scale_factor": scale_factor, "MIXES": mixes},
        **_sizes(plan, _OUTER),
        **{"x_strides": plan.strides(1), "y_strides": plan.strides(0)},
        "scale_strides": plan.strides(2),
        "shift_strides": None if shift is None else plan.strides(3),
        **dict(zip(("SCALE_BY_ROW", "SCALE_BY_COLUMN"), plan.varies(2), strict=True)),
        **dict(zip(("SHIFT_BY_ROW", "SHIFT_BY_COLUMN"), plan.varies(-1), strict=True)),
        **{"ACTIVATION": activation, "BM": plan.BM, "BN": plan.BN},
    }
    launch(x.device, kernels._modulate_kernel, plan.programs, arguments, axes.WARPS, 1)
    return y


def modulate_grads(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift_size: list[int],
    activation: str,
    scale_offset: float,
    want_x: bool,
    want_scale: bool,
    want_shift: bool,
    scale_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale and dshift of ``mi_kernels::modulate_grads``."""
    make = x.new_zeros if x.numel() == 0 else x.new_empty
    dx = torch.empty_like(x) if want_x else x.new_empty(0)
    dscale = make(scale.shape if want_scale else 0)
    dshift = make(shift_size if want_shift else 0)
    if x.numel() == 0:
        return dx, dscale, dshift
    # One pass, unless dshift is summed over other axes than dscale; then a second pass reads g for it.
    same = tuple(shift_size) == tuple(scale.shape)
    for wants in ((want_x, want_scale, want_shift and same), (False, False, want_shift and not same)):
        results = [t if wanted else None for t, wanted in zip((dx, dscale, dshift), wants, strict=True)]
        rule = (activation, scale_offset, scale_factor)
        if any(wants) and not _pass(grad, x, None, scale, *rule, *results):
            given = (grad, x, scale, shift_size, activation, scale_offset)
            return portable.modulate_grads(*given, want_x, want_scale, want_shift, scale_factor)
    return dx, dscale, dshift


def mix_grads(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor,
    activation: str,
    want_a: bool,
    want_b: bool,
    want_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """da, db and dgate of ``mi_kernels::mix_grads``."""
    da, db = (torch.empty_like(a) if wanted else a.new_empty(0) for wanted in (want_a, want_b))
    dgate = (a.new_zeros if a.numel() == 0 else a.new_empty)(gate.shape if want_gate else 0)
    wants = (want_a, want_gate, want_b)
    if a.numel() == 0 or not any(wants):
        return da, db, dgate
    results = [t if wanted else None for t, wanted in zip((da, dgate, db), wants, strict=True)]
    if not _pass(grad, a, b, gate, activation, 0.0, 1.0, *results):
        return portable.mix_grads(grad, a, b, gate, activation, want_a, want_b, want_gate)
    return da, db, dgate


def _pass(
    grad: Tensor,
    x: Tensor,
    other: Maybe,  # of a mixture
    scale: Tensor,
    activation: str,
    scale_offset: float,
    scale_factor: float,
    dx: Maybe,
    dscale: Maybe,
    dshift: Maybe,
) -> bool:
    """Write the results that are not None; False if there are too many axes."""
    sums = [t for t in (dscale, dshift if other is None else None) if t is not None]
    reduced = tuple(own != size for own, size in zip((*sums, x)[0].shape, x.shape, strict=True))
    like_x = dshift if dx is None and other is not None else dx
    operands = (
        grad if like_x is None else like_x,
        grad,
        None if dscale is None else x,
        None if dscale is like_x is None else scale,
        sums[0] if sums else None,
        None if dscale is None else other,
    )
    strides = tuple((0,) * x.dim() if t is None else _strides(t, x.shape) for t in operands)
    plan = axes.tiling(tuple(x.shape), strides, reduced, x.element_size())
    if plan is None:
        return False
    size = sums[0].numel() if sums else 0
    into = [dscale, dshift]
    if plan.splits > 1:
        scratch = x.new_empty((len(sums), plan.splits, size), dtype=accumulation_dtype(x.dtype))
        parts = iter(scratch)
        into = [next(parts) if any(t is one for one in sums) else t for t in into]
    arguments = {
        **{"p_grad": grad, "p_x": operands[2], "p_scale": operands[3], "p_dx": dx},
        **{"p_dscale": into[0], "p_dshift": into[1], "p_other": other},
        **{"scale_offset": scale_offset, "scale_factor": scale_factor},
        **_sizes(plan, _OUTER, _DEPTH),
        **{"grad_strides": plan.strides(1), "x_strides": plan.strides(2), "scale_strides": plan.strides(3)},
        "other_strides": plan.strides(5),
        **{"dx_strides": plan.strides(0), "sum_strides": plan.strides(4), "sum_size": size},
        "splits": plan.splits,
        **dict(zip(("SCALE_BY_ROW", "SCALE_BY_COLUMN"), plan.varies(3), strict=True)),
        **{"REDUCE_ROWS": plan.rows.reduced, "REDUCE_COLUMNS": plan.columns.reduced},
        **{"ACTIVATION": activation, "BM": plan.BM, "BN": plan.BN},
    }
    programs = plan.programs * plan.splits
    launch(x.device, kernels._modulate_grads_kernel, programs, arguments, axes.WARPS, 1)
    if plan.splits > 1:
        for part, total in zip(scratch, sums, strict=True):
            _add_splits(part, total)
    return True


def _add_splits(parts: Tensor, total: Tensor) -> None:
    splits, size = parts.shape
    BN = min(FINISH_COLUMNS, triton.next_power_of_2(size))
    BS = min(FINISH // BN, triton.next_power_of_2(splits))
    arguments = {"p_parts": parts, "p_out": total, "size": size, "splits": splits, "BS": BS, "BN": BN}
    launch(parts.device, kernels._add_splits_kernel, cdiv(size, BN), arguments, axes.WARPS, 1)
