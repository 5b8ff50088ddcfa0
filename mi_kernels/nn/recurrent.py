"""Multiplicative RNNs over sequences, with the interface of nn.LSTM; cells are in recurrent_cells.py."""

import torch

from ..functional._recurrent_arguments import MemoryName
from ._recurrent import Device, Nonlinearity
from ._recurrent_layers import LSTMLayers, StateLayers


class MultiplicativeLSTM(LSTMLayers):
    r"""Layers of a multiplicative LSTM (mLSTM), whose gates see a product of the input and the state.

    .. math::
        m_t &= (W_{mx} x_t) \cdot (W_{mh} h_{t-1}) \\
        i, f, g, o &= W_{ih} x_t + W_{hh} m_t + b_{ih} + b_{hh} \\
        c_t &= \sigma(f) c_{t-1} + \sigma(i) \tanh(g), \quad h_t = \sigma(o) \tanh(c_t)

    The matrix between two states is :math:`W_{hh} \mathrm{diag}(W_{mx} x_t) W_{mh}`: another one for each
    input. It is not the mLSTM of xLSTM, whose states are matrices.

    Args:
        input_size: X, the size of the input.
        hidden_size: H, the number of units.
        num_layers: how many layers; each reads the output of the one before.
        bias: whether to learn :math:`b_{ih}` and :math:`b_{hh}`, whose sum is the bias.
        batch_first: whether the input and the output are [B, T, ...] instead of [T, B, ...]; states are not.
        dropout: probability of dropout between layers, while training.
        bidirectional: whether each layer also reads the sequence from its end, with parameters of its own.
        proj_size: P, the size of h after a projection :math:`W_{hr}`, less than H; 0: none, P = H.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.
        num_factors: M, the size of m; None: H.
        memory: ``"fast"`` keeps what the backward pass reads of all steps, ``"low"`` the input, the output
            and the states of about every sqrt(T)-th step: all else is made again, in a third more time.

    Shape:
        ``input`` [T, B, X], [B, T, X] with ``batch_first``, [T, X] without a batch, or a
        ``PackedSequence``. ``hx`` is (h, c) of shapes [L, B, P] and [L, B, H] for the L = layers times
        directions, without B for an input without; None: zeros. ``lengths`` [B], a tensor of int64 or a
        sequence of ints from 0 to T, are those of padded rows: the output is zero behind them, the last
        states are those of each row's last step, and what stands in the padding has no part in any result.
        The results are the output, of the kind of the input with P features for each direction, and (h, c)
        after the last step.

    Attributes:
        weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0, weight_hr_l0: named and shaped as those of
            :class:`torch.nn.LSTM`, but for ``weight_hh``, which is [4H, M]; for each layer (``_l1``, ...) and
            direction (``_reverse``).
        weight_mx_l0, weight_mh_l0: :math:`W_{mx}` [M, X] and :math:`W_{mh}` [M, P].

    :math:`W_{mx}` is uniform on :math:`\pm\sqrt{3 / X}` and :math:`W_{mh}` on :math:`\pm\sqrt{3 / P}`: their
    variances 1/X and 1/P give :math:`W_{mx} x` of unit-variance features the variance 1, and so m that of h.
    The gates then see what those of nn.LSTM see: :math:`W_{hh}` is uniform on :math:`\pm 1 / \sqrt{M}`, all
    else on :math:`\pm 1 / \sqrt{H}`.

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size is negative, ``num_layers`` is 0, ``dropout`` is no probability, ``proj_size`` is
            not less than ``hidden_size``, ``memory`` is unknown, a shape does not fit, or ``lengths`` come
            with a ``PackedSequence``.
        TypeError, ValueError: see :func:`mi_kernels.multiplicative_rnn`.

    Source: Krause, Lu, Murray and Renals, "Multiplicative LSTM for sequence modelling", 2016; the interface
    of ``torch.nn.LSTM``. The initialisation is this package's own.

    Example:
        >>> layer = mi.nn.MultiplicativeLSTM(5, 6, num_layers=2)
        >>> output, (h, c) = layer(torch.randn(7, 3, 5))
        >>> output.shape, h.shape
        (torch.Size([7, 3, 6]), torch.Size([2, 3, 6]))
    """

    kind = "mlstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_factors: int | None = None,
        memory: MemoryName = "fast",
    ) -> None:
        super().__init__()
        given = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        self._build(*given, device, dtype, memory=memory, factors=("num_factors", num_factors))
        self.num_factors = self._sizes.factors


