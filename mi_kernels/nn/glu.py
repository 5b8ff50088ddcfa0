"""Gated linear units, alone and with the linear layer behind them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..functional import glu
from ..functional._call import call
from ..ops import activations
from ..ops.activations import ActivationName
from ..ops.checks import check_activation, check_number
from ..parallel.axes import ModuleAxes
from ._init import check_construction, draw_uniform, given_axes, keywords_after_first, parameters


class GLU(nn.Module):
    r"""Gated linear unit with one packed weight.

    .. math:: y = \mathrm{act}(G x + a) \cdot (V x + c)

    Args:
        in_features: X, the size of the input.
        out_features: H, the size of the output.
        bias: whether to learn a and c.
        activation: see :func:`mi_kernels.glu`; sigmoid is that of Dauphin et al.
        gate_first: whether G comes before V in the packed weight.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``x [..., X]`` gives ``y [..., H]``.

    Attributes:
        weight: G and V, or V and G, of shape ``[2H, X]``.
        bias: a and c, or c and a, of shape ``[2H]``, or None.

    The weight is initialised uniformly with mean zero and variance 1/X, so that the gate before its
    activation and the value have variance 1 for features of unit variance; the bias is 0.

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size is negative, or the activation is unknown.
        TypeError, ValueError: see :func:`mi_kernels.glu`.

    Source: Dauphin et al., "Language Modeling with Gated Convolutional Networks", ICML 2017; Shazeer, "GLU
    Variants Improve Transformer", 2020.

    Example:
        >>> layer = mi.nn.GLU(5, out_features=4)
        >>> layer(torch.randn(8, 5)).shape
        torch.Size([8, 4])
    """

    __constants__ = ["in_features", "out_features"]
    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    @keywords_after_first
    def __init__(
        self,
        in_features: int,
        *,
        out_features: int,
        bias: bool = True,
        activation: ActivationName = "silu",
        gate_first: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.gate_first = gate_first
        sizes = {name: getattr(self, name) for name in self.__constants__}
        check_construction("GLU", sizes, {"bias": bias, "gate_first": gate_first}, device, dtype)
        check_activation("GLU", activation, activations.NAMES)
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight": (2 * out_features, in_features),
            "bias": (2 * out_features,) if bias else None,
        }
        parameters(self, shapes, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew from torch's random stream.

        Example:
            >>> mi.nn.GLU(5, out_features=4).reset_parameters()
        """
        draw_uniform(self.weight, self.in_features, 1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        """:func:`mi_kernels.glu` of x and the parameters.

        Args:
            x: ``[..., X]``.

        Returns:
            y ``[..., O]``.

        Example:
            >>> mi.nn.GLU(5, out_features=4)(torch.randn(2, 5)).shape
            torch.Size([2, 4])
        """
        return call(
            glu.glu, x, self.weight, self.bias, activation=self.activation, gate_first=self.gate_first
        )

    def _parallel_axes(self) -> ModuleAxes:
        if self.activation == "softmax":
            raise NotImplementedError("GLU: expected an elementwise activation to shard H, got softmax")
        names = given_axes(self, {"weight": "HX", "bias": "H"})
        return ModuleAxes(("X",), "H", names, "", tuple(names))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation!r}, gate_first={self.gate_first}"
        )


class GatedMLP(nn.Module):
    r"""The feed-forward layer of transformers: a gated linear unit and a linear layer.

    .. math:: y = D (\mathrm{act}(G x + a) \cdot (V x + c)) + d

    Args:
        features: X, the size of the input.
        hidden_features: H, the size of the gated linear unit.
        out_features: O, the size of the output; X if None.
        bias: whether to learn a, c and d.
        activation: see :func:`mi_kernels.glu`.
        dropout: probability of dropout of the hidden features, while training.
        gate_first: whether G comes before V in the packed weight.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``x [..., X]`` gives ``y [..., O]``.

    Attributes:
        glu: the :class:`GLU`.
        dropout: an ``nn.Dropout``.
        down: the ``nn.Linear`` with D and d.

    The MLPs of LLaMA, Mixtral, T5, timm and x-transformers are this formula; ready rules of
    :func:`mi_kernels.convert` (``mi.nn.rules.transformers()``, ``timm()``, ``x_transformers()``) compute
    these layers with their own parameters.

    Raises:
        TypeError, ValueError: as :class:`GLU`; ``dropout`` is no probability.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020; Touvron et al., "LLaMA", 2023.

    Example:
        >>> layer = mi.nn.GatedMLP(5, hidden_features=16)
        >>> layer(torch.randn(8, 5)).shape
        torch.Size([8, 5])
    """

    @keywords_after_first
    def __init__(
        self,
        features: int,
        *,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = False,
        activation: ActivationName = "silu",
        dropout: float = 0.0,
        gate_first: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out = features if out_features is None else out_features
        sizes = {"features": features, "hidden_features": hidden_features, "out_features": out}
        check_construction("GatedMLP", sizes, {"bias": bias, "gate_first": gate_first}, device, dtype)
        check_activation("GatedMLP", activation, activations.NAMES)
        check_number("GatedMLP", "dropout", dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"GatedMLP: dropout: expected a probability, got {dropout}")
        self.glu = GLU(
            features,
            out_features=hidden_features,
            bias=bias,
            activation=activation,
            gate_first=gate_first,
            device=device,
            dtype=dtype,
        )
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden_features, out, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's random stream.

        Example:
            >>> mi.nn.GatedMLP(5, hidden_features=8).reset_parameters()
        """
        self.glu.reset_parameters()
        self.down.reset_parameters()

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        """The gated linear unit, dropout and the layer down.

        Args:
            x: ``[..., X]``.

        Returns:
            y of the shape of x, or ``[..., out_features]``.

        Example:
            >>> mi.nn.GatedMLP(5, hidden_features=8)(torch.randn(2, 5)).shape
            torch.Size([2, 5])
        """
        return self.down(self.dropout(self.glu(x)))
