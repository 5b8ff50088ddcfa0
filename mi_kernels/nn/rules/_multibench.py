"""Layers of MultiBench."""

from collections.abc import Sequence

import torch
from fusions.common_fusions import MultiplicativeInteractions2Modal
from torch import Tensor

from mi_kernels.functional import gates, interaction
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
        weight, weight_z, weight_x, bias = self.W, self.U, self.V, self.b
        if self.output == "vector":  # W [Z, X], U [Z, X], V [X], b [X]
            return call(gates.diagonal, x, z, weight.t(), weight_x, weight_z.t(), bias)
        # W [Z, X, ...], U [Z, ...], V [X, ...], b [...], where the rest counts as O
        y = call(
            interaction.interaction,
            x,
            z,
            weight.flatten(2).permute(2, 0, 1),
            weight_z.flatten(1).t(),
            weight_x.flatten(1).t(),
            bias.flatten(),
        )
        return y.unflatten(-1, bias.shape)


def _interactions(layer: MultiplicativeInteractions2Modal) -> MultiplicativeInteractions2Modal | str:
    if layer.output not in ("matrix3D", "matrix", "vector"):
        return f"its output is {layer.output!r}, where there is nothing to fuse"
    if not layer.W.is_floating_point():
        return "its parameters are complex"
    layer.__class__ = FusedMultiplicativeInteractions2Modal
    return layer


RULES = {MultiplicativeInteractions2Modal: _interactions}
