"""Layers of pykeen."""

import torch
from pykeen.nn.modules import TuckERInteraction, apply_optional_bn
from pykeen.utils import einsum
from torch import Tensor

from ...functional import interaction
from ...functional._call import call
from ..heads import HOOKS


class FusedTuckERInteraction(TuckERInteraction):
    def forward(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:  # [..., I], [..., J], [..., I]
        """The scores of triples, as the layer of the package returns them."""
        h = self.head_dropout(apply_optional_bn(x=h, batch_norm=self.head_batch_norm))
        core, dropout = self.core_tensor, self.relation_dropout
        if _is_identity(dropout):
            x = call(interaction.interaction, h, r, core.permute(2, 1, 0))
        else:  # in this layout, in which pykeen draws the numbers of the dropout
            generated = dropout(einsum("abc,...b->...ac", core, r))
            x = einsum("...ac,...a->...c", generated, h)
        x = apply_optional_bn(x=x, batch_norm=self.head_relation_batch_norm)
        return _dot(self.head_relation_dropout(x), t)


def _is_identity(dropout: torch.nn.Module) -> bool:
    if type(dropout) is not torch.nn.Dropout or (dropout.training and dropout.p > 0):
        return False
    return "forward" not in vars(dropout) and not any(getattr(dropout, name) for name in HOOKS)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sums of products of two tensors whose leading dimensions broadcast."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    if a.shape != shape and b.shape != shape:  # the products would be more than either: a matrix product
        return torch.einsum("...k,...k->...", a, b)
    return (a * b).sum(-1)


def _tucker(layer: TuckERInteraction) -> TuckERInteraction | str:
    if not layer.core_tensor.is_floating_point():
        return "its parameters are complex"
    layer.__class__ = FusedTuckERInteraction
    return layer


RULES = {TuckERInteraction: _tucker}
