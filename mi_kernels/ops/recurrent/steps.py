"""What the plain passes of multiplicative RNNs share: the arguments of a step, and its products."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulation_dtype
from .forms import LSTM, form_of

Maybe = Tensor | None
_CHUNK = 1 << 20  # elements of a temporary, unless W has more

# f' of y = f(p).
_SLOPES = {
    "tanh": lambda y: 1 - y * y,
    "relu": lambda y: (y > 0).to(y.dtype),
    "sigmoid": lambda y: y * (1 - y),
    "identity": torch.ones_like,
}


def order(steps: int, reverse: bool) -> Sequence[int]:
    """The steps in the order in which they are made."""
    return range(steps - 1, -1, -1) if reverse else range(steps)


def previous(state: Tensor, out: Tensor, lengths: Maybe, reverse: bool) -> Tensor:
    """[T, B, P], the state before each step."""
    if out.shape[0] == 0:
        return out
    if lengths is not None:  # a row without steps has no part in sums over them, even if its state is NaN
        state = state.masked_fill(lengths[:, None] == 0, 0)
    if not reverse:
        return torch.cat((state[None], out[:-1]))
    before = torch.cat((out[1:], state[None]))
    if lengths is None:
        return before
    steps = torch.arange(out.shape[0], device=out.device)[:, None, None]
    return torch.where(steps == lengths[:, None] - 1, state, before)


def dense_product(h: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """h^T W x of W [O, Z, X], by rows, so that nothing larger than W is kept."""
    out, context, width = weight.shape
    rows = max(context, _CHUNK // max(out * width, 1), 1)
    parts = [
        torch.einsum("bz,ozx,bx->bo", h[b : b + rows], weight, x[b : b + rows])
        for b in range(0, h.shape[0], rows)
    ]
    return torch.cat(parts) if parts else h.new_empty(0, out)


def integrate(q: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """alpha * x * q + beta_h * q + beta_x * x + b."""
    alpha, beta_h, beta_x, bias = vectors
    return q * (alpha * x + beta_h) + (beta_x * x + bias)


def masked(mask: Maybe, value: Tensor, other: Maybe = None) -> Tensor:
    """The value in the rows that make the step, in the others the other one, or zero."""
    if mask is None:
        return value
    return torch.where(mask, value, torch.zeros_like(value) if other is None else other)


class Steps:
    """The arguments that the three passes have in common. What a form does not have is not read."""

    def __init__(
        self,
        gates_x: Tensor,
        factors_x: Any,
        weight_hh: Any,
        weight_hm: Any,
        weight_mh: Any,
        weight: Any,
        weight_hr: Any,
        integration: Any,
        lengths: Maybe,
        kind: str,
        activation: str,
        reverse: bool,
    ) -> None:
        form = form_of(kind, weight_hm)
        self.structure, self.cell = form
        self.gates_x, self.factors_x = gates_x, factors_x
        self.weight_hh, self.weight_hm, self.weight_mh = weight_hh, weight_hm, weight_mh
        self.weight, self.weight_hr = weight, weight_hr
        self.dtype, self.wide = gates_x.dtype, accumulation_dtype(gates_x.dtype)
        self.integration: Any = self.up(integration)
        self.lengths, self.activation, self.reverse = lengths, activation, reverse
        self.units = gates_x.shape[2] // form.gates

    def up(self, tensor: Any) -> Any:
        """The tensor in the accumulation dtype."""
        return None if tensor is None else tensor.to(self.wide)

    def product(self, h: Tensor, weight: Tensor) -> Tensor:
        return F.linear(h.to(self.dtype), weight).to(self.wide)

    def product_back(self, grad: Tensor, weight: Tensor) -> Tensor:
        return (grad.to(self.dtype) @ weight).to(self.wide)

    def __iter__(self) -> Iterator[tuple[int, Maybe]]:
        """Each step, with the mask [B, 1] of the rows that make it."""
        for t in order(self.gates_x.shape[0], self.reverse):
            yield t, None if self.lengths is None else (t < self.lengths)[:, None]

    def gates(self, pre: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = pre.chunk(4, -1)
        return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()

    def kept_gates(self, t: int, gates: Maybe, q: Any) -> Sequence[Tensor]:
        """Those of a lstm: kept, or of the product q with the state, which an integrated form keeps."""
        if gates is not None:
            return self.up(gates[t]).chunk(4, -1)
        return self.gates(integrate(q, self.up(self.gates_x[t]), self.integration))

    def gru_gates(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, z, n = integrate(q, x, self.integration).chunk(3, -1)
        return r.sigmoid(), z.sigmoid(), n.tanh()

    def slope(self, y: Tensor) -> Tensor:
        return _SLOPES[self.activation](y)

    def cells_before(self, c0: Maybe, cells: Maybe) -> Any:
        return (
            None if cells is None or c0 is None else previous(self.up(c0), cells, self.lengths, self.reverse)
        )

    def stacked(self, parts: dict[int, Tensor], width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[T, B, width] of a part for each step."""
        steps, rows = self.gates_x.shape[:2]
        dtype = dtype or self.dtype
        if not parts:
            return self.gates_x.new_zeros(steps, rows, width, dtype=dtype)
        return torch.stack([parts[t] for t in range(steps)]).to(dtype)

    @property
    def is_lstm(self) -> bool:
        return self.cell == LSTM
