"""Layers of x_transformers."""

from torch import Tensor
from x_transformers.x_transformers import GLU

from ._gated import gated, why_not


class FusedGLU(GLU):
    def forward(self, x: Tensor) -> Tensor:
        """As the layer of the package, in one pass."""
        y = None
        if getattr(self, "up_softclamp_value", None) is None:
            y = gated(x, self.act, self.proj, gate_first=False)
        if y is None:
            return super().forward(x)
        scale = self.mult_bias  # a parameter, or the number 1
        return y * scale if isinstance(scale, Tensor) else y


def _glu(layer: GLU) -> GLU | str:
    if getattr(layer, "up_softclamp_value", None) is not None:
        return "it clamps gate and value (softclamp)"
    if not isinstance(layer.mult_bias, Tensor) and layer.mult_bias != 1.0:
        return "its mult_bias is a number other than 1"
    reason = why_not(layer.act, layer.proj)
    if reason is None:
        layer.__class__ = FusedGLU
    return reason or layer


RULES = {GLU: _glu}
