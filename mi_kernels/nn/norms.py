"""Adaptive norms: normalisation that a context modulates, alone and around the layers of a transformer.

Over 400 lines, most of them docstrings.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import norms
from ..functional._call import call
from ..ops.checks import broadcast, check_number, check_tensors
from ..ops.dtypes import FLOATING
from ._contexts import aligned, filled, misfit, missing
from ._init import check_construction, check_module

Residual = tuple[Tensor, Tensor | None]
Device = torch.device | str | int | None


class _AdaptiveNorm(nn.Module):
    """A linear layer of the context, and a norm that holds parameters: the function computes it."""

    features: int
    context_features: int
    linear: nn.Linear
    norm: nn.LayerNorm | nn.RMSNorm | nn.GroupNorm

    def _set(
        self,
        features: int,
        context_features: int,
        *,
        parts: tuple[str, ...],
        bias: bool,
        silu: bool,
        zero_init: bool,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        self.features = features
        self.context_features = context_features
        self.parts = parts
        self.silu = silu
        self.zero_init = zero_init
        self.linear = nn.Linear(context_features, len(parts) * features, bool(bias), device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the linear layer to zero, or draw it anew from torch's random stream; reset the norm.

        Example:
            >>> mi.nn.AdaLayerNorm(5, context_features=3).reset_parameters()
        """
        _reset(self.linear, self.zero_init)
        self.norm.reset_parameters()

    if TYPE_CHECKING:
        # Which results there are depends on the arguments, here and of the constructor.
        def __call__(self, x: Tensor, z: Tensor, residual: Residual | None = None) -> Any: ...

    def forward(self, x: Tensor, z: Tensor, residual: Residual | None = None) -> Any:
        """The norm of x, modulated by what the context makes; before it the residual, where there is one.

        Args:
            x: ``[..., X]`` (AdaGroupNorm: ``[B, X, ...]``).
            z: contexts ``[..., Z]``.
            residual: a gated residual that the module before has left to this one.

        Returns:
            y of the shape of x; with more than one result as the class says.

        Example:
            >>> norm = mi.nn.AdaLayerNorm(5, context_features=3)
            >>> norm(torch.randn(2, 7, 5), torch.randn(2, 3)).shape
            torch.Size([2, 7, 5])
        """
        op = type(self).__name__
        _check_context(op, z, self.context_features)
        z, dim = self._aligned(op, x, z)
        modulation = self.linear(F.silu(z) if self.silu else z)
        chunks = (modulation if dim < 0 else modulation.movedim(-1, dim)).chunk(len(self.parts), dim)
        found = dict(zip(self.parts, chunks, strict=True))
        given = found["scale"], found.get("shift")
        if residual is None:
            results = [call(norms.norm_modulate, x, *given, **self._options())]
        else:
            h, gate = _pair(op, residual)
            results = [*call(norms.gated_residual_norm_modulate, x, h, gate, *given, **self._options())]
        if "gate" in found:
            results.append(found["gate"])
        return results[0] if len(results) == 1 else tuple(results)

    def _aligned(self, op: str, x: Tensor, z: Tensor) -> tuple[Tensor, int]:
        """z with the dimensions that it lacks, and the channel dimension of x."""
        return aligned(op, x, z), -1

    def _options(self) -> dict[str, Any]:
        norm = self.norm
        options: dict[str, Any] = {
            "weight": norm.weight,
            "bias": getattr(norm, "bias", None),
            "eps": norm.eps,
        }
        if isinstance(norm, nn.GroupNorm):
            return options | {"norm": "group", "groups": norm.num_groups}
        return options | {"norm": "layer" if isinstance(norm, nn.LayerNorm) else "rms"}

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, context_features={self.context_features}, parts={self.parts}, "
            f"silu={self.silu}, zero_init={self.zero_init}"
        )


