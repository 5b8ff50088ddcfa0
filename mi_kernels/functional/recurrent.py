"""Multiplicative RNNs over sequences: products over all steps, backend, call."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backends
from ..ops.backend import get
from ..ops.interaction import shared
from ..ops.interaction.linear import linear
from ..ops.interaction.segments import opaque
from ..ops.library import Axes
from ..ops.plan import Plan
from ..ops.recurrent import autograd as rules
from ..ops.recurrent import plan as plans
from ..ops.recurrent import reference
from ..ops.recurrent.forms import DENSE, INTEGRATED, KINDS, LSTM
from ..ops.rules import recorded, transformed
from ..parallel import calls as distributed
from . import _recurrent_arguments as arguments
from ._arguments import autocast, expand_bias_to
from ._recurrent_arguments import MemoryName, RecurrentName, Tensors

__all__ = ["RecurrentName", "multiplicative_rnn"]

State = Tensor | tuple[Tensor, Tensor]


def multiplicative_rnn(
    kind: RecurrentName,
    x: Tensor,  # [T, B, X] or [T, X]
    state: State | None,  # [B, P]; (h [B, P], c [B, H]) of a lstm
    weight_ih: Tensor | None,  # [G H, X]
    weight_hh: Tensor | None,  # [G H, P], or [G H, M] of mlstm and mrnn
    bias: Tensor | None = None,  # [G H]
    *,
    weight_mx: Tensor | None = None,  # [M, X]
    weight_mh: Tensor | None = None,  # [M, P]
    weight_hm: Tensor | None = None,  # [H, M]
    weight: Tensor | None = None,  # [H, H, X]
    weight_hr: Tensor | None = None,  # [P, H]
    alpha: Tensor | None = None,  # [G H]
    beta_h: Tensor | None = None,  # [G H]
    beta_x: Tensor | None = None,  # [G H]
    lengths: Tensor | Sequence[int] | None = None,  # [B]
    reverse: bool = False,
    activation: str = "tanh",
    memory: MemoryName = "fast",
) -> tuple[Tensor, State]:
    r"""A multiplicative RNN over a whole sequence, with all that does not depend on the state in one product.

    With W = ``weight_ih``, U = ``weight_hh``, c = ``bias`` and the state h before step t, what the gates are
    made of is

    .. math::
        p &= W x_t + U m + c, \quad m = (W_{mx} x_t) \cdot (W_{mh} h) && \text{mlstm, mrnn} \\
        p &= \alpha (W x_t) (U h) + \beta_h (U h) + \beta_x (W x_t) + c && \text{mi\_...} \\
        p_o &= \sum_{ij} h_i W'_{oij} x_{tj} + (U h)_o + (W x_t)_o + c_o && \text{second\_order}

    and the cells are PyTorch's: ``mlstm`` and ``mi_lstm`` have the gates i, f, g, o of ``nn.LSTM``,
    ``mi_gru`` the gates r, z, n and the state (1 - z) n + z h of ``nn.GRU``, where n has :math:`U_n (r h)` in
    the place of :math:`U h` (``nn.GRU`` has :math:`r (U_n h)`); the others are h = act(p).

    Args:
        kind: ``"mlstm"``, ``"mrnn"``, ``"mi_rnn"``, ``"mi_lstm"``, ``"mi_gru"`` or ``"second_order"``. G, the
            gates of the cell, is 4 for a lstm, 3 for the gru, else 1.
        x: input of shape ``[T, B, X]``, or ``[T, X]`` for a single sequence; the state and the results then
            have no dimension B.
        state: h of shape ``[B, P]``; for a lstm the pair (h, c), c of shape ``[B, H]``. None: zeros. P is H
            unless there is a ``weight_hr``.
        weight_ih: W of shape ``[G H, X]``; optional for ``"second_order"``.
        weight_hh: U of shape ``[G H, P]``, for ``"mlstm"`` and ``"mrnn"`` ``[G H, M]``; optional for
            ``"second_order"``.
        bias: c of shape ``[G H]``, optional; ``[1, G H]`` and scalars are accepted.
        weight_mx: of shape ``[M, X]``, for ``"mlstm"`` and ``"mrnn"``.
        weight_mh: of shape ``[M, P]``, likewise.
        weight: W' of shape ``[H, H, X]``, for ``"second_order"``; or of low rank,
            :math:`W'_{oij} = \sum_m W_{hm,om} W_{mh,mi} W_{mx,mj}`, as ``weight_hm``, ``weight_mh`` and
            ``weight_mx``.
        weight_hm: of shape ``[H, M]``, for that.
        weight_hr: of shape ``[P, H]``, of a lstm: h is its product with o tanh(c), as ``proj_size`` of
            ``nn.LSTM``.
        alpha, beta_h, beta_x: of shape ``[G H]``, for ``"mi_..."``; None: 1, 0 and 0.
        lengths: of the sequences, from 0 to T: int64 of shape ``[B]``, or a sequence of ints. The output is
            zero behind a length, the returned state that after the last step (the given one, for length 0),
            and what x holds there, also NaN, reaches nothing. Under tracers lengths out of range are taken as
            0 or T.
        reverse: from the last step of each row to the first.
        activation: act, ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``, of the cells without gates.
        memory: ``"fast"``: the backward pass reads what the forward pass kept, 4 H + M (mlstm) or 4 H
            (mi_lstm) numbers and c a step. ``"low"``: it keeps the states of about :math:`\sqrt T` steps, and
            makes what is between two of them again, the products with x too, which takes a third more time;
            under transforms of torch.func and compilers as ``"fast"``. Results are the same up to rounding:
            the products have fewer rows, and c of 16 bits is rounded where a chunk of steps ends.

    Returns:
        The output of shape ``[T, B, P]`` and the state after the last step, as the given one: h, or (h, c).

    Dtypes are float64, float32, bfloat16 and float16, one for all arguments; autocast casts them as for
    ``torch.mm``. Of 16 bits h is rounded in each step, c is float32 within a call. All tensors have one
    device. Differentiable in all tensors, in reverse and in forward mode; derivatives of derivatives are
    exact, by plain PyTorch code. Compiled kernels' results do not depend on threads.

    Raises:
        TypeError: an argument is no dense tensor, its dtype is unsupported or not that of ``x``, a tensor
            that the kind needs is missing, the state of a lstm is no pair, or lengths are no integers.
        ValueError: the kind, the activation or ``memory`` is unknown, a tensor is given that the kind does
            not have, a rank or size does not fit, or a length is out of range.

    Source: Sutskever et al., "Generating Text with Recurrent Neural Networks", ICML 2011; Krause et al.,
    "Multiplicative LSTM for sequence modelling", 2016; Wu et al., "On Multiplicative Integration with
    Recurrent Neural Networks", NeurIPS 2016; Giles et al., "Learning and Extracting Finite State Automata
    with Second-Order Recurrent Neural Networks", Neural Computation, 1992.

    Example:
        >>> x, weight_ih, weight_hh = torch.randn(7, 2, 5), torch.randn(4 * 3, 5), torch.randn(4 * 3, 3)
        >>> output, (h, c) = mi.multiplicative_rnn("mi_lstm", x, None, weight_ih, weight_hh)
    """
    weights = weight_ih, weight_hh, bias, weight_mx, weight_mh, weight_hm, weight, weight_hr
    vectors = alpha, beta_h, beta_x
    rule = reverse, activation, memory
    tensors, lengths = _prepared(kind, x, state, (*weights, *vectors), lengths, rule)
    chosen = backends.choose(tensors.x, "recurrent")
    if get(chosen).is_reference:
        return _reference(kind, tensors, state, lengths, reverse, activation)
    unbatched = tensors.x.dim() == 2
    if unbatched:
        h, c = (None if t is None else t.unsqueeze(0) for t in (tensors.h, tensors.c))
        tensors = tensors._replace(x=tensors.x.unsqueeze(1), h=h, c=c)
    lstm = KINDS[kind].cell == LSTM
    out, h, c = _called(chosen, kind, tensors, lengths, bool(reverse), activation, memory)
    if unbatched:
        out, h, c = out.squeeze(1), h.squeeze(0), c.squeeze(0) if lstm else c
    return out, (h, c) if lstm else h


def _prepared(
    kind: Any, x: Any, state: Any, weights: Sequence[Any], lengths: Any, rule: tuple[Any, Any, Any]
) -> tuple[Tensors, Any]:
    """The checked arguments, with a bias [G H] and lengths that are a tensor."""
    reverse, activation, memory = rule
    lengths = distributed.whole_index(lengths)
    arguments.form_of(kind, activation)
    h, c = arguments.states(kind, state)
    tensors = Tensors(*autocast((x, *weights, h, c)))
    lengths = arguments.as_lengths(lengths, x)
    tensors = tensors._replace(bias=_bias(tensors))
    arguments.check(kind, tensors, lengths, reverse, memory)
    return tensors, lengths


def _bias(tensors: Tensors) -> Any:
    if tensors.bias is None:
        return None
    for weight in (tensors.weight, tensors.weight_hm, tensors.weight_ih):
        if isinstance(weight, Tensor) and not weight.is_nested and weight.dim() > 0:
            return expand_bias_to(weight.shape[0], tensors.bias)
    return tensors.bias


def _reference(
    kind: str, tensors: Tensors, state: Any, lengths: Any, reverse: bool, activation: str
) -> tuple[Tensor, Any]:
    given = tensors._asdict()
    h, c = given.pop("h"), given.pop("c")
    if state is not None:
        state = (h, c) if KINDS[kind].cell == LSTM else h
    own = {"lengths": lengths, "reverse": reverse, "activation": activation}
    return reference.multiplicative_rnn(kind, state=state, **given, **own)


def _called(
    backend: str, kind: str, tensors: Tensors, lengths: Any, reverse: bool, activation: str, memory: str
) -> tuple[Tensor, Tensor, Tensor]:
    """out, h_n and c_n of checked arguments, as the operations of a backend."""
    x = tensors.x
    steps, rows, _ = x.shape
    units = arguments.units_of(kind, tensors)
    if distributed.given(*tensors):
        return _on_parts(kind, tensors, lengths, units, (reverse, activation, memory))
    if lengths is not None:
        if opaque(lengths):
            lengths = lengths.clamp(0, steps)
        padding = torch.arange(steps, device=x.device)[:, None] >= lengths
        x = x.masked_fill(padding[:, :, None], 0)
    features = units if tensors.weight_hr is None else tensors.weight_hr.shape[0]
    h = x.new_zeros(rows, features) if tensors.h is None else tensors.h
    c = x.new_zeros(rows, units) if tensors.c is None and KINDS[kind].cell == LSTM else tensors.c
    tensors = tensors._replace(x=x, h=h, c=c)
    apply = functools.partial(_steps, backend, kind, reverse, activation)
    if memory == "low" and _is_saving(tensors):
        return _in_chunks(apply, reverse, tensors, lengths)
    return apply(tensors, lengths)


def _on_parts(
    kind: Any, tensors: Tensors, lengths: Any, units: int, rule: tuple[bool, str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    """out, h_n and c_n of DTensors: rows are independent, and each step needs all units of the one before."""
    given, lstm = tensors._asdict(), KINDS[kind].cell == LSTM
    rows = tensors.x.shape[1]
    features = units if tensors.weight_hr is None else tensors.weight_hr.shape[0]
    given["h"] = tensors.x.new_zeros(rows, features) if tensors.h is None else tensors.h
    given["c"] = tensors.x.new_zeros(rows, units) if tensors.c is None and lstm else tensors.c
    reverse, activation, memory = rule

    def function(h: Any, c: Any, **parts: Any) -> tuple[Any, ...]:
        options: dict[str, Any] = {"reverse": reverse, "activation": activation, "memory": memory}
        out, state = multiplicative_rnn(kind, state=(h, c) if lstm else h, **parts, **options)
        return (out, *state) if lstm else (out, state, None)

    # Weights are whole.
    axes = {name: "." * tensor.dim() for name, tensor in given.items() if tensor is not None}
    axes |= {"x": "TBX", "h": "BP", "c": "BH", "lengths": "B"}
    results = Axes("TBP"), Axes("BP"), Axes("BH") if lstm else None
    found = distributed.run("multiplicative_rnn", function, given | {"lengths": lengths}, axes, results, "B")
    return found


def _steps(
    backend: str, kind: str, reverse: bool, activation: str, tensors: Tensors, lengths: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The products with x over all steps, and the steps."""
    form, x = KINDS[kind], tensors.x
    steps, rows, width = x.shape
    units = arguments.units_of(kind, tensors)
    flat = x.reshape(steps * rows, width)

    def product(weight: Tensor, bias: Any) -> Tensor:
        # A trace is to have the same operation in all of its runs.
        apply = shared.linear if torch.jit.is_tracing() else linear
        return apply(backend, flat, weight, bias).view(steps, rows, weight.shape[0])

    integrated = form.structure == INTEGRATED
    if tensors.weight_ih is not None:
        gates_x = product(tensors.weight_ih, None if integrated else tensors.bias)
    elif tensors.bias is not None:
        gates_x = tensors.bias.expand(steps, rows, units)
    else:
        gates_x = x.new_zeros(()).expand(steps, rows, units)
    factors_x = None if tensors.weight_mx is None else product(tensors.weight_mx, None)
    if form.structure == DENSE and factors_x is None:
        factors_x = x
    hh, hm = tensors.weight_hh, tensors.weight_hm
    if form.structure != DENSE and not integrated:
        hh, hm = None, tensors.weight_hh
    integration = _integration(tensors, gates_x) if integrated else None
    weights = hh, hm, tensors.weight_mh, tensors.weight, tensors.weight_hr, integration
    operands = gates_x, factors_x, tensors.h, tensors.c, *weights, lengths
    return rules.recurrent(backend, kind, activation, reverse, *operands)


