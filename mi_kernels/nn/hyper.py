"""Layers whose weights are generated from a context. Over 400 lines, most of them docstrings."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..functional import hyper, interaction
from ..functional._call import call
from ..functional.heads import Order
from ..ops.checks import check_number, check_rank, check_tensors
from ..parallel.axes import ModuleAxes
from ._as_called import as_called
from ._contexts import aligned, aligned_layers
from ._init import (
    check_construction,
    check_function,
    check_module,
    draw_uniform,
    given_axes,
    keywords_after_first,
    parameters,
)

# Where the bias of a generated layer lies in the output of a head.
BiasPosition = Literal["last", "first"] | None


def context_of(module: nn.Module, z: Any, size: int, x: Any = None) -> Tensor:
    """The context of ``size`` features: z, or the output of the module's context network for z.

    For an input x, one for each of its samples where it has fewer dimensions.
    """
    name, op = "z", type(module).__name__
    network: Any = module.context_network
    if network is not None:
        check_module(op, "context_network", network)  # it may have been set after construction
        name, z = "context_network", network(z)
    if not isinstance(z, Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(z).__name__}")
    # Nested tensors are rejected by the functions, with a better message.
    if not z.is_nested and (z.dim() == 0 or z.shape[-1] != size):
        raise ValueError(f"{op}: {name}: expected shape [..., Z={size}], got {list(z.shape)}")
    return z if x is None else aligned(op, x, z, name)


class BoundLinear(nn.Module):
    r"""Generated layers for fixed contexts: :math:`y = W' x + b'`, one layer for each context.

    Args:
        weight: W' of shape ``[..., O, X]``.
        bias: b' of shape ``[..., O]``, or None.

    Shape:
        ``x [..., X]`` gives ``y [..., O]``. Layers belong to inputs as contexts in :mod:`mi_kernels.nn`:
        ``weight [B, O, X]`` has one per sample of ``x [B, T, X]``, ``weight [B, T, O, X]`` one per position.

    Attributes:
        weight, bias: parameters that do not require grad.

    Raises:
        ValueError: the shapes fit in two ways that differ.
        TypeError, ValueError: see :func:`mi_kernels.apply_generated`.

    Example:
        >>> layer = mi.nn.BoundLinear(weight=torch.randn(2, 4, 5))
        >>> layer(torch.randn(2, 7, 5)).shape
        torch.Size([2, 7, 4])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        check_tensors("BoundLinear", ("weight", "bias"), (weight, bias), 1)
        check_rank("BoundLinear", "weight", weight, 2)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        """Each layer, applied to its inputs.

        Args:
            x: ``[..., X]``.

        Returns:
            y ``[..., O]``.

        Example:
            >>> mi.nn.BoundLinear(torch.randn(2, 4, 5))(torch.randn(2, 7, 5)).shape
            torch.Size([2, 7, 4])
        """
        weight, bias = aligned_layers("BoundLinear", x, self.weight, self.bias)
        return call(hyper.apply_generated, x, weight, bias)

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}, bias={self.bias is not None}"


