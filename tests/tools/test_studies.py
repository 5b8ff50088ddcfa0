"""Studies: models of equal size, equal tuning, figures that any run repeats, pages that the results make."""

import ast
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import environment_of_pytest, interruptible
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import results as files
from studies import __main__ as command
from studies.core import models, plots, report, runner, training
from studies.core.study import (
    Claim,
    Outcome,
    Record,
    Results,
    Study,
    Trial,
    coverage_of,
    first_reaching,
    interval_of_median,
)

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parents[2]


def draw(axes, results):
    plots.curves(axes, results, results.tasks[0])


def train_made_up(trial: Trial) -> Outcome:
    """Ours is the better, the nearer the rate is to 0.1; the rival diverges with the largest rate."""
    score = abs(math.log10(trial.rate / 0.1)) + 0.01 * trial.seed + (trial.model == "theirs")
    if trial.model == "theirs" and trial.rate == 1.0:
        score = math.nan
    return Outcome(100, score, score * 2, ((1.0, 3.0), (2.0, score)), {"steps": math.inf})


MADE_UP = Study(
    name="made_up", title="Made up", statement="A task.", metric="error", better="lower", tasks=("a", "b"),
    models=lambda task: ("ours", "theirs"), rates=(0.01, 0.1, 1.0), train=train_made_up,
    claims=lambda results: [Claim("ours | wins", "yes", number_of(results), True)], draw=draw,
    shows="Nothing.", tuning_seeds=(1000, 1001), infinite="never", figures=("steps",),
)  # fmt: skip


def number_of(results: Results) -> str:
    return report.number(results.median("a", "ours"))


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(runner, "find", lambda name: MADE_UP)
    with ThreadPoolExecutor(1) as executor:
        yield runner.run(MADE_UP, executor, 5, False)


def test_every_model_is_tried_with_every_rate_and_trained_with_the_best(made_up):
    tuning, records = made_up
    tried = [(r.task, r.model, r.rate, r.seed) for r in tuning]
    assert sorted(tried) == sorted(
        (task, model, rate, seed)
        for task in "ab"
        for model in ("ours", "theirs")
        for rate in (0.01, 0.1, 1.0)
        for seed in (1000, 1001)
    )
    assert [(r.task, r.model, r.seed, r.rate) for r in records] == [
        (task, model, seed, 0.1) for task in "ab" for model in ("ours", "theirs") for seed in range(5)
    ]
    assert all(r.validation == 2 * r.score for r in records)


@pytest.mark.parametrize("better, expected", [("lower", 0.1), ("higher", 0.01)])
def test_a_rate_that_diverges_is_never_chosen(better, expected):
    study = replace(MADE_UP, better=better)
    records = [
        Record("a", "ours", rate, 0, 1, validation, validation)
        for rate, validation in ((1.0, math.nan), (0.01, 3.0), (0.1, 2.0))
    ]
    assert runner.best_rate(study, records) == expected


def test_tuning_goes_by_validation():
    records = [Record("a", "ours", rate, 0, 1, score, -score) for rate, score in ((0.1, 1.0), (1.0, 2.0))]
    assert runner.best_rate(MADE_UP, records) == 1.0


def test_results_are_read_as_they_were_written(made_up, tmp_path):
    tuning, records = made_up
    records = [*records, replace(records[-1], score=math.nan, seed=5, figures={"steps": 7.0})]
    result = report.summary(MADE_UP, tuning, records, 60.0, False, FACTS)
    paths = report.write(tmp_path, MADE_UP, result)
    assert [path.name for path in paths] == ["made_up.json", "made_up.md", "made_up.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG") and "NaN" not in paths[0].read_text()
    again = report.records_of(files.read(paths[0]), MADE_UP)
    assert again[:-1] == [
        replace(r, score=round(r.score, 4), validation=round(r.validation, 4)) for r in records[:-1]
    ]
    assert again[-1].score == math.inf and again[-1].figures == {"steps": 7.0}
    page = paths[1].read_text()
    assert "| ours \\| wins | yes | 0.02 | yes |" in page and "![Made up](made_up.png)" in page
    assert page.index("| ours | 100 |") < page.index("| theirs | 100 |")
    assert "probability of 94%" in page
    before = paths[2].read_bytes()
    report.write(tmp_path, MADE_UP, files.read(paths[0]))
    assert paths[2].read_bytes() == before


FACTS = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m studies made_up",
    "machine": {"cpu": "some (family)", "cores": 2},
    "versions": {"torch": "2.13.0"},
}


