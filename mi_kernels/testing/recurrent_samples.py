"""Arguments of multiplicative RNNs, and S^2 of the error rule for them: the part of samples.py for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.namespace import OPS
from ..ops.recurrent import reference
from ..ops.recurrent.forms import ACTIVATIONS, DENSE, FACTORED, INTEGRATED, KINDS, LSTM, PLAIN
from .lru_cache import normal
from .samples import LAYOUTS, lay_out, made

Maybe = Tensor | None
NAMES = (
    *("x", "h", "c", "weight_ih", "weight_hh", "bias", "weight_mx", "weight_mh", "weight_hm", "weight"),
    *("weight_hr", "alpha", "beta_h", "beta_x"),
)
_ON_STATE = ("weight_hh", "weight_mh", "weight_hm", "weight", "alpha", "beta_h")


@dataclass(frozen=True)
class Recurrence:
    """Arguments of ``multiplicative_rnn``: everything but dtype, device and seed."""

    name: str
    kind: str
    steps: int = 4
    rows: int | None = 12  # None: x is [T, X]
    width: int = 7
    units: int = 13
    factors: int = 11
    projected: int | None = None  # P of weight_hr
    low_rank: bool = False  # of second_order
    without: str = ""  # of the optional arguments, by name
    lengths: tuple[int, ...] | None = None  # x behind them is NaN
    reverse: bool = False
    activation: str = "tanh"
    layout: str = "contiguous"
    memory: str = "fast"

    def __str__(self) -> str:
        parts = [self.kind, self.name, "" if self.layout == "contiguous" else self.layout]
        parts += ["low-rank" if self.low_rank else "", "reverse" if self.reverse else ""]
        parts += ["" if self.projected is None else f"projected{self.projected}"]
        parts += ["" if self.activation == "tanh" else self.activation]
        parts += ["" if self.memory == "fast" else self.memory]
        parts += [f"without-{name}" for name in self.without.split()]
        return "-".join(part for part in parts if part)

    @property
    def features(self) -> int:
        """P."""
        return self.units if self.projected is None else self.projected

    @property
    def shape(self) -> torch.Size:
        """Of output, h_n and c_n of each row, one behind the other."""
        size = (self.steps + 1) * self.features + (self.units if KINDS[self.kind].cell == LSTM else 0)
        return torch.Size((size,) if self.rows is None else (self.rows, size))

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        form = KINDS[self.kind]
        n, p, h, m, x = form.gates * self.units, self.features, self.units, self.factors, self.width
        batch = () if self.rows is None else (self.rows,)
        sizes: dict[str, tuple[int, ...]] = {"x": (self.steps, *batch, x), "h": (*batch, p)}
        sizes |= {"c": (*batch, h)} if form.cell == LSTM else {}
        sizes |= {"weight_ih": (n, x), "bias": (n,)}
        sizes |= {"weight_hh": (n, m if form.structure == FACTORED else p)}
        if form.structure == FACTORED or self.low_rank:
            sizes |= {"weight_mx": (m, x), "weight_mh": (m, p)}
        if self.low_rank:
            sizes["weight_hm"] = (h, m)
        elif form.structure == DENSE:
            sizes["weight"] = (h, h, x)
        if form.structure == INTEGRATED:
            sizes |= {"alpha": (n,), "beta_h": (n,), "beta_x": (n,)}
        if self.projected is not None:
            sizes["weight_hr"] = (p, h)
        return {name: size for name, size in sizes.items() if name not in self.without.split()}

    def call(self, function: Callable[..., Any], *tensors: Maybe) -> Tensor:
        """The function, as one tensor [B, ...] of output, h_n and c_n."""
        output, *states = self.results(function, *tensors)
        if self.rows is None:
            return torch.cat([output.flatten(), *states])
        # reshape with a size: without elements -1 is ambiguous.
        flat = output.transpose(0, 1).reshape(self.rows, self.steps * self.features)
        return torch.cat([flat, *states], -1)

    def results(self, function: Callable[..., Any], *tensors: Maybe) -> tuple[Tensor, ...]:
        """output, h_n and c_n, where there is one."""
        given = dict(zip(NAMES, tensors, strict=True))
        x, h, c = (given.pop(name) for name in ("x", "h", "c"))
        lstm = KINDS[self.kind].cell == LSTM
        state = None if h is None else (h, c) if lstm else h
        lengths = None if self.lengths is None or x is None else torch.tensor(self.lengths, device=x.device)
        options = {"lengths": lengths, "reverse": self.reverse, "activation": self.activation}
        output, state = function(self.kind, x, state, **given, **options, memory=self.memory)
        return (output, *state) if lstm else (output, state)

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> list[Maybe]:
        """In the order of `NAMES`. The same numbers in every dtype, rounded."""
        sizes = self._sizes()
        found: dict[str, Tensor] = {}
        for values, (name, size) in zip(normal(list(sizes.values()), seed), sizes.items(), strict=True):
            # Half of what keeps the size of the state: what is rounded is not to grow over the steps.
            scale = 0.5 if name in _ON_STATE else 1.0
            if name.startswith("weight"):
                scale *= max(size[-1], 1) ** -0.5
            scale *= max(size[-2], 1) ** -0.5 if name == "weight" else 1.0
            if self.activation == "relu":
                values = self._of_one_sign(name, values)
            found[name] = self._lay_out(name, made(values * scale, dtype, device))
        if self.lengths is not None:
            x = found["x"]
            x = found["x"] = x.clone() if self.layout == "expanded" else x
            x.masked_fill_(self.padding(x), torch.nan)
        return [found[name].requires_grad_(requires_grad) if name in found else None for name in NAMES]

    @staticmethod
    def _of_one_sign(name: str, values: Tensor) -> Tensor:
        """Values by which all terms of a unit's p have one sign: none is rounded to the other side of 0."""
        values = values.abs()
        if name in ("weight_ih", "weight_hh", "weight_hm", "weight", "bias", "alpha"):
            values[1::2] *= -1
        return values

    def _lay_out(self, name: str, tensor: Tensor) -> Tensor:
        if self.layout == "expanded":  # along B, or the vectors: of equal rows of weights all units are equal
            if name.startswith("weight") or self.rows is None:
                return tensor
            return lay_out(tensor, self.layout, expand_dim=1 if name == "x" else 0)
        return lay_out(tensor, self.layout)

    def padding(self, x: Tensor) -> Tensor:
        """Where x [T, B, X] is behind its length."""
        lengths = torch.tensor(self.lengths, device=x.device)
        return (torch.arange(self.steps, device=x.device)[:, None] >= lengths)[:, :, None]

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        (values,) = normal([tuple(self.shape)], seed)
        tensor = made(values, dtype, device)
        return lay_out(tensor, self.layout) if self.layout in ("transposed", "gaps", "offset") else tensor


