"""Fused kernels for multiplicative interactions, y = z^T W x + U z + V x + b, in PyTorch."""

from mi_kernels import nn
from mi_kernels._version import __version__
from mi_kernels.backends import BackendName, backend
from mi_kernels.explain import explain
from mi_kernels.functional.biaffine import biaffine
from mi_kernels.functional.gates import diagonal, gated_interaction, modulate
from mi_kernels.functional.glu import glu
from mi_kernels.functional.heads import HeadPart, split_head
from mi_kernels.functional.hyper import apply_generated, apply_low_rank, generate
from mi_kernels.functional.interaction import bilinear, interaction, pack
from mi_kernels.functional.low_rank import low_rank
from mi_kernels.functional.mix import mix
from mi_kernels.functional.norms import gated_residual, gated_residual_norm_modulate, norm_modulate
from mi_kernels.functional.recurrent import RecurrentName, multiplicative_rnn
from mi_kernels.nn.convert import conversion_report, convert
from mi_kernels.nn.report import ConversionReport
from mi_kernels.ops import flops as _flops
from mi_kernels.ops.activations import ActivationName
from mi_kernels.ops.interaction.packed_weight import PackedWeight
from mi_kernels.ops.plan import Plan
from mi_kernels.parallel import sharding as _sharding

_flops.register()
_sharding.register()

__all__ = [
    "ActivationName",
    "BackendName",
    "ConversionReport",
    "HeadPart",
    "PackedWeight",
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
    "split_head",
]
