"""What stands in the repository of the studies: full runs, and the page and pictures that they make."""

import math
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import results as files
from studies.core import report, runner
from studies.core.study import Claim, Record, Results

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_made_of_the_results_in_the_repository():
    found = report.saved()
    assert [study.name for study, _ in found] == list(runner.STUDIES)
    assert report.PAGE.read_text() == report.page(found), "python -m studies --render"
    for study, _ in found:
        assert (report.PICTURES / f"{study.name}.png").is_file()
    assert "studies/overview.png" in (ROOT / "docs" / "why.md").read_text()
    assert (report.PICTURES / "overview.png").is_file()


def test_links_of_the_preface_are_right_where_it_is():
    links = re.findall(r"\]\(([^()]+)\)", report.PREFACE.read_text())
    assert links and all((report.PREFACE.parent / link).exists() for link in links), links


@pytest.mark.parametrize("name", runner.STUDIES)
def test_recorded_results_are_of_full_runs_with_models_of_equal_size(name):
    study, path = runner.find(name), report.SAVED / f"{name}.json"
    result = files.read(path)
    results = Results(study, report.records_of(result, study))
    assert path.stat().st_size < 100_000 and result["quick"] is False and result["minutes"] < 10
    assert results.tasks == list(study.tasks)
    tried = {(t["task"], t["model"], t["rate"], t["seed"]) for t in result["tuning"]}
    for task in study.tasks:
        assert results.models(task) == list(study.models(task))
        for model in study.models(task):
            seeds = [record.seed - study.first_seed for record in results.of(task, model)]
            assert seeds == list(range(len(seeds))) and len(seeds) >= 5
            assert {(task, model, rate, s) for rate in study.rates for s in study.tuning_seeds} <= tried
            assert results.of(task, model)[0].rate == runner.best_rate(
                study,
                [Record(t["task"], t["model"], t["rate"], t["seed"], 0, 0.0, worst(t["validation"], study))
                 for t in result["tuning"] if (t["task"], t["model"]) == (task, model)],
            )  # fmt: skip
    assert [Claim(**claim) for claim in result["claims"]] == study.claims(results)


def worst(value, study):
    return (math.inf if study.better == "lower" else -math.inf) if value is None else value
