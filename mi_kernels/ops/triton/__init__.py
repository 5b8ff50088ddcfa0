"""The Triton kernels: one main loop, the choice of tiles, launches, and the families built on them.

Compiled ahead of time for many GPUs and run in Triton's interpreter; not yet run on a GPU.
"""

import os


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
