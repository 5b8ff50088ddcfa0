"""Cells of multiplicative RNNs, one step each, with the interface of nn.LSTMCell."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional._recurrent_arguments import RecurrentName
from ._init import parameters
from ._recurrent import (
    Device,
    Nonlinearity,
    Pair,
    Sizes,
    check_common,
    check_factors,
    check_input,
    check_state,
    draw,
    run,
)


class _Cell(nn.Module):
    """A cell of one kind; a subclass has the kind and a constructor."""

    kind: ClassVar[RecurrentName]
    input_size: int
    hidden_size: int
    bias: bool
    nonlinearity: str

    def _build(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Device,
        dtype: torch.dtype | None,
        nonlinearity: str = "tanh",
        factors: tuple[str, int | None] = ("rank", None),
    ) -> None:
        op = type(self).__name__
        sizes = {"input_size": input_size, "hidden_size": hidden_size}
        check_common(op, sizes, {"bias": bias}, device, dtype, nonlinearity)
        check_factors(op, *factors)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bool(bias)
        self.nonlinearity = nonlinearity
        self._sizes = Sizes.of(self.kind, hidden_size, self.bias, factors=factors[1])
        parameters(self, self._sizes.shapes(input_size), device, dtype)
        self.reset_parameters()

    def _weights(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._sizes.shapes(self.input_size)}

    def reset_parameters(self) -> None:
        """Draw the parameters anew from torch's random stream; set those of multiplicative integration.

        Example:
            >>> mi.nn.MultiplicativeLSTMCell(5, 4).reset_parameters()
        """
        draw(self._sizes, self._weights())

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step.

        Args:
            input: ``[B, X]`` or ``[X]``.
            hx: the state before, as the class says; zeros if None.

        Returns:
            The state after: h ``[B, H]``, or the pair (h, c).

        Example:
            >>> cell = mi.nn.MultiplicativeLSTMCell(5, 4)
            >>> h, c = cell(torch.randn(2, 5))
        """
        op = type(self).__name__
        check_input(op, input, (2, 1), "B", self.input_size)
        if hx is not None:
            lead = {"B": input.shape[0]} if input.dim() == 2 else {}
            check_state(op, self.kind, hx, lead, self._sizes)
        options = {"activation": self.nonlinearity}
        return run(self.kind, self._weights(), input.unsqueeze(0), hx, options)[1]

    def extra_repr(self) -> str:
        shown = [str(self.input_size), str(self.hidden_size)]
        shown += [] if self.bias else ["bias=False"]
        shown += [] if self.nonlinearity == "tanh" else [f"nonlinearity={self.nonlinearity!r}"]
        return ", ".join([*shown, *self._sizes.shown()])


class _LSTMCell(_Cell):
    """The state is the pair (h, c)."""

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Pair | None = None) -> Pair: ...


class _StateCell(_Cell):
    """The state is h."""

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...


class MultiplicativeLSTMCell(_LSTMCell):
    r"""A step of a multiplicative LSTM; formula and initialisation are those of
    :class:`~mi_kernels.nn.MultiplicativeLSTM`.

    Args:
        input_size: X, the size of the input.
        hidden_size: H, the number of units.
        bias: whether to learn :math:`b_{ih}` and :math:`b_{hh}`, whose sum is the bias.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.
        num_factors: M, the size of m; None: H.

    Shape:
        ``input`` [B, X] or [X]; ``hx`` is (h, c), each [B, H] or [H], None: zeros. The result is the next
        (h, c).

    Attributes:
        weight_ih, weight_hh, bias_ih, bias_hh: as of :class:`torch.nn.LSTMCell`, ``weight_hh`` [4H, M].
        weight_mx, weight_mh: of shapes [M, X] and [M, H].

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size is negative, or a shape does not fit.
        TypeError, ValueError: see :func:`mi_kernels.multiplicative_rnn`.

    Source: Krause et al., "Multiplicative LSTM for sequence modelling", 2016.

    Example:
        >>> cell = mi.nn.MultiplicativeLSTMCell(5, 6)
        >>> h, c = cell(torch.randn(3, 5))
        >>> h, c = cell(torch.randn(3, 5), (h, c))
    """

    kind = "mlstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_factors: int | None = None,
    ) -> None:
        super().__init__()
        self._build(input_size, hidden_size, bias, device, dtype, factors=("num_factors", num_factors))
        self.num_factors = self._sizes.factors


class MultiplicativeRNNCell(_StateCell):
    r"""A step of a multiplicative RNN; formula and initialisation are those of
    :class:`~mi_kernels.nn.MultiplicativeRNN`.

    Args:
        input_size, hidden_size, bias, device, dtype, num_factors: as of :class:`MultiplicativeLSTMCell`.
        nonlinearity: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.

    Shape:
        ``input`` [B, X] or [X]; ``hx`` h [B, H] or [H], None: zeros. The result is the next h.

    Attributes:
        weight_ih, weight_hh, bias_ih, bias_hh: as of :class:`torch.nn.RNNCell`, ``weight_hh`` [H, M].
        weight_mx, weight_mh: of shapes [M, X] and [M, H].

    Raises:
        TypeError, ValueError: as :class:`MultiplicativeLSTMCell`; ``nonlinearity`` is unknown.

    Source: Sutskever, Martens and Hinton, "Generating Text with Recurrent Neural Networks", ICML 2011.

    Example:
        >>> cell = mi.nn.MultiplicativeRNNCell(5, 6)
        >>> cell(torch.randn(3, 5), torch.randn(3, 6)).shape
        torch.Size([3, 6])
    """

    kind = "mrnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_factors: int | None = None,
        nonlinearity: Nonlinearity = "tanh",
    ) -> None:
        super().__init__()
        factors = ("num_factors", num_factors)
        self._build(input_size, hidden_size, bias, device, dtype, nonlinearity, factors)
        self.num_factors = self._sizes.factors


