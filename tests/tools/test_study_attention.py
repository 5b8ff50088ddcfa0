"""The study of masks: its tasks, its sizes, and that it can be repeated."""

import math

import pytest
import torch

from studies import attention
from studies.core.models import parameters
from studies.core.study import Record, Results, Trial

pytestmark = [pytest.mark.tools, pytest.mark.usefixtures("one_thread")]

GUESSING = 0.5  # the error of y = x / 2, and the share of right guesses


def drawn(task, rows=4000):
    random = torch.Generator().manual_seed(1)
    masks = attention.Masks(task, random)
    x, z = torch.randn(rows, attention.X, generator=random), masks.context(rows, random)
    return masks, x, z


@pytest.mark.parametrize("task", attention.TASKS)
def test_masks_are_what_the_statement_says(task):
    masks, x, z = drawn(task)
    mask = masks(x, z)
    rows = range(0, len(x), 97)
    wide_x, wide_z = x.double(), z.double()
    for b in rows:
        for o in range(attention.X):
            if task == "bilinear":
                score = float(wide_z[b] @ masks.weight[o].double() @ wide_x[b])
            elif task == "switch":
                question = int(z[b].nonzero())
                score = float(wide_x[b, masks.looked_at[question]]) * float(masks.sign[question, o])
            elif task == "network":
                both = torch.cat([wide_x[b], wide_z[b]])
                score = float(masks.out[o].double() @ torch.tanh(3 * (masks.hidden.double() @ both)))
            else:
                score = float(masks.weight[o].double() @ wide_z[b])
            if abs(score) > 1e-4:  # float32 may round the rest to the other side
                assert mask[b, o] == (score > 0)
    # Each feature passes half of the time: x -> -x or z -> -z closes what was open.
    assert torch.equal(mask.unique(), torch.tensor([0.0, 1.0]))
    assert abs(float(mask.mean()) - 0.5) < 6 * 0.5 / math.sqrt(len(x))


@pytest.mark.parametrize("task", attention.TASKS)
def test_what_a_mask_depends_on(task):
    masks, x, z = drawn(task)
    mask = masks(x, z)
    by_x = float((masks(x.roll(1, 0), z) != mask).float().mean())
    by_z = float((masks(x, z.roll(1, 0)) != mask).float().mean())
    assert by_z > 0.2 and (by_x == 0 if task == "z alone" else by_x > 0.2)


def test_sizes():
    with torch.device("meta"):
        sizes = {model: parameters(attention.build(model)) for model in attention.MODELS}
    ours = sizes[attention.OURS]
    assert list(sizes)[0] == attention.OURS and ours == 16**3 + 2 * 16**2 + 16 + 1
    assert sizes.pop("diagonal") == 16**2 + 16 + 1
    assert all(ours <= size <= 1.03 * ours for size in sizes.values())


@pytest.mark.parametrize("model", attention.MODELS)
def test_every_model_gives_the_shape_of_x(model):
    torch.manual_seed(0)
    x, z = torch.randn(5, attention.X), torch.randn(5, attention.Z)
    y = attention.build(model)(x, z)
    assert y.shape == x.shape
    if model in attention.BOUNDED or model in ("low-rank MI", "concat mask", *attention.GATES):
        low = -1 if model == "MI tanh" else 0
        high = attention.X if model == "MI softmax" else 1
        assert ((low <= y / x) & (y / x <= high)).all()  # a bounded mask times x


def test_gates_by_z_do_not_see_x():
    x, z = torch.randn(2, 5, attention.X)
    for model in attention.GATES:
        built = attention.build(model)
        assert torch.allclose(built(x, z) / x, built(2 * x, z) / (2 * x), rtol=1e-6)


@pytest.mark.parametrize("model", [attention.OURS, "concat mask"])
def test_a_trial_can_be_repeated_bitwise(model):
    trial = Trial("attention", "switch", model, 2e-2, 3, quick=True)
    first = attention.train(trial)
    assert first == attention.train(trial) and math.isfinite(first.score)


def test_a_short_training_learns(monkeypatch):
    monkeypatch.setattr(attention, "STEPS", 300)
    outcome = attention.train(Trial("attention", "bilinear", attention.OURS, 6e-2, 0))
    assert outcome.score < GUESSING / 2 and outcome.figures["mask accuracy"] > GUESSING + 0.3


def test_models_of_a_seed_see_the_same_data(monkeypatch):
    seen = []
    call = attention.Masks.__call__

    def recorded(self, x, z):
        seen.append((x.clone(), z.clone()))
        return call(self, x, z)

    monkeypatch.setattr(attention.Masks, "__call__", recorded)
    for model in (attention.OURS, "FiLM"):
        attention.train(Trial("attention", "bilinear", model, 2e-2, 5, quick=True))
    half = len(seen) // 2
    for (x, z), (same_x, same_z) in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(x, same_x) and torch.equal(z, same_z)
    assert len(seen[half - 1][0]) == attention.TEST
    assert len({float(x[0, 0]) for x, _ in seen[:half]}) == half  # no batch twice, and none in the test


def test_claims_follow_the_figures():
    def holds(task, **scores):
        rows = [
            Record(task, name, 1e-2, 0, 1, score, score)
            for name in attention.models(task)
            for score in [scores.get(name.replace(" ", "_"), 0.3)]
        ]
        return [claim.holds for claim in attention.claims(Results(attention.STUDY, rows))]

    good = {"dense_MI": 0.1, "MI_hardsigmoid": 0.1}
    assert holds("bilinear", **good) == [True, True]
    assert holds("bilinear", **good, concat_mask=0.105) == [False, True]
    assert holds("bilinear", **good, concat=0.05) == [False, True]
    assert holds("bilinear", **good, MI_tanh=0.05) == [True, False]
    assert holds("switch", dense_MI=0.1, MI_softmax=0.2) == [True, False]
    assert holds("network", dense_MI=0.1, low_rank_MI=0.05) == [True]
    assert holds("z alone", dense_MI=0.1) == [False]
    assert holds("z alone", dense_MI=0.1, diagonal=0.1) == [True]


def test_the_picture(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    rows = [
        Record(task, name, 1e-2, seed, 1, 2.0**-seed, 0.1)
        for task in attention.TASKS
        for name in attention.models(task)
        for seed in range(5)
    ]
    figure, axes = pyplot.subplots()
    attention.STUDY.draw(axes, Results(attention.STUDY, rows))
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {*attention.MODELS, "y = x / 2"}
    assert [text.get_text() for text in axes.get_xticklabels()] == list(attention.TASKS)
    for bars in axes.containers:
        assert {float(y) for y in bars.lines[0].get_ydata()} == {0.25}  # the median of 1, 1 / 2, ..., 1 / 16
    pyplot.close(figure)
