"""Gates and modulation as modules. Over 400 lines, most of them docstrings."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..functional import gates, interaction
from ..functional._call import call
from ..ops import activations
from ..ops.activations import ActivationName, ElementwiseName
from ..ops.autocast import dtype_in_force
from ..ops.checks import broadcast, check_activation, check_number, check_tensors
from ..ops.dtypes import FLOATING
from ..parallel import calls as distributed
from ..parallel.axes import ModuleAxes
from ._contexts import aligned, always_equal, filled, misfit, missing
from ._init import check_construction, draw_uniform, given_axes, keywords_after_first, parameters


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
        ``x [..., X]`` and ``z [..., Z]`` give ``y [..., X]``. Contexts as in :mod:`mi_kernels.nn`:
        ``z [B, Z]`` per sample, ``z [B, T, Z]`` per position.

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

    @keywords_after_first
    def __init__(
        self,
        features: int,
        *,
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
        """Draw the parameters anew from torch's random stream, in the order A, G, C.

        Example:
            >>> mi.nn.DiagonalInteraction(5, context_features=3).reset_parameters()
        """
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
        """The gate and the shift that z makes, applied to x, in one pass.

        Args:
            x: ``[..., X]``.
            z: contexts ``[..., Z]``, one per sample or position, as in :mod:`mi_kernels.nn`.

        Returns:
            y ``[..., X]``.

        Example:
            >>> layer = mi.nn.DiagonalInteraction(5, context_features=3)
            >>> layer(torch.randn(2, 7, 5), torch.randn(2, 3)).shape
            torch.Size([2, 7, 5])
        """
        return call(
            gates.diagonal,
            x,
            aligned(type(self).__name__, x, z),
            self.weight,
            self.bias,
            self.shift_weight,
            self.shift_bias,
            weight_x=self.weight_x,
            activation=self.activation,
            scale_offset=self.scale_offset,
        )

    def _parallel_axes(self) -> ModuleAxes:
        names = {"weight": "OZ", "bias": "O", "shift_weight": "OZ", "shift_bias": "O", "weight_x": "OX"}
        return ModuleAxes(("O" if self.weight_x is None else "X", "Z"), "O", given_axes(self, names))

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
        ``x [B, C, ...]`` (or ``[B, ..., C]``, with ``channel_dim=-1``) and ``z [..., Z]`` give ``y`` as x.
        Contexts as in :mod:`mi_kernels.nn`: ``z [B, Z]`` per sample, ``z [B, T, Z]`` per position, where the
        leading dimensions of x are all but its channels. Also a single sample, ``x [C, ...]`` (or
        ``[..., C]``) with ``z [Z]``.

    Attributes:
        weight: M of shape ``[2C, Z]``, the rows of gamma first.
        bias: m of shape ``[2C]``, or None.

    The parameters are initialised to zero: with s = 1 and act the identity, y = x.

    z has the dtype of the parameters (under autocast any floating-point one). x may have another: y has the
    dtype that :func:`mi_kernels.modulate` gives it.

    Raises:
        TypeError: an argument has a wrong type, ``dtype`` is no floating-point dtype, x or z is no dense
            tensor of a floating-point dtype, or z not of that of the parameters.
        ValueError: a size is negative, the activation is unknown or softmax, ``channel_dim`` is neither 1 nor
            -1, the shapes or devices of x and z do not fit, or the shapes fit in two ways that differ.

    Source: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.

    Example:
        >>> layer = mi.nn.FiLM(5, context_features=3)
        >>> layer(torch.randn(8, 5, 6, 6), torch.randn(8, 3)).shape
        torch.Size([8, 5, 6, 6])
    """

    __constants__ = ["features", "context_features", "channel_dim"]
    features: int
    context_features: int
    channel_dim: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    @keywords_after_first
    def __init__(
        self,
        features: int,
        *,
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
        """Set all parameters to zero.

        Example:
            >>> mi.nn.FiLM(5, context_features=3).reset_parameters()
        """
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, z: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Modulate the channels of x by the context.

        Args:
            x: ``[B, X]`` or feature maps ``[B, X, ...]``, channels as the class says.
            z: contexts ``[..., Z]``.

        Returns:
            y of the shape of x.

        Example:
            >>> film = mi.nn.FiLM(features=4, context_features=3)
            >>> film(torch.randn(2, 4, 8, 8), torch.randn(2, 3)).shape
            torch.Size([2, 4, 8, 8])
        """
        batched, count = self._check(x, z)
        scale, shift = self._modulation(x, z, batched, count)
        return call(
            gates.modulate, x, scale, shift, activation=self.activation, scale_offset=self.scale_offset
        )

    def _modulation(self, x: Tensor, z: Tensor, batched: bool, count: int) -> Sequence[Tensor]:
        """Scale and shift as views that broadcast with x."""
        if distributed.given(self.weight):
            return self._modulation_on_parts(x, z, batched, count)
        both = filled(nn.functional.linear(z, self.weight, self.bias), count)  # [..., 2C]
        dim = -1
        if self.channel_dim == 1 and z.dim() > 1:
            both, dim = both.movedim(-1, 1), 1
        elif self.channel_dim == 1:
            dim = 0
            for _ in range(x.dim() - (2 if batched else 1)):
                both = both.unsqueeze(-1)
        return both.chunk(2, dim)

    def _modulation_on_parts(self, x: Tensor, z: Tensor, batched: bool, count: int) -> Sequence[Tensor]:
        """The same with a product for each half of a packed DTensor, which may be sharded each."""
        weights = distributed.halves(self.weight)
        biases = (None, None) if self.bias is None else distributed.halves(self.bias)
        found = []
        for weight, bias in zip(weights, biases, strict=True):
            half = filled(interaction.interaction(z, z, None, weight, None, bias), count)
            if self.channel_dim == 1 and z.dim() > 1:
                half = half.movedim(-1, 1)
            elif self.channel_dim == 1:
                half = half.reshape(*half.shape, *(1,) * (x.dim() - (2 if batched else 1)))
            found.append(half)
        return found

    def _parallel_axes(self) -> ModuleAxes:
        parameters = {"weight": "CZ"} | ({} if self.bias is None else {"bias": "C"})
        dim = self.channel_dim
        return ModuleAxes(("C", "Z"), "C", parameters, "", tuple(parameters), (dim, -1), dim)

    def _check(self, x: Tensor, z: Tensor) -> tuple[bool, int]:
        """Whether x has samples before its channels, and how many dimensions z lacks."""
        if dtype_in_force(self.weight.device.type) is None:
            check_tensors("FiLM", ("weight", "z"), (self.weight, z), 2, FLOATING)
        else:  # autocast casts to a common dtype
            check_tensors("FiLM", ("z",), (z,), 1, FLOATING)
        check_tensors("FiLM", ("x",), (x,), 1, FLOATING)  # modulation takes any floating-point dtype
        if x.device != self.weight.device:
            raise ValueError(
                f"FiLM: x: expected device {self.weight.device} (that of weight), got {x.device}"
            )
        batched = self._is_batched(x, z)
        if z.dim() == 0 or z.shape[-1] != self.context_features:
            raise ValueError(f"FiLM: z: expected shape [..., Z={self.context_features}], got {list(z.shape)}")
        if z.dim() == 1:
            return batched, 0
        lead = (x.shape[0], *x.shape[2:]) if self.channel_dim == 1 else x.shape[:-1]
        # With the channels in between, PyTorch would broadcast z with the positions of no x.
        count = missing("FiLM", lead, z, by_last=self.channel_dim == -1)
        if z.dim() > len(lead) + 1 or (count == 0 and broadcast(torch.Size(lead), z.shape[:-1]) is None):
            raise misfit("FiLM", lead, z)
        return batched, count

    def _is_batched(self, x: Tensor, z: Tensor) -> bool:
        """Whether the channels of x are in ``channel_dim``; with one context, x may be a single sample."""
        size, axis = self.features, self.channel_dim
        batched = x.dim() > max(axis, 0) and x.shape[axis] == size
        single = axis == 1 and z.dim() == 1 and x.dim() > 0 and always_equal(x.shape[0], size)
        if batched and single and size != 1:
            raise ValueError(
                f"FiLM: x: expected size {size}, that of the channels, in dimension 0 (a single sample) or in"
                f" dimension 1, got {list(x.shape)}, which has both: pass x.unsqueeze(0) for a single sample,"
                " z.unsqueeze(0) for one context of all samples"
            )
        if not batched and not single:
            where = (
                "dimension 1 (channel_dim=1; channel_dim=-1 takes channels from the last)"
                if axis == 1
                else "the last dimension (channel_dim=-1; channel_dim=1 takes channels from dimension 1)"
            )
            raise ValueError(f"FiLM: x: expected size {size} in {where}, got shape {list(x.shape)}")
        return batched

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
        ``x [..., X]`` and ``z [..., Z]`` give ``y [..., X]``. Contexts as in :mod:`mi_kernels.nn`:
        ``z [B, Z]`` per sample, ``z [B, T, Z]`` per position.

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

    @keywords_after_first
    def __init__(
        self,
        features: int,
        *,
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
        """Draw the parameters anew from torch's random stream, in the order W, U, V.

        Example:
            >>> mi.nn.GatedInteraction(5, context_features=3).reset_parameters()
        """
        terms = [t for t in (self.weight, self.weight_z, self.weight_x) if t is not None and t.numel() > 0]
        for term in terms:
            draw_uniform(term, math.prod(term.shape[1:]), len(terms))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, z: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The mask that x and z make, applied to x.

        Args:
            x: ``[..., X]``.
            z: contexts ``[..., Z]``, one per sample or position, as in :mod:`mi_kernels.nn`.

        Returns:
            y ``[..., X]``.

        Example:
            >>> layer = mi.nn.GatedInteraction(5, context_features=3)
            >>> layer(torch.randn(2, 7, 5), torch.randn(2, 3)).shape
            torch.Size([2, 7, 5])
        """
        return call(
            gates.gated_interaction,
            x,
            aligned(type(self).__name__, x, z),
            self.weight,
            self.weight_z,
            self.weight_x,
            self.bias,
            activation=self.activation,
        )

    def _parallel_axes(self) -> ModuleAxes:
        names = {"weight": "OZX", "weight_z": "OZ", "weight_x": "OX", "bias": "O"}
        return ModuleAxes(("X", "Z"), "O", given_axes(self, names))

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, context_features={self.context_features}, "
            f"bias={self.bias is not None}, weight_z={self.weight_z is not None}, "
            f"weight_x={self.weight_x is not None}, activation={self.activation!r}"
        )