def _integration(tensors: Tensors, like: Tensor) -> Tensor:
    """alpha, beta_h, beta_x and the bias as the rows of one tensor."""
    rows = []
    for vector, value in (
        (tensors.alpha, 1.0),
        (tensors.beta_h, 0.0),
        (tensors.beta_x, 0.0),
        (tensors.bias, 0.0),
    ):
        rows.append(like.new_full((like.shape[2],), value) if vector is None else vector)
    return torch.stack(rows)


def _is_saving(tensors: Sequence[Any]) -> bool:
    """Whether a call saves tensors for a backward pass, and hooks on these are possible."""
    return recorded(tensors) and not (
        transformed() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    )


def _in_chunks(
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]], reverse: bool, tensors: Tensors, lengths: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`_steps` of about sqrt(T) steps at a time, whose backward passes make these steps again."""
    x, h, c = tensors.x, tensors.h, tensors.c
    steps = x.shape[0]
    size = max(math.isqrt(steps), 1)
    starts = range(0, steps, size)
    parts: list[Tensor] = []

    # What is saved, and found to be changed in place, is what is an argument itself.
    def flat(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        return apply(Tensors(*given[:-1]), given[-1])

    for start in reversed(starts) if reverse else starts:
        part = x[start : start + size]
        own = None if lengths is None else (lengths - start).clamp(0, part.shape[0])
        given = (*tensors._replace(x=part, h=h, c=c), own)
        out, h, cell = checkpoint(flat, *given, use_reentrant=False, preserve_rng_state=False)
        c = None if c is None else cell
        parts.append(out)
    if not parts:
        return apply(tensors, lengths)
    return torch.cat(parts[::-1] if reverse else parts), h, cell


def _plan(kind: Any, x: Any, state: Any, lengths: Any, reverse: Any, **others: Any) -> Plan:
    rule = reverse, others.pop("activation"), others.pop("memory")
    tensors, lengths = _prepared(
        kind, x, state, [others[name] for name in Tensors._fields[1:-2]], lengths, rule
    )
    backend = backends.choose(tensors.x, "recurrent")
    rows = tensors.x.shape[1] if tensors.x.dim() == 3 else 1
    features = arguments.units_of(kind, tensors) if tensors.weight_hr is None else tensors.weight_hr.shape[0]
    of_x = tensors.weight_ih, tensors.weight_mx
    of_state = tensors.weight_hh, tensors.weight_mh, tensors.weight_hm, tensors.weight, tensors.weight_hr
    return plans.plan(backend, tensors.x.shape[0], rows, of_x, of_state, tensors, features, rule[2])


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {
    "multiplicative_rnn": (multiplicative_rnn, _plan)
}
