"""The precision of float32 products on all GPU backends, by PyTorch's own setting."""

import torch

from .library import LIBRARY


def precision(dtype: torch.dtype) -> str:
    """``"tf32"`` where PyTorch's own float32 products on GPUs may use it, else ``"ieee"``."""
    asked = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if asked and has_tf32() else "ieee"


def has_tf32() -> bool:
    """False on AMD GPUs, most of which have no tf32 products."""
    return torch.version.hip is None


# The CUDA library calls it at run time, as the stable ABI does not expose the setting.
LIBRARY.define("tf32_allowed() -> bool")
LIBRARY.impl("tf32_allowed", lambda: precision(torch.float32) == "tf32", "CompositeExplicitAutograd")
