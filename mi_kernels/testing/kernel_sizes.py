"""Sizes that between them reach every CUDA kernel of the dense interaction: numbers alone.

Which kernel a call takes depends on its sizes and dtype, on the GPU and on which terms there are. These sizes
are for compute capability 9.0 and 132 multiprocessors (H100 SXM, H200), with W, U, V and c, contiguous.
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
        """Whether z x of all rows is small enough for a reference that makes it, in float64 too."""
        groups, rows, context, width, _ = self.sizes
        return groups * rows * context * width <= 1 << 24


# Tiles of 256 outputs exist in bfloat16 alone. Z is a multiple of 8 throughout: with any other Z the rows of
# z and U do not begin on 16-byte boundaries, and the mma engine takes the call.
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
    # 64 pairs of row tiles are fewer than the 66 clusters that run at a time: only with more than one column
    # tile does a block take several.
    KernelSize("many wide tiles a block", (1, 16384, 32, 256, 768), (256, 2, 1), ("bfloat16",)),
    KernelSize("ragged tails", (2, 777, 24, 200, 264), (64, 2, 1), HALF),
    KernelSize("element-wise store", (1, 300, 16, 64, 77), (64, 2, 1), HALF),
)

# The mma engine and, up to 4 rows in 16 bits and 8 otherwise, the kernels of a few rows. The sm_90a engine is
# kept away by X < 48 or O < 32.
MMA = (
    KernelSize("tile", (1, 300, 5, 40, 150), None, EVERY),
    KernelSize("odd", (2, 131, 7, 33, 65), None, EVERY),
    KernelSize("many rows", (1, 4096, 8, 40, 64), None, EVERY),
    # float16 has its products z x made in float32 where X is short, and goes by items otherwise.
    KernelSize("short x", (1, 300, 9, 13, 70), None, EVERY),
    KernelSize("few", (1, 3, 16, 64, 48), None, EVERY),
    KernelSize("one", (1, 1, 64, 256, 96), None, EVERY),
    KernelSize("one output", (1, 512, 64, 64, 1), None, EVERY),
)
