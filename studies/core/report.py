"""What a study found, as JSON, as Markdown and as pictures; and docs/studies.md, which gathers all."""

import math
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import results as files
from studies.core.study import Claim, Record, Results, Study, coverage_of, order_of

ROOT = Path(__file__).resolve().parents[2]
SAVED = ROOT / "studies" / "results"
PAGE, PICTURES = ROOT / "docs" / "studies.md", ROOT / "docs" / "studies"
PREFACE = Path(__file__).parent / "preface.md"


def summary(
    study: Study,
    tuning: Sequence[Record],
    records: Sequence[Record],
    seconds: float,
    quick: bool,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The content of a result's file."""
    results = Results(study, records)
    return facts | {
        "study": study.name,
        "quick": quick,
        "minutes": seconds / 60,
        "python": platform.python_version(),
        "claims": [vars(claim) for claim in study.claims(results)],
        "tuning": [_plain(record, curve=False) for record in tuning],
        "records": [_plain(record) for record in records],
    }


def _plain(record: Record, curve: bool = True) -> dict[str, Any]:
    """JSON has no infinity: null stands for a score that is not finite."""
    found = record.as_dict()
    for name in ("score", "validation"):
        found[name] = found[name] if math.isfinite(found[name]) else None
    found["figures"] = {name: one if math.isfinite(one) else None for name, one in record.figures.items()}
    found["curve"] = [[step, value if math.isfinite(value) else None] for step, value in record.curve]
    return found if curve else {name: found[name] for name in ("task", "model", "rate", "seed", "validation")}


def records_of(result: dict[str, Any], study: Study) -> list[Record]:
    worst = math.inf if study.better == "lower" else -math.inf
    return [_record(fields, worst) for fields in result["records"]]


def _record(fields: dict[str, Any], worst: float) -> Record:
    figures = {name: math.inf if one is None else one for name, one in fields["figures"].items()}
    curve = tuple((step, worst if value is None else value) for step, value in fields["curve"])
    scores = {name: worst if fields[name] is None else fields[name] for name in ("score", "validation")}
    return Record(**{**fields, **scores, "figures": figures, "curve": curve})


def number(value: float, infinite: str = "diverged") -> str:
    """Three digits; counts in full."""
    if not math.isfinite(value):
        return infinite
    if value == int(value) and abs(value) >= 100:
        return f"{int(value):,}".replace(",", " ")
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def table(results: Results, task: str) -> str:
    """Every model of a task, the best first."""
    study, models = results.study, results.models(task)
    first = results.of(task, models[0])
    columns = [name for name in study.figures if all(name in record.figures for record in first)]
    rows = [["model", "parameters", "rate", f"median {study.metric}", "interval", *columns]]
    rows.append(["---"] * len(rows[0]))
    for model in sorted(models, key=lambda m: results.median(task, m), reverse=study.better == "higher"):
        records = results.of(task, model)
        rows.append([
            model, number(results.parameters(task, model)), _rate(study, records[0].rate),
            number(results.median(task, model), study.infinite),
            " to ".join(number(end, study.infinite) for end in results.interval(task, model)),
            *(number(median(record.figures[name] for record in records), study.infinite) for name in columns),
        ])  # fmt: skip
    return "\n".join(map(_row, rows))


def _rate(study: Study, rate: float) -> str:
    return f"{rate:g}{'*' if rate in (min(study.rates), max(study.rates)) else ''}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def claims_table(claims: Sequence[Claim]) -> str:
    rows = [(c.text, c.wanted, c.found, "yes" if c.holds else "**no**") for c in claims]
    return "\n".join(map(_row, [("claim", "wanted", "found", "holds"), ("---",) * 4, *rows]))


def section(study: Study, result: dict[str, Any], picture: str | None = None) -> str:
    """A study as Markdown."""
    results = Results(study, records_of(result, study))
    seeds = len(results.of(results.tasks[0], results.models(results.tasks[0])[0]))
    machine = result["machine"]
    rates = ", ".join(f"{rate:g}" for rate in study.rates)
    where = f"{machine['cpu'].partition(' (')[0]}, {machine['cores']} cores"
    parts = [
        f"## {study.title}",
        f"    {result['command']}",
        study.statement.strip(),
        f"Rates tried for each model: {rates}, with {_counted(len(study.tuning_seeds), 'seed')} that "
        f"no figure is of; a star marks a rate at the end of what was tried. Then {_counted(seeds, 'seed')}"
        f"{_probability(seeds)}. "
        f"{result['date'][:10]}, {where}, torch {result['versions']['torch']}, "
        f"Python {result['python']}: {result['minutes']:.1f} minutes.",
        claims_table([Claim(**claim) for claim in result["claims"]]),
    ]
    if picture is not None:
        parts.append(f"![{study.title}]({picture})")
    several = len(results.tasks) > 1
    parts += [
        f"**{task}**\n\n{table(results, task)}" if several else table(results, task) for task in results.tasks
    ]
    return "\n\n".join([*parts, study.shows.strip()]) + "\n"


def _probability(seeds: int) -> str:
    if seeds == 1:
        return ", of which the interval is the only value"
    return f"; the interval holds the median with a probability of {coverage_of(seeds, order_of(seeds)):.0%}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def write(folder: Path, study: Study, result: dict[str, Any]) -> list[Path]:
    """NAME.json, NAME.md and NAME.png in a folder."""
    from studies.core import plots

    paths = [folder / f"{study.name}.{ending}" for ending in ("json", "md", "png")]
    files.write(paths[0], result)
    paths[1].write_text(section(study, result, paths[2].name))
    plots.draw(study, Results(study, records_of(result, study)), paths[2])
    return paths


def record(study: Study, result: dict[str, Any]) -> None:
    """Into the repository: the results, and the documentation that shows them."""
    files.write(SAVED / f"{study.name}.json", result)
    render()


def saved() -> list[tuple[Study, dict[str, Any]]]:
    """The studies whose results are in the repository."""
    from studies.core.runner import STUDIES, find

    paths = [SAVED / f"{name}.json" for name in STUDIES]
    return [(find(path.stem), files.read(path)) for path in paths if path.is_file()]


def page(found: Sequence[tuple[Study, dict[str, Any]]]) -> str:
    """docs/studies.md."""
    sections = [section(study, result, f"studies/{study.name}.png") for study, result in found]
    return "\n".join([preface(), *sections])


def preface() -> str:
    """With its links, which are relative to its own file, made relative to the page."""

    def moved(link: re.Match[str]) -> str:
        return f"]({os.path.relpath(PREFACE.parent / link[1], PAGE.parent)})"

    return re.sub(r"\]\(([^():]+)\)", moved, PREFACE.read_text())


def render() -> None:
    """docs/studies.md and its pictures, from the results in the repository."""
    from studies.core import plots

    found = saved()
    if not found:
        raise FileNotFoundError(f"{SAVED}: no results; python -m studies NAME --record makes them")
    for study, result in found:
        plots.draw(study, Results(study, records_of(result, study)), PICTURES / f"{study.name}.png")
    plots.overview(
        [(study, Results(study, records_of(result, study))) for study, result in found],
        PICTURES / "overview.png",
    )
    PAGE.write_text(page(found))
