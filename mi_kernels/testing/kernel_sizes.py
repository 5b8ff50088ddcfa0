"""Sizes that together reach every CUDA kernel of the dense interaction.

The kernel of a call depends on its sizes and dtype, on the GPU and on the terms that are present. These sizes
are for compute capability 9.0 and 132 multiprocessors (H100 SXM, H200), with contiguous W, U, V and c.
"""

from typing import NamedTuple

PROCESSORS = 132
HALF = ("bfloat16", "float16")
EVERY = ("float64", "float32", *HALF)


class KernelSize(NamedTuple):
    name: str
    sizes: tuple[int, int, int, int, int]  # G, B, Z, X, O
    kernel: tuple[int, int, int] | None  # outputs of a tile, cluster, split; None: not the sm_90a engine
    dtypes: tuple[str, ...]

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def gradients(self) -> bool:
        """Whether z x of all rows is small enough for a reference that materialises it in float64."""
        groups, rows, context, width, _ = self.sizes
        return groups * rows * context * width <= 1 << 24


# Tiles of 256 outputs exist in bfloat16 only. Z is always a multiple of 8: otherwise the rows of z and U are
# not 16-byte aligned, and the mma engine is used.
SM90 = (
    KernelSize("64x1", (1, 64, 8, 64, 32), (64, 1, 1), HALF),
    KernelSize("64x2", (1, 200, 8, 64, 32), (64, 2, 1), HALF),
    KernelSize("64 split 2", (40, 64, 16, 128, 32), (64, 1, 2), HALF),
    KernelSize("64 split 4", (3, 1000, 16, 128, 32), (64, 1, 4), HALF),
    KernelSize("64 split 8", (1, 64, 16, 128, 32), (64, 1, 8), HALF),
    KernelSize("128x1", (40, 64, 8, 64, 200), (128, 1, 1), HALF),
    KernelSize("128x2", (3, 300, 8, 64, 1024), (128, 2, 1), HALF),
    KernelSize("128 split 2", (40, 64, 64, 512, 128), (128, 1, 2), HALF),
    KernelSize("128 split 4", (3, 300, 64, 512, 200), (128, 1, 4), HALF),
    KernelSize("256x1", (66, 64, 8, 64, 1024), (256, 1, 1), ("bfloat16",)),
    KernelSize("256x2", (1, 16384, 8, 64, 200), (256, 2, 1), ("bfloat16",)),
    KernelSize("many tiles a block", (1, 16384, 32, 256, 256), (128, 2, 1), ("float16",)),
    # 64 pairs of row tiles are fewer than the 66 resident clusters: a block gets several tiles only with more
    # than one column tile.
    KernelSize("many wide tiles a block", (1, 16384, 32, 256, 768), (256, 2, 1), ("bfloat16",)),
    KernelSize("ragged tails", (2, 777, 24, 200, 264), (64, 2, 1), HALF),
    KernelSize("element-wise store", (1, 300, 16, 64, 77), (64, 2, 1), HALF),
)

# The mma engine and, for up to 4 rows in 16 bits and 8 otherwise, the small-batch kernels. X < 48 or O < 32
# excludes the sm_90a engine.
MMA = (
    KernelSize("tile", (1, 300, 5, 40, 150), None, EVERY),
    KernelSize("odd", (2, 131, 7, 33, 65), None, EVERY),
    KernelSize("many rows", (1, 4096, 8, 40, 64), None, EVERY),
    # In float16 the products z x are computed in float32 for a short X, and per context feature otherwise.
    KernelSize("short x", (1, 300, 9, 13, 70), None, EVERY),
    KernelSize("few", (1, 3, 16, 64, 48), None, EVERY),
    KernelSize("one", (1, 1, 64, 256, 96), None, EVERY),
    KernelSize("one output", (1, 512, 64, 64, 1), None, EVERY),
)
