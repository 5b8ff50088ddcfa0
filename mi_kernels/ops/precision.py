"""What float32 products are computed in, on every GPU backend: PyTorch's own setting decides."""

import torch

from mi_kernels.ops.library import LIBRARY


def precision(dtype: torch.dtype) -> str:
    """``"tf32"`` where PyTorch's own float32 products on GPUs may use it, else ``"ieee"``."""
    asked = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if asked and has_tf32() else "ieee"


def has_tf32() -> bool:
    """Not GPUs of AMD, most of which have no such products."""
    return torch.version.hip is None


# The CUDA library asks for it when it runs, as its ABI does not have the setting.
LIBRARY.define("tf32_allowed() -> bool")
LIBRARY.impl("tf32_allowed", lambda: precision(torch.float32) == "tf32", "CompositeExplicitAutograd")
