"""Layers of MultiBench."""

from collections.abc import Sequence

import torch
from fusions.common_fusions import LowRankTensorFusion, MultiplicativeInteractions2Modal
from torch import Tensor

from ...functional import interaction, low_rank
from ...functional._call import call


class FusedMultiplicativeInteractions2Modal(MultiplicativeInteractions2Modal):
    def forward(self, modalities: Sequence[Tensor], training: bool = False) -> Tensor:  # unused, as there
        """As the layer of the repository, in one pass."""
        if len(modalities) != 2:
            return super().forward(modalities)
        x, z = modalities if self.flip else reversed(modalities)
        if self.flatten:
            z, x = z.flatten(1), x.flatten(1)
        if self.clip is not None:
            z, x = (torch.clip(each, self.clip[0], self.clip[1]) for each in (z, x))
        # W [Z, X, ...], U [Z, ...], V [X, ...], b [...], where the rest counts as O.
        weight, weight_z, weight_x = self.W.flatten(2), self.U.flatten(1), self.V.flatten(1)
        views = weight.permute(2, 0, 1), weight_z.t(), weight_x.t(), self.b.flatten()
        return call(interaction.interaction, x, z, *views).unflatten(-1, self.b.shape)


def _interactions(layer: MultiplicativeInteractions2Modal) -> MultiplicativeInteractions2Modal | str:
    # "vector" as one call of mi.diagonal took 0.8 to 2 times as long (one thread, 64 to 256 features).
    if layer.output not in ("matrix3D", "matrix"):
        return f"its output is {layer.output!r}, where no weight is generated for each sample"
    if not layer.W.is_floating_point():
        return "its parameters are complex"
    layer.__class__ = FusedMultiplicativeInteractions2Modal
    return layer


class FusedLowRankTensorFusion(LowRankTensorFusion):
    """The products of both modalities for each rank are not stored: [rank, B, out] each there."""

    def forward(self, modalities: Sequence[Tensor], training: bool = False) -> Tensor:  # unused, as there
        """As the layer of the repository, without the products for each rank."""
        rows = [each.flatten(1) for each in modalities] if self.flatten else modalities
        if len(rows) != 2 or len(self.factors) != 2 or not _pays(self, *rows):
            return super().forward(modalities)
        z, x = (torch.cat((each.new_ones(len(each), 1), each), 1) for each in rows)
        factor_z, factor_x = (factor.mT for factor in self.factors)  # [rank, out, features + 1]
        weights = self.fusion_weights.view(-1, 1, 1)  # of the ranks: into the smaller one of the factors
        if factor_z.numel() < factor_x.numel():
            factor_z = weights * factor_z
        else:
            factor_x = weights * factor_x
        return call(low_rank.low_rank, x, z, factor_x, factor_z, bias=self.fusion_bias)


def _pays(layer: LowRankTensorFusion, z: Tensor, x: Tensor) -> bool:
    """Whether rows [B, ...] pay for copies of the factors, whose layout no product can read.

    One thread, 35 to 300 features: where both hold, 0.2 to 0.7 times as long in inference and 0.4 to 1.0 in
    training. With products of half that size, or fewer rows, 0.7 to 1.0 and 0.9 to 1.3.
    """
    if not z.dim() == x.dim() == 2:
        return False
    products = len(x) * layer.fusion_weights.numel() * layer.fusion_bias.numel()
    return products >= 2**21 and len(x) >= 6 * (z.shape[1] + x.shape[1])


def _low_rank(layer: LowRankTensorFusion) -> LowRankTensorFusion | str:
    if len(layer.factors) != 2:
        return f"it has {len(layer.factors)} modalities, not two"
    if not layer.fusion_weights.is_floating_point():
        return "its parameters are complex"
    layer.__class__ = FusedLowRankTensorFusion
    return layer


RULES = {MultiplicativeInteractions2Modal: _interactions, LowRankTensorFusion: _low_rank}
