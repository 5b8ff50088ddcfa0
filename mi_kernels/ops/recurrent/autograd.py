"""Derivative rules of multiplicative RNNs.

The backward pass is ``recurrent_grads``, through time, and products over all steps for the weights; forward
mode is products over all steps, for the tangents of the weights, and ``recurrent_tangents``. Both are rules
themselves. Their derivatives are those of the steps in plain PyTorch: exact to any order, and slow.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_tensors
from ..dtypes import FLOATING
from ..library import traceable
from ..rules import (
    Maybe,
    Rule,
    differentiating,
    nestable,
    primals,
    scatter,
    select,
    unbatched,
    wanted,
)
from . import portable, terms
from .forms import FACTORED, INTEGRATED, LSTM
from .terms import DIFFERENTIABLE, Kept, Operands, Setting

_NAMES = Operands._fields[:DIFFERENTIABLE]
_FOLDED: tuple[Any, ...] = (1, 1, 0, 0, *(None,) * 6, 0)  # where B is in each of the operands
_SHARED = slice(4, DIFFERENTIABLE)  # the operands without B


def _check(backend, kind, activation, reverse, gates_x, factors_x, h0, c0, *weights):
    names = ("gates_x", "h0", "factors_x", "c0", *_NAMES[4:])
    check_tensors("recurrent", names, (gates_x, h0, factors_x, c0, *weights[:6]), 2, FLOATING)


@traceable(
    "differentiable_recurrent",
    "(str backend, str kind, str activation, bool reverse, Tensor gates_x, Tensor? factors_x, Tensor h0,"
    " Tensor? c0, Tensor? weight_hh, Tensor? weight_hm, Tensor? weight_mh, Tensor? weight, Tensor? weight_hr,"
    " Tensor? integration, Tensor? lengths) -> (Tensor, Tensor, Tensor)",
    _check,
)
def recurrent(
    backend: str,
    kind: str,
    activation: str,
    reverse: bool,
    gates_x: Tensor,
    factors_x: Maybe,
    h0: Tensor,
    c0: Maybe,
    weight_hh: Maybe,
    weight_hm: Maybe,
    weight_mh: Maybe,
    weight: Maybe,
    weight_hr: Maybe,
    integration: Maybe,
    lengths: Maybe,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, h_n and c_n, which has no elements but of a lstm; differentiable. schema.py has the shapes."""
    operands = Operands(
        gates_x,
        factors_x,
        h0,
        c0,
        weight_hh,
        weight_hm,
        weight_mh,
        weight,
        weight_hr,
        integration,
        lengths,
    )
    setting = Setting(kind, activation, reverse)
    if differentiating(operands[:DIFFERENTIABLE]):
        return RecurrentRule.call(backend, setting, *operands)[:3]
    return terms.kernel(backend, setting, False, *operands)[:3]  # type: ignore[return-value]


class RecurrentRule(Rule):
    function = "MultiplicativeRNN"

    @staticmethod
    def forward(backend, setting, *operands):
        return terms.kernel(backend, setting, True, *operands)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.setting, *given = inputs
        operands = Operands(*given)
        out, h_n, c_n, *kept = output
        form = operands.form(ctx.setting)
        has_c, factored = form.cell == LSTM, form.structure == FACTORED
        has_products = factored or form.structure == INTEGRATED
        there = factored and has_c, has_products, has_c, operands.weight_hr is not None
        ctx.mark_non_differentiable(*kept if has_c else (c_n, *kept))
        Rule.save(
            ctx, *operands, out, *(t if is_there else None for t, is_there in zip(kept, there, strict=True))
        )

    @staticmethod
    def backward(ctx, grad, grad_h, grad_c, *_):
        saved = ctx.saved_tensors
        operands, kept = Operands(*saved[: len(_FOLDED)]), Kept(*saved[len(_FOLDED) :])
        grads = grad, grad_h, grad_c if operands.c0 is not None else None
        want = tuple(wanted(ctx, operands.gates_x.numel() * kept.out.shape[-1])[2 : 2 + DIFFERENTIABLE])
        if not any(want) or all(g is None for g in grads):
            return (None,) * (3 + DIFFERENTIABLE)
        if differentiating((*grads, *operands[:DIFFERENTIABLE])):
            found = scatter(GradsRule.call(ctx.backend, ctx.setting, want, *grads, *operands, *kept), want)
        else:
            found = terms.gradients(ctx.backend, ctx.setting, want, grads, operands, kept)
        return None, None, *found, None

    @staticmethod
    @nestable
    def jvp(ctx, _, __, *tangents):
        saved, along = primals(ctx), tangents[:DIFFERENTIABLE]
        results = TangentsRule.call(ctx.backend, ctx.setting, *along, *saved)
        return (*results[:2], None if saved[3] is None else results[2], None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, backend, setting, *operands):
        size, dims = info.batch_size, in_dims[2:]
        if unbatched(dims[_SHARED], operands[_SHARED]):
            folded = [_folded(*one, size) for one in zip(operands, dims, _FOLDED, strict=True)]
            results = RecurrentRule.call(backend, setting, *folded)
            return _unfolded(results, (1, 0, 0, 1, 1, 1, 1), size)
        return _by_sample(size, lambda *one: RecurrentRule.call(backend, setting, *one), operands, dims)