def test_the_interval_of_a_median_has_the_probability_that_is_said():
    """By drawing: the median of uniform numbers lies in the interval as often as the formula says."""
    assert interval_of_median([3.0, 1.0, 2.0, 5.0, 4.0]) == (1.0, 5.0) and coverage_of(5) == 15 / 16
    drawn = random.Random(0)
    for n in (5, 9, 20):
        k = next(k for k in range(n // 2, 0, -1) if coverage_of(n, k) >= 0.9)
        held = 0
        for _ in range(2000):
            low, high = interval_of_median([drawn.random() for _ in range(n)])
            held += low <= 0.5 <= high
        share, deviation = coverage_of(n, k), math.sqrt(0.25 / 2000)
        assert abs(held / 2000 - share) < 5 * deviation and (k == 1 or coverage_of(n, k + 1) < 0.9)


def test_seeds_are_compared_in_pairs_and_the_worst_is_a_run_that_diverged():
    records = [
        Record("a", model, 0.1, seed, 9, score, score)
        for model, scores in {"x": (1.0, 5.0, math.nan), "y": (2.0, 4.0, 6.0)}.items()
        for seed, score in enumerate(scores)
    ]
    results = Results(MADE_UP, records[::-1])
    assert results.wins("a", "x", "y") == 1 and results.wins("a", "y", "x") == 2
    assert results.median("a", "x") == 5.0 and results.interval("a", "x") == (1.0, math.inf)
    assert results.best_rival("a", "x") == "y" and results.parameters("a", "x") == 9
    higher = Results(replace(MADE_UP, better="higher"), records)
    assert higher.scores("a", "x") == [1.0, 5.0, -math.inf] and higher.wins("a", "x", "y") == 1


def test_streams_of_one_seed_have_nothing_in_common():
    """Nor with the weights, which are drawn from the global generator after ``torch.manual_seed``."""
    torch.manual_seed(3)
    drawn = [torch.rand(4096), *(torch.rand(4096, generator=training.stream(3, name)) for name in ("a", "b"))]
    drawn += [torch.rand(4096, generator=training.stream(4, "a"))]
    assert torch.equal(drawn[1], torch.rand(4096, generator=training.stream(3, "a")))
    shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in itertools.combinations(drawn, 2)]
    assert max(shared) < 40  # of 4096 numbers out of 2^24, one or two meet by chance


def test_no_study_makes_a_generator_of_its_own():
    for path in (ROOT / "studies").rglob("*.py"):
        made = [
            node for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.Generator"
        ]  # fmt: skip
        assert len(made) == (path.name == "training.py"), path


def test_a_run_that_diverged_is_drawn_as_the_worst(tmp_path):
    """It has no finite value from some step on; the medians of the others are drawn."""
    curve = ((1.0, 3.0), (2.0, 2.0))
    records = [
        Record("a", model, 0.1, seed, 9, 1.0, 1.0, curve if seed else ((1.0, math.nan), (2.0, math.nan)))
        for model in ("ours", "theirs")
        for seed in range(5)
    ]
    result = report.summary(MADE_UP, [], records, 60.0, False, FACTS)
    (path, _, picture) = report.write(tmp_path, MADE_UP, result)
    again = report.records_of(files.read(path), MADE_UP)
    assert again[0].curve == ((1.0, math.inf), (2.0, math.inf)) and picture.stat().st_size > 1000


def test_the_first_step_at_a_threshold():
    curve = ((10, 3.0), (20, 1.0), (30, 2.0))
    assert first_reaching(curve, 2.0, "lower") == 20 and first_reaching(curve, 0.5, "lower") == math.inf
    assert first_reaching(curve, 2.5, "higher") == 10 and first_reaching((), 0.0, "higher") == math.inf


@pytest.mark.parametrize("kind", models.KINDS)
def test_the_smallest_model_that_has_as_many_parameters(kind):
    """And its output depends on both inputs, in each row alone."""
    make = models.KINDS[kind]
    for x, z, out, least in ((16, 8, 3, 3000), (5, 2, 1, 10), (64, 10, 1, 20_000)):
        width = models.width_for(lambda width: make(x, z, out, width), least)  # noqa: B023
        counts = [models.parameters(make(x, z, out, n)) for n in (width - 1, width) if n > 0]
        assert counts[-1] >= least and (width == 1 or counts[0] < least)
    torch.manual_seed(0)
    model = models.fitted(kind, 5, 3, 2, 500)
    assert models.parameters(model) >= 500
    for parameter in model.parameters():  # FiLM starts as the identity, whatever z is
        nn.init.normal_(parameter)
    x, z = torch.randn(4, 5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y = model(x, z)
    assert y.shape == (4, 2)
    for grad in torch.autograd.grad(y[1].sum(), (x, z)):
        assert grad[1].abs().sum() > 0 and grad[[0, 2, 3]].abs().sum() == 0


def test_a_size_that_no_model_has_is_an_error():
    with pytest.raises(ValueError, match="width_for: no model of at most 65536 units has 1000000 parameters"):
        models.width_for(lambda width: nn.Linear(1, 1), 1_000_000)


def test_training_ends_at_a_rate_of_zero_and_evaluates_without_gradients():
    torch.manual_seed(0)
    model, rates, enabled = nn.Linear(3, 1), [], []
    x = torch.randn(64, 3)

    def evaluate() -> float:
        enabled.append((torch.is_grad_enabled(), model.training))
        return model.weight.detach().abs().sum().item()

    before = model.weight.detach().clone()
    curve = training.fit(
        model,
        lambda step: rates.append(step) or (model(x) - x.sum(1, keepdim=True)).square().mean(),
        0.1,
        100,
        evaluate,
    )
    assert rates == list(range(1, 101)) and [step for step, _ in curve] == list(range(5, 101, 5))
    assert set(enabled) == {(False, False)} and model.training
    assert (model.weight - 1).abs().max() < (before - 1).abs().max()
    assert abs(curve[-1][1] - curve[-2][1]) < abs(curve[1][1] - curve[0][1])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["compat"], "NAME: expected some of compact, .* got 'compat'"),
        (["all", "compact"], "got 'all'"),
        (["compact", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["compact", "--workers", "0"], "--workers: expected at least 1, got 0"),
        (["compact", "--record", "--quick"], "--record: expected at least 5 seeds and no --quick"),
        (["compact", "--record", "--seeds", "4"], "--record: expected at least 5 seeds"),
        (["compact", "--render"], "--render: expected no study"),
        (["--rend"], "unrecognized arguments: --rend"),
    ],
)
def test_wrong_arguments_are_said(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_without_a_name_it_says_what_there_is(capsys):
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} " in said and runner.find(name).title in said for name in runner.STUDIES)


