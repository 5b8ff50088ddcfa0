"""The biaffine form as a module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..functional import biaffine
from ..functional._call import call
from ..parallel.axes import ModuleAxes
from ._init import check_construction, draw_uniform, given_axes, parameters


class Biaffine(nn.Module):
    r"""Scores of all pairs of two sequences, with learned weights.

    .. math:: y_{lmo} = [x_l; 1]^T W_o [x'_m; 1] + c_o, \quad \text{either 1 being optional}

    Args:
        in1_features: I1, the size of the first input.
        in2_features: I2, the size of the second input.
        out_features: O, the number of scores of a pair.
        ones: whether each input has a constant feature 1 appended; see :func:`mi_kernels.biaffine`.
        bias: whether to learn c; with two ones it is part of W.
        channels_first: the order of the result.
        device: device of the parameters.
        dtype: dtype of the parameters, a floating-point one.

    Shape:
        ``input1 [..., L1, I1]`` and ``input2 [..., L2, I2]``, whose leading dimensions broadcast, give
        ``[..., L1, L2, O]``, or ``[..., O, L1, L2]`` with ``channels_first``.

    Attributes:
        weight: W of shape ``[O, I1, I2]``, with one more row or column for a one: the last.
        bias: c of shape ``[O]``, or None.

    W is uniform with mean zero and variance 1/(I1 I2), ones not counted, its row and column for a one are 0,
    and so is c: y has variance 1 for independent inputs with features of unit variance. (supar begins with W
    = 0; its state dict, ``weight`` alone, can be loaded.)

    Raises:
        TypeError: an argument has a wrong type, or ``dtype`` is no floating-point dtype.
        ValueError: a size is negative.
        TypeError, ValueError: see :func:`mi_kernels.biaffine`.

    Source: Dozat and Manning, "Deep Biaffine Attention for Neural Dependency Parsing", ICLR 2017. The
    initialisation is this package's own.

    Example:
        >>> layer = mi.nn.Biaffine(5, 3, 4)
        >>> layer(torch.randn(2, 7, 5), torch.randn(2, 6, 3)).shape
        torch.Size([2, 7, 6, 4])
    """

    __constants__ = ["in1_features", "in2_features", "out_features", "ones", "channels_first"]
    in1_features: int
    in2_features: int
    out_features: int
    ones: tuple[bool, bool]
    channels_first: bool
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        ones: tuple[bool, bool] = (True, True),
        *,
        bias: bool = False,
        channels_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in1_features": in1_features, "in2_features": in2_features, "out_features": out_features}
        if not isinstance(ones, tuple | list) or len(ones) != 2:
            raise TypeError(f"Biaffine: ones: expected a pair of bools, got {ones!r}")
        flags = {"ones[0]": ones[0], "ones[1]": ones[1], "bias": bias, "channels_first": channels_first}
        check_construction("Biaffine", sizes, flags, device, dtype)
        self.in1_features = in1_features
        self.in2_features = in2_features
        self.out_features = out_features
        self.ones = (bool(ones[0]), bool(ones[1]))
        self.channels_first = bool(channels_first)
        rows, columns = in1_features + self.ones[0], in2_features + self.ones[1]
        shapes = {"weight": (out_features, rows, columns), "bias": (out_features,) if bias else None}
        parameters(self, shapes, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W anew from torch's random stream; what belongs to a one is 0.

        Example:
            >>> mi.nn.Biaffine(5, 3, 4).reset_parameters()
        """
        nn.init.zeros_(self.weight)
        weight = self.weight[:, : self.in1_features, : self.in2_features]
        draw_uniform(weight, self.in1_features * self.in2_features, 1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    if TYPE_CHECKING:

        def __call__(self, input1: Tensor, input2: Tensor) -> Tensor: ...

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """The scores of all pairs of two sequences.

        Args:
            input1: ``[..., L1, X1]``.
            input2: ``[..., L2, X2]``.

        Returns:
            y ``[..., L1, L2, O]``, or ``[..., O, L1, L2]`` with ``channels_first``.

        Example:
            >>> score = mi.nn.Biaffine(5, 3, 4, ones=(True, True))
            >>> score(torch.randn(2, 7, 5), torch.randn(2, 6, 3)).shape
            torch.Size([2, 7, 6, 4])
        """
        return call(
            biaffine.biaffine,
            input1,
            input2,
            self.weight,
            self.bias,
            ones=self.ones,
            channels_first=self.channels_first,
        )

    def _parallel_axes(self) -> ModuleAxes:
        summed = "".join(axis for axis, one in zip("XZ", self.ones, strict=True) if not one)
        names = given_axes(self, {"weight": "OXZ", "bias": "O"})
        return ModuleAxes(("X", "Z"), "O", names, summed, result_dim=-3 if self.channels_first else -1)

    def extra_repr(self) -> str:
        return (
            f"in1_features={self.in1_features}, in2_features={self.in2_features}, "
            f"out_features={self.out_features}, ones={self.ones}, bias={self.bias is not None}, "
            f"channels_first={self.channels_first}"
        )
