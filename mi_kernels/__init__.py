"""Fused kernels for multiplicative interactions, y = z^T W x + U z + V x + b, in PyTorch."""

from . import nn, parallel
from ._version import __version__
from .backends import BackendName, backend
from .explain import explain
from .functional.biaffine import biaffine
from .functional.gates import diagonal, gated_interaction, modulate
from .functional.glu import glu
from .functional.heads import HeadPart, split_head
from .functional.hyper import apply_generated, apply_low_rank, generate
from .functional.interaction import bilinear, interaction, pack
from .functional.low_rank import low_rank
from .functional.mix import mix
from .functional.norms import gated_residual, gated_residual_norm_modulate, norm_modulate
from .functional.recurrent import RecurrentName, multiplicative_rnn
from .nn.convert import conversion_report, convert
from .nn.report import ConversionReport
from .ops import flops as _flops
from .ops.activations import ActivationName
from .ops.interaction.packed_weight import PackedWeight
from .ops.plan import Plan
from .parallel import sharding as _sharding
from .patch import Patch, patch, patched

_flops.register()
_sharding.register()

__all__ = [
    "ActivationName",
    "BackendName",
    "ConversionReport",
    "HeadPart",
    "PackedWeight",
    "Patch",
    "Plan",
    "RecurrentName",
    "__version__",
    "apply_generated",
    "apply_low_rank",
    "backend",
    "biaffine",
    "bilinear",
    "conversion_report",
    "convert",
    "diagonal",
    "explain",
    "gated_interaction",
    "gated_residual",
    "gated_residual_norm_modulate",
    "generate",
    "glu",
    "interaction",
    "low_rank",
    "mix",
    "modulate",
    "multiplicative_rnn",
    "nn",
    "norm_modulate",
    "pack",
    "parallel",
    "patch",
    "patched",
    "split_head",
]
