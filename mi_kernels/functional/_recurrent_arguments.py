"""The arguments of multiplicative RNNs: what they have to be."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..ops.checks import check_activation, check_flag, check_index, check_shape, check_tensors
from ..ops.dtypes import FLOATING
from ..ops.interaction.segments import opaque
from ..ops.recurrent.forms import ACTIVATIONS, DENSE, FACTORED, INTEGRATED, KINDS, LSTM, PLAIN, Form

RecurrentName = Literal["mlstm", "mrnn", "mi_rnn", "mi_lstm", "mi_gru", "second_order"]
MemoryName = Literal["fast", "low"]
MEMORY: tuple[MemoryName, ...] = get_args(MemoryName)
OP = "multiplicative_rnn"
Maybe = Tensor | None


class Tensors(NamedTuple):
    """All tensors of a call, by their public names; h and c are the state."""

    x: Any
    weight_ih: Any
    weight_hh: Any
    bias: Any
    weight_mx: Any
    weight_mh: Any
    weight_hm: Any
    weight: Any
    weight_hr: Any
    alpha: Any
    beta_h: Any
    beta_x: Any
    h: Any
    c: Any


_FACTORS = ("weight_mx", "weight_mh", "weight_hm")
_VECTORS = ("alpha", "beta_h", "beta_x")
# By structure: what has to be there, and what may be.
_NEEDED = {
    FACTORED: ("weight_ih", "weight_hh", "weight_mx", "weight_mh"),
    INTEGRATED: ("weight_ih", "weight_hh"),
    DENSE: (),
}
_OPTIONAL = {
    FACTORED: (),
    INTEGRATED: _VECTORS,
    DENSE: ("weight_ih", "weight_hh", "weight", *_FACTORS),
}


def form_of(kind: Any, activation: Any) -> Form:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{OP}: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    form = KINDS[kind]
    check_activation(OP, activation, ACTIVATIONS)
    if form.cell != PLAIN and activation != "tanh":
        raise ValueError(f"{OP}: activation: expected tanh for {kind}, got {activation!r}")
    return form


def states(kind: str, state: Any) -> tuple[Any, Any]:
    """h and c of a state as it is given."""
    if state is None:
        return None, None
    if KINDS[kind].cell != LSTM:
        return state, None
    if not isinstance(state, tuple | list) or len(state) != 2:
        got = f"{len(state)} of them" if isinstance(state, tuple | list) else type(state).__name__
        raise TypeError(f"{OP}: state: expected a pair of tensors (h, c) for {kind}, got {got}")
    if any(one is None for one in state):
        raise TypeError(f"{OP}: state: expected a pair of tensors (h, c) for {kind}, got None in it")
    return state[0], state[1]


def check(kind: str, tensors: Tensors, lengths: Any, reverse: Any, memory: Any) -> None:
    """Raises unless a call of these is right. The kind is known, and the activation one of its own."""
    check_flag(OP, "reverse", reverse)
    if not isinstance(memory, str) or memory not in MEMORY:
        raise ValueError(f"{OP}: memory: expected one of {', '.join(MEMORY)}, got {memory!r}")
    form = KINDS[kind]
    _check_presence(kind, form, tensors)
    check_tensors(OP, Tensors._fields, tensors, 1, FLOATING)
    x = tensors.x
    if x.dim() not in (2, 3):
        raise ValueError(f"{OP}: x: expected shape [T, B, X] or [T, X], got {list(x.shape)}")
    units = units_of(kind, tensors)
    _check_shapes(form, tensors, units)
    check_lengths(x, lengths)


def _check_presence(kind: str, form: Form, tensors: Tensors) -> None:
    needed, optional = _NEEDED[form.structure], _OPTIONAL[form.structure]
    if form.structure == DENSE:
        factors = [name for name in _FACTORS if getattr(tensors, name) is not None]
        needed = ("weight",) if not factors else _FACTORS
        if factors and tensors.weight is not None:
            raise ValueError(f"{OP}: weight: expected None beside {factors[0]}, got a tensor")
    if form.cell == LSTM:
        optional = (*optional, "weight_hr")
    for name in needed:
        if getattr(tensors, name) is None:
            raise TypeError(f"{OP}: {name}: expected a tensor for {kind}, got None")
    for name in ("weight_ih", "weight_hh", *_FACTORS, "weight", "weight_hr", *_VECTORS):
        if name not in (*needed, *optional) and getattr(tensors, name) is not None:
            raise ValueError(
                f"{OP}: {name}: expected None for {kind}, got {type(getattr(tensors, name)).__name__}"
            )


def units_of(kind: str, tensors: Tensors) -> int:
    """H, by the first of the weights that have it."""
    form = KINDS[kind]
    for name in ("weight", "weight_hm", "weight_ih"):
        weight = getattr(tensors, name)
        if weight is None:
            continue
        if weight.dim() != (3 if name == "weight" else 2):
            axes = {"weight": "H, H, X", "weight_hm": "H, R"}.get(name, "N, X")
            raise ValueError(f"{OP}: {name}: expected shape [{axes}], got {list(weight.shape)}")
        units = weight.shape[0] // form.gates
        if units * form.gates != weight.shape[0]:
            raise ValueError(
                f"{OP}: {name}: expected a multiple of {form.gates} rows for {kind}, got {weight.shape[0]}"
            )
        return units
    raise AssertionError("a weight with rows of gates is needed")


def _check_shapes(form: Form, tensors: Tensors, units: int) -> None:
    x, rows = tensors.x, form.gates * units
    width = x.shape[-1]
    features = units
    if tensors.weight_hr is not None:
        check_shape(OP, "weight_hr", tensors.weight_hr, {"P": None, "H": units})
        features = tensors.weight_hr.shape[0]
    factors = None
    if tensors.weight_mx is not None:
        check_shape(OP, "weight_mx", tensors.weight_mx, {"M": None, "X": width})
        factors = tensors.weight_mx.shape[0]
    by_factors = form.structure == FACTORED
    batch = {"B": x.shape[1]} if x.dim() == 3 else {}
    expected: dict[str, dict[str, int | None]] = {
        "weight_ih": {"N": rows, "X": width},
        "weight_hh": {"N": rows, "M": factors} if by_factors else {"N": rows, "P": features},
        "bias": {"N": rows},
        "weight_mh": {"M": factors, "P": features},
        "weight_hm": {"H": units, "M": factors},
        "alpha": {"N": rows},
        "beta_h": {"N": rows},
        "beta_x": {"N": rows},
        "h": {**batch, "P": features},
        "c": {**batch, "H": units},
    }
    for name, sizes in expected.items():
        check_shape(OP, name, getattr(tensors, name), sizes)
    check_shape(OP, "weight", tensors.weight, [("H", units), ("H", units), ("X", width)])


def check_lengths(x: Tensor, lengths: Any) -> None:
    """``lengths`` is None, or int64 [B] from 0 to T; values are read unless a tracer would have to."""
    if lengths is None:
        return
    if x.dim() == 2:
        raise ValueError(
            f"{OP}: lengths: expected None for x without a dimension B, got {type(lengths).__name__}"
        )
    check_index(OP, "lengths", lengths, x)
    check_shape(OP, "lengths", lengths, {"B": x.shape[1]})
    if lengths.numel() == 0 or opaque(lengths):
        return
    least, most = (int(value) for value in torch.aminmax(lengths))
    if least < 0 or most > x.shape[0]:
        found = least if least < 0 else most
        raise ValueError(f"{OP}: lengths: expected numbers from 0 to T = {x.shape[0]}, got {found}")


def as_lengths(lengths: Any, x: Any) -> Any:
    """A sequence of numbers as a tensor."""
    if lengths is None or isinstance(lengths, Tensor):
        return lengths
    if not isinstance(lengths, Sequence) or not all(type(one) is int for one in lengths):
        raise TypeError(f"{OP}: lengths: expected a torch.Tensor or a sequence of ints, got {lengths!r}")
    return torch.tensor(lengths, dtype=torch.int64, device=x.device if isinstance(x, Tensor) else None)