def test_a_package_that_is_missing_is_one_line(monkeypatch, capsys):
    found = command.find_spec
    for module, name, needed in (
        ("sklearn", "compact", 'python -m studies: needs scikit-learn: pip install ".[bench]"'),
        (
            "pydoc_data",
            "sequence",
            "python -m studies sequence: needs pydoc_data, which this Python came without",
        ),
    ):
        monkeypatch.setattr(command, "find_spec", lambda asked: None if asked == module else found(asked))  # noqa: B023
        assert command.main([name, "--quick"]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err == f"{needed}\n"


def test_an_output_that_is_no_folder_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "run", None)
    (tmp_path / "file").touch()
    assert command.main(["compact", "--output", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m studies: --output: expected a folder, got ") and said.count("\n") == 1


def test_without_results_no_page_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "SAVED", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    assert command.main(["--render"]) == 2 and "no results" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


@pytest.mark.subprocess
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_command_that_is_ended_takes_its_workers_along(name, status, tmp_path):
    arguments = ["-m", "studies", "compact", "--workers", "1", "--output", str(tmp_path)]
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-u", *arguments], cwd=ROOT, env=environment_of_pytest(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    try:
        assert "compact: tuning" in process.stdout.readline()
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=300)  # until nobody holds the pipes, workers included
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == status and "Traceback" not in errors


class AtOnce(Executor):
    """Everything is done before anything is waited for, as when the waiting thread gets no processor."""

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
@pytest.mark.parametrize("executor", (AtOnce, lambda: ThreadPoolExecutor(1)), ids=("at-once", "thread"))
def test_the_first_trial_that_fails_is_named(executor, monkeypatch):
    def fail(trial):
        if trial.rate > 0.01:
            raise ZeroDivisionError("division")
        return train_made_up(trial)

    monkeypatch.setattr(runner, "find", lambda name: replace(MADE_UP, train=fail))
    first = Trial("made_up", "a", "ours", 0.1, 1000, False)
    with executor() as pool, pytest.raises(ZeroDivisionError) as raised:
        runner.run(MADE_UP, pool, 1, False)
    assert raised.value.__notes__ == [f"while training {first}"]


@pytest.mark.subprocess
@pytest.mark.parametrize("name", runner.STUDIES)
def test_a_quick_run_of_every_study(name, tmp_path):
    """As a user starts it: a table, claims that are decided, a picture, and records of every model."""
    arguments = ["-m", "studies", name, "--quick", "--workers", "2", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment_of_pytest(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    study = runner.find(name)
    assert f"## {study.title}" in done.stdout and "| claim | wanted | found | holds |" in done.stdout
    result = files.read(tmp_path / f"{name}.json")
    records = report.records_of(result, study)
    tasks = study.quick_tasks or study.tasks[:1]
    assert {(r.task, r.model) for r in records} == {(t, m) for t in tasks for m in study.models(t)}
    assert {r.seed - study.first_seed for r in records} == {0, 1} and result["quick"] and result["claims"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_study_says_what_it_does_and_what_it_shows():
    for name in runner.STUDIES:
        study = runner.find(name)
        assert study.name == name and len(study.rates) >= 3 and study.better in ("lower", "higher")
        assert len(study.statement.split()) > 50 and len(study.shows.split()) > 30, name
        seeds = range(study.first_seed, study.first_seed + 100)
        assert not set(study.tuning_seeds) & set(seeds), "a seed of tuning is one of the figures"
        assert all(len(study.models(task)) >= 3 for task in study.tasks)


def test_studies_use_public_names_alone():
    """So that they are examples of what a user can write."""
    allowed = {"mi_kernels"}
    of_commands = {"mi_kernels.cli.without_traceback", "mi_kernels.testing.isolated.end_with_this_process"}
    for path in (ROOT / "studies").rglob("*.py"):
        known = allowed | (of_commands if path.name == "__main__.py" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            assert [n for n in names if n.startswith("mi_kernels") and n not in known] == [], path
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("mi."):
                assert "._" not in ast.unparse(node), path
