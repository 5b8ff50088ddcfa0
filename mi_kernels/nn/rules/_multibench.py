"""Layers of MultiBench."""

from collections.abc import Sequence

import torch
from fusions.common_fusions import MultiplicativeInteractions2Modal
from torch import Tensor

from mi_kernels.functional import interaction
from mi_kernels.functional._call import call


class FusedMultiplicativeInteractions2Modal(MultiplicativeInteractions2Modal):
    def forward(self, modalities: Sequence[Tensor], training: bool = False) -> Tensor:  # unused, as there
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


RULES = {MultiplicativeInteractions2Modal: _interactions}
