"""The public functions of the adaptive-norm block: normalisation, modulation, gated residual."""

from mi_kernels.ops.norm import schema  # noqa: F401  (defines the operations)
from mi_kernels.ops.norm.reference import gated_residual, gated_residual_norm_modulate, norm_modulate

__all__ = ["gated_residual", "gated_residual_norm_modulate", "norm_modulate"]
