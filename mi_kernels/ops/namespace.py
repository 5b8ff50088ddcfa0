"""The namespace of the operations in ``torch.ops``: one of its own for each build that asks for it.

Two builds in one process, as those of a hub of kernels may be, must not define the same operations twice.
"""

import torch

try:
    from .build_facts import NAMESPACE  # written by the build; see CMakeLists.txt
except ImportError:  # nothing was compiled
    NAMESPACE = "mi_kernels"

OPS = getattr(torch.ops, NAMESPACE)