def _folded(tensor: Maybe, dim: int | None, position: int | None, size: int) -> Maybe:
    """The mapped dimension as a part of B, which is the one at ``position``."""
    if tensor is None or position is None:
        return tensor
    if dim is None:
        shape = tensor.shape
        tensor = tensor.unsqueeze(position).expand(*shape[:position], size, *shape[position:])
    else:
        tensor = tensor.movedim(dim, position)
    shape = tensor.shape
    return tensor.reshape(*shape[:position], size * shape[position + 1], *shape[position + 2 :])


def _unfolded(
    results: Sequence[Any], positions: Sequence[Any], size: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The inverse of `_folded`; a result without a dimension B has no elements."""
    found, dims = [], []
    for result, position in zip(results, positions, strict=True):
        shape = result.shape
        if result.dim() < 2:
            found.append(result.new_empty(size, 0))
            dims.append(0)
        else:
            rows = shape[position] // size
            found.append(result.reshape(*shape[:position], size, rows, *shape[position + 1 :]))
            dims.append(position)
    return tuple(found), tuple(dims)


def _by_sample(
    size: int, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Maybe], dims: Sequence[int | None]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call a sample."""
    samples = [
        function(
            *(t if d is None or t is None else t.select(d, index) for t, d in zip(tensors, dims, strict=True))
        )
        for index in range(size)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    return results, (0,) * len(results)


def _steps(setting: Setting, operands: Sequence[Maybe]) -> tuple[Tensor, ...]:
    """out, h_n and c_n as plain PyTorch operations, which have all derivatives."""
    results = portable.recurrent(*operands, *setting, False)  # type: ignore[arg-type, call-arg]
    return results[:3] if operands[3] is not None else results[:2]


def _pulled(
    function: Callable[[Sequence[Maybe]], Sequence[Tensor]],
    tensors: Sequence[Maybe],
    want: Sequence[bool],
    cotangents: Sequence[Maybe],
) -> list[Maybe]:
    """The wanted gradients of the tensors, for cotangents of the results of a differentiable function."""
    given = [c is not None for c in cotangents]

    def of_wanted(*values: Tensor) -> tuple[Tensor, ...]:
        found = scatter(values, want)
        everything = [new if wanted else old for new, old, wanted in zip(found, tensors, want, strict=True)]
        return select(function(everything), given)  # type: ignore[return-value]

    pull = torch.func.vjp(of_wanted, *select(tensors, want))[1]
    return scatter(pull(select(cotangents, given)), want)


def _pushed(
    function: Callable[[Sequence[Maybe]], Sequence[Tensor]],
    tensors: Sequence[Maybe],
    along: Sequence[Maybe],
) -> tuple[Tensor, ...]:
    """The tangents of the results of a differentiable function.

    The gradients are linear in the cotangents, and the gradients of these are the tangents: there is no level
    of forward mode in it, of which PyTorch has a second one under torch.func alone.
    """
    given = [t is not None for t in along]

    def of_given(*values: Tensor) -> tuple[Tensor, ...]:
        found = scatter(values, given)
        everything = [new if wanted else old for new, old, wanted in zip(found, tensors, given, strict=True)]
        return tuple(function(everything))

    results, pull = torch.func.vjp(of_given, *select(tensors, given))[:2]
    pull_again = torch.func.vjp(pull, tuple(torch.zeros_like(result) for result in results))[1]
    return pull_again(select(along, given))[0]


class GradsRule(Rule):
    """The wanted gradients of `recurrent`, as a function of grads and operands; what is kept is constant."""

    function = "MultiplicativeRNNGrads"

    @staticmethod
    def forward(backend, setting, want, *tensors):
        grads, operands, kept = _parted(tensors, 3)
        return select(terms.gradients(backend, setting, want, grads, operands, kept), want)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.setting, ctx.want, *tensors = inputs
        Rule.save(ctx, *tensors[: 3 + len(_FOLDED)])

    @staticmethod
    def _composed(ctx):
        """The results as a function of grads and operands."""

        def function(tensors: Sequence[Maybe]) -> Sequence[Tensor]:
            grads, operands = tensors[:3], tensors[3:]
            cotangents = grads if operands[3] is not None else grads[:2]
            want = (*ctx.want, False)
            found = _pulled(lambda given: _steps(ctx.setting, given), operands, want, cotangents)
            return select(found, want)  # type: ignore[return-value]

        return function

    @staticmethod
    def backward(ctx, *cotangents):
        tensors = ctx.saved_tensors
        need = [n and t is not None for n, t in zip(ctx.needs_input_grad[3:], tensors, strict=False)]
        if not any(need) or all(c is None for c in cotangents):
            return (None,) * (3 + len(tensors) + len(Kept._fields))
        found = _pulled(GradsRule._composed(ctx), tensors, need, cotangents)
        return (None, None, None, *found, *(None,) * len(Kept._fields))

    @staticmethod
    @nestable
    def jvp(ctx, _, __, ___, *tangents):
        tensors = primals(ctx)
        return _pushed(GradsRule._composed(ctx), tensors, tangents[: len(tensors)])

    @staticmethod
    def vmap(info, in_dims, backend, setting, want, *tensors):
        size, dims = info.batch_size, in_dims[3:]
        shared = slice(3 + _SHARED.start, 3 + _SHARED.stop)
        _, operands, _ = _parted(tensors, 3)
        of_weights = want[_SHARED]
        summed = of_weights[-1]  # recurrent_grads sums over B
        foldable = unbatched(dims[shared], tensors[shared]) and not summed
        if not foldable or (any(of_weights) and differentiating(tensors)):
            return _by_sample(size, lambda *one: GradsRule.call(backend, setting, want, *one), tensors, dims)
        positions = (1, 0, 0, *_FOLDED, *(1,) * len(Kept._fields))
        folded = [_folded(*one, size) for one in zip(tensors, dims, positions, strict=True)]
        of_data = (*want[: _SHARED.start], *(False,) * len(of_weights))
        if not any(of_weights):
            found = GradsRule.call(backend, setting, want, *folded)
            return _unfolded(found, select(_FOLDED[:DIFFERENTIABLE], want), size)
        grads, operands, kept = _parted(folded, 3)
        results = terms.kernel_grads(backend, setting, grads, operands, kept)
        data = terms.completed(backend, setting, of_data, results, operands, kept)
        found, out_dims = _unfolded(select(data, of_data), select(_FOLDED[:DIFFERENTIABLE], of_data), size)
        by_sample = _products_by_sample(backend, setting, want, size, results, operands, kept)
        return (*found, *by_sample), (*out_dims, *(0,) * len(by_sample))


def _products_by_sample(
    backend: str,
    setting: Setting,
    want: Sequence[bool],
    size: int,
    results: Sequence[Tensor],
    operands: Operands,
    kept: Kept,
) -> tuple[Tensor, ...]:
    """The gradients of the weights, of the folded results of ``recurrent_grads``."""
    of_weights = (*(False,) * _SHARED.start, *want[_SHARED])
    # The gradient of the coefficients is a sum over all samples, and is not wanted here.
    results = (*results[:5], results[5].new_empty(0), *results[6:])
    results, result_dims = _unfolded(results, (1, 1, 1, 0, 0, 0, 1), size)
    saved = (*operands, *kept)
    positions = (*_FOLDED, *(1,) * len(kept))
    views = [
        t if t is None or p is None else t.reshape(*t.shape[:p], size, -1, *t.shape[p + 1 :])
        for t, p in zip(saved, positions, strict=True)
    ]
    dims = [None if t is None else p for t, p in zip(views, positions, strict=True)]

    def one(*tensors: Any) -> tuple[Any, ...]:
        given, rest = tensors[: len(results)], tensors[len(results) :]
        own = Operands(*rest[: len(_FOLDED)]), Kept(*rest[len(_FOLDED) :])
        return select(terms.completed(backend, setting, of_weights, given, *own), of_weights)

    return _by_sample(size, one, (*results, *views), (*result_dims, *dims))[0]


def _parted(tensors: Sequence[Any], first: int) -> tuple[Sequence[Any], Operands, Kept]:
    """The first ones, operands and what is kept."""
    behind = first + len(_FOLDED)
    return tensors[:first], Operands(*tensors[first:behind]), Kept(*tensors[behind:])


class TangentsRule(Rule):
    """The tangents of out, h_n and c_n for those of the operands."""

    function = "MultiplicativeRNNTangents"

    @staticmethod
    def forward(backend, setting, *tensors):
        along, operands, kept = _parted(tensors, DIFFERENTIABLE)
        return tuple(terms.tangents(backend, setting, along, operands, kept))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.setting, *tensors = inputs
        ctx.has_c = tensors[DIFFERENTIABLE + 3] is not None
        if not ctx.has_c:
            ctx.mark_non_differentiable(output[2])
        Rule.save(ctx, *tensors[: DIFFERENTIABLE + len(_FOLDED)])

    @staticmethod
    def _composed(ctx):
        """The results as a function of tangents and operands."""

        def function(tensors: Sequence[Maybe]) -> Sequence[Tensor]:
            along, operands = (*tensors[:DIFFERENTIABLE], None), tensors[DIFFERENTIABLE:]
            return _pushed(lambda given: _steps(ctx.setting, given), operands, along)

        return function

    @staticmethod
    def backward(ctx, *cotangents):
        tensors = ctx.saved_tensors
        cotangents = cotangents if ctx.has_c else cotangents[:2]
        need = [n and t is not None for n, t in zip(ctx.needs_input_grad[2:], tensors, strict=False)]
        nothing = (None,) * len(Kept._fields)
        if not any(need) or all(c is None for c in cotangents):
            return (None, None, *(None,) * len(tensors), *nothing)
        found = _pulled(TangentsRule._composed(ctx), tensors, need, cotangents)
        return (None, None, *found, *nothing)

    @staticmethod
    @nestable
    def jvp(ctx, _, __, *tangents):
        tensors = primals(ctx)
        found = _pushed(TangentsRule._composed(ctx), tensors, tangents[: len(tensors)])
        return found if ctx.has_c else (*found, None)

    @staticmethod
    def vmap(info, in_dims, backend, setting, *tensors):
        size, dims = info.batch_size, in_dims[2:]
        shared = slice(DIFFERENTIABLE + _SHARED.start, DIFFERENTIABLE + _SHARED.stop)
        one_by_one = not unbatched(dims[shared], tensors[shared])
        mapped = not unbatched(dims[_SHARED], tensors[_SHARED])  # the tangents of weights
        if one_by_one or (mapped and differentiating(tensors)):
            return _by_sample(size, lambda *one: TangentsRule.call(backend, setting, *one), tensors, dims)
        positions = (*_FOLDED[:DIFFERENTIABLE], *_FOLDED, *(1,) * len(Kept._fields))
        folded = [_folded(*one, size) for one in zip(tensors, dims, positions, strict=True)]
        if not mapped:
            return _unfolded(TangentsRule.call(backend, setting, *folded), (1, 0, 0), size)
        samples = [
            terms.tangent_terms(backend, setting, *_parted(_sample(tensors, dims, index), DIFFERENTIABLE))
            for index in range(size)
        ]
        folded_terms = [
            None if parts[0] is None else _folded(torch.stack(parts), 0, position, size)
            for parts, position in zip(zip(*samples, strict=True), (1, 1, 1, 1, 0, 0), strict=True)
        ]
        _, operands, kept = _parted(folded, DIFFERENTIABLE)
        results = terms.kernel_tangents(backend, setting, folded_terms, operands, kept)
        return _unfolded(results, (1, 0, 0), size)


def _sample(tensors: Sequence[Maybe], dims: Sequence[int | None], index: int) -> list[Maybe]:
    return [t if d is None or t is None else t.select(d, index) for t, d in zip(tensors, dims, strict=True)]
