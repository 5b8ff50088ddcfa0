"""The named shapes that are measured, each with where it comes from."""

from collections.abc import Iterator

from benchmarks.harness.measure import Entry
from mi_kernels.testing.samples import Shape


def _entry(name: str, rows: int, context: int, width: int, out: int, origin: str) -> Entry:
    return Entry(Shape(name, (rows,), context, width, out), origin)


FULL = (
    _entry(
        "large-256", 4096, 32, 256, 256, "a 256-wide layer conditioned on a 32-dimensional task embedding"
    ),
    _entry("large-512", 1024, 64, 512, 512, "a 512-wide layer conditioned on a 64-dimensional context"),
    _entry(
        "large-cube", 4096, 128, 128, 128, "two 128-wide streams fused, as in multimodal bilinear pooling"
    ),
    _entry(
        "many-rows", 8192, 16, 64, 64, "a small conditioned layer on every token or every step of a rollout"
    ),
    _entry("batch-1", 1, 256, 256, 512, "inference for one request"),
    _entry("batch-4", 4, 256, 256, 512, "inference for a few requests"),
    _entry("batch-16", 16, 256, 256, 512, "inference for a small batch"),
    _entry("batch-64", 64, 64, 128, 128, "an ordinary minibatch"),
    _entry("one-output", 4096, 64, 64, 1, "a learned similarity x^T W z"),
    _entry("eight-outputs", 2048, 128, 128, 8, "a few relations scored for each pair"),
    _entry("odd", 977, 31, 67, 53, "no size is a multiple of a vector or of a tile"),
    _entry(
        "biaffine-arc",
        1024,
        400,
        400,
        1,
        "biaffine dependency parser: score of an arc (Dozat & Manning 2017)",
    ),
    _entry(
        "biaffine-label",
        1024,
        400,
        400,
        40,
        "biaffine dependency parser: 40 arc labels (Dozat & Manning 2017)",
    ),
    _entry("ntn", 1000, 100, 100, 4, "neural tensor network, d = 100, k = 4 slices (Socher et al. 2013)"),
    _entry("user-10x720", 64, 10, 720, 100, "nn.Bilinear(10, 720, 100) in user code"),
    _entry("user-256x256", 256, 256, 256, 512, "nn.Bilinear(256, 256, 512) in user code"),
    _entry("user-16x16", 256, 16, 16, 32, "nn.Bilinear(16, 16, 32) in user code"),
    _entry(
        "hypernetwork", 32, 64, 512, 512, "a 64-dimensional context generates a 512x512 layer for each row"
    ),
)
# One of each kind: large, many rows, small batch, tiny O, odd sizes, a real layer.
QUICK_NAMES = ("large-256", "many-rows", "batch-4", "one-output", "odd", "user-10x720")
SMOKE = (
    _entry("tiny", 3, 2, 4, 5, "only to see that the benchmarks run"),
    _entry("tiny-odd", 7, 3, 5, 2, "only to see that the benchmarks run"),
    _entry("tiny-row", 1, 4, 3, 6, "only to see that the benchmarks run"),
)
# A GPU is not busy with the shapes above. In the order in which they are measured there: time may run out.
GPU_LARGE = (
    _entry("gpu-512", 16384, 64, 512, 512, "a 512-wide layer conditioned on a 64-dimensional context"),
    _entry("gpu-1024", 16384, 32, 1024, 1024, "a 1024-wide layer conditioned on a 32-dimensional context"),
    _entry("gpu-cube", 32768, 128, 128, 128, "two 128-wide streams fused, at the batch of a GPU"),
    _entry("gpu-256", 65536, 32, 256, 256, "a 256-wide layer conditioned on a 32-dimensional task embedding"),
)
SUITES = {
    "full": FULL,
    "gpu": (*GPU_LARGE, *FULL),
    "quick": tuple(entry for entry in FULL if entry.shape.name in QUICK_NAMES),
    "smoke": SMOKE,
}

# Where the call itself costs more than the arithmetic.
OVERHEAD = (
    _entry("1-2x2x2", 1, 2, 2, 2, "call overhead"),
    _entry("8-4x4x4", 8, 4, 4, 4, "call overhead"),
)

SWEEP_BASE = {"B": 512, "Z": 32, "X": 128, "O": 128}
SWEEP_VALUES = {
    "B": (1, 4, 16, 64, 256, 1024, 4096),
    "Z": (1, 4, 16, 64, 256),
    "X": (4, 16, 64, 256, 1024),
    "O": (1, 4, 16, 64, 256, 1024),
}


def by_name(names: list[str]) -> tuple[Entry, ...]:
    """The entries of any suite with these names, in this order; ValueError for a name that there is not."""
    known = {entry.shape.name: entry for entry in (*FULL, *GPU_LARGE, *SMOKE)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--shape: no shape is called {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[name] for name in names)


def sweep(divisor: int = 1) -> Iterator[tuple[str, Entry]]:
    """(letter, entry): one size grows and the others stay; all sizes divided by ``divisor``, at least 1."""
    for letter, values in SWEEP_VALUES.items():
        fixed = {key: max(1, size // divisor) for key, size in SWEEP_BASE.items()}
        for value in dict.fromkeys(max(1, value // divisor) for value in values):
            sizes = fixed | {letter: value}
            yield letter, _entry(f"{letter}={value}", *sizes.values(), origin=f"cost as {letter} grows")