class MultiplicativeRNN(StateLayers):
    r"""Layers of the multiplicative RNN of Sutskever et al., the plain cell of :class:`MultiplicativeLSTM`.

    .. math::
        m_t = (W_{mx} x_t) \cdot (W_{mh} h_{t-1}), \quad
        h_t = \mathrm{act}(W_{ih} x_t + W_{hh} m_t + b_{ih} + b_{hh})

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            num_factors, memory: as of :class:`MultiplicativeLSTM`.
        proj_size: 0, the place of the argument of LSTMs.
        nonlinearity: act: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.

    Shape:
        As of :class:`MultiplicativeLSTM`, with h alone for (h, c), and P = H.

    Attributes:
        weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0: as of :class:`torch.nn.RNN`, ``weight_hh`` [H, M].
        weight_mx_l0, weight_mh_l0: :math:`W_{mx}` [M, X] and :math:`W_{mh}` [M, H].

    Initialised as :class:`MultiplicativeLSTM`: :math:`W_{hh} m` has the variance that :math:`W_{hh} h` has in
    nn.RNN, a third of that of h.

    Raises:
        TypeError, ValueError: as :class:`MultiplicativeLSTM`; ``proj_size`` is not 0, or ``nonlinearity`` is
            unknown.

    Source: Sutskever, Martens and Hinton, "Generating Text with Recurrent Neural Networks", ICML 2011.

    Example:
        >>> layer = mi.nn.MultiplicativeRNN(5, 6, num_factors=8)
        >>> output, h = layer(torch.randn(7, 3, 5))
        >>> output.shape, h.shape
        (torch.Size([7, 3, 6]), torch.Size([1, 3, 6]))
    """

    kind = "mrnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_factors: int | None = None,
        nonlinearity: Nonlinearity = "tanh",
        memory: MemoryName = "fast",
    ) -> None:
        super().__init__()
        given = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        factors = ("num_factors", num_factors)
        self._build(*given, device, dtype, memory=memory, nonlinearity=nonlinearity, factors=factors)
        self.num_factors = self._sizes.factors


class MultiplicativeIntegrationRNN(StateLayers):
    r"""Layers of an RNN in which the products with the input and with the state are multiplied, too.

    .. math::
        h_t = \mathrm{act}(\alpha \cdot (W_{ih} x_t) \cdot (W_{hh} h_{t-1}) + \beta_h \cdot (W_{hh} h_{t-1})
        + \beta_x \cdot (W_{ih} x_t) + b_{ih} + b_{hh})

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            memory: as of :class:`MultiplicativeLSTM`.
        proj_size: 0, the place of the argument of LSTMs.
        nonlinearity: act: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.

    Shape:
        As of :class:`MultiplicativeLSTM`, with h alone for (h, c), and P = H.

    Attributes:
        weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0: as of :class:`torch.nn.RNN`.
        alpha_l0, beta_h_l0, beta_x_l0: of shape [H].

    With alpha = 0 and both betas 1 it is :class:`torch.nn.RNN`, whose state dict it takes with
    ``strict=False``. It starts with alpha 1 and betas 1/2, as in the paper: each of the three terms takes
    part from the start, and the gradient of the state has the gate :math:`\alpha W_{ih} x + \beta_h`, which
    the input moves around 1/2. The weights are drawn as those of nn.RNN, in the same order.

    Raises:
        TypeError, ValueError: as :class:`MultiplicativeRNN`.

    Source: Wu, Zhang, Zhang, Bengio and Salakhutdinov, "On Multiplicative Integration with Recurrent Neural
    Networks", NeurIPS 2016.

    Example:
        >>> layer = mi.nn.MultiplicativeIntegrationRNN(5, 6, bidirectional=True)
        >>> layer(torch.randn(7, 3, 5))[0].shape
        torch.Size([7, 3, 12])
    """

    kind = "mi_rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        nonlinearity: Nonlinearity = "tanh",
        memory: MemoryName = "fast",
    ) -> None:
        super().__init__()
        given = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        self._build(*given, device, dtype, memory=memory, nonlinearity=nonlinearity)