class AdaLayerNorm(_AdaptiveNorm):
    r"""Layer norm whose scale and shift are made of a context (adaLN).

    .. math:: y = \mathrm{LN}(x) (1 + \gamma) + \beta, \quad (\beta, \gamma, g) = L\,\mathrm{silu}(z) + l

    Args:
        features: C, the size of the input and of the output.
        context_features: Z, the size of the context.
        affine: whether the norm has a weight, and a bias where there is one of the linear layer.
        shift: whether there is a shift beta.
        gate: whether there is a gate g, for the residual that follows (adaLN-Zero).
        scale_first: whether the rows of gamma come before those of beta, as in diffusers' AdaLayerNorm and
            AdaLayerNormContinuous. They come behind in DiT and diffusers' AdaLayerNormZero.
        bias: whether to learn l, and with ``affine`` the bias of the norm.
        silu: whether the linear layer sees silu(z), or z.
        zero_init: whether L and l are zero at the start: y is the norm then, and g is 0.
        eps: added to the variance.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``x [..., C]`` and ``z [..., Z]`` give ``y [..., C]``. Contexts as in :mod:`mi_kernels.nn`:
        ``z [B, Z]`` per sample, ``z [B, T, Z]`` per position. With ``residual=(h, g)``, a layer's output of
        the shape of x and what it is gated with (or None), the norm is that of :math:`x + g \cdot h`, in the
        same pass. The results are, in this order: that sum if there is a ``residual``, y, and the gate if the
        layer has one. One result is no tuple.

    Attributes:
        linear: the ``nn.Linear`` with L and l, of shape ``[kC, Z]`` and ``[kC]`` for k parts.
        norm: an ``nn.LayerNorm``, which holds eps, weight and bias. It is not called.
        parts: the names of the chunks of the linear layer.

    The state dict is that of diffusers' AdaLayerNormContinuous (``affine=True, scale_first=True``),
    AdaLayerNormZeroSingle (``gate=True``) and AdaLayerNorm (``scale_first=True``; without where chunk_dim=1).

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size or eps is negative, the shapes of x and z do not fit, or ``residual`` is no pair.
        TypeError, ValueError: see :func:`mi_kernels.norm_modulate`.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023; Xu et al.,
    "Understanding and Improving Layer Normalization", NeurIPS 2019 (AdaNorm).

    Example:
        >>> layer = mi.nn.AdaLayerNorm(5, context_features=3)
        >>> layer(torch.randn(8, 7, 5), torch.randn(8, 3)).shape
        torch.Size([8, 7, 5])
    """

    def __init__(
        self,
        features: int,
        *,
        context_features: int,
        affine: bool = False,
        shift: bool = True,
        gate: bool = False,
        scale_first: bool = False,
        bias: bool = True,
        silu: bool = True,
        zero_init: bool = True,
        eps: float = 1e-6,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"features": features, "context_features": context_features}
        flags = {"affine": affine, "bias": bias, "silu": silu, "zero_init": zero_init}
        flags |= {"shift": shift, "gate": gate, "scale_first": scale_first}
        check_construction("AdaLayerNorm", sizes, flags, device, dtype)
        _check_eps("AdaLayerNorm", eps)
        self.norm = nn.LayerNorm(features, eps, bool(affine), bool(bias), device, dtype)
        parts = _parts(shift, gate, scale_first)
        options: dict[str, Any] = {"bias": bias, "silu": silu, "zero_init": zero_init}
        self._set(features, context_features, parts=parts, device=device, dtype=dtype, **options)


class AdaRMSNorm(_AdaptiveNorm):
    r"""RMS norm whose scale is made of a context.

    .. math:: y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} w (1 + \gamma) + \beta,
        \quad (\beta, \gamma, g) = L\,\mathrm{silu}(z) + l

    Args:
        features: C, the size of the input and of the output.
        context_features: Z, the size of the context.
        affine: whether the norm has a weight w.
        shift: whether there is a shift beta.
        gate: whether there is a gate g, for the residual that follows.
        scale_first: as of :class:`AdaLayerNorm`.
        bias: whether to learn l.
        silu: whether the linear layer sees silu(z), or z.
        zero_init: whether L and l are zero at the start.
        eps: added to the mean square.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        As of :class:`AdaLayerNorm`.

    Attributes:
        linear: the ``nn.Linear`` with L and l, of shape ``[kC, Z]`` and ``[kC]`` for k parts.
        norm: an ``nn.RMSNorm``, which holds eps and weight. It is not called.
        parts: the names of the chunks of the linear layer.

    The state dict is that of diffusers' AdaLayerNormContinuous with an RMS norm (``shift=True,
    scale_first=True``). Its LuminaRMSNormZero has four chunks, the first two of which are a layer with
    ``gate=True``.

    Raises:
        TypeError, ValueError: as :class:`AdaLayerNorm`.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019; Gao et al.,
    "Lumina-T2X", 2024.

    Example:
        >>> layer = mi.nn.AdaRMSNorm(5, context_features=3)
        >>> layer(torch.randn(8, 7, 5), torch.randn(8, 3)).shape
        torch.Size([8, 7, 5])
    """

    def __init__(
        self,
        features: int,
        *,
        context_features: int,
        affine: bool = True,
        shift: bool = False,
        gate: bool = False,
        scale_first: bool = False,
        bias: bool = True,
        silu: bool = True,
        zero_init: bool = True,
        eps: float = 1e-6,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"features": features, "context_features": context_features}
        flags = {"affine": affine, "bias": bias, "silu": silu, "zero_init": zero_init}
        flags |= {"shift": shift, "gate": gate, "scale_first": scale_first}
        check_construction("AdaRMSNorm", sizes, flags, device, dtype)
        _check_eps("AdaRMSNorm", eps)
        self.norm = nn.RMSNorm(features, eps, bool(affine), device, dtype)
        parts = _parts(shift, gate, scale_first)
        options: dict[str, Any] = {"bias": bias, "silu": silu, "zero_init": zero_init}
        self._set(features, context_features, parts=parts, device=device, dtype=dtype, **options)


