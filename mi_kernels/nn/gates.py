"""Gates and modulation as modules."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mi_kernels.functional import gates
from mi_kernels.functional._call import call
from mi_kernels.nn._init import check_construction, draw_uniform, parameters
from mi_kernels.ops import activations
from mi_kernels.ops.activations import ActivationName, ElementwiseName
from mi_kernels.ops.autocast import dtype_in_force
from mi_kernels.ops.checks import check_activation, check_number, check_tensors
from mi_kernels.ops.dtypes import FLOATING


class DiagonalInteraction(nn.Module):
    r"""Gate and shift of an input x by a context z, with learned weights.

    .. math:: y = (\mathrm{act}(z A^T + x G^T + a) + s) \cdot x + (z C^T + c)

    Args:
        features: X, the size of the input and of the output.
        context_features: Z, the size of the context.
        bias: whether to learn a.
        shift: whether to learn C and c.
        weight_x: whether to learn G.
        activation: see :func:`mi_kernels.modulate`.
        scale_offset: s.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``x [..., X]`` and ``z [..., Z]``, whose leading dimensions broadcast, give ``y [..., X]``.

    Attributes:
        weight: A of shape ``[X, Z]``.
        bias: a of shape ``[X]``, or None.
        shift_weight: C of shape ``[X, Z]``, or None.
        shift_bias: c of shape ``[X]``, or None.
        weight_x: G of shape ``[X, X]``, or None.

    A and G are initialised uniformly with mean zero and variances 1/(kZ) and 1/(kX), where k is their number,
    so that the gate before its activation has variance 1 for x and z with features of unit variance; C has
    variance 1/Z, and the biases are 0.

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size is negative, or the activation is unknown.
        TypeError, ValueError: see :func:`mi_kernels.diagonal`.

    Source: Jayakumar et al., "Multiplicative Interactions and Where to Find Them", ICLR 2020. The
    initialisation is this package's own.

    Example:
        >>> layer = mi.nn.DiagonalInteraction(features=5, context_features=3, activation="sigmoid")
        >>> layer(torch.randn(8, 5), torch.randn(8, 3)).shape
        torch.Size([8, 5])
    """

    __constants__ = ["features", "context_features"]
    features: int
    context_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    shift_weight: nn.Parameter | None
    shift_bias: nn.Parameter | None
    weight_x: nn.Parameter | None

    def __init__(
        self,
        features: int,
        context_features: int,
        bias: bool = True,
        shift: bool = True,
        weight_x: bool = False,
        activation: ActivationName = "identity",
        scale_offset: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.context_features = context_features
        self.activation = activation
        self.scale_offset = scale_offset
        sizes = {name: getattr(self, name) for name in self.__constants__}
        flags = {"bias": bias, "shift": shift, "weight_x": weight_x}
        check_construction("DiagonalInteraction", sizes, flags, device, dtype)
        check_activation("DiagonalInteraction", activation, activations.NAMES)
        check_number("DiagonalInteraction", "scale_offset", scale_offset)
        x, z = features, context_features
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight": (x, z),
            "bias": (x,) if bias else None,
            "shift_weight": (x, z) if shift else None,
            "shift_bias": (x,) if shift else None,
            "weight_x": (x, x) if weight_x else None,
        }
        parameters(self, shapes, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew from torch's random stream, in the order A, G, C."""
        terms = 1 if self.weight_x is None else 2
        draw_uniform(self.weight, self.context_features, terms)
        draw_uniform(self.weight_x, self.features, terms)
        draw_uniform(self.shift_weight, self.context_features, 1)
        for bias in (self.bias, self.shift_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, z: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return call(
            gates.diagonal,
            x,
            z,
            self.weight,
            self.bias,
            self.shift_weight,
            self.shift_bias,
            weight_x=self.weight_x,
            activation=self.activation,
            scale_offset=self.scale_offset,
        )

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, context_features={self.context_features}, "
            f"bias={self.bias is not None}, shift={self.shift_weight is not None}, "
            f"weight_x={self.weight_x is not None}, activation={self.activation!r}, "
            f"scale_offset={self.scale_offset}"
        )


