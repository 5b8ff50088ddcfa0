"""Layers of timm."""

from timm.layers import activations
from timm.layers.mlp import GluMlp, SwiGLU
from torch import Tensor

from ._gated import gated, of_package, why_not

of_package(
    activations,
    {
        "Swish": "silu",
        "Mish": "mish",
        "Sigmoid": "sigmoid",
        "Tanh": "tanh",
        "HardSwish": "hardswish",
        "HardSigmoid": "hardsigmoid",
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "QuickGELU": "quick_gelu",
    },
)


def _behind(layer: GluMlp | SwiGLU, y: Tensor) -> Tensor:
    return layer.drop2(layer.fc2(layer.norm(layer.drop1(y))))


class FusedGluMlp(GluMlp):
    def forward(self, x: Tensor) -> Tensor:
        """As the layer of the package; one pass for the product and the activation."""
        y = None
        if self.chunk_dim == -1:
            y = gated(x, self.act, self.fc1, gate_first=not self.gate_last)
        return super().forward(x) if y is None else _behind(self, y)


class FusedSwiGLU(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        """As the layer of the package; one pass for the product and the activation."""
        y = gated(x, self.act, self.fc1_g, self.fc1_x)
        return super().forward(x) if y is None else _behind(self, y)


def _glu_mlp(layer: GluMlp) -> GluMlp | str:
    if layer.chunk_dim != -1:
        return "its layers are convolutions (use_conv)"
    reason = why_not(layer.act, layer.fc1)
    if reason is None:
        layer.__class__ = FusedGluMlp
    return reason or layer


def _swiglu(layer: SwiGLU) -> SwiGLU | str:
    reason = why_not(layer.act, layer.fc1_g, layer.fc1_x)
    if reason is None:
        layer.__class__ = FusedSwiGLU
    return reason or layer


RULES = {GluMlp: _glu_mlp, SwiGLU: _swiglu}
