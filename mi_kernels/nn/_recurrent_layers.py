"""The sequence modules of multiplicative RNNs, whatever their kind: layers, directions, packed sequences."""

import warnings
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..functional._recurrent_arguments import RecurrentName
from ..ops.checks import check_number
from ..ops.recurrent.forms import KINDS, LSTM
from ._init import parameters
from ._recurrent import (
    Device,
    Pair,
    Sizes,
    check_common,
    check_factors,
    check_input,
    check_state,
    draw,
    run,
)

Lengths = Tensor | list[int] | tuple[int, ...]


class RecurrentLayers(nn.Module):
    """Layers of one kind with the interface of nn.LSTM; a subclass has the kind and a constructor."""

    kind: ClassVar[RecurrentName]
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    nonlinearity: str
    memory: str

    def _build(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: Device,
        dtype: torch.dtype | None,
        *,
        memory: str,
        nonlinearity: str = "tanh",
        factors: tuple[str, int | None] = ("rank", None),
    ) -> None:
        """Check the arguments of a constructor, register the parameters, and draw them.

        ``factors``: the name of the argument with the number of factors or the rank, and its value.
        """
        op = type(self).__name__
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        sizes["proj_size"] = proj_size
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
        check_common(op, sizes, flags, device, dtype, nonlinearity)
        check_factors(op, *factors)
        if num_layers < 1:
            raise ValueError(f"{op}: num_layers: expected >= 1, got {num_layers}")
        _check_projection(op, self.kind, proj_size, hidden_size)
        check_number(op, "dropout", dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"{op}: dropout: expected a probability, got {dropout}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"{op}: dropout: it comes between layers: {dropout} has no effect on num_layers=1",
                stacklevel=3,
            )
        if not isinstance(memory, str) or memory not in ("fast", "low"):
            raise ValueError(f"{op}: memory: expected one of fast, low, got {memory!r}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bool(bias)
        self.batch_first = bool(batch_first)
        self.dropout = float(dropout)
        self.bidirectional = bool(bidirectional)
        self.proj_size = proj_size
        self.nonlinearity = nonlinearity
        self.memory = memory
        self._sizes = Sizes.of(self.kind, hidden_size, self.bias, proj_size, factors[1])
        width = input_size
        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                shapes = self._sizes.shapes(width)
                parameters(self, {f"{name}{suffix}": shape for name, shape in shapes.items()}, device, dtype)
            width = self._sizes.features * (1 + self.bidirectional)
        self.reset_parameters()

    def _suffixes(self, layer: int) -> list[str]:
        """What follows the names of the parameters of a layer, in each direction."""
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    def _of(self, suffix: str) -> dict[str, nn.Parameter | None]:
        names = self._sizes.shapes(0)
        return {name: getattr(self, f"{name}{suffix}") for name in names}

    def reset_parameters(self) -> None:
        """Draw the parameters anew from torch's random stream; set those of multiplicative integration.

        Example:
            >>> mi.nn.MultiplicativeLSTM(5, 4).reset_parameters()
        """
        for layer in range(self.num_layers):
            for suffix in self._suffixes(layer):
                draw(self._sizes, self._of(suffix))

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer and direction, as of nn.LSTM.

        Example:
            >>> len(mi.nn.MultiplicativeLSTM(5, 4, num_layers=2).all_weights)
            2
        """
        suffixes = [suffix for layer in range(self.num_layers) for suffix in self._suffixes(layer)]
        return [[one for one in self._of(suffix).values() if one is not None] for suffix in suffixes]

    def flatten_parameters(self) -> None:
        """Does nothing: for programs that call it of nn.LSTM.

        Example:
            >>> mi.nn.MultiplicativeLSTM(5, 4).flatten_parameters()
        """

    def forward(self, input: Any, hx: Any = None, lengths: Lengths | None = None) -> Any:
        """All layers over all steps, with the arguments of :class:`torch.nn.LSTM`.

        Args:
            input: ``[T, B, X]`` (``[B, T, X]`` with ``batch_first``), ``[T, X]``, or a ``PackedSequence``.
            hx: the states before the first step, ``[layers * directions, B, ...]``; zeros if None.
            lengths: steps of each sequence ``[B]``, for padded input.

        Returns:
            ``output, h_n`` or ``output, (h_n, c_n)``, as the class says.

        Example:
            >>> rnn = mi.nn.MultiplicativeLSTM(5, 4)
            >>> output, (h_n, c_n) = rnn(torch.randn(7, 2, 5))
        """
        op = type(self).__name__
        packed = isinstance(input, PackedSequence)
        if not packed:
            check_input(op, input, (3, 2), "BT" if self.batch_first else "TB", self.input_size)
        if lengths is not None and (packed or input.dim() == 2):
            what = "with a PackedSequence, which has its own" if packed else "for an input without a batch"
            raise ValueError(f"{op}: lengths: expected None {what}, got a {type(lengths).__name__}")
        if packed:
            return self._packed(op, input, hx)
        transposed = self.batch_first and input.dim() == 3
        x = input.transpose(0, 1) if transposed else input
        self._check_state(op, x, hx)
        output, state = self._layers(x, hx, lengths)
        return output.transpose(0, 1) if transposed else output, state

    def _packed(self, op: str, packed: PackedSequence, hx: Any) -> Any:
        data, batch_sizes, order, back = packed
        check_input(op, data, (2,), "N", self.input_size)
        # Rows stay in the order of the packed data, longest first: states are brought into it, and back.
        x, sizes = pad_packed_sequence(PackedSequence(data, batch_sizes))
        self._check_state(op, x, hx)
        output, state = self._layers(x, _permuted(hx, order), sizes.to(x.device))
        output = pack_padded_sequence(output, sizes).data
        return PackedSequence(output, batch_sizes, order, back), _permuted(state, back)

    def _check_state(self, op: str, x: Tensor, hx: Any) -> None:
        if hx is not None:
            lead = {"L": self.num_layers * (1 + self.bidirectional)}
            if x.dim() == 3:
                lead["B"] = x.shape[1]
            check_state(op, self.kind, hx, lead, self._sizes)

    def _layers(self, x: Tensor, hx: Any, lengths: Lengths | None) -> tuple[Tensor, Any]:
        """Output and states of x [T, B, X] or [T, X]."""
        lstm = KINDS[self.kind].cell == LSTM
        options: dict[str, Any] = {"lengths": lengths, "memory": self.memory, "activation": self.nonlinearity}
        states: list[Any] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs: list[Tensor] = []
            for suffix in self._suffixes(layer):
                index = len(states)
                state = None if hx is None else (hx[0][index], hx[1][index]) if lstm else hx[index]
                options["reverse"] = len(outputs) == 1
                output, state = run(self.kind, self._of(suffix), x, state, options)
                outputs.append(output)
                states.append(state)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        if not lstm:
            return x, torch.stack(states)
        h, c = zip(*states, strict=True)
        return x, (torch.stack(h), torch.stack(c))

    def extra_repr(self) -> str:
        shown = [str(self.input_size), str(self.hidden_size)]
        defaults: dict[str, Any] = {
            "proj_size": 0,
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
        }
        defaults |= {"bidirectional": False, "nonlinearity": "tanh", "memory": "fast"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                shown.append(f"{name}={getattr(self, name)!r}")
        return ", ".join([*shown, *self._sizes.shown()])


class LSTMLayers(RecurrentLayers):
    """States are pairs (h, c)."""

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, input: Tensor, hx: Pair | None = None, lengths: Lengths | None = None
        ) -> tuple[Tensor, Pair]: ...
        @overload
        def __call__(
            self, input: PackedSequence, hx: Pair | None = None, lengths: None = None
        ) -> tuple[PackedSequence, Pair]: ...
        def __call__(self, input: Any, hx: Any = None, lengths: Any = None) -> Any: ...


class StateLayers(RecurrentLayers):
    """States are h alone."""

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, input: Tensor, hx: Tensor | None = None, lengths: Lengths | None = None
        ) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(
            self, input: PackedSequence, hx: Tensor | None = None, lengths: None = None
        ) -> tuple[PackedSequence, Tensor]: ...
        def __call__(self, input: Any, hx: Any = None, lengths: Any = None) -> Any: ...


def _check_projection(op: str, kind: str, proj_size: int, hidden_size: int) -> None:
    if proj_size and KINDS[kind].cell != LSTM:
        raise ValueError(f"{op}: proj_size: expected 0, as projections belong to LSTMs, got {proj_size}")
    if proj_size and proj_size >= hidden_size:
        raise ValueError(f"{op}: proj_size: expected less than hidden_size={hidden_size}, got {proj_size}")


def _permuted(hx: Any, order: Tensor | None) -> Any:
    """States [L, B, P] with their rows in another order."""
    if hx is None or order is None:
        return hx
    if isinstance(hx, Tensor):
        return hx.index_select(1, order)
    return tuple(one.index_select(1, order) for one in hx)