def recurrent_calls(dtype: torch.dtype) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]]:
    """Calls of ``recurrent``, ``recurrent_grads`` and ``recurrent_tangents``, which is by its schema."""
    steps, rows, width, units, factors, features = 2, 4, 2, 3, 5, 2
    for seed, kind in enumerate(("mlstm", "mi_gru", "second_order")):
        form = KINDS[kind]
        n, lstm = form.gates * units, form.cell == LSTM
        p = features if kind == "mlstm" else units
        sizes: dict[str, tuple[int, ...] | None] = {
            "gates_x": (steps, rows, n),
            "factors_x": None,
            "h0": (rows, p),
        }
        sizes |= {"c0": (rows, units) if lstm else None}
        sizes |= dict.fromkeys(("weight_hh", "weight_hm", "weight_mh", "weight", "weight_hr", "integration"))
        if form.structure == FACTORED:
            sizes |= {
                "factors_x": (steps, rows, factors),
                "weight_hm": (n, factors),
                "weight_mh": (factors, p),
            }
        elif form.structure == INTEGRATED:
            sizes |= {"weight_hh": (n, p), "integration": (4, n)}
        else:
            sizes |= {"factors_x": (steps, rows, width), "weight": (units, p, width), "weight_hh": (n, p)}
        if p != units:
            sizes["weight_hr"] = (p, units)
        drawn = iter(normal([size for size in sizes.values() if size is not None], seed))
        tensors = [None if size is None else next(drawn).to(dtype) for size in sizes.values()]
        lengths = torch.tensor([2, 0, 2, 1]) if seed % 2 == 0 else None
        rule = (lengths, kind, "tanh", form.structure == FACTORED)
        forward = (*tensors, *rule, True)
        out, h_n, c_n, gates, products, cells, _ = OPS.recurrent_portable(*forward)
        kept = [out, *(t if t.numel() else None for t in (gates, products, cells))]
        saved = (*tensors[:4], *kept, *tensors[4:], *rule)
        grads = (out.flip(0), h_n.flip(0), c_n.flip(0) if lstm else None, *saved)
        gates_x, factors_x, h0, c0 = (None if t is None else t.flip(-1) for t in tensors[:4])
        of_hr = None if p == units else out.flip(0)
        factors_t = factors_x if form.structure == FACTORED else None
        terms = (gates_x, factors_t, None if kept[2] is None else kept[2].flip(-1), of_hr, h0, c0)
        yield forward, grads, (*terms, *saved)