class AdaGroupNorm(_AdaptiveNorm):
    r"""Group norm of feature maps whose scale and shift are made of a context.

    .. math:: y_c = \mathrm{GN}(x)_c (1 + \gamma_c) + \beta_c, \quad (\gamma, \beta) = L\,\mathrm{silu}(z) + l

    Args:
        features: C, the number of channels.
        context_features: Z, the size of the context.
        groups: the number of groups of channels; C is that of StyleGAN's AdaIN.
        affine: whether the norm has a weight and a bias, as in guided diffusion.
        shift: whether there is a shift beta.
        scale_first: whether the rows of gamma come before those of beta.
        bias: whether to learn l.
        silu: whether the linear layer sees silu(z), or z; diffusers' AdaGroupNorm sees z unless told.
        zero_init: whether L and l are zero at the start.
        eps: added to the variance.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``x [B, C, ...]`` and ``z [..., Z]`` give ``y`` as x. Contexts as in :mod:`mi_kernels.nn`:
        ``z [B, Z]`` per sample, ``z [B, H, W, Z]`` per position of maps ``[B, C, H, W]``. ``residual`` and
        the results as of :class:`AdaLayerNorm`.

    Attributes:
        linear: the ``nn.Linear`` with L and l, of shape ``[2C, Z]`` and ``[2C]``.
        norm: an ``nn.GroupNorm``, which holds groups, eps, weight and bias. It is not called.
        parts: the names of the chunks of the linear layer.

    The state dict is that of diffusers' AdaGroupNorm.

    Raises:
        TypeError, ValueError: as :class:`AdaLayerNorm`; ``groups`` does not divide C.

    Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021 (AdaGN); Huang
    and Belongie, "Arbitrary Style Transfer in Real-Time with Adaptive Instance Normalization", ICCV 2017.

    Example:
        >>> layer = mi.nn.AdaGroupNorm(6, context_features=3, groups=2)
        >>> layer(torch.randn(8, 6, 4, 4), torch.randn(8, 3)).shape
        torch.Size([8, 6, 4, 4])
    """

    norm: nn.GroupNorm

    def __init__(
        self,
        features: int,
        *,
        context_features: int,
        groups: int,
        affine: bool = False,
        shift: bool = True,
        scale_first: bool = True,
        bias: bool = True,
        silu: bool = True,
        zero_init: bool = True,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"features": features, "context_features": context_features, "groups": groups}
        flags = {"affine": affine, "bias": bias, "silu": silu, "zero_init": zero_init}
        flags |= {"shift": shift, "scale_first": scale_first}
        check_construction("AdaGroupNorm", sizes, flags, device, dtype)
        if groups == 0 or features % groups != 0:
            raise ValueError(f"AdaGroupNorm: groups: expected a divisor of C={features}, got {groups}")
        _check_eps("AdaGroupNorm", eps)
        self.norm = nn.GroupNorm(groups, features, eps, bool(affine), device, dtype)
        parts = _parts(shift, False, scale_first)
        options: dict[str, Any] = {"bias": bias, "silu": silu, "zero_init": zero_init}
        self._set(features, context_features, parts=parts, device=device, dtype=dtype, **options)

    def _aligned(self, op: str, x: Tensor, z: Tensor) -> tuple[Tensor, int]:
        check_tensors(op, ("x",), (x,), 1, FLOATING)
        if x.dim() < 2 or x.shape[1] != self.features:
            raise ValueError(f"{op}: x: expected shape [B, C={self.features}, ...], got {list(x.shape)}")
        lead = (x.shape[0], *x.shape[2:])
        z = z if z.dim() > 1 else z.unsqueeze(0)
        # With the channels in between, PyTorch would broadcast z with the positions of no x.
        count = missing(op, lead, z, by_last=False)
        if z.dim() > len(lead) + 1 or (count == 0 and broadcast(torch.Size(lead), z.shape[:-1]) is None):
            raise misfit(op, lead, z)
        return filled(z, count), 1

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.norm.num_groups}"


