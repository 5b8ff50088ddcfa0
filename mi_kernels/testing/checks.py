"""The error rule applied to a sample of a public function: its values, its gradients, their gradients.

The one judge of tests, of ``python -m mi_kernels verify`` and of ``make gpu-check``. Each check takes a dtype
and a device, runs on the backend that is selected, raises AssertionError where the rule is broken, and
returns the worst error as a part of what is allowed.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.dual_linear import reference as dual_reference
from ..ops.gate import reference as diagonal_reference
from ..ops.gate import reference as gated_reference
from ..ops.interaction import reference as interaction_reference
from ..ops.modulate import reference as modulate_reference
from ..ops.norm import reference as norm_reference
from ..ops.recurrent import reference as recurrent_reference
from . import norm_squares, recurrent_samples, squares
from ._package import mi
from .biaffine_samples import Pairs
from .dual_samples import DualSample
from .errors import Function, check_errors, check_second_order_errors, mapped
from .low_rank_weight_samples import Factors
from .mix_samples import Mixing
from .norm_samples import Normalization
from .recurrent_samples import Recurrence
from .samples import GateSample, Modulation, Sample
from .third_order_samples import Triple

AnySample = (
    Sample
    | GateSample
    | Modulation
    | Mixing
    | Normalization
    | Recurrence
    | Pairs
    | Factors
    | Triple
    | DualSample
)
Maybe = Tensor | None


class Form(NamedTuple):
    """A public function of a sample's tensors, and what judges it."""

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    squares: Function | None = None  # S^2 of the values; None: they are sums of products
    square_gradients: Function | None = None
    enough: int = 300  # elements of each gradient


