"""What sequence modules and cells of multiplicative RNNs share: parameters, initialisation, calls, states."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import recurrent
from ..functional._call import call
from ..functional._recurrent_arguments import RecurrentName
from ..ops.checks import check_activation, check_shape, check_tensors
from ..ops.dtypes import FLOATING
from ..ops.recurrent.forms import ACTIVATIONS, FACTORED, INTEGRATED, KINDS, LSTM
from ._init import check_construction, check_size

Device = torch.device | str | int | None
Pair = tuple[Tensor, Tensor]
Nonlinearity = Literal["tanh", "relu", "sigmoid", "identity"]


class Sizes(NamedTuple):
    """What the shapes of a layer's parameters depend on."""

    kind: str
    hidden_size: int
    bias: bool
    proj_size: int
    factors: int | None  # M, or the rank of W; None: W is dense, or there are no factors

    @classmethod
    def of(
        cls, kind: str, hidden_size: int, bias: bool, proj_size: int = 0, factors: int | None = None
    ) -> "Sizes":
        if KINDS[kind].structure == FACTORED and factors is None:
            factors = hidden_size
        return cls(kind, hidden_size, bias, proj_size, factors)

    @property
    def features(self) -> int:
        """P, of the state h."""
        return self.proj_size or self.hidden_size

    def shapes(self, width: int) -> dict[str, tuple[int, ...] | None]:
        """The parameters of a layer for inputs of ``width`` features, those of nn.LSTM first."""
        form, hidden, features = KINDS[self.kind], self.hidden_size, self.features
        rows, factors = form.gates * hidden, self.factors
        gated = form.structure == FACTORED  # the gates see m, not h
        found: dict[str, tuple[int, ...] | None] = {
            "weight_ih": (rows, width),
            "weight_hh": (rows, factors if gated and factors is not None else features),
            "bias_ih": (rows,) if self.bias else None,
            "bias_hh": (rows,) if self.bias else None,
        }
        if self.proj_size:
            found["weight_hr"] = (self.proj_size, hidden)
        if form.structure == INTEGRATED:
            return found | dict.fromkeys(("alpha", "beta_h", "beta_x"), (rows,))
        if factors is None:
            return found | {"weight": (hidden, features, width)}
        found |= {"weight_mx": (factors, width), "weight_mh": (factors, features)}
        return found if gated else found | {"weight_hm": (hidden, factors)}

    def shown(self) -> list[str]:
        """The number of factors, where it is not the default, for `extra_repr`."""
        default = self.hidden_size if KINDS[self.kind].structure == FACTORED else None
        if self.factors == default:
            return []
        return [f"{'rank' if default is None else 'num_factors'}={self.factors}"]


def draw(sizes: Sizes, found: Mapping[str, nn.Parameter | None]) -> None:
    """Draw a layer's parameters anew from torch's random stream, in the order of their registration."""
    for name, parameter in found.items():
        if parameter is None:
            continue
        if name in ("alpha", "beta_h", "beta_x"):
            nn.init.constant_(parameter, 1.0 if name == "alpha" else 0.5)
        elif parameter.numel() > 0:
            bound = _bound(name, parameter, sizes)
            nn.init.uniform_(parameter, -bound, bound)


def _bound(name: str, parameter: Tensor, sizes: Sizes) -> float:
    fan_in = math.prod(parameter.shape[1:])
    if name in ("weight_mx", "weight_mh"):  # so that m has the variance of h
        return math.sqrt(3 / fan_in)
    if name in ("weight", "weight_hm"):  # two thirds of the variance of h, beside the third of U h
        return math.sqrt(2 / fan_in)
    of_factors = name == "weight_hh" and KINDS[sizes.kind].structure == FACTORED
    return 1 / math.sqrt(fan_in if of_factors else sizes.hidden_size)


def run(
    kind: RecurrentName,
    found: Mapping[str, Tensor | None],
    x: Tensor,
    state: Tensor | Pair | None,
    options: Mapping[str, Any],
) -> tuple[Tensor, Any]:
    """The call of a layer: the output of all steps and the last state."""
    weight_ih, weight_hh, bias_ih, bias_hh, *others = found.values()
    bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh
    named: dict[str, Any] = dict(zip(list(found)[4:], others, strict=True))
    return call(recurrent.multiplicative_rnn, kind, x, state, weight_ih, weight_hh, bias, **named, **options)


def check_common(
    op: str, sizes: Mapping[str, Any], flags: Mapping[str, Any], device: Any, dtype: Any, nonlinearity: Any
) -> None:
    """Checks of the arguments that sequence modules and cells share."""
    check_construction(op, sizes, flags, device, dtype)
    check_activation(op, nonlinearity, ACTIVATIONS, "nonlinearity")


def check_factors(op: str, name: str, value: Any) -> None:
    """The number of factors, or the rank: an int, or None for the default."""
    if value is not None:
        check_size(op, name, value)


def check_input(op: str, x: Any, ranks: Sequence[int], names: str, width: int) -> None:
    """A tensor with one of these ranks, the largest first, whose last size is the input size.

    ``names``: the axes before the features of the largest; a second rank is that without the batch B.
    """
    check_tensors(op, ("input",), (x,), 1, FLOATING)
    if x.dim() in ranks and x.shape[-1] == width:
        return
    axes = [", ".join((*names, f"X={width}"))]
    if len(ranks) > 1:
        axes.append(", ".join((*names.replace("B", ""), f"X={width}")))
    expected = " or ".join(f"[{one}]" for one in axes)
    raise ValueError(f"{op}: input: expected shape {expected}, got {list(x.shape)}")


def check_state(op: str, kind: str, hx: Any, lead: Mapping[str, int], sizes: Sizes) -> None:
    """h [*lead, P], or of LSTMs the pair of it and c [*lead, H]."""
    lstm = KINDS[kind].cell == LSTM
    if lstm and not isinstance(hx, tuple | list):  # a tensor could be unpacked
        raise TypeError(f"{op}: hx: expected a pair (h, c), got {type(hx).__name__}")
    if lstm and len(hx) != 2:
        raise ValueError(f"{op}: hx: expected a pair (h, c), got {len(hx)} elements")
    given = {"hx[0]": hx[0], "hx[1]": hx[1]} if lstm else {"hx": hx}
    for name, tensor in given.items():
        check_tensors(op, (name,), (tensor,), 1, FLOATING)
        width = {"H": sizes.hidden_size} if name == "hx[1]" or not sizes.proj_size else {"P": sizes.proj_size}
        check_shape(op, name, tensor, {**lead, **width})