def bound(weight: Tensor, bias: Tensor | None) -> nn.Linear | BoundLinear:
    """The layer of W' [O, X] and b' [O], or those of W' [..., O, X] and b' [..., O]."""
    if weight.dim() > 2:
        return BoundLinear(weight, bias)
    # One weight on the meta device: avoids the random initialisation of nn.Linear.
    layer = nn.Linear(1, 1, bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


class HyperLinear(nn.Module):
    r"""A linear layer whose weights and bias are generated from a context.

    .. math:: y = W'(z) x + b'(z), \quad W'(z) = z W + V, \quad b'(z) = U z + c

    Args:
        in_features: X, the size of the input.
        out_features: O, the size of the output.
        context_features: Z, the size of the context.
        bias: whether the generated layer has a bias: U and c.
        context_network: any module that computes the context ``[..., Z]`` from the argument of ``forward``.
        gain: factor of the initial W', for inputs that are outputs of an activation.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``x [..., X]`` and ``z [..., Z]`` (or what the context network makes of it) give ``y [..., O]``.
        Contexts as in :mod:`mi_kernels.nn`:
        ``z [B, Z]`` per sample, ``z [B, T, Z]`` per position. With
        ``segment_ids`` as in :func:`mi_kernels.interaction`.

    Attributes:
        weight: W of shape ``[O, Z, X]``.
        weight_z: U of shape ``[O, Z]``, or None.
        weight_x: V of shape ``[O, X]``.
        bias: c of shape ``[O]``, or None.
        context_network: the module, or None.

    Initialisation is hyperfan-in: V and c are zero, W and U are uniform with mean zero and variances

    .. math:: s_W^2 = gain^2 / (k X Z), \quad s_U^2 = 1 / (k Z)

    with k = 2 with a bias and 1 without. For a context of unit variance, W' has variance gain^2 / (k X), and
    for x of unit variance (1 / gain^2 after an activation) y has variance 1: the variance of the input is
    preserved for all sizes.

    :meth:`from_linear` makes the layer of an ``nn.Linear`` that generates weights in existing code.

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size is negative.
        TypeError, ValueError: see :func:`mi_kernels.interaction`.

    Source: Ha et al., "HyperNetworks", ICLR 2017; initialisation: Chang et al., "Principled Weight
    Initialization for Hypernetworks", ICLR 2020.

    Example:
        >>> layer = mi.nn.HyperLinear(5, out_features=4, context_features=3)
        >>> layer(torch.randn(8, 5), torch.randn(8, 3)).shape
        torch.Size([8, 4])
    """

    __constants__ = ["in_features", "out_features", "context_features"]
    in_features: int
    out_features: int
    context_features: int
    weight: nn.Parameter
    weight_z: nn.Parameter | None
    weight_x: nn.Parameter
    bias: nn.Parameter | None

    @keywords_after_first
    def __init__(
        self,
        in_features: int,
        *,
        out_features: int,
        context_features: int,
        bias: bool = True,
        context_network: nn.Module | None = None,
        gain: float = 1.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.context_features = context_features
        self.gain = gain
        sizes = {name: getattr(self, name) for name in self.__constants__}
        check_construction("HyperLinear", sizes, {"bias": bias}, device, dtype)
        check_number("HyperLinear", "gain", gain)
        check_module("HyperLinear", "context_network", context_network)
        o, z, x = out_features, context_features, in_features
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight": (o, z, x),
            "weight_z": (o, z) if bias else None,
            "weight_x": (o, x),
            "bias": (o,) if bias else None,
        }
        parameters(self, shapes, device, dtype)
        self.context_network = context_network
        self.reset_parameters()

    @staticmethod
    def from_linear(
        head: nn.Linear,
        in_features: int,
        out_features: int,
        *,
        order: Order = "out,in",
        bias: BiasPosition = "last",
    ) -> "HyperLinear":
        r"""The layer whose weights existing code generates by an ``nn.Linear``, with the parameters of that.

        Args:
            head: a ``torch.nn.Linear`` of Z inputs and O X + O outputs, or O X without a generated bias; with
                a bias of its own (V and c) or without.
            in_features: X, the size of the input.
            out_features: O, the size of the output.
            order: how W' lies in the output of the head: ``"out,in"`` for ``[O, X]``, as in ``nn.Linear``, or
                ``"in,out"`` for ``[X, O]``, as in ``x @ head(z).view(X, O)``.
            bias: where b' lies in the output of the head: after W' (``"last"``), before it (``"first"``), or
                None without b'.

        Returns:
            A :class:`HyperLinear` that keeps its parameters as the head does. They are the head's: ``weight
            [P, Z]`` and ``bias [P]``, the same objects, so that in the place of the head a model has the same
            state dict, optimiser and weight tying. W, U, V and c, which :meth:`weights` returns, are views of
            them; nothing is copied.

        What the head itself would not say is refused: subclasses of ``nn.Linear`` (quantised, low-rank
        adapters), parametrizations, hooks, a replaced ``forward``, and state besides weight and bias. For
        a generator of several layers the head is the last one; its input is z.

        Raises:
            TypeError: ``head`` is no plain ``torch.nn.Linear`` or its dtype not floating-point, or a size is
                no int.
            ValueError: the shape of the head does not fit, it has hooks or other state, a size is negative,
                or ``order`` or ``bias`` is none of those.

        Source: Gilmer et al., "Neural Message Passing for Quantum Chemistry", ICML 2017 (the edge network);
        Ha et al., "HyperNetworks", ICLR 2017.

        Example:
            >>> head, x, z = torch.nn.Linear(3, 4 * 5 + 4), torch.randn(8, 5), torch.randn(8, 3)
            >>> layer = mi.nn.HyperLinear.from_linear(head, in_features=5, out_features=4)
            >>> generated = head(z)
            >>> y = torch.einsum("boj,bj->bo", generated[:, :20].view(8, 4, 5), x) + generated[:, 20:]
            >>> torch.allclose(layer(x, z), y, atol=1e-5)
            True
        """
        from .heads import HyperLinearHead  # a subclass of this one

        return HyperLinearHead(head, in_features, out_features, order, bias)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """W, U, V and c, as :func:`mi_kernels.interaction` and :func:`mi_kernels.generate` take them.

        Example:
            >>> W, U, V, c = mi.nn.HyperLinear(5, out_features=4, context_features=3).weights()
        """
        return self.weight, self.weight_z, self.weight_x, self.bias

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew from torch's random stream, in the order W, U.

        Example:
            >>> mi.nn.HyperLinear(5, out_features=4, context_features=3).reset_parameters()
        """
        weight, weight_z, weight_x, bias = self.weights()
        terms = 1 if weight_z is None else 2
        draw_uniform(weight, self.in_features * self.context_features, terms, self.gain)
        draw_uniform(weight_z, self.context_features, terms)
        for zero in (weight_x, bias):
            if zero is not None:
                nn.init.zeros_(zero)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, z: Tensor, segment_ids: Tensor | None = None) -> Tensor: ...

    def forward(self, x: Tensor, z: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """The layer that z generates, applied to x, without making it where rows have contexts of their own.

        Args:
            x: ``[..., X]``.
            z: contexts ``[..., Z]`` (or the arguments of the context network), as in :mod:`mi_kernels.nn`.
            segment_ids: see :func:`mi_kernels.interaction`.

        Returns:
            y ``[..., O]``.

        Example:
            >>> layer = mi.nn.HyperLinear(5, out_features=4, context_features=3)
            >>> layer(torch.randn(2, 7, 5), torch.randn(2, 3)).shape
            torch.Size([2, 7, 4])
        """
        z = context_of(self, z, self.context_features, x if segment_ids is None else None)
        return call(interaction.interaction, x, z, *self.weights(), segment_ids=segment_ids)

    @torch.no_grad()
    def bind(self, z: Tensor) -> nn.Linear | BoundLinear:
        """The generated layer of a fixed context, or the layers of several contexts.

        Args:
            z: a context ``[Z]`` (or the corresponding input of the context network), or contexts
                ``[..., Z]``.

        Returns:
            A :class:`torch.nn.Linear` for one context without leading dimensions, else a
            :class:`BoundLinear`, which pairs z with inputs as this layer does. Its weights are copies in the
            dtype of this layer's, also under autocast; they do not require grad and do not follow later
            changes of this layer.

        Raises:
            TypeError: a call of this layer does more than the parameters say, which would be left out: hooks
                (parametrizations and pruning are followed), another ``forward``, a subclass with a forward of
                its own that inherits ``bind``.

        Example:
            >>> mi.nn.HyperLinear(5, out_features=4, context_features=3).bind(torch.randn(3))
            Linear(in_features=5, out_features=4, bias=True)
        """
        with as_called(f"{type(self).__name__}: bind", self, HyperLinear, "bind"):
            weight, bias = hyper.generate(context_of(self, z, self.context_features), *self.weights())
        weight = weight.to(self.weight.dtype).contiguous()
        bias = None if bias is None else bias.to(self.weight.dtype)
        return bound(weight, bias).train(self.training)

    def _parallel_axes(self) -> ModuleAxes:
        names = {"weight": "OZX", "weight_z": "OZ", "weight_x": "OX", "bias": "O"}
        # What a context network takes is not z.
        inputs = ("X", "Z") if self.context_network is None else ("X", "")
        return ModuleAxes(inputs, "O", given_axes(self, names), "XZ" if self.context_network is None else "X")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"context_features={self.context_features}, bias={self.bias is not None}"
        )


class _Elementwise(nn.Module):
    """A function as a module, for nn.Sequential."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function of x, elementwise."""
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


class HyperMLP(nn.Module):
    r"""A multilayer perceptron, all of whose weights and biases are generated from a context.

    Args:
        sizes: X, the widths of the hidden layers, O: at least two.
        context_features: Z, the size of the context.
        activation: an elementwise function between the layers.
        bias: whether the layers have biases.
        context_network: any module that computes the context from the argument of ``forward``, once for all
            layers.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        As :class:`HyperLinear`. Every layer is one call for all samples.

    Attributes:
        layers: an ``nn.ModuleList`` of :class:`HyperLinear`.
        context_network: the module, or None.

    Each layer after the first is initialised with the gain that restores the mean square 1 of its inputs,
    activations of a normal variable (gain 1 for an activation with parameters on the meta device).

    Raises:
        TypeError, ValueError: as :class:`HyperLinear`; there are fewer than two sizes, or the activation
            is not callable.

    Source: as :class:`HyperLinear`.

    Example:
        >>> network = mi.nn.HyperMLP([5, 16, 4], context_features=3)
        >>> network(torch.randn(2, 7, 5), torch.randn(2, 3)).shape
        torch.Size([2, 7, 4])
    """

    @keywords_after_first
    def __init__(
        self,
        sizes: Sequence[int],
        *,
        context_features: int,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        bias: bool = True,
        context_network: nn.Module | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sizes, Sequence):
            raise TypeError(f"HyperMLP: sizes: expected a sequence of int, got {type(sizes).__name__}")
        if len(sizes) < 2:
            raise ValueError(f"HyperMLP: sizes: expected at least 2, got {list(sizes)}")
        named = {f"sizes[{index}]": size for index, size in enumerate(sizes)}
        named["context_features"] = context_features
        check_construction("HyperMLP", named, {"bias": bias}, device, dtype)
        check_function("HyperMLP", "activation", activation)
        check_module("HyperMLP", "context_network", context_network)
        self.activation = activation if isinstance(activation, nn.Module) else _Elementwise(activation)
        gain = _gain(self.activation)
        self.layers = nn.ModuleList(
            HyperLinear(
                width,
                out_features=out,
                context_features=context_features,
                bias=bias,
                gain=gain if number else 1.0,
                device=device,
                dtype=dtype,
            )
            for number, (width, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        )
        self.context_features = context_features
        self.context_network = context_network

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, z: Tensor, segment_ids: Tensor | None = None) -> Tensor: ...

    def forward(self, x: Tensor, z: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """The network that z generates, applied to x.

        Args:
            x: ``[..., X]``.
            z: contexts ``[..., Z]`` (or the arguments of the context network), as in :mod:`mi_kernels.nn`.
            segment_ids: see :func:`mi_kernels.interaction`.

        Returns:
            y ``[..., O]``.

        Example:
            >>> network = mi.nn.HyperMLP([5, 16, 4], context_features=3)
            >>> network(torch.randn(2, 7, 5), torch.randn(2, 3)).shape
            torch.Size([2, 7, 4])
        """
        z = context_of(self, z, self.context_features, x if segment_ids is None else None)
        for number, layer in enumerate(self.layers):
            x = layer(self.activation(x) if number else x, z, segment_ids)
        return x

    @torch.no_grad()
    def bind(self, z: Tensor) -> nn.Sequential:
        """The network for fixed contexts, with layers as returned by :meth:`HyperLinear.bind`.

        The activation is copied, too: the two networks share no state.

        Raises:
            TypeError: as :meth:`HyperLinear.bind`, for this module and each of its layers.

        Example:
            >>> network = mi.nn.HyperMLP([5, 16, 4], context_features=3).bind(torch.randn(3))
            >>> network(torch.randn(7, 5)).shape
            torch.Size([7, 4])
        """
        name = f"{type(self).__name__}: bind"
        with as_called(name, self, HyperMLP, "bind"):
            z = context_of(self, z, self.context_features)
        activation = copy.deepcopy(self.activation).requires_grad_(False)
        modules: list[nn.Module] = []
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, HyperLinear):
                raise TypeError(
                    f"{name}: layers.{number}: expected a HyperLinear, got {type(layer).__name__}:"
                    f" merge its own adapter into it first"
                )
            with as_called(f"{name}: layers.{number}", layer, HyperLinear, "bind"):
                pass  # refused with its name here
            modules += [activation, layer.bind(z)] if modules else [layer.bind(z)]
        return nn.Sequential(*modules).train(self.training)


@torch.no_grad()
def _gain(activation: nn.Module) -> float:
    """1 / sqrt(E f(n)^2) for a standard normal n, from 4096 quantiles; 1 if it cannot be computed.

    An activation with parameters is evaluated in their dtype, on their device.
    """
    like = next(activation.parameters(), torch.empty(0, dtype=torch.float64, device="cpu"))
    if like.is_meta:
        return 1.0
    quantiles = (torch.arange(4096, dtype=torch.float64, device="cpu") + 0.5) / 4096
    normal = (math.sqrt(2) * torch.erfinv(2 * quantiles - 1)).to(like)
    mean = activation(normal).double().square().mean().item()
    return mean**-0.5 if mean > 0 and math.isfinite(mean) else 1.0
