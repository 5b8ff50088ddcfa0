"""Fused kernels for multiplicative interactions, y = z^T W x + U z + V x + b, in PyTorch."""

from mi_kernels import nn
from mi_kernels._version import __version__
from mi_kernels.backends import BackendName, backend
from mi_kernels.functional import bilinear, explain, interaction
from mi_kernels.gating import diagonal, gated_interaction, modulate
from mi_kernels.hyper import apply_generated, generate
from mi_kernels.nn.conversion import convert
from mi_kernels.ops import flops as _flops  # noqa: F401  (registers them)
from mi_kernels.ops.activations import ActivationName
from mi_kernels.ops.interaction.packed import PackedWeight, pack
from mi_kernels.ops.interaction.plan import Plan
from mi_kernels.parallel import sharding as _sharding  # noqa: F401  (registers it)

__all__ = [
    "ActivationName",
    "BackendName",
    "PackedWeight",
    "Plan",
    "__version__",
    "apply_generated",
    "backend",
    "bilinear",
    "convert",
    "diagonal",
    "explain",
    "gated_interaction",
    "generate",
    "interaction",
    "modulate",
    "nn",
    "pack",
]
