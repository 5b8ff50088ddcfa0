"""Pictures: the plot of a study, an overview of all, and what the plots have in common."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from studies.core.colours import colour
from studies.core.study import Results, Study, interval_of_median


def draw(study: Study, results: Results, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    study.draw(axes, results)
    axes.set_title(study.title, fontsize=11)
    _save(figure, path)


def overview(found: Sequence[tuple[Study, Results]], path: Path) -> None:
    """The main plots of all studies beside each other."""
    figure, panels = plt.subplots(
        2, math.ceil(len(found) / 2), figsize=(14, 8), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (study, results) in zip(panels.flat, found, strict=False):
        study.draw(axes, results)
        axes.set_title(study.title, fontsize=10)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    """With a palette: lines on white need no more, and the files are kept in git."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    plt.close(figure)
    picture = Image.open(drawn).convert("RGB")
    picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(path, "PNG", optimize=True)


def curves(axes, results: Results, task: str, models: Sequence[str] | None = None) -> None:
    """Medians against steps, and the interval of the median as a band."""
    shown = list(models or results.models(task))
    for model in shown:
        runs = [dict(record.curve) for record in results.of(task, model)]
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        low, high = zip(*(interval_of_median([run[step] for run in runs]) for step in steps), strict=True)
        tint = colour(model, shown)
        axes.plot(
            steps,
            [median(run[step] for run in runs) for step in steps],
            color=tint,
            label=model,
            linewidth=1.6,
        )
        axes.fill_between(steps, low, high, color=tint, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def dots(axes, results: Results) -> None:
    """For each task the median of each model, and the interval of the median as a line."""
    shown = list(dict.fromkeys(model for task in results.tasks for model in results.models(task)))
    for place, model in enumerate(shown):
        shift = 0.7 * (place / max(len(shown) - 1, 1) - 0.5)
        found = [
            (row + shift, task) for row, task in enumerate(results.tasks) if model in results.models(task)
        ]
        middles = [results.median(task, model) for _, task in found]
        bands = [results.interval(task, model) for _, task in found]
        lengths = [(m - low, high - m) for m, (low, high) in zip(middles, bands, strict=True)]
        axes.errorbar(
            [x for x, _ in found], middles, list(zip(*lengths, strict=True)),
            fmt="o", markersize=4, linewidth=1, color=colour(model, shown), label=model,
        )  # fmt: skip
    axes.set_xticks(
        range(len(results.tasks)), [task.replace(", ", "\n") for task in results.tasks], fontsize=8
    )
    axes.legend(fontsize=7)
    axes.grid(axis="y", alpha=0.3)