class MultiplicativeIntegrationLSTM(LSTMLayers):
    r"""Layers of an LSTM whose gates multiply the products with the input and with the state, too.

    .. math::
        i, f, g, o &= \alpha \cdot (W_{ih} x_t) \cdot (W_{hh} h_{t-1}) + \beta_h \cdot (W_{hh} h_{t-1})
        + \beta_x \cdot (W_{ih} x_t) + b_{ih} + b_{hh} \\
        c_t &= \sigma(f) c_{t-1} + \sigma(i) \tanh(g), \quad h_t = \sigma(o) \tanh(c_t)

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype, memory: as of :class:`MultiplicativeLSTM`.

    Shape:
        As of :class:`MultiplicativeLSTM`.

    Attributes:
        weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0, weight_hr_l0: as of :class:`torch.nn.LSTM`.
        alpha_l0, beta_h_l0, beta_x_l0: of shape [4H].

    With alpha = 0 and both betas 1 it is :class:`torch.nn.LSTM`, whose state dict it takes with
    ``strict=False``. Initialised as :class:`MultiplicativeIntegrationRNN`, with the weights of nn.LSTM.

    Raises:
        TypeError, ValueError: as :class:`MultiplicativeLSTM`.

    Source: Wu et al., "On Multiplicative Integration with Recurrent Neural Networks", NeurIPS 2016.

    Example:
        >>> layer = mi.nn.MultiplicativeIntegrationLSTM(5, 6, proj_size=2, batch_first=True)
        >>> output, (h, c) = layer(torch.randn(3, 7, 5), lengths=[7, 4, 0])
        >>> output.shape, h.shape, c.shape
        (torch.Size([3, 7, 2]), torch.Size([1, 3, 2]), torch.Size([1, 3, 6]))
    """

    kind = "mi_lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        memory: MemoryName = "fast",
    ) -> None:
        super().__init__()
        given = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        self._build(*given, device, dtype, memory=memory)


class MultiplicativeIntegrationGRU(StateLayers):
    r"""Layers of a GRU whose gates multiply the products with the input and with the state, too.

    .. math::
        r, z &= \sigma(\alpha \cdot (W_{ih} x_t) \cdot (W_{hh} h_{t-1}) + \beta_h \cdot (W_{hh} h_{t-1})
        + \beta_x \cdot (W_{ih} x_t) + b_{ih} + b_{hh}) \\
        n &= \tanh(\alpha \cdot (W_{ih} x_t) \cdot (W_{hh} (r \cdot h_{t-1})) + \beta_h \cdot (W_{hh} (r \cdot
        h_{t-1})) + \beta_x \cdot (W_{ih} x_t) + b_{ih} + b_{hh}) \\
        h_t &= (1 - z) \cdot n + z \cdot h_{t-1}

    each with its rows of the parameters, in the order r, z, n. As in the paper, r meets the state before the
    product; in :class:`torch.nn.GRU` it meets the product, so that alpha = 0 does not make one of the other.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            memory: as of :class:`MultiplicativeLSTM`.
        proj_size: 0, the place of the argument of LSTMs.

    Shape:
        As of :class:`MultiplicativeLSTM`, with h alone for (h, c), and P = H.

    Attributes:
        weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0: named and shaped as those of
            :class:`torch.nn.GRU`.
        alpha_l0, beta_h_l0, beta_x_l0: of shape [3H].

    Initialised as :class:`MultiplicativeIntegrationRNN`, with the weights of nn.GRU.

    Raises:
        TypeError, ValueError: as :class:`MultiplicativeLSTM`; ``proj_size`` is not 0.

    Source: Wu et al., "On Multiplicative Integration with Recurrent Neural Networks", NeurIPS 2016.

    Example:
        >>> layer = mi.nn.MultiplicativeIntegrationGRU(5, 6)
        >>> output, h = layer(torch.randn(7, 5))  # without a batch
        >>> output.shape, h.shape
        (torch.Size([7, 6]), torch.Size([1, 6]))
    """

    kind = "mi_gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        memory: MemoryName = "fast",
    ) -> None:
        super().__init__()
        given = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        self._build(*given, device, dtype, memory=memory)


