"""The study of products and distances: its targets, its sizes, and that it can be repeated."""

import math

import pytest
import torch

from studies import compact
from studies.core.models import parameters
from studies.core.study import Record, Results, Trial

pytestmark = [pytest.mark.tools, pytest.mark.usefixtures("one_thread")]

QUICK_STEPS_ERROR = 0.9  # of the variance; the mean alone has 1


@pytest.mark.parametrize("task", compact.STUDY.tasks)
def test_the_target_is_what_it_is_called_and_standardised(task):
    kind, d = compact.kind_of(task)
    x, z = torch.randn(2, 40_000, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if kind == "product":
        plain = torch.einsum("bi,bi->b", x, z)
    else:
        plain = (x.square() - 2 * x * z + z.square()).sum(-1).sqrt()
    mean, variance = compact.moments(task)
    found = compact.target(task, x, z)
    assert torch.allclose(found * math.sqrt(variance) + mean, plain, rtol=0, atol=1e-12)
    # Six standard errors of a mean and, with E x^4 <= 9 here, of a variance.
    assert abs(found.mean()) < 6 / math.sqrt(40_000) and abs(found.var() - 1) < 6 * math.sqrt(8 / 40_000)


@pytest.mark.parametrize("task", compact.STUDY.tasks)
def test_sizes(task):
    _, d = compact.kind_of(task)
    with torch.device("meta"):
        sizes = {model: parameters(compact.build(task, model)) for model in compact.STUDY.models(task)}
    assert list(sizes)[0] == compact.OURS
    ours = sizes[compact.OURS]
    if task.startswith("product"):
        assert ours == (d + 1) ** 2
    for model, size in sizes.items():
        if model != compact.PLAIN:  # which is there to show what it lacks
            assert size >= ours * compact.TIMES.get(model.partition(",")[0], 1)


def test_the_claim_is_about_networks_below_its_limit():
    with torch.device("meta"):
        sizes = {
            model: parameters(compact.build("product d=8", model))
            for model in compact.STUDY.models("product d=8")
        }
    assert sizes[compact.OURS] == 81
    largest = [size for model, size in sizes.items() if model.startswith("MLP 24x")]
    assert len(largest) == 6 and all(0.95 * compact.FEW < size < compact.FEW for size in largest)


@pytest.mark.parametrize("task, model", [("product d=4", "MLP 1x"), ("distance d=2", compact.OURS)])
def test_a_trial_can_be_repeated_bitwise(task, model):
    trial = Trial("compact", task, model, 1e-2, 3, quick=True)
    first, again = compact.train(trial), compact.train(trial)
    assert first == again and math.isfinite(first.score)
    assert first.figures["MSE"] == pytest.approx(first.score * compact.moments(task)[1], rel=1e-3)


@pytest.mark.parametrize("model", [compact.OURS, "diagonal MI"])
def test_a_short_training_learns(model):
    outcome = compact.train(Trial("compact", "product d=8", model, 3e-2, 0, quick=True))
    assert outcome.score < QUICK_STEPS_ERROR


def test_all_models_of_a_seed_are_judged_by_the_same_pairs(monkeypatch):
    seen = []
    target = compact.target

    def recorded(task, x, z):
        seen.append((x.clone(), z.clone()))
        return target(task, x, z)

    monkeypatch.setattr(compact, "target", recorded)
    for model in (compact.OURS, "MLP 3x"):
        compact.train(Trial("compact", "product d=4", model, 1e-2, 5, quick=True))
    half = len(seen) // 2
    for (x, z), (same_x, same_z) in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(x, same_x) and torch.equal(z, same_z)
    assert seen[0][0].shape == (compact.BATCH, 4) and seen[half - 1][0].shape == (compact.TEST, 4)
    assert len({float(x[0, 0]) for x, _ in seen[:half]}) == half  # no batch twice, and none in the test


def record(task, model, size, score):
    return Record(task, model, 1e-3, 0, size, score, score)


def test_the_size_that_is_needed():
    task = "product d=4"

    def needed(*scores):
        names = ("MLP 1x", "MLP 3x", "MLP 6x")
        rows = [record(task, n, s, e) for n, s, e in zip(names, (10, 40, 100), scores, strict=True)]
        return compact.needed(Results(compact.STUDY, rows), task, "MLP", 0)

    assert needed(0.05, 0.01, 0.001) == pytest.approx(10)
    assert needed(1.0, 0.01, 0.001) == pytest.approx(20)  # half of the way, in logarithms
    assert needed(math.inf, 1.0, 0.1) == pytest.approx(100)
    assert needed(1.0, math.nan, 0.01) == pytest.approx(math.sqrt(10 * 100))
    assert needed(1.0, 0.5, 0.2) == math.inf


def test_claims_follow_the_figures():
    task = "product d=8"

    def holds(ours, mlp):
        names = [(compact.OURS, 81, ours), ("MLP 1x", 91, 6.0), ("MLP 24x", 1945, mlp), ("FiLM", 99, 0.0)]
        rows = [record(task, n, s, e / 8) for n, s, e in names]
        return [claim.holds for claim in compact.claims(Results(compact.STUDY, rows))]

    assert holds(1e-4, 0.2) == [True, True]
    assert holds(1e-2, 0.05) == [False, False]


def ladder(task, factor):
    """Five seeds, of which an MLP needs ``factor`` times our parameters to 10 %."""
    _, d = compact.kind_of(task)
    ours = (d + 1) ** 2
    rows = [
        (compact.OURS, ours, 1e-9),
        ("MLP 1x", ours, 1.0),
        ("MLP 6x", round(ours * min(factor, 99)), 0.1 if factor < math.inf else 0.5),
    ]
    return [
        Record(task, name, 1e-3, seed, size, score, score) for name, size, score in rows for seed in range(5)
    ]


def test_the_growth_is_that_of_the_multiple():
    def holds(*factors):
        tasks = ("product d=2", "product d=8", "product d=64")
        rows = [row for task, factor in zip(tasks, factors, strict=True) for row in ladder(task, factor)]
        return [claim.holds for claim in compact.growth(Results(compact.STUDY, rows), list(tasks))]

    assert holds(3, 4, 5) == [True, False]
    assert holds(1, 4, 9) == [False, True]
    assert holds(3, 4, math.inf) == holds(3, math.inf, math.inf) == [False, False]  # no MLP gets there


def test_the_picture():
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    rows = [row for d in (2, 8) for row in ladder(f"product d={d}", 4)]
    figure, axes = pyplot.subplots()
    compact.STUDY.draw(axes, Results(compact.STUDY, rows))
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["MLP, d = 2", "dense MI, d = 2 to 64", "MLP, d = 8"]
    sizes = [list(container.lines[0].get_xdata()) for container in axes.containers]
    assert [len(found) for found in sizes] == [2, 1, 2, 1] and sizes[1] == [9] and sizes[3] == [81]
    pyplot.close(figure)