class FiLM(nn.Module):
    r"""Feature-wise linear modulation: each channel of x is scaled and shifted as the context determines.

    .. math:: y_c = (\mathrm{act}(\gamma_c) + s) \cdot x_c + \beta_c, \quad (\gamma, \beta) = z M^T + m

    Args:
        features: C, the number of channels.
        context_features: Z, the size of the context.
        bias: whether to learn m.
        activation: see :func:`mi_kernels.modulate`; not softmax.
        scale_offset: s; with 1 the initial layer is the identity.
        channel_dim: the channel dimension of x: 1 for feature maps ``[B, C, H, W]``, -1 for
            tokens ``[B, T, C]``.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``x [B, C, ...]`` (or ``[B, ..., C]``, with ``channel_dim=-1``) and ``z [B, Z]`` give ``y`` as x. All
        dimensions of x but the first and the channels share the context. For one context per frame pass
        ``z [B, T, Z]`` with ``x [B, C, T, ...]`` (or ``[B, T, ..., C]``), and so on: the leading dimensions
        of z are the first dimensions of x without its channels.

    Attributes:
        weight: M of shape ``[2C, Z]``, the rows of gamma first.
        bias: m of shape ``[2C]``, or None.

    The parameters are initialised to zero: with s = 1 and act the identity, y = x.

    Raises:
        TypeError: an argument has a wrong type, ``dtype`` is no floating-point dtype, or x or z no dense
            tensor of the dtype of the parameters (under autocast, of any floating-point dtype).
        ValueError: a size is negative, the activation is unknown or softmax, ``channel_dim`` is neither 1 nor
            -1, or the shapes or devices of x and z do not fit.

    Source: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.

    Example:
        >>> layer = mi.nn.FiLM(5, 3)
        >>> layer(torch.randn(8, 5, 6, 6), torch.randn(8, 3)).shape
        torch.Size([8, 5, 6, 6])
    """

    __constants__ = ["features", "context_features", "channel_dim"]
    features: int
    context_features: int
    channel_dim: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        context_features: int,
        bias: bool = True,
        activation: ElementwiseName = "identity",
        scale_offset: float = 1.0,
        channel_dim: int = 1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"features": features, "context_features": context_features}
        check_construction("FiLM", sizes, {"bias": bias}, device, dtype)
        check_activation("FiLM", activation, tuple(activations.ELEMENTWISE))
        check_number("FiLM", "scale_offset", scale_offset)
        if isinstance(channel_dim, bool) or channel_dim not in (1, -1):
            raise ValueError(f"FiLM: channel_dim: expected 1 or -1, got {channel_dim!r}")
        self.features = features
        self.context_features = context_features
        self.activation = activation
        self.scale_offset = scale_offset
        self.channel_dim = channel_dim
        shapes = {"weight": (2 * features, context_features), "bias": (2 * features,) if bias else None}
        parameters(self, shapes, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all parameters to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, z: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        self._check(x, z)
        scale, shift = nn.functional.linear(z, self.weight, self.bias).chunk(2, -1)
        return call(
            gates.modulate,
            x,
            self._broadcastable(x, scale),
            self._broadcastable(x, shift),
            activation=self.activation,
            scale_offset=self.scale_offset,
        )

    def _broadcastable(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Scale or shift [B, ..., C] as a view that broadcasts with x."""
        ones = (1,) * (x.dim() - modulation.dim())
        if self.channel_dim == 1:
            modulation = modulation.movedim(-1, 1)
            return modulation.view(*modulation.shape, *ones)
        return modulation.view(*modulation.shape[:-1], *ones, modulation.shape[-1])

    def _check(self, x: Tensor, z: Tensor) -> None:
        if dtype_in_force(self.weight.device.type) is not None:
            # Autocast casts to a common dtype.
            check_tensors("FiLM", ("x",), (x,), 1, FLOATING)
            check_tensors("FiLM", ("z",), (z,), 1, FLOATING)
        else:
            check_tensors("FiLM", ("weight", "x", "z"), (self.weight, x, z), 3, FLOATING)
        if x.dim() < 2 or x.shape[self.channel_dim] != self.features:
            where = (
                "dimension 1 (channel_dim=1; channel_dim=-1 takes channels from the last)"
                if self.channel_dim == 1
                else "the last dimension (channel_dim=-1; channel_dim=1 takes channels from dimension 1)"
            )
            raise ValueError(f"FiLM: x: expected size {self.features} in {where}, got shape {list(x.shape)}")
        outer = (x.shape[0], *x.shape[2:]) if self.channel_dim == 1 else x.shape[:-1]
        lead = z.shape[:-1]
        if not lead or lead != outer[: len(lead)] or z.shape[-1] != self.context_features:
            sizes = [f"B={outer[0]}", *map(str, outer[1:])]
            rows = (", ".join(sizes[: index + 1]) for index in range(len(sizes)))
            expected = " or ".join(f"[{row}, Z={self.context_features}]" for row in rows)
            raise ValueError(f"FiLM: z: expected shape {expected}, got {list(z.shape)}")

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, context_features={self.context_features}, "
            f"bias={self.bias is not None}, activation={self.activation!r}, "
            f"scale_offset={self.scale_offset}, channel_dim={self.channel_dim}"
        )


class GatedInteraction(nn.Module):
    r"""Attention over the features of x by a dense interaction with a context z, with learned weights.

    .. math:: y = \mathrm{act}(z^T W x + U z + V x + c) \cdot x

    Args:
        features: X, the size of the input and of the output.
        context_features: Z, the size of the context.
        bias: whether to learn c.
        weight_z: whether to learn U.
        weight_x: whether to learn V.
        activation: see :func:`mi_kernels.modulate`; softmax is over the features.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``x [..., X]`` and ``z [..., Z]``, whose leading dimensions broadcast, give ``y [..., X]``.

    Attributes:
        weight: W of shape ``[X, Z, X]``.
        weight_z: U of shape ``[X, Z]``, or None.
        weight_x: V of shape ``[X, X]``, or None.
        bias: c of shape ``[X]``, or None.

    The parameters are initialised as in :class:`MultiplicativeInteraction`: the gate has variance 1 before
    its activation.

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size is negative, or the activation is unknown.
        TypeError, ValueError: see :func:`mi_kernels.gated_interaction`.

    Source: Jayakumar et al., "Multiplicative Interactions and Where to Find Them", ICLR 2020. The
    initialisation is this package's own.

    Example:
        >>> layer = mi.nn.GatedInteraction(features=5, context_features=3)
        >>> layer(torch.randn(8, 5), torch.randn(8, 3)).shape
        torch.Size([8, 5])
    """

    __constants__ = ["features", "context_features"]
    features: int
    context_features: int
    weight: nn.Parameter
    weight_z: nn.Parameter | None
    weight_x: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        context_features: int,
        bias: bool = True,
        weight_z: bool = True,
        weight_x: bool = True,
        activation: ActivationName = "sigmoid",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.context_features = context_features
        self.activation = activation
        sizes = {name: getattr(self, name) for name in self.__constants__}
        flags = {"bias": bias, "weight_z": weight_z, "weight_x": weight_x}
        check_construction("GatedInteraction", sizes, flags, device, dtype)
        check_activation("GatedInteraction", activation, activations.NAMES)
        x, z = features, context_features
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight": (x, z, x),
            "weight_z": (x, z) if weight_z else None,
            "weight_x": (x, x) if weight_x else None,
            "bias": (x,) if bias else None,
        }
        parameters(self, shapes, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew from torch's random stream, in the order W, U, V."""
        terms = [t for t in (self.weight, self.weight_z, self.weight_x) if t is not None and t.numel() > 0]
        for term in terms:
            draw_uniform(term, math.prod(term.shape[1:]), len(terms))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, z: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return call(
            gates.gated_interaction,
            x,
            z,
            self.weight,
            self.weight_z,
            self.weight_x,
            self.bias,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, context_features={self.context_features}, "
            f"bias={self.bias is not None}, weight_z={self.weight_z is not None}, "
            f"weight_x={self.weight_x is not None}, activation={self.activation!r}"
        )
