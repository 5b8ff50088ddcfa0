"""Pictures: the plot of a study, an overview of all, and what the plots have in common."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt

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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes from the same figures
    plt.close(figure)


def curves(axes, results: Results, task: str, models: Sequence[str] | None = None) -> None:
    """Medians against steps, and the interval of the median as a band."""
    shown = list(models or results.models(task))
    for model in shown:
        runs = [dict(record.curve) for record in results.of(task, model)]
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        bands = [interval_of_median([run[step] for run in runs]) for step in steps]
        tint = colour(model, shown)
        axes.plot(
            steps,
            [median(run[step] for run in runs) for step in steps],
            color=tint,
            label=model,
            linewidth=1.6,
        )
        axes.fill_between(steps, *zip(*bands, strict=True), color=tint, alpha=0.15, linewidth=0)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
