"""The gradients of normalisation with modulation in Triton: passes, and what follows from their sums."""

import torch
from torch import Tensor

from .. import activations
from ..norm.layout import result_like
from . import norm_grads_kernels as kernels
from . import norm_kernels as shared
from . import norm_tiling as tiling
from .launch import cdiv, launch
from .norm_problem import Problem, launch_rows, map_tiles

Maybe = Tensor | None


class Gradients:
    """One call of norm_modulate_grads."""

    def __init__(self, problem: Problem, activation: str, scale_offset: float, *want: bool) -> None:
        self.problem, self.activation, self.scale_offset = problem, activation, scale_offset
        self.want_x, self.want_h, self.want_gate, self.want_scale, self.want_shift, *affine = want
        self.want_weight, self.want_bias = affine
        self.inputs = self.want_x or self.want_h or self.want_gate

    def take(
        self,
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
    ) -> None:
        """Keep the operands that are read, and the sizes of the others."""
        problem = self.problem
        size = (1,) * problem.dim + (problem.x.shape[problem.dim],) + (1,) * (x.dim() - problem.dim - 1)
        self.weight_size = torch.Size(size)
        self.context_size = next((t.shape for t in (gate, scale, shift) if t is not None), self.weight_size)
        self.bias = bias
        self.tensors: dict[str, Maybe] = {
            "grad": problem.flat(grad),
            "x": problem.flat(x),
            "grad_x": problem.flat(grad_x) if self.inputs else None,
            "h": problem.flat(h) if self.want_gate else None,
            "gate": gate if self.want_h else None,
            "scale": scale,
            "weight": weight,
        }
        self.statistics = {"p_mean": mean, "p_rstd": rstd.contiguous()}
        if mean is not None:
            self.statistics["p_mean"] = mean.contiguous()

    def run(self) -> tuple[Tensor, ...] | None:
        """The gradients, or None if there are too many axes."""
        problem, x = self.problem, self.problem.x
        self.dx = result_like(x, problem.dim) if self.want_x else x.new_empty(0)
        self.dh = result_like(x, problem.dim) if self.want_h else x.new_empty(0)
        self.layouts = {name: problem.layout(t) for name, t in self.tensors.items()}
        made = self.dx if self.want_x else self.dh if self.want_h else result_like(x, problem.dim)
        self.layouts["dx"] = problem.layout(made)
        self.arguments = {
            **{f"p_{name}": t for name, t in self.tensors.items()},
            **self.statistics,
            **{"p_dx": self.dx if self.want_x else None, "p_dh": self.dh if self.want_h else None},
            **{"scale_offset": self.scale_offset, "ACTIVATION": self.activation, "sets": problem.sets},
        }
        # Which of the sums over g n, g and h dx are needed for the sizes of a context or of weight.
        self.sum_gn = self.want_scale or self.want_weight
        self.sum_g = self.want_shift or self.want_bias or (self.want_scale and self.bias is not None)
        if problem.space > 1:
            return self._of_maps()
        lead = zip(self.context_size[: problem.dim], x.shape[: problem.dim], strict=True)
        reduced = [own == 1 != size for own, size in lead]
        has_context = self.context_size != self.weight_size
        if has_context and not any(reduced):
            return self._of_rows((True,) * problem.dim, True)
        return self._of_rows(tuple(reduced), False)

    def _of_rows(self, looped: tuple[bool, ...], by_row: bool) -> tuple[Tensor, ...] | None:
        problem, x = self.problem, self.problem.x
        context = {"p_dgate": self.want_gate, "p_dscale": self.want_scale, "p_dshift": self.want_shift}
        if by_row:
            results = {
                name: x.new_empty(self.context_size) if wanted else None for name, wanted in context.items()
            }
            size, wants = self.weight_size, [self.want_weight, self.want_bias, False]
            self.layouts["context"] = problem.layout(x.new_empty(self.context_size, device="meta"))
        else:
            results = dict.fromkeys(context)
            size, wants = self.context_size, [self.sum_gn, self.sum_g, self.want_gate]
            self.layouts["context"] = tiling.ABSENT
        bias = self.bias if by_row and self.want_scale else None
        self.layouts |= {"bias": problem.layout(bias), "stat": problem.statistics()}
        self.layouts["sum"] = problem.layout(x.new_empty(size, device="meta"))
        axes = problem.axes(self.layouts, (*looped, False), True)
        if axes is None:
            return None
        means = None
        whole = tiling.power(problem.channels) <= problem.most(True)
        if self.inputs and not whole:
            means = self._row_means()
            if means is None:
                return None
        rows, others = axes.rows.size, torch.Size([axis.size for axis in axes.outer]).numel()
        deep = torch.Size([axis.size for axis in axes.depth]).numel()
        columns = problem.channels if whole else tiling.LONG
        BM, BN = tiling.row_tile(rows, others * deep, columns, problem.most(True) // 4)
        programs = others * cdiv(problem.channels, BN)
        steps = deep * cdiv(rows, BM)
        splits = tiling.splits(steps, programs)
        sums = [x.new_empty((splits, *size), dtype=problem.wide) if wanted else None for wanted in wants]
        arguments = {
            **self.arguments,
            **results,
            **{"p_means": means, "p_bias": bias, "p_sum_gn": sums[0], "p_sum_g": sums[1]},
            **axes.sizes(shared.OUTER, shared.DEPTH),
            **problem.strides(axes, self.layouts, None),
            **{"M": rows, "N": problem.channels, "BM": BM, "BN": BN, "CONTEXT_BY_ROW": by_row},
            **{"sum_size": size.numel(), "splits": splits},
        }
        if not by_row:
            arguments["p_dgate"] = sums[2]
        kernel = kernels._norm_rows_grads_kernel
        launch(x.device, kernel, programs * splits, arguments, problem.warps(BM, BN, True), 1)
        gn, g, hd = (None if t is None else t.sum(0) for t in sums)
        if not by_row:
            return self._finished(gn, g, hd)
        found = [results[name] for name in ("p_dgate", "p_dscale", "p_dshift")] + [gn, g]
        return self._results(*found)

    def _row_means(self) -> Maybe:
        """m(a) and m(a n) of rows that are longer than a tile, [2, sets]; None: too many axes."""
        problem = self.problem
        names = ("grad", "x", "scale", "weight", "stat")
        layouts = {name: self.layouts[name] for name in names}
        axes = problem.axes(layouts, None, True)
        if axes is None:
            return None
        means = problem.x.new_empty((2, problem.sets), dtype=problem.wide)
        taken = ("p_grad", "p_x", "p_scale", "p_weight", "p_mean", "p_rstd", "scale_offset", "sets")
        arguments = {name: self.arguments[name] for name in (*taken, "ACTIVATION")}
        arguments |= {"p_means": means, **axes.sizes(shared.OUTER)}
        launch_rows(problem, axes, kernels._norm_row_means_kernel, arguments, layouts, tiling.LONG)
        return means

    def _of_maps(self) -> tuple[Tensor, ...] | None:
        problem, x = self.problem, self.problem.x
        axes = problem.axes(self.layouts, None, False)
        if axes is None:
            return None
        tile, whole, m_tiles, n_tiles = map_tiles(problem, self.layouts["dx"])
        by_rows = tile["CHANNELS_ARE_ROWS"]
        arguments = {
            **self.arguments,
            **tile,
            **axes.sizes(shared.OUTER),
            **problem.strides(axes, self.layouts, by_rows),
        }
        cuts = n_tiles if by_rows else m_tiles
        programs, warps = m_tiles * n_tiles * problem.sets, problem.warps(tile["BM"], tile["BN"], True)
        two_passes = self.inputs and not whole

        def made(wanted: bool) -> Maybe:
            size = (cuts, problem.sets, problem.channels)
            return x.new_empty(size, dtype=problem.wide) if wanted else None

        def run(part: int, means: Maybe, *sums: Maybe) -> None:
            given = dict(zip(("p_sum_gn", "p_sum_g", "p_sum_hd"), sums, strict=True))
            given = arguments | given | {"PASS": part, "p_means": means}
            launch(x.device, kernels._norm_maps_grads_kernel, programs, given, warps, 1)

        gn = made(self.sum_gn or two_passes)
        g = made(self.sum_g or (two_passes and self.statistics["p_mean"] is not None))
        hd = made(self.want_gate)
        if whole and self.inputs:
            run(shared.WHOLE.value, None, gn, g, hd)
        elif gn is not None or g is not None:
            run(shared.SUMS.value, None, gn, g, None)
        gn, g = self._by_channel(gn), self._by_channel(g)
        if two_passes:
            run(shared.APPLY.value, self._means(gn, g), None, None, hd)
        return self._finished(gn, g, self._by_channel(hd))

    def _by_channel(self, sums: Maybe) -> Maybe:
        """[cuts, sets, channels] added up to [*lead, C, 1...]."""
        if sums is None:
            return None
        x, dim = self.problem.x, self.problem.dim
        return sums.sum(0).view(*x.shape[: dim + 1], *(1,) * (x.dim() - dim - 1))

    def _means(self, gn: Maybe, g: Maybe) -> Tensor:
        """m(a) and m(a n), [2, sets], from the sums of each channel."""
        problem = self.problem
        means = problem.x.new_empty((2, problem.sets), dtype=problem.wide)
        for mean, total in zip(means, (g, gn), strict=True):
            if total is not None:
                if self.tensors["scale"] is not None:
                    total = total * self._factor()
                if self.tensors["weight"] is not None:
                    total = total * self.tensors["weight"]
                of_sets = total.reshape(problem.sets, problem.channels).sum(1)
                torch.div(of_sets, problem.channels * problem.space, out=mean)
        return means

    def _factor(self) -> Tensor:
        scale = self.tensors["scale"]
        assert scale is not None
        return activations.value(self.activation, scale.to(self.problem.wide)) + self.scale_offset

    def _finished(self, gn: Maybe, g: Maybe, hd: Maybe) -> tuple[Tensor, ...]:
        """All gradients from the sums of g n, g and h dx, which have a context's size at least."""
        scale, weight, bias = self.tensors["scale"], self.tensors["weight"], self.bias
        gn, g, hd = (None if t is None else t.sum_to_size(self.context_size) for t in (gn, g, hd))
        dscale = dweight = dbias = None
        if self.want_scale and gn is not None and scale is not None:
            dscale = gn if weight is None else gn * weight
            if bias is not None and g is not None:
                dscale = dscale + g * bias
            dscale = activations.tangent(self.activation, scale.to(self.problem.wide), dscale)
        if self.want_weight and gn is not None:
            dweight = (gn if scale is None else gn * self._factor()).sum_to_size(self.weight_size)
        if self.want_bias and g is not None:
            dbias = (g if scale is None else g * self._factor()).sum_to_size(self.weight_size)
        return self._results(hd, dscale, g if self.want_shift else None, dweight, dbias)

    def _results(self, *found: Maybe) -> tuple[Tensor, ...]:
        x = self.problem.x
        return self.dx, self.dh, *(x.new_empty(0) if t is None else t.to(x.dtype).contiguous() for t in found)
