"""Multiplicative RNNs over sequences: products over all steps, backend, call."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mi_kernels import backends
from mi_kernels.functional import _recurrent_arguments as arguments
from mi_kernels.functional._arguments import autocast, expand_bias_to
from mi_kernels.functional._recurrent_arguments import MemoryName, RecurrentName, Tensors
from mi_kernels.ops.backend import get
from mi_kernels.ops.interaction.linear import linear
from mi_kernels.ops.interaction.segments import opaque
from mi_kernels.ops.recurrent import autograd as rules
from mi_kernels.ops.recurrent import reference
from mi_kernels.ops.recurrent.forms import DENSE, INTEGRATED, KINDS, LSTM
from mi_kernels.ops.rules import recorded, transformed

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
    r"""A multiplicative RNN over a whole sequence."""
    rest = {"weight_mx": weight_mx, "weight_mh": weight_mh, "weight_hm": weight_hm, "weight": weight}
    rest |= {"weight_hr": weight_hr, "alpha": alpha, "beta_h": beta_h, "beta_x": beta_x}
    form = arguments.form_of(kind, activation)
    h, c = arguments.states(kind, state)
    tensors = Tensors(*autocast((x, weight_ih, weight_hh, bias, *rest.values(), h, c)))
    lengths = arguments.as_lengths(lengths, x)
    tensors = tensors._replace(bias=_bias(kind, tensors))
    arguments.check(kind, tensors, lengths, reverse, memory)
    chosen = backends.choose(tensors.x, "recurrent")
    if get(chosen).is_reference:
        return _reference(kind, tensors, state, lengths, reverse, activation)
    unbatched = tensors.x.dim() == 2
    if unbatched:
        h, c = (None if t is None else t.unsqueeze(0) for t in (tensors.h, tensors.c))
        tensors = tensors._replace(x=tensors.x.unsqueeze(1), h=h, c=c)
    lstm = form.cell == LSTM
    out, h, c = _called(chosen, kind, tensors, lengths, bool(reverse), activation, memory)
    if unbatched:
        out, h, c = out.squeeze(1), h.squeeze(0), c.squeeze(0) if lstm else c
    return out, (h, c) if lstm else h


def _bias(kind: str, tensors: Tensors) -> Any:
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
    form, x = KINDS[kind], tensors.x
    steps, rows, width = x.shape
    units = arguments.units_of(kind, tensors)
    if lengths is not None:
        if opaque(lengths):
            lengths = lengths.clamp(0, steps)
        padding = torch.arange(steps, device=x.device)[:, None] >= lengths
        x = x.masked_fill(padding[:, :, None], 0)
    flat = x.reshape(steps * rows, width)

    def product(weight: Tensor, bias: Any) -> Tensor:
        return linear(backend, flat, weight, bias).view(steps, rows, weight.shape[0])

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
    features = units if tensors.weight_hr is None else tensors.weight_hr.shape[0]
    h = x.new_zeros(rows, features) if tensors.h is None else tensors.h
    c = tensors.c
    if c is None and form.cell == LSTM:
        c = x.new_zeros(rows, units)
    hh, hm = tensors.weight_hh, tensors.weight_hm
    if form.structure != DENSE and not integrated:
        hh, hm = None, tensors.weight_hh
    integration = _integration(tensors, gates_x) if integrated else None
    weights = hh, hm, tensors.weight_mh, tensors.weight, tensors.weight_hr, integration
    run = _in_chunks if memory == "low" and _is_saving((x, h, c, *tensors)) else rules.recurrent
    return run(backend, kind, activation, reverse, gates_x, factors_x, h, c, *weights, lengths)


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
    backend: str,
    kind: str,
    activation: str,
    reverse: bool,
    gates_x: Tensor,
    factors_x: Any,
    h: Tensor,
    c: Any,
    *weights: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rules.recurrent` of about sqrt(T) steps at a time, whose backward passes make these steps again."""
    steps, lengths = gates_x.shape[0], weights[-1]
    size = max(math.isqrt(steps), 1)
    starts = range(0, steps, size)
    parts: list[Tensor] = []
    empty = c
    for start in reversed(starts) if reverse else starts:
        there = slice(start, start + size)
        own = None if lengths is None else (lengths - start).clamp(0, min(size, steps - start))
        inputs = gates_x[there], None if factors_x is None else factors_x[there], h, c, *weights[:-1], own
        setting = backend, kind, activation, reverse
        out, h, empty = checkpoint(
            rules.recurrent, *setting, *inputs, use_reentrant=False, preserve_rng_state=False
        )
        c = None if c is None else empty
        parts.append(out)
    if not parts:
        return rules.recurrent(backend, kind, activation, reverse, gates_x, factors_x, h, c, *weights)
    return torch.cat(parts[::-1] if reverse else parts), h, empty
