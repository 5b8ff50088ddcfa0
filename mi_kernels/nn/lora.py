"""An adapter of low rank (LoRA) whose factors are generated from a context."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional import hyper
from ..functional._call import call
from ..ops.checks import check_number
from ..ops.dtypes import FLOATING, accumulation_dtype
from ._as_called import as_called
from ._init import (
    check_construction,
    check_module,
    draw_uniform,
    keywords_after_first,
    parameters,
)
from .hyper import BoundLinear, bound, context_of

_DENSE = torch.contiguous_format


class HyperLoRA(nn.Module):
    r"""A linear layer with an adapter of low rank, whose factors are generated from a context.

    .. math:: y = W_0 x + b_0 + scale \cdot B(z) A(z) x, \quad A(z) = z W_A + V_A, \quad B(z) = z W_B + V_B

    Args:
        linear: the ``torch.nn.Linear`` that is adapted, W_0 and b_0. It stays as it is, a submodule: frozen
            where its parameters do not require grad.
        context_features: Z, the size of the context.
        rank: R, the rank of the adapter.
        scale: a number; LoRA's is alpha / R.
        context_network: any module that computes the context ``[..., Z]`` from the argument of ``forward``.

    Shape:
        ``x [..., X]`` and ``z [..., Z]`` (or what the context network makes of it) give ``y [..., O]``.
        Contexts as in :mod:`mi_kernels.nn`: ``z [B, Z]`` per sample, ``z [B, T, Z]`` per position. With
        ``segment_ids`` as in :func:`mi_kernels.apply_low_rank`. The factors are generated once for each
        context; none is repeated for the inputs that share it.

    Attributes:
        linear: the layer.
        down_weight: W_A of shape ``[R, Z, X]``.
        down_weight_x: V_A of shape ``[R, X]``.
        up_weight: W_B of shape ``[O, Z, R]``.
        up_weight_x: V_B of shape ``[O, R]``.
        context_network: the module, or None.

    The parameters have the dtype and device of those of ``linear``. At the start W_B and V_B are zero, so
    that y is the output of ``linear``; V_A is zero and W_A uniform with mean zero and variance
    :math:`1 / (XZ)`, so that A x has variance 1 for an input and a context of unit variance.

    Raises:
        TypeError: an argument has a wrong type, or the dtype of ``linear`` is no floating-point dtype.
        ValueError: a size is negative.
        TypeError, ValueError: see :func:`mi_kernels.generate` and :func:`mi_kernels.apply_low_rank`.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; Charakorn et al.,
    "Text-to-LoRA: Instant Transformer Adaption", ICML 2025. The initialisation is that of LoRA, with the one
    of :class:`HyperLinear` for A.

    Example:
        >>> linear = torch.nn.Linear(5, 4)
        >>> layer = mi.nn.HyperLoRA(linear, context_features=3, rank=2)
        >>> x, z = torch.randn(2, 7, 5), torch.randn(2, 3)
        >>> torch.equal(layer(x, z), linear(x))
        True
    """

    __constants__ = ["context_features", "rank"]
    linear: nn.Linear
    context_features: int
    rank: int
    down_weight: nn.Parameter
    down_weight_x: nn.Parameter
    up_weight: nn.Parameter
    up_weight_x: nn.Parameter

    @keywords_after_first
    def __init__(
        self,
        linear: nn.Linear,
        *,
        context_features: int,
        rank: int,
        scale: float = 1.0,
        context_network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check_linear(linear)
        check_construction("HyperLoRA", {"context_features": context_features, "rank": rank}, {}, None, None)
        check_number("HyperLoRA", "scale", scale)
        check_module("HyperLoRA", "context_network", context_network)
        self.linear = linear
        self.context_features = context_features
        self.rank = rank
        self.scale = scale
        o, z, x = linear.out_features, context_features, linear.in_features
        shapes: dict[str, tuple[int, ...] | None] = {
            "down_weight": (rank, z, x),
            "down_weight_x": (rank, x),
            "up_weight": (o, z, rank),
            "up_weight_x": (o, rank),
        }
        parameters(self, shapes, linear.weight.device, linear.weight.dtype)
        self.context_network = context_network
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W_A anew from torch's random stream; the others are zero. ``linear`` is not changed.

        Example:
            >>> mi.nn.HyperLoRA(torch.nn.Linear(5, 4), rank=2, context_features=3).reset_parameters()
        """
        draw_uniform(self.down_weight, self.linear.in_features * self.context_features, 1)
        for zero in (self.down_weight_x, self.up_weight, self.up_weight_x):
            nn.init.zeros_(zero)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, z: Tensor, segment_ids: Tensor | None = None) -> Tensor: ...

    def forward(self, x: Tensor, z: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """The linear layer and the adapter that z generates, for each context.

        Args:
            x: ``[..., X]``.
            z: contexts ``[..., Z]`` (or the arguments of the context network), as in :mod:`mi_kernels.nn`.
            segment_ids: see :func:`mi_kernels.apply_low_rank`.

        Returns:
            y ``[..., O]``.

        Example:
            >>> layer = mi.nn.HyperLoRA(torch.nn.Linear(5, 4), rank=2, context_features=3)
            >>> layer(torch.randn(2, 7, 5), torch.randn(2, 3)).shape
            torch.Size([2, 7, 4])
        """
        z = context_of(self, z, self.context_features, x if segment_ids is None else None)
        down, up = self._factors(z)
        base = self.linear(x)
        return call(hyper.apply_low_rank, x, down, up, base, scale=self.scale, segment_ids=segment_ids)

    def _factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """A [..., R, X] and B [..., O, R]."""
        down, _ = call(hyper.generate, z, self.down_weight, None, self.down_weight_x)
        up, _ = call(hyper.generate, z, self.up_weight, None, self.up_weight_x)
        return down, up

    @torch.no_grad()
    def bind(self, z: Tensor) -> nn.Linear | BoundLinear:
        """The layer with the adapter of a fixed context merged into it, or those of several contexts.

        Args:
            z: a context ``[Z]`` (or the corresponding input of the context network), or contexts
                ``[..., Z]``.

        Returns:
            A :class:`torch.nn.Linear` of W_0 + scale B A and b_0 for one context without leading dimensions,
            else a :class:`BoundLinear` with a whole layer for each context. Its weights are copies in the
            dtype of ``linear``, also under autocast; they do not require grad and do not follow later
            changes.

        Raises:
            TypeError: ``linear`` has been replaced by a layer that computes something else, such as one with
                an adapter of its own; or as :meth:`HyperLinear.bind`, for this module and ``linear``.

        Example:
            >>> layer = mi.nn.HyperLoRA(torch.nn.Linear(5, 4), rank=2, context_features=3)
            >>> layer.bind(torch.randn(3))
            Linear(in_features=5, out_features=4, bias=True)
        """
        name = f"{type(self).__name__}: bind"
        with as_called(name, self, HyperLoRA, "bind"):
            down, up = self._factors(context_of(self, z, self.context_features))
        _check_mergeable(self.linear)
        with as_called(f"{name}: linear", self.linear, nn.Linear):
            weight, bias = _parameters_of(self.linear)
            with torch.autocast(weight.device.type, enabled=False):
                wide = accumulation_dtype(weight.dtype)
                product = up.to(wide) @ down.to(wide)
                merged = product.mul_(self.scale).add_(weight.to(wide)).to(weight.dtype)
            offset = None if bias is None else bias.expand(merged.shape[:-1]).clone(memory_format=_DENSE)
        return bound(merged, offset).train(self.training)

    def extra_repr(self) -> str:
        return f"context_features={self.context_features}, rank={self.rank}, scale={self.scale}"


def _check_mergeable(linear: nn.Module) -> None:
    if getattr(type(linear), "forward", None) is not nn.Linear.forward:
        raise TypeError(
            f"HyperLoRA: bind: linear: expected a layer that computes as torch.nn.Linear, got"
            f" {type(linear).__name__}: merge its own adapter into it first"
        )


def _parameters_of(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """W_0 and b_0, a quantised one restored."""
    weight: Any = linear.weight
    is_quantised = type(weight).dequantize is not Tensor.dequantize
    return weight.dequantize() if is_quantised else weight, linear.bias  # type: ignore[return-value]


def _check_linear(linear: Any) -> None:
    kind = f"the class {linear.__name__}" if isinstance(linear, type) else type(linear).__name__
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"HyperLoRA: linear: expected a torch.nn.Linear, got {kind}")
    if isinstance(linear.weight, nn.parameter.UninitializedParameter):
        raise TypeError(f"HyperLoRA: linear: expected a layer with its parameters, got an empty {kind}")
    if linear.weight.dtype not in FLOATING:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"HyperLoRA: linear: expected a dtype of {known}, got {linear.weight.dtype}")