def call_gate(op: str, function: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """A gated form as a function of its tensors in the order of ``GateSample.names``."""
    function = function or getattr(mi, op)

    def called(*tensors: Maybe, **options: Any) -> Tensor:
        if op == "diagonal":
            *tensors, options["weight_x"] = tensors  # type: ignore[assignment]
        return function(*tensors, **options)

    return called


def reference_gate(op: str) -> Callable[..., Tensor]:
    if op == "diagonal":
        return call_gate(op, diagonal_reference.diagonal)
    return call_gate(op, gated_reference.gated_interaction)


def as_gate(sample: GateSample, tensors: Sequence[Maybe]) -> tuple[Any, ...]:
    """x, z, (W, U, V, c), C, d for squares.gate."""
    if sample.op == "diagonal":
        x, z, a, bias, c, d, g = tensors
        return x, z, (None, a, g, bias), c, d
    x, z, *weights = tensors
    return x, z, weights, None, None


def _form_of_gate(sample: GateSample) -> Form:
    def square_gradients(grad: Tensor, *tensors: Maybe) -> list[Tensor]:
        results = squares.gate_grads(sample.activation, sample.offset, grad, *as_gate(sample, tensors))
        if sample.op == "diagonal" and tensors[6] is not None:
            results.append(results.pop(3))  # dx, dz, dA, dG, da, dC, dd come; dG is the last one here
        return results

    ours, theirs = call_gate(sample.op), reference_gate(sample.op)
    return Form(
        lambda *a: ours(*a, **sample.options),
        lambda *a: theirs(*a, **sample.options),
        lambda *a: squares.gate(sample.activation, sample.offset, *as_gate(sample, a)),
        square_gradients,
    )


def _form_of_modulation(sample: Modulation) -> Form:
    f, s, c = sample.activation, sample.scale_offset, sample.scale_factor
    return Form(
        lambda *a: mi.modulate(*a, **sample.options),
        lambda *a: modulate_reference.modulate(*a, **sample.options),
        lambda x, scale, shift: squares.modulate(f, s, x, scale, shift, c),
        lambda g, x, scale, shift: squares.modulate_grads(f, s, g, x, scale, shift, c),
        500,
    )


def _form_of_mixing(sample: Mixing) -> Form:
    return Form(
        lambda *a: mi.mix(*a, **sample.options),
        lambda *a: modulate_reference.mix(*a, **sample.options),
        lambda *a: squares.mix(sample.activation, *a),
        lambda *a: squares.mix_grads(sample.activation, *a),
        500,
    )


def _form_of_normalization(sample: Normalization) -> Form:
    def theirs(x: Tensor, h: Maybe, *others: Maybe) -> Tensor:
        if sample.layout == "channels_last":  # torch.vmap cannot map group_norm over these
            x, h = x.contiguous(), None if h is None else h.contiguous()
        return sample.call(norm_reference, x, h, *others)

    return Form(
        partial(sample.call, mi),
        theirs,
        partial(norm_squares.values, sample),
        partial(norm_squares.gradients, sample),
        500,
    )


def _form_of_recurrence(sample: Recurrence) -> Form:
    return Form(
        partial(sample.call, mi.multiplicative_rnn),
        partial(sample.call, recurrent_reference.multiplicative_rnn),
        partial(recurrent_samples.values, sample),
        partial(recurrent_samples.gradients, sample),
        600,  # of alpha they are sums of products of three normal numbers, of which few are large
    )


def call_dual(op: str, function: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """``glu`` or ``low_rank`` as a function of its tensors by position."""
    function = function or getattr(mi, op)
    if op == "low_rank":
        return function

    def called(
        x: Tensor, weight: Tensor, bias: Maybe, value: Maybe, bias_value: Maybe, **options: Any
    ) -> Tensor:
        return function(x, weight, bias, weight_value=value, bias_value=bias_value, **options)

    return called


def as_dual(sample: DualSample, *tensors: Any) -> squares.DualLinear:
    """The tensors of a sample, for squares.dual_linear."""
    if sample.op == "low_rank":
        x, z, a, c, *terms = tensors
        weights = (
            (a, c, None, None) if sample.ranks is None else (a.flatten(0, 1), c.flatten(0, 1), None, None)
        )
        rule = sample.activation, sample.other, sample.ranks or 1
        return squares.DualLinear(*rule, x, z, weights, tuple(terms))
    x, g, a, v, c = tensors
    if v is None:
        halves = [(None, None) if t is None else t.chunk(2) for t in (g, a)]
        (g, v), (a, c) = halves if sample.gate_first else [pair[::-1] for pair in halves]
    return squares.DualLinear(sample.activation, "identity", 1, x, x, (g, v, a, c), (None,) * 4)


def _form_of_dual(sample: DualSample) -> Form:
    ours, theirs = call_dual(sample.op), call_dual(sample.op, getattr(dual_reference, sample.op))
    make = partial(as_dual, sample)
    return Form(
        lambda *a: ours(*a, **sample.options),
        lambda *a: theirs(*a, **sample.options),
        lambda *a: squares.dual_linear(make(*a)),
        lambda grad, *a: squares.dual_linear_grads(make, grad, a),
    )


def form_of(sample: AnySample) -> Form:
    if isinstance(sample, DualSample):
        return _form_of_dual(sample)
    if isinstance(sample, GateSample):
        return _form_of_gate(sample)
    if isinstance(sample, Modulation):
        return _form_of_modulation(sample)
    if isinstance(sample, Mixing):
        return _form_of_mixing(sample)
    if isinstance(sample, Normalization):
        return _form_of_normalization(sample)
    if isinstance(sample, Recurrence):
        return _form_of_recurrence(sample)
    if isinstance(sample, Pairs):
        ones, first = sample.ones, sample.channels_first
        return Form(
            lambda *a: mi.biaffine(*a, **sample.options),
            lambda x, z, w, c: interaction_reference.biaffine(x, z, w, c, ones, first),
        )
    if isinstance(sample, Factors):
        return Form(sample.call, sample.reference, lambda *a: [sample.squares(*a)], sample.square_gradients)
    if isinstance(sample, Triple):
        return Form(sample.call, interaction_reference.third_order)
    return Form(mi.interaction, interaction_reference.interaction)


class values_of:  # noqa: N801, a function with a second form
    """(tensors...) -> y alone."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function

    def __call__(self, *tensors: Maybe) -> Sequence[Tensor]:
        return [self.function(*tensors)]

    def stacked(self, *tensors: Maybe) -> Sequence[Tensor]:
        return [mapped(self.function)(*tensors)]


class gradients_of:  # noqa: N801
    """(g, tensors...) -> the gradients by the tensors that there are; zeros where y does not depend on it.

    With ``values``, y comes first.
    """

    def __init__(self, function: Callable[..., Tensor], values: bool = False):
        self.function, self.values = function, values

    def __call__(self, grad: Tensor, *tensors: Maybe) -> Sequence[Tensor]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        present = [t for t in leaves if t is not None]
        y = self.function(*leaves)
        if not y.requires_grad:  # no argument contributes
            found: Sequence[Tensor] = [torch.zeros_like(t) for t in present]
        else:
            found = torch.autograd.grad(y, present, grad, materialize_grads=True)
        return [y.detach(), *found] if self.values else found

    def stacked(self, grad: Tensor, *tensors: Maybe) -> Sequence[Tensor]:
        """No draw depends on another."""
        return gradients_of(mapped(self.function), self.values)(grad, *tensors)


def check_form_values(form: Form, draw: Callable[[int], Sequence[Maybe]], oracle: Hashable = None) -> float:
    return check_errors(
        values_of(form.function),
        values_of(form.reference),
        draw,
        squares=form.squares,
        oracle=oracle,
    )


def check_form_gradients(
    form: Form,
    draw: Callable[[int], Sequence[Maybe]],
    enough: int | None = None,
    oracle: Hashable = None,
) -> float:
    """``draw``: a seed -> the gradient of y, and the arguments."""
    return check_errors(
        gradients_of(form.function),
        gradients_of(form.reference),
        draw,
        squares=form.square_gradients,
        enough=enough or form.enough,
        oracle=oracle,
    )


def check_values(
    sample: AnySample,
    dtype: torch.dtype,
    device: str = "cpu",
    function: Callable[..., Tensor] | None = None,
) -> float:
    """Of the public function, or of another one of the same tensors."""
    form = form_of(sample)
    return check_form_values(
        form._replace(function=function or form.function),
        partial(sample.arguments, dtype, device),
        ("values", sample, dtype, device),
    )


def check_gradients(
    sample: AnySample,
    dtype: torch.dtype,
    device: str = "cpu",
    function: Callable[..., Tensor] | None = None,
) -> float:
    """By every argument that is there."""
    form = form_of(sample)
    return check_form_gradients(
        form._replace(function=function or form.function),
        lambda seed: (sample.cotangent(dtype, device, seed + 1000), *sample.arguments(dtype, device, seed)),
        # Expanded operands make elements of a weight's gradient equal, so more draws are needed.
        1500 if sample.layout == "expanded" else None,
        ("gradients", sample, dtype, device),
    )


def check_second_order(sample: AnySample, dtype: torch.dtype, device: str = "cpu") -> float:
    """The gradients of a weighted sum of the gradients, as exact as PyTorch's."""
    form, there = form_of(sample), [t is not None for t in sample.arguments(dtype)]

    def of_present(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*tensors: Tensor) -> Tensor:
            left = iter(tensors)
            return function(*(next(left) if t else None for t in there))

        return called

    def draw(seed: int) -> list[Tensor]:
        tensors = sample.arguments(dtype, device, seed)
        return [*(t for t in tensors if t is not None), sample.cotangent(dtype, device, seed + 1000)]

    return check_second_order_errors(of_present(form.function), of_present(form.reference), draw)