class SecondOrderRNN(StateLayers):
    r"""Layers of a second-order RNN, whose step is the dense interaction of the state and the input.

    .. math:: h_t = \mathrm{act}(h_{t-1}^T W x_t + W_{hh} h_{t-1} + W_{ih} x_t + b_{ih} + b_{hh})

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            memory: as of :class:`MultiplicativeLSTM`.
        proj_size: 0, the place of the argument of LSTMs.
        rank: R, of a factorised W: :math:`h^T W x = W_{hm} ((W_{mx} x) \cdot (W_{mh} h))`; None: W is dense.
        nonlinearity: act: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.

    Shape:
        As of :class:`MultiplicativeLSTM`, with h alone for (h, c), and P = H.

    Attributes:
        weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0: as of :class:`torch.nn.RNN`.
        weight_l0: W [H, H, X], its axes those of the new state, the state and the input.
        weight_mx_l0, weight_mh_l0, weight_hm_l0: with a rank the factors [R, X], [R, H] and [H, R].

    :math:`W_{hh}`, :math:`W_{ih}` and the biases are drawn as those of nn.RNN, from
    :math:`\pm 1 / \sqrt{H}`: :math:`W_{hh} h` has a third of the variance of h, by which a state fades. W is
    uniform on :math:`\pm\sqrt{2 / (HX)}`, with variance 2/(3HX): for unit-variance features of x,
    :math:`h^T W x` has the other two thirds. Over the parameters and x, what a step makes of a small change
    of the state has its mean square times :math:`\mathrm{act}'^2 \le 1`: it neither explodes nor fades but
    by the activation. The factors do the same: :math:`\pm\sqrt{3 / X}`, :math:`\pm\sqrt{3 / H}` and
    :math:`\pm\sqrt{2 / R}`. One-hot inputs have the mean square 1/X: give them an embedding, or a factor
    :math:`\sqrt{X}`.

    Raises:
        TypeError, ValueError: as :class:`MultiplicativeRNN`; ``rank`` is no int >= 0.

    Source: Giles et al., "Learning and Extracting Finite State Automata with Second-Order Recurrent Neural
    Networks", Neural Computation 1992. The initialisation is this package's own.

    Example:
        >>> layer = mi.nn.SecondOrderRNN(5, 6, rank=3, memory="low")
        >>> output, h = layer(torch.randn(7, 2, 5))
        >>> output.shape, h.shape
        (torch.Size([7, 2, 6]), torch.Size([1, 2, 6]))
    """

    kind = "second_order"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int | None = None,
        nonlinearity: Nonlinearity = "tanh",
        memory: MemoryName = "fast",
    ) -> None:
        super().__init__()
        given = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        self._build(*given, device, dtype, memory=memory, nonlinearity=nonlinearity, factors=("rank", rank))
        self.rank = self._sizes.factors
