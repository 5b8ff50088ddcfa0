"""Pictures of results: bars for each shape, a roofline, and the cost as each size grows."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from benchmarks.harness import summary

OURS, RIVAL, GEMM = "#1b6ca8", "#d1495b", "#8d99ae"
PALETTE = (OURS, RIVAL, "#edae49", "#66a182", "#9b5de5", "#00798c", "#7f5539", "#f15bb5")
MARKERS = "osD^vP*X"


def draw(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Writes every picture that the results have data for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    plain = [case for case in result["cases"] if "sweep" not in case]
    swept = [case for case in result["cases"] if "sweep" in case]
    for dtype, work, cases in summary.groups(plain):
        paths.append(folder / f"{stem}-bars-{dtype}-{work.replace('+', '-')}.png")
        _save(_bars(cases, f"{dtype}, {work}"), paths[-1])
    single = [case for case in plain if case["pass"] != "double-backward"]
    for dtype in dict.fromkeys(case["dtype"] for case in single):
        paths.append(folder / f"{stem}-roofline-{dtype}.png")
        cases = [case for case in single if case["dtype"] == dtype]
        _save(_roofline(cases, result["ceilings"], dtype), paths[-1])
    for dtype, work, cases in summary.groups(swept):
        paths.append(folder / f"{stem}-sweep-{dtype}-{work.replace('+', '-')}.png")
        _save(_sweep(cases, f"{dtype}, {work}"), paths[-1])
    return paths


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _bars(cases: list[summary.Case], title: str):
    """Two bars a shape, on a logarithmic axis that starts at 1: to the right ours is faster."""
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.42 * len(cases)), layout="constrained")
    series = (("rival", "best rival / ours", OURS, -0.2), ("fastest gemm", "fastest GEMM / ours", GEMM, 0.2))
    values = []
    for key, label, colour, shift in series:
        for row, case in enumerate(cases):
            value = summary.ratios(case)[key]
            if value is None:
                continue
            values.append(value)
            axis.barh(
                row + shift, value - 1, left=1, height=0.38, color=colour, label=label if row == 0 else None
            )
            side = 4 if value >= 1 else -4
            axis.annotate(
                f"{value:.2f}", (value, row + shift), (side, 0), textcoords="offset points",
                va="center", ha="left" if value >= 1 else "right", fontsize=7,
            )  # fmt: skip
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    low, high = min([1.0, *values]), max([1.0, *values])
    axis.set_xlim(low / 1.5, high * 1.5)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if high / low < 8 else ""))
    axis.tick_params(axis="x", which="both", labelsize=8)
    names = [f"{c['shape']['name']}  ({', '.join(str(c['shape'][k]) for k in 'BZXO')})" for c in cases]
    axis.set_yticks(range(len(cases)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("ratio of times (above 1: ours is faster)")
    axis.set_title(f"{title}: shapes are (B, Z, X, O)", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _roofline(cases: list[summary.Case], ceilings: dict[str, Any], dtype: str):
    """Rate against operations per ideal byte, under the measured copy bandwidth and GEMM rate."""
    groups = [(work, group) for _, work, group in summary.groups(cases)]
    figure, axes = plt.subplots(
        1, len(groups), figsize=(2 + 6 * len(groups), 5.5), sharey=True, squeeze=False, layout="constrained"
    )
    copy, rates = ceilings["copy_bytes_per_s"], ceilings["mm_operations_per_s"]
    peak = max(rate for name, rate in rates.items() if name.split()[0] == dtype)
    names = list(dict.fromkeys(case["shape"]["name"] for case in cases))
    for axis, (work, group) in zip(axes.flat, groups, strict=True):
        x = [case["operations"] / case["bytes"] for case in group]
        y = [case["operations"] / summary.fastest(case, "ours")["median_s"] / 1e9 for case in group]
        low, high, knee = min(x) / 2, max(x) * 2, peak / copy
        roof = [low, knee, high] if low < knee < high else [low, high]
        axis.plot(roof, [min(peak, copy * value) / 1e9 for value in roof], color="black", linewidth=1.2)
        axis.scatter(x, y, s=22, color=OURS, zorder=3)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("operations per byte (operands read once, results written once)")
        axis.set_title(work, fontsize=10)
        axis.grid(which="major", alpha=0.3)
    axes.flat[0].set_ylabel("GFLOP/s")
    figure.canvas.draw()  # the labels are placed in pixels, so the axes must have their final size
    for axis, (_, group) in zip(axes.flat, groups, strict=True):
        _number_points(axis, [str(names.index(case["shape"]["name"]) + 1) for case in group])
    numbered = "\n".join(f"{number}  {name}" for number, name in enumerate(names, 1))
    axes.flat[-1].text(1.03, 1, numbered, transform=axes.flat[-1].transAxes, va="top", fontsize=8)
    figure.suptitle(
        f"Roofline, {dtype}: copy {copy / 1e9:.3g} GB/s, fastest GEMM {peak / 1e9:.4g} GFLOP/s (measured). "
        "Above the slope: from cache",
        fontsize=10,
    )
    return figure


def _number_points(axis, numbers: list[str]) -> None:
    """A number beside each point, in the nearest direction where no point and no other number is."""
    points = axis.transData.transform(axis.collections[0].get_offsets())
    taken = [tuple(point) for point in points]
    ring = [(math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8)]
    for number, (left, up), data in zip(numbers, points, axis.collections[0].get_offsets(), strict=True):
        places = [(left + r * a, up + r * b) for r in (13, 22, 31) for a, b in ring]

        def room(place: tuple[float, float], own: tuple[float, float] = (left, up)) -> float:
            return min((math.dist(place, other) for other in taken if other != own), default=math.inf)

        place = next((place for place in places if room(place) > 13), max(places, key=room))
        taken.append(place)
        axis.annotate(
            number,
            data,
            xytext=axis.transData.inverted().transform(place),
            fontsize=8,
            ha="center",
            va="center",
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none"},
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 3, "shrinkB": 1},
        )


def _sweep(cases: list[summary.Case], title: str):
    """One panel for each size that grows; one line for each candidate."""
    letters = list(dict.fromkeys(case["sweep"] for case in cases))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    names = list(dict.fromkeys(c["name"] for case in cases for c in case["candidates"]))
    for axis, letter in zip(axes.flat, letters, strict=False):
        group = [case for case in cases if case["sweep"] == letter]
        for number, name in enumerate(names):
            found = [(case["shape"][letter], summary.seconds(summary.named(case, name))) for case in group]
            points = [(size, 1e3 * time) for size, time in found if time is not None]
            if points:
                style = _line_style(name, number)
                axis.plot(*zip(*points, strict=True), label=name, markersize=4, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        fixed = {key: group[0]["shape"][key] for key in "BZXO" if key != letter}
        axis.set_title(", ".join(f"{key} = {size}" for key, size in fixed.items()), fontsize=9)
        axis.set_xlabel(letter)
        axis.set_ylabel("time of a call, ms")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{title}: cost as one size grows", fontsize=11)
    return figure


def _line_style(name: str, number: int) -> dict[str, Any]:
    style = {"marker": MARKERS[number % len(MARKERS)], "linewidth": 2.2 if number == 0 else 1.2}
    if name.startswith("oneDNN"):
        return style | {"color": "black", "linestyle": "-."}
    if name.startswith("mm "):
        return style | {"color": GEMM, "linestyle": ":" if name == "mm [ZX,O]" else "--"}
    return style | {"color": PALETTE[number % len(PALETTE)]}