class MultiplicativeIntegrationRNNCell(_StateCell):
    r"""A step of an RNN with multiplicative integration; formula and initialisation are those of
    :class:`~mi_kernels.nn.MultiplicativeIntegrationRNN`.

    Args:
        input_size, hidden_size, bias, device, dtype: as of :class:`MultiplicativeLSTMCell`.
        nonlinearity: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.

    Shape:
        As of :class:`MultiplicativeRNNCell`.

    Attributes:
        weight_ih, weight_hh, bias_ih, bias_hh: as of :class:`torch.nn.RNNCell`, which this is with alpha = 0
            and both betas 1.
        alpha, beta_h, beta_x: of shape [H].

    Raises:
        TypeError, ValueError: as :class:`MultiplicativeRNNCell`.

    Source: Wu et al., "On Multiplicative Integration with Recurrent Neural Networks", NeurIPS 2016.

    Example:
        >>> cell = mi.nn.MultiplicativeIntegrationRNNCell(5, 6, nonlinearity="relu")
        >>> cell(torch.randn(5)).shape
        torch.Size([6])
    """

    kind = "mi_rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        nonlinearity: Nonlinearity = "tanh",
    ) -> None:
        super().__init__()
        self._build(input_size, hidden_size, bias, device, dtype, nonlinearity)


class MultiplicativeIntegrationLSTMCell(_LSTMCell):
    r"""A step of an LSTM with multiplicative integration; formula and initialisation are those of
    :class:`~mi_kernels.nn.MultiplicativeIntegrationLSTM`.

    Args:
        input_size, hidden_size, bias, device, dtype: as of :class:`MultiplicativeLSTMCell`.

    Shape:
        As of :class:`MultiplicativeLSTMCell`.

    Attributes:
        weight_ih, weight_hh, bias_ih, bias_hh: as of :class:`torch.nn.LSTMCell`, which this is with alpha = 0
            and both betas 1.
        alpha, beta_h, beta_x: of shape [4H].

    Raises:
        TypeError, ValueError: as :class:`MultiplicativeLSTMCell`.

    Source: Wu et al., "On Multiplicative Integration with Recurrent Neural Networks", NeurIPS 2016.

    Example:
        >>> cell = mi.nn.MultiplicativeIntegrationLSTMCell(5, 6)
        >>> h, c = cell(torch.randn(3, 5))
    """

    kind = "mi_lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._build(input_size, hidden_size, bias, device, dtype)


class MultiplicativeIntegrationGRUCell(_StateCell):
    r"""A step of a GRU with multiplicative integration; formula and initialisation are those of
    :class:`~mi_kernels.nn.MultiplicativeIntegrationGRU`.

    Args:
        input_size, hidden_size, bias, device, dtype: as of :class:`MultiplicativeLSTMCell`.

    Shape:
        As of :class:`MultiplicativeRNNCell`.

    Attributes:
        weight_ih, weight_hh, bias_ih, bias_hh: named and shaped as those of :class:`torch.nn.GRUCell`.
        alpha, beta_h, beta_x: of shape [3H].

    Raises:
        TypeError, ValueError: as :class:`MultiplicativeLSTMCell`.

    Source: Wu et al., "On Multiplicative Integration with Recurrent Neural Networks", NeurIPS 2016.

    Example:
        >>> cell = mi.nn.MultiplicativeIntegrationGRUCell(5, 6)
        >>> h = cell(torch.randn(3, 5), torch.randn(3, 6))
    """

    kind = "mi_gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._build(input_size, hidden_size, bias, device, dtype)


class SecondOrderRNNCell(_StateCell):
    r"""A step of a second-order RNN; formula and initialisation are those of
    :class:`~mi_kernels.nn.SecondOrderRNN`.

    Args:
        input_size, hidden_size, bias, device, dtype: as of :class:`MultiplicativeLSTMCell`.
        rank: R, of a factorised W; None: W is dense.
        nonlinearity: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.

    Shape:
        As of :class:`MultiplicativeRNNCell`.

    Attributes:
        weight_ih, weight_hh, bias_ih, bias_hh: as of :class:`torch.nn.RNNCell`.
        weight: W [H, H, X], its axes those of the new state, the state and the input.
        weight_mx, weight_mh, weight_hm: with a rank the factors [R, X], [R, H] and [H, R].

    Raises:
        TypeError, ValueError: as :class:`MultiplicativeRNNCell`; ``rank`` is no int >= 0.

    Source: Giles et al., "Learning and Extracting Finite State Automata with Second-Order Recurrent Neural
    Networks", Neural Computation 1992.

    Example:
        >>> cell = mi.nn.SecondOrderRNNCell(5, 6)
        >>> h = cell(torch.randn(3, 5), torch.randn(3, 6))
    """

    kind = "second_order"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int | None = None,
        nonlinearity: Nonlinearity = "tanh",
    ) -> None:
        super().__init__()
        self._build(input_size, hidden_size, bias, device, dtype, nonlinearity, ("rank", rank))
        self.rank = self._sizes.factors
