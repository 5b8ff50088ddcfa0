"""Pictures of ratios for the documentation, from the recorded runs of drawn shapes.

    python benchmarks/harness/ratios.py

writes docs/images. Each case is a dot: time of its best rival by ours. A picture carries a digest of what it
shows, which a test compares with the results in the repository.
"""

import hashlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import pictures, results  # noqa: E402

FOLDER = ROOT / "docs" / "images"
DIGEST = "Description"  # the field of the PNG's text
FAMILIES = {
    "dense": "dense interaction",
    "gates": "gates, modulation",
    "hyper": "hypernetworks",
    "ragged": "groups of unequal length",
    "biaffine": "all pairs (biaffine)",
    "layouts": "W in other layouts",
}
Record = dict[str, Any]
Row = tuple[str, list[float]]


def records() -> list[Record]:
    paths = sorted(results.FOLDER.glob("*drawn*.json"))
    return [record for path in paths for record in results.read(path)["cases"]]


def rows(found: Sequence[Record], wanted: Callable[[Record], bool], ratio: str = "ratio") -> list[Row]:
    """The ratios of each family, pass and dtype that is wanted, named for a reader."""
    kept = [r for r in found if wanted(r) and r[ratio] is not None]
    order = list(FAMILIES)
    keys = dict.fromkeys((r["family"], r["pass"], r["dtype"]) for r in kept)

    def name(family: str, work: str, dtype: str) -> str:
        return f"{FAMILIES[family]}, {work.replace('+', ' + ')}, {dtype}"

    return [
        (name(*key), [r[ratio] for r in kept if (r["family"], r["pass"], r["dtype"]) == key])
        for key in sorted(keys, key=lambda key: order.index(key[0]))
    ]


def contents() -> Iterator[tuple[str, str, list[Row]]]:
    """File, axis and rows of each picture."""
    found, rivals = records(), "time of the best rival / time of mi_kernels (above 1: mi_kernels is faster)"
    single = "forward+backward"
    speed = rows(found, lambda r: r["pass"] == single or r["family"] == "dense" and r["pass"] == "forward")
    yield "speed.png", rivals, speed
    yield "drawn-dense.png", rivals, rows(found, lambda r: r["family"] == "dense")
    yield "drawn-families.png", rivals, rows(found, lambda r: r["family"] != "dense")
    gemm = "time of torch.mm of equal work, its operand ready-made / time of mi_kernels"
    yield "drawn-mm.png", gemm, rows(found, lambda r: r["family"] == "dense", "mm")


def digest(axis: str, shown: list[Row]) -> str:
    return hashlib.sha256(json.dumps([axis, shown]).encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    """The digest that a picture carries."""
    _, found, rest = path.read_bytes().partition(b"tEXt" + DIGEST.encode() + b"\0")
    return rest[:64].decode() if found else None


def draw(axis_label: str, shown: list[Row]):
    """A line of dots for each row, on a logarithmic axis; losses have another colour."""
    figure, axis = pictures.plt.subplots(figsize=(8.6, 1.2 + 0.29 * len(shown)), layout="constrained")
    for index, (_, values) in enumerate(shown):
        for value in values:
            colour = pictures.OURS if value >= 1 else pictures.RIVAL
            axis.plot(value, index, "o", color=colour, alpha=0.45, markersize=4.5, markeredgewidth=0)
        mean = math.exp(sum(map(math.log, values)) / len(values))
        axis.plot([mean, mean], [index - 0.34, index + 0.34], color="black", linewidth=1.6)
        axis.annotate(
            f"{mean:.2f}", (1.01, index), xycoords=("axes fraction", "data"), fontsize=8, va="center"
        )
    axis.axvline(1, color="black", linewidth=0.7)
    axis.set_xscale("log")
    ticks = [
        tick for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8) if _least(shown) / 1.3 < tick < _most(shown) * 1.3
    ]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(
        axis_label + "\ndots: one shape each, drawn from a seed; bars and numbers: geometric means",
        fontsize=8,
    )
    return figure


def _least(shown: list[Row]) -> float:
    return min(min(values) for _, values in shown)


def _most(shown: list[Row]) -> float:
    return max(max(values) for _, values in shown)


def save(figure, path: Path, text: str) -> None:
    """With few colours: no file in git may be large."""
    written, field = io.BytesIO(), PngImagePlugin.PngInfo()
    figure.savefig(written, dpi=110, facecolor="white")
    pictures.plt.close(figure)
    field.add_text(DIGEST, text)
    Image.open(written).convert("RGB").quantize(48).save(path, optimize=True, pnginfo=field)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, axis, shown in contents():
        save(draw(axis, shown), FOLDER / name, digest(axis, shown))
        print(FOLDER / name)


if __name__ == "__main__":
    main()