class AdaLNZeroBlock(nn.Module):
    r"""A transformer's block with adaptive norms and gated residuals: that of DiT (adaLN-Zero).

    .. math::
        x' &= x + g_1 \cdot \mathrm{attn}(\mathrm{norm}(x) (1 + \gamma_1) + \beta_1) \\
        y &= x' + g_2 \cdot \mathrm{mlp}(\mathrm{norm}(x') (1 + \gamma_2) + \beta_2) \\
        (\beta_1, \gamma_1, g_1, \beta_2, \gamma_2, g_2) &= L\,\mathrm{silu}(z) + l

    The first sum, the norm behind it and its modulation are one pass. So are the last sum of a block and the
    first norm of the next one, where the sum is left to that:

    .. code-block:: python

        residual = None
        for block in blocks:
            x, residual = block(x, z, residual, defer=True)
        x, y = final_norm(x, z, residual)  # an AdaLayerNorm; or x = mi.gated_residual(x, *residual)

    Args:
        attn: any module that computes an output of the shape of its input.
        mlp: another one; without it the block has one residual and L three parts.
        features: C, the size of the input and of the output.
        context_features: Z, the size of the context.
        norm: ``"layer"`` or ``"rms"``; it has no parameters of its own.
        bias: whether to learn l.
        zero_init: whether L and l are zero at the start, so that y = x.
        eps: of the norms.
        device: device of L and l.
        dtype: dtype of L and l, a floating-point one.

    Shape:
        ``x [..., C]`` and ``z [..., Z]`` give ``y [..., C]``. Contexts as in :mod:`mi_kernels.nn`:
        ``z [B, Z]`` per sample, ``z [B, T, Z]`` per position. ``residual=(h, g)`` is added first: the block
        is that of :math:`x + g \cdot h`. With ``defer`` the results are x' and (mlp's output, g_2). Other
        keywords are those of ``attn``.

    Attributes:
        attn: the first module.
        mlp: the second one, or None.
        adaLN_modulation: silu and the ``nn.Linear`` with L and l, of shape ``[6C, Z]`` and ``[6C]``.

    The state dict is that of DiT's block for its attention and MLP.

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size or eps is negative, the norm is unknown, or the shapes of x and z do not fit.
        TypeError, ValueError: see :func:`mi_kernels.gated_residual_norm_modulate`.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023.

    Example:
        >>> mlp = mi.nn.GatedMLP(6, hidden_features=16)
        >>> block = mi.nn.AdaLNZeroBlock(torch.nn.Identity(), mlp, features=6, context_features=3)
        >>> x, z = torch.randn(8, 7, 6), torch.randn(8, 3)
        >>> torch.equal(block(x, z), x)
        True
    """

    def __init__(
        self,
        attn: nn.Module,
        mlp: nn.Module | None = None,
        *,
        features: int,
        context_features: int,
        norm: Literal["layer", "rms"] = "layer",
        bias: bool = True,
        zero_init: bool = True,
        eps: float = 1e-6,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if attn is None:
            raise TypeError("AdaLNZeroBlock: attn: expected a torch.nn.Module, got NoneType")
        check_module("AdaLNZeroBlock", "attn", attn)
        check_module("AdaLNZeroBlock", "mlp", mlp)
        sizes = {"features": features, "context_features": context_features}
        check_construction("AdaLNZeroBlock", sizes, {"bias": bias, "zero_init": zero_init}, device, dtype)
        if not isinstance(norm, str) or norm not in ("layer", "rms"):
            raise ValueError(f"AdaLNZeroBlock: norm: expected one of layer, rms, got {norm!r}")
        _check_eps("AdaLNZeroBlock", eps)
        self.features = features
        self.context_features = context_features
        self.norm = norm
        self.zero_init = zero_init
        self.eps = eps
        self.attn = attn
        self.mlp = mlp
        size = features * (3 if mlp is None else 6)
        linear = nn.Linear(context_features, size, bool(bias), device, dtype)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set L and l to zero, or draw them anew from torch's random stream; attn and mlp are not changed.

        Example:
            >>> mi.nn.AdaLNZeroBlock(torch.nn.Identity(), features=8, context_features=3).reset_parameters()
        """
        linear = self.adaLN_modulation[1]
        assert isinstance(linear, nn.Linear)
        _reset(linear, self.zero_init)

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Tensor,
            z: Tensor,
            residual: Residual | None = None,
            *,
            defer: bool = False,
            **options: Any,
        ) -> Any: ...

    def forward(
        self, x: Tensor, z: Tensor, residual: Residual | None = None, *, defer: bool = False, **options: Any
    ) -> Any:
        """Attention and MLP, each between an adaptive norm and a gated residual.

        Args:
            x: ``[B, T, X]``.
            z: contexts ``[..., Z]``.
            residual: what the block before has left with ``defer``.
            defer: whether to leave the last residual to the norm behind it.
            options: for ``attn``.

        Returns:
            y of the shape of x; with ``defer`` the pair of it and its residual.

        Example:
            >>> attn, mlp = torch.nn.Identity(), torch.nn.Linear(8, 8)
            >>> block = mi.nn.AdaLNZeroBlock(attn, mlp, features=8, context_features=3)
            >>> block(torch.randn(2, 7, 8), torch.randn(2, 3)).shape
            torch.Size([2, 7, 8])
        """
        _check_context("AdaLNZeroBlock", z, self.context_features)
        modulation = self.adaLN_modulation(aligned("AdaLNZeroBlock", x, z))
        shift, scale, gate, *others = modulation.chunk(3 if self.mlp is None else 6, -1)
        kind: dict[str, Any] = {"norm": self.norm, "eps": self.eps}
        if residual is None:
            y = call(norms.norm_modulate, x, scale, shift, **kind)
        else:
            h, before = _pair("AdaLNZeroBlock", residual)
            x, y = call(norms.gated_residual_norm_modulate, x, h, before, scale, shift, **kind)
        h = self.attn(y, **options)
        if self.mlp is not None:
            shift, scale, gate_mlp = others
            x, y = call(norms.gated_residual_norm_modulate, x, h, gate, scale, shift, **kind)
            h, gate = self.mlp(y), gate_mlp
        return (x, (h, gate)) if defer else call(norms.gated_residual, x, h, gate)

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, context_features={self.context_features}, norm={self.norm!r}, "
            f"zero_init={self.zero_init}, eps={self.eps}"
        )


def _parts(shift: bool, gate: bool, scale_first: bool) -> tuple[str, ...]:
    """The names of the linear layer's chunks, in their order."""
    both = ("scale", "shift") if scale_first else ("shift", "scale")
    return (*(both if shift else ("scale",)), *(("gate",) if gate else ()))


def _reset(linear: nn.Linear, zero: bool) -> None:
    if not zero:
        return linear.reset_parameters()
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return None


def _check_context(op: str, z: Tensor, size: int) -> None:
    check_tensors(op, ("z",), (z,), 1, FLOATING)
    if z.dim() == 0 or z.shape[-1] != size:
        raise ValueError(f"{op}: z: expected shape [..., Z={size}], got {list(z.shape)}")


def _pair(op: str, residual: Any) -> Residual:
    if not isinstance(residual, tuple | list):  # a tensor could be unpacked
        raise TypeError(f"{op}: residual: expected a pair (h, gate), got {type(residual).__name__}")
    if len(residual) != 2:
        raise ValueError(f"{op}: residual: expected a pair (h, gate), got {len(residual)} elements")
    return residual[0], residual[1]


def _check_eps(op: str, eps: float) -> None:
    check_number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}: eps: expected a number >= 0, got {eps}")
