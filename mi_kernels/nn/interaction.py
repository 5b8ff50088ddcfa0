"""The dense interaction as modules."""

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..functional import interaction
from ..functional._call import call
from ..parallel.axes import ModuleAxes
from ._contexts import aligned
from ._init import check_construction, draw_uniform, given_axes, keywords_after_first, parameters

BilinearInit = Literal["torch", "unit"]


class MultiplicativeInteraction(nn.Module):
    r"""Dense multiplicative interaction of an input x and a context z, with learned weights.

    .. math:: y_o = \sum_{ij} z_i W_{oij} x_j + \sum_i U_{oi} z_i + \sum_j V_{oj} x_j + c_o

    Args:
        in_features: X, the size of the input.
        context_features: Z, the size of the context.
        out_features: O, the size of the output.
        bias: whether to learn c.
        weight_z: whether to learn U.
        weight_x: whether to learn V.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``x [..., X]`` and ``z [..., Z]`` give ``y [..., O]``. Contexts as in :mod:`mi_kernels.nn`:
        ``z [B, Z]`` per sample, ``z [B, T, Z]`` per position.

    Attributes:
        weight: W of shape ``[O, Z, X]``.
        weight_z: U of shape ``[O, Z]``, or None.
        weight_x: V of shape ``[O, X]``, or None.
        bias: c of shape ``[O]``, or None.

    The parameters are initialised independently and uniformly on :math:`(-b, b)`; with k the number of terms
    among W, U and V that are present and not empty,

    .. math:: b_W = \sqrt{3 / (kZX)}, \quad b_U = \sqrt{3 / (kZ)}, \quad b_V = \sqrt{3 / (kX)}, \quad c = 0.

    A uniform variable on (-b, b) has variance :math:`b^2 / 3`. The parameters have mean zero and are
    independent, so all cross terms vanish in the expectation over them:

    .. math:: E[y_o^2] = \frac{b_W^2}{3} |z|^2 |x|^2 + \frac{b_U^2}{3} |z|^2 + \frac{b_V^2}{3} |x|^2.

    Independent x and z with features of unit variance and mean zero have :math:`E|x|^2 = X` and
    :math:`E|z|^2 = Z`: each term contributes 1/k, and y has variance 1 for any Z and X.

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size is negative.
        TypeError, ValueError: see :func:`mi_kernels.interaction`.

    Source: Jayakumar et al., "Multiplicative Interactions and Where to Find Them", ICLR 2020. The
    initialisation is this package's own.

    Example:
        >>> layer = mi.nn.MultiplicativeInteraction(in_features=5, context_features=3, out_features=4)
        >>> layer(torch.randn(8, 5), torch.randn(8, 3)).shape
        torch.Size([8, 4])
    """

    __constants__ = ["in_features", "context_features", "out_features"]
    in_features: int
    context_features: int
    out_features: int
    weight: nn.Parameter
    weight_z: nn.Parameter | None
    weight_x: nn.Parameter | None
    bias: nn.Parameter | None

    @keywords_after_first
    def __init__(
        self,
        in_features: int,
        *,
        context_features: int,
        out_features: int,
        bias: bool = True,
        weight_z: bool = True,
        weight_x: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.context_features = context_features
        self.out_features = out_features
        sizes = {name: getattr(self, name) for name in self.__constants__}
        flags = {"bias": bias, "weight_z": weight_z, "weight_x": weight_x}
        check_construction("MultiplicativeInteraction", sizes, flags, device, dtype)
        o, z, x = out_features, context_features, in_features
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight": (o, z, x),
            "weight_z": (o, z) if weight_z else None,
            "weight_x": (o, x) if weight_x else None,
            "bias": (o,) if bias else None,
        }
        parameters(self, shapes, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew from torch's random stream, in the order W, U, V.

        Example:
            >>> mi.nn.MultiplicativeInteraction(5, context_features=3, out_features=4).reset_parameters()
        """
        terms = [term for term in (self.weight, self.weight_z, self.weight_x) if term is not None]
        terms = [term for term in terms if term.numel() > 0]
        for term in terms:
            bound = math.sqrt(3 / (len(terms) * math.prod(term.shape[1:])))
            nn.init.uniform_(term, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, z: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """:func:`mi_kernels.interaction` of x, z and the parameters.

        Args:
            x: ``[..., X]``.
            z: contexts ``[..., Z]``, one per sample or position, as in :mod:`mi_kernels.nn`.

        Returns:
            y ``[..., O]``.

        Example:
            >>> layer = mi.nn.MultiplicativeInteraction(5, context_features=3, out_features=4)
            >>> layer(torch.randn(2, 7, 5), torch.randn(2, 3)).shape
            torch.Size([2, 7, 4])
        """
        z = aligned(type(self).__name__, x, z)
        return call(interaction.interaction, x, z, self.weight, self.weight_z, self.weight_x, self.bias)

    def _parallel_axes(self) -> ModuleAxes:
        names = {"weight": "OZX", "weight_z": "OZ", "weight_x": "OX", "bias": "O"}
        return ModuleAxes(("X", "Z"), "O", given_axes(self, names), "XZ")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, context_features={self.context_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight_z={self.weight_z is not None}, weight_x={self.weight_x is not None}"
        )


class Bilinear(nn.Bilinear):
    r"""Drop-in for :class:`torch.nn.Bilinear`: :math:`y = x_1^T A x_2 + b`.

    Arguments, attributes, initialisation (bit for bit from the same seed) and state dict are those of
    :class:`torch.nn.Bilinear`, of which this is a subclass. Only the computation differs: it is
    :func:`mi_kernels.bilinear`, where leading dimensions broadcast.

    Args:
        in1_features, in2_features, out_features, bias, device, dtype: as :class:`torch.nn.Bilinear`.
        init: ``"torch"`` for PyTorch's initialisation, or ``"unit"`` for outputs of variance 1.

    PyTorch draws A from :math:`(-1/\sqrt{I_1}, 1/\sqrt{I_1})`, as if there were a sum over the first input
    alone: for independent features of unit variance y has variance :math:`I_2 / 3`, a standard deviation of 9
    at 256 features. With ``"unit"`` A is uniform with mean zero and variance :math:`1 / (I_1 I_2)`, and b is
    zero: y has variance 1 for all sizes.

    Shape:
        ``input1 [..., in1_features]`` and ``input2 [..., in2_features]`` give ``[..., out_features]``.

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype: complex parameters
            are not supported.
        ValueError: a size is negative, ``in1_features`` is 0, or ``init`` is neither.
        TypeError, ValueError: see :func:`mi_kernels.bilinear`.

    Source: ``torch.nn.Bilinear``; Jayakumar et al., ICLR 2020, equation 1 without U and V. ``"unit"`` is this
    package's own.

    Example:
        >>> layer = mi.nn.Bilinear(3, 5, 4)
        >>> layer(torch.randn(8, 3), torch.randn(8, 5)).shape
        torch.Size([8, 4])
    """

    weight: nn.Parameter
    init: BilinearInit = "torch"  # also of a layer that mi.convert has made of one of PyTorch's

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: BilinearInit = "torch",
    ) -> None:
        sizes = {"in1_features": in1_features, "in2_features": in2_features, "out_features": out_features}
        check_construction("Bilinear", sizes, {"bias": bias}, device, dtype)
        if not isinstance(init, str) or init not in ("torch", "unit"):
            raise ValueError(f"Bilinear: init: expected one of torch, unit, got {init!r}")
        self.init = init  # before the constructor of nn.Bilinear, which draws the parameters
        super().__init__(in1_features, in2_features, out_features, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Draw the parameters anew from torch's random stream, as ``init`` says.

        Example:
            >>> mi.nn.Bilinear(3, 5, 4).reset_parameters()
        """
        if self.init == "torch":
            return super().reset_parameters()
        draw_uniform(self.weight, self.in1_features * self.in2_features, 1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    if TYPE_CHECKING:

        def __call__(self, input1: Tensor, input2: Tensor) -> Tensor: ...

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """:func:`mi_kernels.bilinear` of the inputs and the parameters.

        Args:
            input1: ``[..., in1_features]``.
            input2: ``[..., in2_features]``; leading dimensions broadcast.

        Returns:
            y ``[..., out_features]``.

        Example:
            >>> layer = mi.nn.Bilinear(3, 5, 4)
            >>> layer(torch.randn(8, 3), torch.randn(8, 5)).shape
            torch.Size([8, 4])
        """
        return call(interaction.bilinear, input1, input2, self.weight, self.bias)

    def _parallel_axes(self) -> ModuleAxes:
        return ModuleAxes(("X", "Z"), "O", given_axes(self, {"weight": "OXZ", "bias": "O"}), "XZ")

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.init == "torch" else f", init={self.init!r}")