def values(sample: Recurrence, *tensors: Maybe) -> list[Tensor]:
    """S^2 of the result.

    A recurrence passes the rounding of all that came before to every unit. So each element is held to the
    scale of its step, and of a state that of the state: S^2 is the mean square there, and 0 behind a row's
    length, where results are exact.
    """

    def squared(*arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        output, state = reference.multiplicative_rnn(*arguments, **options)
        steps = _by_step(sample, output)
        if isinstance(state, tuple):
            return steps, tuple(_spread(one) for one in state)
        return steps, _spread(state)

    return [sample.call(squared, *tensors)]


def gradients(sample: Recurrence, cotangent: Tensor, *tensors: Maybe) -> list[Tensor]:
    """S^2 of the gradients by the tensors that are there, likewise."""
    there = [t is not None for t in tensors]

    def function(*given: Tensor) -> Tensor:
        left = iter(given)
        return sample.call(reference.multiplicative_rnn, *(next(left) if t else None for t in there))

    dx, *others = torch.func.vjp(function, *(t for t in tensors if t is not None))[1](cotangent)
    return [_by_step(sample, dx), *map(_spread, others)]


def _spread(t: Tensor) -> Tensor:
    return t.square().mean().expand(t.shape) if t.numel() else t


def _by_step(sample: Recurrence, t: Tensor) -> Tensor:
    """[T, (B,) ...]"""
    if t.numel() == 0:
        return t
    squares = t.square().flatten(1).mean(1).view(t.shape[0], *(1,) * (t.dim() - 1)).expand(t.shape)
    return squares if sample.lengths is None else squares.masked_fill(sample.padding(t), 0)


def every_kind() -> Iterator[Recurrence]:
    """Each kind once, those that have parts of their own with and without these."""
    for kind, form in KINDS.items():
        yield Recurrence("odd", kind)
        if form.structure == DENSE:
            yield Recurrence("odd", kind, low_rank=True)
        if form.cell == LSTM:
            yield Recurrence("odd", kind, projected=3)


LENGTHS = (3, 0, 4, 2, 1, 4, 0, 3, 2, 4, 1, 3)
MLSTM = Recurrence("odd", "mlstm")
MI_LSTM = Recurrence("odd", "mi_lstm", projected=5)
MI_GRU = Recurrence("odd", "mi_gru")
DENSE_RNN = Recurrence("odd", "second_order")


def recurrences() -> Iterator[Recurrence]:
    """Every pattern of terms, lengths, directions, layouts and sizes that these are tested on."""
    for sample in every_kind():
        yield sample
        yield replace(sample, name="reverse", reverse=True)
        for reverse in (False, True):
            yield replace(sample, name="lengths", lengths=LENGTHS, reverse=reverse)
        yield replace(sample, name="without", without="bias h c alpha beta_h beta_x")
    for sample in (MLSTM, MI_LSTM, MI_GRU, DENSE_RNN):
        yield replace(sample, name="unbatched", rows=None)
        yield replace(sample, name="one-row", rows=1)
        yield replace(sample, name="one-step", steps=1)
        yield replace(sample, name="many-rows", rows=67, steps=2)
        yield replace(sample, name="narrow", rows=50, width=1, units=4, factors=1, projected=None)
        yield replace(sample, name="no-steps", steps=0)
        yield replace(sample, name="no-rows", rows=0)
        yield replace(sample, name="no-input", width=0)
        if KINDS[sample.kind].structure == FACTORED:
            yield replace(sample, name="no-factors", factors=0)
        yield replace(sample, name="low-memory", memory="low", steps=7)
        for layout in LAYOUTS[1:]:
            yield replace(sample, layout=layout)
    for kind, form in KINDS.items():
        if form.cell == PLAIN:
            for activation in ACTIVATIONS[1:]:
                yield Recurrence("odd", kind, activation=activation)
        yield Recurrence("wide", kind, steps=3, width=33, units=37, factors=40)
        yield Recurrence("long", kind, steps=40, units=24, without="bias")
    yield replace(DENSE_RNN, without="weight_ih")
    yield replace(DENSE_RNN, without="weight_ih weight_hh bias")
    yield replace(DENSE_RNN, low_rank=True, without="weight_hh bias")
