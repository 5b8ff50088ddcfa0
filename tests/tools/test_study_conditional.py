"""The study of conditional computation: its data are what it says, and nothing held out is trained with."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from studies import conditional
from studies.core import models
from studies.core.study import Trial

pytestmark = [pytest.mark.tools, pytest.mark.usefixtures("one_thread")]


def problem(task: str, seed: int = 0) -> conditional.Problem:
    return conditional.PROBLEMS[task][0](torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", conditional.PROBLEMS)
def test_no_rival_is_smaller_than_ours(task):
    """None is larger by more than its width allows, but for one MLP; the layer alone is smaller."""
    found = problem(task)
    sizes = {kind: models.parameters(found.make(kind)) for kind in conditional.PROBLEMS[task][2]}
    ours, *others = sizes.values()
    if task == "32 tasks":
        assert sizes.pop("hypernetwork") >= ours  # with one hidden unit, the fewest that it can have
    layer, large = sizes.pop(conditional.LAYER, 0), sizes.pop(conditional.LARGE, None)
    assert all(ours <= size <= 1.13 * ours for size in sizes.values()), sizes
    assert layer <= ours and (large is None or 8 * ours <= large <= 8.2 * ours)


@pytest.mark.parametrize("task", conditional.PROBLEMS)
def test_every_model_sees_the_same_data(task):
    """Whatever it draws for its parameters; another seed has other data."""
    first, second, other = problem(task), problem(task), problem(task, 1)
    torch.manual_seed(7)
    first.make("concat")
    batches = [first.batch(), second.batch(), other.batch()]
    for a, b, c in zip(*batches, strict=True):
        assert a.shape[0] == conditional.BATCH and torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("task", conditional.PROBLEMS)
def test_a_context_chooses_a_function_of_x(task):
    """Of each x one answer, that of its context: linear in x where the study says so."""
    found = problem(task)
    x, z, wanted = found.batch(4096) if task in ("32 tasks", "selection") else found.batch()
    assert wanted.shape == (len(x), 1)
    if task == "32 tasks":
        x, wanted = x.double(), wanted.double()
        for t in range(3):
            rows = torch.cat([x[z == t], torch.ones((z == t).sum(), 1).double()], 1)
            left = rows @ torch.linalg.lstsq(rows, wanted[z == t]).solution - wanted[z == t]
            rounding = 17 * torch.finfo(torch.float32).eps  # of a sum of so many terms
            assert len(rows) > 2 * 17 and left.norm() <= rounding * wanted[z == t].norm()
    if task == "selection":
        assert torch.equal(z.sum(1), torch.ones(len(z))) and z.shape[1] == 16
        assert len(torch.unique(z, dim=0)) == 16
        draw = torch.Generator().manual_seed(0)
        first, second = torch.randn(16, 16, 16, generator=draw), torch.randn(16, 16, generator=draw)
        chosen = z.argmax(1)
        hidden = torch.tanh(torch.einsum("bhj,bj->bh", first[chosen].double() / 2, x.double()))
        again = (hidden * second[chosen].double() / 4).sum(1, keepdim=True)
        assert (again - wanted).norm() <= 32 * torch.finfo(torch.float32).eps * again.norm()  # two sums of 16
    if task == "digits":
        assert torch.equal(z.sum(1), torch.full((len(z),), 5.0)) and set(wanted.unique().tolist()) == {
            0.0,
            1.0,
        }
    if task.startswith("new"):
        assert len(torch.unique(z, dim=0)) <= 64


@pytest.mark.parametrize("task", ["new contexts, linear", "new contexts, curved", "digits"])
def test_no_context_and_no_image_of_the_test_is_trained_with(task):
    evaluated: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Recorder(torch.nn.Module):
        def forward(self, x, z):
            evaluated.append((x, z))
            return torch.zeros(len(x), 1)

    found = problem(task)
    for evaluate in (found.score, found.validation, found.figures):
        evaluate(Recorder())
    seen = dict(zip(("test", "tuning", "inside"), evaluated, strict=True))
    batches = [found.batch() for _ in range(200)]
    trained = [rows_of(torch.cat([batch[place] for batch in batches])) for place in (0, 1)]
    contexts = {name: rows_of(z) for name, (_, z) in seen.items()}
    assert not contexts["test"] & trained[1] and not contexts["tuning"] & trained[1]
    assert not contexts["test"] & contexts["tuning"] and contexts["inside"] == trained[1]
    if task == "digits":
        images = {name: rows_of(x) for name, (x, _) in seen.items()}
        assert not images["test"] & trained[0] and not images["tuning"] & trained[0]
        assert not images["test"] & images["tuning"] and not images["inside"] & trained[0]
        assert (len(trained[1]), len(contexts["test"])) == (126, 63)


def rows_of(values: torch.Tensor) -> set[tuple[float, ...]]:
    return set(map(tuple, values.tolist()))


def test_a_trial_repeats_to_the_bit_and_learns():
    trial = Trial("conditional", "new contexts, linear", conditional.LAYER, 0.03, 3, quick=True)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(conditional.train(trial))
    assert found[0] == found[1]
    assert found[0].score < 0.5 and found[0].curve[-1][1] < found[0].curve[0][1]  # 1: the mean as the answer


def test_the_interaction_has_a_fifth_of_the_error_on_32_tasks(monkeypatch):
    """With fewer steps than the study."""
    problem_of, _, kinds = conditional.PROBLEMS["32 tasks"]
    monkeypatch.setitem(conditional.PROBLEMS, "32 tasks", (problem_of, 800, kinds))
    scores = {}
    for kind in (conditional.LAYER, "concat"):
        torch.manual_seed(0)
        scores[kind] = conditional.train(Trial("conditional", "32 tasks", kind, 0.03, 0)).score
    assert scores[conditional.LAYER] <= 0.2 * scores["concat"]
