"""Interactions whose W is factorised."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from ..functional import hyper, interaction, low_rank
from ..functional._call import call
from ..ops import activations
from ..ops.activations import ElementwiseName
from ..ops.checks import check_activation, check_tensors
from ..ops.dtypes import FLOATING
from ..parallel.axes import ModuleAxes
from ._as_called import as_called
from ._contexts import aligned
from ._decompose import decompose
from ._init import check_construction, check_size, draw_uniform, given_axes, keywords_after_first, parameters

Core = Literal["cp", "tucker", "blocks"]


class LowRankInteraction(nn.Module):
    r"""Interaction of an input x with a context z, with a factorised W.

    .. math:: y = P h + U z + V x + c

    With :math:`u = f(A x)` and :math:`v = g(C z)`, h is

    * ``core="cp"``: :math:`u * v`, so that :math:`W_{oij} = \sum_r P_{or} C_{ri} A_{rj}` (MLB, DistMult);
    * ``core="tucker"``: :math:`v^T G u` with a core G (MUTAN without its constraint, TuckER);
    * ``core="blocks"``: :math:`v_k^T G_k u_k` of the parts k of u and v, one behind the other (BLOCK).

    Args:
        in_features: X, the size of the input.
        context_features: Z, the size of the context.
        out_features: O, the size of the output.
        rank: R for ``"cp"``; otherwise the sizes of the core (of h, v and u; those of one block), or a number
            for all three.
        core: ``"cp"``, ``"tucker"`` or ``"blocks"``.
        blocks: the number of blocks of ``core="blocks"``.
        bias: whether to learn c.
        weight_z: whether to learn U.
        weight_x: whether to learn V.
        activation_x: f, elementwise; see :func:`mi_kernels.low_rank`.
        activation_z: g, elementwise.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``x [..., X]`` and ``z [..., Z]`` give ``y [..., O]``. Contexts as in :mod:`mi_kernels.nn`:
        ``z [B, Z]`` per sample, ``z [B, T, Z]`` per position.

    Attributes:
        factor_x: A of shape ``[R, X]``; with blocks, of all of them.
        factor_z: C of shape ``[R, Z]``.
        core: G of shape ``[R_h, R_v, R_u]``, with blocks ``[K, R_h, R_v, R_u]``, or None.
        factor_out: P of shape ``[O, R]``.
        weight_z: U of shape ``[O, Z]``, or None.
        weight_x: V of shape ``[O, X]``, or None.
        bias: c of shape ``[O]``, or None.

    Weights are initialised uniformly with mean zero, such that u, v, h (without activations) and y have
    variance 1 for features of unit variance; c is 0.

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size is negative, or ``core`` or an activation is unknown.
        TypeError, ValueError: see :func:`mi_kernels.low_rank`.

    Source: Kim et al., "Hadamard Product for Low-rank Bilinear Pooling", ICLR 2017; Ben-younes et al.,
    "MUTAN", ICCV 2017, and "BLOCK", AAAI 2019. The initialisation is this package's own.

    Example:
        >>> layer = mi.nn.LowRankInteraction(5, context_features=3, out_features=4, rank=8)
        >>> layer(torch.randn(8, 5), torch.randn(8, 3)).shape
        torch.Size([8, 4])
    """

    __constants__ = ["in_features", "context_features", "out_features"]
    in_features: int
    context_features: int
    out_features: int
    factor_x: nn.Parameter
    factor_z: nn.Parameter
    core: nn.Parameter | None
    factor_out: nn.Parameter
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
        rank: int | Sequence[int],
        core: Core = "cp",
        blocks: int = 1,
        bias: bool = True,
        weight_z: bool = False,
        weight_x: bool = False,
        activation_x: ElementwiseName = "identity",
        activation_z: ElementwiseName = "identity",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "LowRankInteraction"
        self.in_features = in_features
        self.context_features = context_features
        self.out_features = out_features
        self.activation_x, self.activation_z = activation_x, activation_z
        sizes = {name: getattr(self, name) for name in self.__constants__}
        flags = {"bias": bias, "weight_z": weight_z, "weight_x": weight_x}
        check_construction(op, sizes, flags, device, dtype)
        check_activation(op, activation_x, activations.ELEMENTWISE, "activation_x")
        check_activation(op, activation_z, activations.ELEMENTWISE, "activation_z")
        self.rank, self.blocks = _checked(op, rank, core, blocks), blocks
        out, context, width = (blocks * each for each in self.rank)
        shapes: dict[str, tuple[int, ...] | None] = {
            "factor_x": (width, in_features),
            "factor_z": (context, context_features),
            "core": None if core == "cp" else self.rank if core == "tucker" else (blocks, *self.rank),
            "factor_out": (out_features, out),
            "weight_z": (out_features, context_features) if weight_z else None,
            "weight_x": (out_features, in_features) if weight_x else None,
            "bias": (out_features,) if bias else None,
        }
        parameters(self, shapes, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew from torch's random stream, in the order A, C, G, P, U, V.

        Example:
            >>> mi.nn.LowRankInteraction(5, context_features=3, out_features=4, rank=2).reset_parameters()
        """
        terms = 1 + (self.weight_z is not None) + (self.weight_x is not None)
        draw_uniform(self.factor_x, self.in_features, 1)
        draw_uniform(self.factor_z, self.context_features, 1)
        draw_uniform(self.core, self.rank[1] * self.rank[2], 1)
        draw_uniform(self.factor_out, self.factor_out.shape[1], terms)
        draw_uniform(self.weight_z, self.context_features, terms)
        draw_uniform(self.weight_x, self.in_features, terms)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        rank: int | Sequence[int],
        *,
        core: Core = "cp",
        blocks: int = 1,
        weight_z: Tensor | None = None,
        weight_x: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> "LowRankInteraction":
        """The layer whose W is nearest to a dense one ``[O, Z, X]``, by alternating least squares.

        ``rank``, ``core`` and ``blocks`` as of the constructor; U, V and c are taken as they are. The result
        is a local minimum for ``"cp"`` and ``"blocks"``, whose best approximation may not exist at all.

        Example:
            >>> mi.nn.LowRankInteraction.from_dense(torch.randn(4, 3, 5), rank=2).to_dense().shape
            torch.Size([4, 3, 5])
        """
        op = "LowRankInteraction.from_dense"
        check_tensors(
            op, ("weight", "weight_z", "weight_x", "bias"), (weight, weight_z, weight_x, bias), 1, FLOATING
        )
        if weight.dim() != 3:
            raise ValueError(f"{op}: weight: expected 3 dimensions [O, Z, X], got {list(weight.shape)}")
        out, context, width = weight.shape
        layer = cls(
            width,
            context_features=context,
            out_features=out,
            rank=rank,
            core=core,
            blocks=blocks,
            bias=bias is not None,
            weight_z=weight_z is not None,
            weight_x=weight_x is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        cp = core == "cp"
        found = decompose(weight, (1, 1, 1) if cp else layer.rank, layer.rank[0] if cp else blocks, cp)
        values = {
            "factor_x": found.factor_x.flatten(0, 1),
            "factor_z": found.factor_z.flatten(0, 1),
            "core": None if cp else found.core[0] if core == "tucker" else found.core,
            "factor_out": found.factor_out.flatten(1),
            "weight_z": weight_z,
            "weight_x": weight_x,
            "bias": bias,
        }
        layer.load_state_dict({name: value for name, value in values.items() if value is not None})
        return layer

    def to_dense(self) -> Tensor:
        """The W of the same layer without factors. Differentiable.

        Returns:
            W ``[O, Z, X]``.

        Raises:
            ValueError: there are activations, with which there is no such W.
            TypeError: a call of this layer does more than the factors say, as for :meth:`HyperLinear.bind`.

        Example:
            >>> mi.nn.LowRankInteraction(5, context_features=3, out_features=4, rank=2).to_dense().shape
            torch.Size([4, 3, 5])
        """
        for name in ("activation_x", "activation_z"):
            if getattr(self, name) != "identity":
                raise ValueError(f"to_dense: {name}: expected identity, got {getattr(self, name)!r}")
        with as_called(f"{type(self).__name__}: to_dense", self, LowRankInteraction, "to_dense"):
            return self._dense()

    def _dense(self) -> Tensor:
        if self.core is None:
            return torch.einsum("or,ri,rj->oij", self.factor_out, self.factor_z, self.factor_x)
        core = self.core.reshape(self.blocks, *self.rank)
        factors = (
            self.factor_out.unflatten(1, (self.blocks, -1)),
            self.factor_z.unflatten(0, (self.blocks, -1)),
            self.factor_x.unflatten(0, (self.blocks, -1)),
        )
        return torch.einsum("oka,kaij,kiz,kjx->ozx", factors[0], core, *factors[1:])

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, z: Tensor) -> Tensor: ...

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """:func:`mi_kernels.low_rank` of x, z and the factors.

        Args:
            x: ``[..., X]``.
            z: contexts ``[..., Z]``, one per sample or position, as in :mod:`mi_kernels.nn`.

        Returns:
            y ``[..., O]``.

        Example:
            >>> layer = mi.nn.LowRankInteraction(5, context_features=3, out_features=4, rank=2)
            >>> layer(torch.randn(2, 7, 5), torch.randn(2, 3)).shape
            torch.Size([2, 7, 4])
        """
        z = aligned(type(self).__name__, x, z)
        terms = self.weight_z, self.weight_x, self.bias
        if self.core is None:
            return call(
                low_rank.low_rank,
                x,
                z,
                self.factor_x,
                self.factor_z,
                self.factor_out,
                *terms,
                activation_x=self.activation_x,
                activation_z=self.activation_z,
            )
        u = activations.value(self.activation_x, call(hyper.apply_generated, x, self.factor_x))
        v = activations.value(self.activation_z, call(hyper.apply_generated, z, self.factor_z))
        if self.core.dim() == 4:
            u, v = u.unflatten(-1, (self.blocks, -1)), v.unflatten(-1, (self.blocks, -1))
            h = call(interaction.interaction, u, v, self.core).flatten(-2)
        else:
            h = call(interaction.interaction, u, v, self.core)
        y = call(interaction.interaction, h, z, None, self.weight_z, self.factor_out, self.bias)
        return y if self.weight_x is None else y + call(hyper.apply_generated, x, self.weight_x)

    def _parallel_axes(self) -> ModuleAxes:
        if self.core is not None:
            raise NotImplementedError('LowRankInteraction: expected core="cp" to shard it, got a core')
        names = {"factor_x": "RX", "factor_z": "RZ", "factor_out": "OR"}
        names |= {"weight_z": "OZ", "weight_x": "OX", "bias": "O"}
        summed = "R" + "X" * (self.activation_x == "identity") + "Z" * (self.activation_z == "identity")
        return ModuleAxes(("X", "Z"), "O", given_axes(self, names), summed)

    def extra_repr(self) -> str:
        core = (
            "cp"
            if self.core is None
            else "tucker"
            if self.core.dim() == 3
            else f"blocks, blocks={self.blocks}"
        )
        return (
            f"in_features={self.in_features}, context_features={self.context_features}, "
            f"out_features={self.out_features}, rank={self.rank if self.core is not None else self.rank[0]}, "
            f"core={core}, bias={self.bias is not None}, weight_z={self.weight_z is not None}, "
            f"weight_x={self.weight_x is not None}, activation_x={self.activation_x!r}, "
            f"activation_z={self.activation_z!r}"
        )


def _checked(op: str, rank: int | Sequence[int], core: str, blocks: int) -> tuple[int, int, int]:
    """The sizes (of h, v, u) of the core, or of one of its blocks."""
    if not isinstance(core, str) or core not in get_args(Core):
        raise ValueError(f"{op}: core: expected one of {', '.join(get_args(Core))}, got {core!r}")
    check_size(op, "blocks", blocks)
    if blocks < 1 or (blocks > 1 and core != "blocks"):
        expected = "at least 1" if core == "blocks" else f"1 with core={core!r}"
        raise ValueError(f"{op}: blocks: expected {expected}, got {blocks}")
    if isinstance(rank, list | tuple):
        if core == "cp" or len(rank) != 3:
            expected = "a number" if core == "cp" else "a number or three"
            raise ValueError(f"{op}: rank: expected {expected} with core={core!r}, got {list(rank)}")
        for size in rank:
            check_size(op, "rank", size)
        return rank[0], rank[1], rank[2]
    check_size(op, "rank", rank)  # type: ignore[arg-type]
    return rank, rank, rank  # type: ignore[return-value]
