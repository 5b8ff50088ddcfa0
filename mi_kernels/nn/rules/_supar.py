"""Layers of supar."""

from supar.modules.affine import Biaffine
from torch import Tensor

from ...functional._call import call
from ...functional.biaffine import biaffine


class FusedBiaffine(Biaffine):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # [B, T, n_in] each
        """As the layer of the package, without copies of the inputs with a one."""
        weight = self.weight  # [n_out, n_in (+ 1), n_in (+ 1)]
        scale = getattr(self, "scale", 0)
        if scale != 0:
            weight = weight / self.n_in**scale
        ones = bool(self.bias_x), bool(self.bias_y)
        scores = call(biaffine, x, y, weight, ones=ones, channels_first=True)  # [B, n_out, T, T]
        return scores.squeeze(1)


def _biaffine(layer: Biaffine) -> Biaffine | str:
    if layer.weight is None or {*layer._parameters, *layer._buffers, *layer._modules} != {"weight"}:
        return "this version of supar's Biaffine has more parts than a weight"
    inside = [layer.n_in + bool(layer.bias_x), layer.n_in + bool(layer.bias_y)]
    if layer.weight.dim() != 3 or list(layer.weight.shape[1:]) != inside:
        return f"its weight is not [n_out, {inside[0]}, {inside[1]}]"
    if not layer.weight.is_floating_point():
        return "its parameters are complex"
    layer.__class__ = FusedBiaffine
    return layer


RULES = {Biaffine: _biaffine}
