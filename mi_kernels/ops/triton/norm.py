"""Normalisation with modulation and a gated residual, and its gradients, in Triton.

Compiled ahead of time and run in Triton's interpreter, not on a GPU. Axes and tiles: norm_tiling.py;
kernels: norm_kernels.py.

Sets without positions (layer and rms norm) are rows of a tile, which has all their channels. The backward
pass computes dx and, in the same read, the sums of g n, g and h dx over the rows of one context that a
program loops over. These partial sums go to scratch, are added in a fixed order (no atomics), and give the
gradients of all that has the size of a context. Where contexts vary by row, their gradients are written by
element, and only the sums for weight and bias go to scratch. Longer rows take their means in a pass before.

Sets with positions (maps) are a tile each; their sums over positions are those of the means too. Larger ones
are cut into tiles and read twice: sums first, then results. Where the operands have more axes than the
kernels take, the portable implementation computes the result.
"""

from typing import Any

from torch import Tensor

from ..norm import portable
from ..norm.layout import result_like
from . import norm_kernels as kernels
from . import norm_tiling as tiling
from .launch import launch
from .norm_grads import Gradients
from .norm_problem import Problem, launch_rows, map_tiles

Maybe = Tensor | None


def norm_modulate(
    x: Tensor,
    h: Maybe,
    gate: Maybe,
    scale: Maybe,
    shift: Maybe,
    weight: Maybe,
    bias: Maybe,
    dim: int,
    groups: int,
    center: bool,
    eps: float,
    activation: str,
    scale_offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x_new, mean and rstd of ``mi_kernels::norm_modulate``; shapes as in schema.py."""
    found = None
    if x.numel():
        operands = {"h": h, "gate": gate, "scale": scale, "shift": shift, "weight": weight, "bias": bias}
        found = _forward(Problem(x, dim, groups), operands, center, eps, activation, scale_offset)
    if found is None:
        given = (x, h, gate, scale, shift, weight, bias, dim, groups, center, eps, activation, scale_offset)
        return portable.norm_modulate(*given)
    return found


def _forward(
    problem: Problem,
    operands: dict[str, Maybe],
    center: bool,
    eps: float,
    activation: str,
    scale_offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The results, or None if there are too many axes."""
    x, dim = problem.x, problem.dim
    y = result_like(x, dim)
    x_new = x.new_empty(0) if operands["h"] is None else result_like(x, dim)
    mean = x.new_empty(problem.lead if center else (0,), dtype=problem.wide)
    rstd = x.new_empty(problem.lead, dtype=problem.wide)
    tensors = {"x": problem.flat(x)} | operands | {"h": problem.flat(operands["h"])}
    layouts = {name: problem.layout(t) for name, t in tensors.items()} | {"y": problem.layout(y)}
    arguments: dict[str, Any] = {f"p_{name}": t for name, t in tensors.items()}
    arguments |= {"p_y": y, "p_x_new": None if operands["h"] is None else x_new}
    arguments |= {"p_mean": mean if center else None, "p_rstd": rstd}
    arguments |= {"eps": eps, "scale_offset": scale_offset, "ACTIVATION": activation}
    rows = problem.space == 1 and tiling.power(problem.channels) <= problem.most(False)
    if rows:
        layouts["stat"] = problem.statistics()
    axes = problem.axes(layouts, None, rows)
    if axes is None:
        return None
    arguments |= axes.sizes(kernels.OUTER)
    if rows:
        launch_rows(problem, axes, kernels._norm_rows_kernel, arguments, layouts)
    else:
        _launch_maps(problem, axes, arguments, layouts, center, eps)
    return y, x_new, mean, rstd


def _launch_maps(
    problem: Problem,
    axes: tiling.Sets,
    arguments: dict[str, Any],
    layouts: dict[str, tiling.Layout],
    center: bool,
    eps: float,
) -> None:
    tile, whole, m_tiles, n_tiles = map_tiles(problem, layouts["y"])
    arguments |= tile | {"CENTER": center} | problem.strides(axes, layouts, tile["CHANNELS_ARE_ROWS"])
    tiles, device = m_tiles * n_tiles, problem.x.device
    options = tiles * problem.sets, problem.warps(tile["BM"], tile["BN"], False)

    def run(part: int, parts: Maybe, **others: Any) -> None:
        given = arguments | others | {"PASS": part, "p_parts": parts}
        launch(device, kernels._norm_maps_kernel, options[0], given, options[1], 1)

    if whole:
        run(kernels.WHOLE.value, None)
        return
    parts = problem.x.new_empty((3, tiles, problem.sets), dtype=problem.wide)
    run(kernels.SUMS.value, parts, p_y=None)
    _combine(parts, arguments["p_mean"], arguments["p_rstd"], problem.channels * problem.space, eps)
    x_new = arguments["p_x_new"]
    others = {} if x_new is None else {"p_x": x_new, "p_h": None, "p_gate": None, "p_x_new": None}
    strides = {} if x_new is None else {"x_strides": arguments["y_strides"]}
    run(kernels.APPLY.value, None, **others, **strides)


def _combine(parts: Tensor, mean: Maybe, rstd: Tensor, size: int, eps: float) -> None:
    """mean and rstd from those of the tiles, by Chan's formula, in float64: there are few of them."""
    sizes, means, squares = parts.double()
    total = squares.sum(0)
    if mean is not None:
        together = (sizes * means).sum(0) / size
        total += (sizes * (means - together).square()).sum(0)
        mean.copy_(together.view(mean.shape))
    rstd.copy_((total / size + eps).rsqrt().view(rstd.shape))


def norm_modulate_grads(
    grad: Tensor,
    x: Tensor,
    grad_x: Maybe,
    h: Maybe,
    gate: Maybe,
    scale: Maybe,
    shift: Maybe,
    weight: Maybe,
    bias: Maybe,
    mean: Maybe,
    rstd: Tensor,
    dim: int,
    groups: int,
    center: bool,
    activation: str,
    scale_offset: float,
    *want: bool,
) -> tuple[Tensor, ...]:
    """The gradients of ``mi_kernels::norm_modulate_grads``."""
    found = None
    if x.numel():
        call = Gradients(Problem(x, dim, groups), activation, scale_offset, *want)
        call.take(grad, x, grad_x, h, gate, scale, shift, weight, bias, mean if center else None, rstd)
        found = call.run()
    if found is None:
        given = (grad, x, grad_x, h, gate, scale, shift, weight, bias, mean if center else None, rstd)
        return portable.norm_modulate_grads(*given, dim, groups, center, activation, scale_offset, *want)
    return found
