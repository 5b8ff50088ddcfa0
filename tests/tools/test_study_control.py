"""The reacher, the learner and the models of the study of reinforcement learning are what its text says."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from studies import control, ppo, reacher
from studies.core import models
from studies.core.study import Record, Results, Trial

pytestmark = [pytest.mark.tools, pytest.mark.usefixtures("one_thread")]

EXACT = {"rtol": 1e-12, "atol": 1e-12}
IDENTITY = torch.eye(2, dtype=torch.float64)
TASKS = (control.SMALL, control.ANY, control.KNOWN)


def drawn(tasks: int = 5, seed: int = 0) -> reacher.Tasks:
    found = reacher.draw_tasks(tasks, torch.Generator().manual_seed(seed))
    return reacher.Tasks(found.goal.double(), found.actuator.double())


def test_a_step_follows_the_equations():
    tasks = drawn()
    world = reacher.Reacher(lambda: tasks, 3, torch.Generator().manual_seed(1))
    world.reset()
    world.q, world.speed = world.q.double(), torch.randn(5, 3, 2, dtype=torch.float64)
    action = 2 * torch.randn(5, 3, 2, dtype=torch.float64)
    q, speed = world.q.tolist(), world.speed.tolist()
    seen, reward = world.step(action)
    for t in range(5):
        (a, b), (c, d) = tasks.actuator[t].tolist()
        for n in range(3):
            u, v = action[t, n].tolist()
            norm = max(1.0, math.hypot(u, v))
            torques = [(a * u + b * v) / norm, (c * u + d * v) / norm]
            new = [s + 0.1 * (8 * f - s) for s, f in zip(speed[t][n], torques, strict=True)]
            first, bend = (p + 0.1 * s for p, s in zip(q[t][n], new, strict=True))
            second = first + bend
            x, y = (0.5 * (f(first) + f(second)) for f in (math.cos, math.sin))
            wanted = [f(angle) for f in (math.cos, math.sin) for angle in (first, second)]
            wanted += [s / 4 for s in new]
            assert seen[t, n].tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)
            distance = math.hypot(x - tasks.goal[t, 0].item(), y - tasks.goal[t, 1].item())
            assert reward[t, n].item() == pytest.approx(-distance, rel=1e-12, abs=1e-12)


def test_tasks_differ_in_what_they_should():
    tasks = drawn(400)
    # Cosines and sines were rounded to float32.
    torch.testing.assert_close(
        tasks.actuator @ tasks.actuator.mT,
        IDENTITY.expand(400, 2, 2),
        rtol=0,
        atol=4 * torch.finfo(torch.float32).eps,
    )
    reflected = (torch.linalg.det(tasks.actuator) < 0).sum().item()
    assert 100 < reflected < 300
    radius = tasks.goal.norm(dim=-1)
    assert reacher.NEAREST < radius.min() and radius.max() < reacher.FARTHEST
    many = reacher.draw_tasks(1 << 16, torch.Generator().manual_seed(3)).description
    # Standard errors are below 0.004.
    torch.testing.assert_close(many.square().mean((0, 1)), torch.ones(reacher.DESCRIPTION), rtol=0, atol=0.03)


def test_a_posture_puts_the_fingertip_at_the_goal():
    goal = drawn(50).goal
    for q in reacher.postures(goal):
        torch.testing.assert_close(reacher.fingertip(q), goal, **EXACT)


def test_the_scripted_controller_reaches_every_goal_whatever_the_actuator():
    tasks = drawn(40)
    world = reacher.Reacher(lambda: tasks, 10, torch.Generator().manual_seed(2))
    world.reset()
    reacher.episode(world, reacher.Scripted(world))
    missed = (reacher.fingertip(world.q) - tasks.goal[:, None]).norm(dim=-1)
    assert missed.max() < 0.1 * reacher.NEAREST


def test_no_other_spring_and_brake_are_much_better():
    tasks = reacher.draw_tasks(40, torch.Generator().manual_seed(0))

    def found(stiffness: float, brake: float) -> float:
        world = reacher.Reacher(lambda: tasks, 10, torch.Generator().manual_seed(2))
        world.reset()
        return reacher.episode(world, reacher.Scripted(world, stiffness, brake))

    lowest = reacher.random_return(reacher.Reacher(lambda: tasks, 10, torch.Generator().manual_seed(2)))
    chosen = found(reacher.STIFFNESS, reacher.BRAKE)
    best = max(found(s, b) for s in (2, 4, 6, 8, 12, 20) for b in (0.4, 0.8, 1.2, 1.6, 2, 3))
    assert (chosen - lowest) / (best - lowest) > 0.98


def test_advantages_are_the_discounted_sum_of_errors():
    reward, value = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    advantage, target = ppo.advantages(reward, value)
    error = 0.1 * reward + 0.9 * value[:, 1:] - value[:, :-1]
    for t in range(6):
        wanted = sum((ppo.DISCOUNT * ppo.TRACE) ** (s - t) * error[:, s] for s in range(t, 6))
        torch.testing.assert_close(advantage[:, t], wanted, **EXACT)
        torch.testing.assert_close(target[:, t], wanted + value[:, t], **EXACT)


def test_the_density_is_that_of_a_gaussian():
    agent = control.agent("concat", control.ANY).double()
    action, mean = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    wanted = torch.distributions.Normal(mean, agent.log_std.exp()).log_prob(action).sum(-1)
    torch.testing.assert_close(agent.log_prob(action, mean), wanted, **EXACT)


@pytest.mark.parametrize("task", TASKS)
def test_models_are_of_equal_size(task):
    sizes = {kind: models.parameters(control.agent(kind, task)) for kind in control.KINDS}
    table = 2 * control.TASKS * control.EMBEDDING if task == control.KNOWN else 0
    assert all(size >= 2 * control.LEAST[task] + table for size in sizes.values())
    ours = sizes[control.OURS]
    assert all(ours <= size <= 1.06 * ours for size in sizes.values()), sizes


@pytest.mark.parametrize("kind", control.KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_an_action_depends_on_its_own_arm_and_task_alone(kind, task):
    torch.manual_seed(0)
    learner = control.agent(kind, task).double()
    x = torch.randn(control.TASKS, 4, reacher.FEATURES, dtype=torch.float64)
    context = control.told(task)(drawn(control.TASKS))
    together = learner.act(x, context)
    assert together.shape == (control.TASKS, 4, 2)
    for t in (0, 7):
        alone = learner.act(x[t : t + 1, 1:2], context[t : t + 1])
        torch.testing.assert_close(together[t, 1], alone[0, 0], **EXACT)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # FiLM starts as the identity
    assert not torch.allclose(learner.act(x, context.roll(1, 0)), learner.act(x, context))


def test_known_tasks_are_told_by_number_alone():
    tasks = drawn(3)
    assert control.told(control.KNOWN)(tasks).tolist() == [[0], [1], [2]]


def goals(world: reacher.Reacher) -> set[tuple[float, ...]]:
    world.reset()
    return {tuple(goal) for goal in world.tasks.goal.tolist()}


def test_new_tasks_are_not_those_of_evaluation():
    world, test = control.worlds(control.ANY, 0)
    shown = goals(test())
    assert goals(test()) == shown and len(shown) == control.EVALUATED
    episodes = [goals(world) for _ in range(4)]
    assert len(set.union(*episodes)) == 4 * control.ANY_TASKS
    radii = [{round(math.hypot(*goal), 6) for goal in found} for found in (shown, episodes[0])]
    assert len(radii[0] & radii[1]) < 10  # one stream for both would give the same ones
    assert not shown & set.union(*episodes)


def test_known_tasks_stay_and_seeds_have_their_own():
    world, test = control.worlds(control.KNOWN, 0)
    assert goals(world) == goals(world) == goals(test())
    assert not goals(world) & goals(control.worlds(control.KNOWN, 1)[0])


def test_evaluation_starts_from_other_postures_than_training():
    world, test = control.worlds(control.KNOWN, 0)
    world.reset()
    inside = test()
    inside.reset()
    assert not set(world.q.flatten().tolist()) & set(inside.q.flatten().tolist())


@pytest.mark.parametrize("kind", control.KINDS)
def test_a_trial_is_repeatable(kind):
    trial = Trial("control", control.ANY, kind, 0.005, 0, quick=True)
    torch.manual_seed(1)
    first = control.train(trial)
    torch.manual_seed(2)
    assert control.train(trial) == first
    assert control.train(replace(trial, seed=1)).curve != first.curve


def test_all_models_meet_the_same_arms():
    """Whatever a model draws to initialise itself."""
    ends = []
    for kind in control.KINDS:
        torch.manual_seed(0)
        control.agent(kind, control.ANY)
        world, _ = control.worlds(control.ANY, 0, quick=True)
        ends.append(world.reset())
    assert all(torch.equal(end, ends[0]) for end in ends)


@pytest.mark.parametrize("kind", [control.OURS, "concat"])
def test_learning_beats_random_actions(kind, monkeypatch):
    """On the way from random actions (0) to the scripted controller (1), in a few of the study's episodes."""
    monkeypatch.setitem(control.EPISODES, control.KNOWN, 3)
    outcome = control.train(Trial("control", control.KNOWN, kind, 0.01, 0))
    assert outcome.curve[0][1] < 0.2 < 0.3 < outcome.figures["final return"]


def record(model: str, seed: int, steps: float) -> Record:
    return Record(
        control.ANY, model, 0.01, seed, 6000, steps, steps, ((0.0, 0.0), (400.0, 0.7)), {"mean return": 0.5}
    )


@pytest.mark.parametrize(
    ("ours", "concat", "holds"),
    [
        (100, 200, True),
        (101, 200, False),
        (200, math.inf, True),
        (201, math.inf, False),
        (math.inf, math.inf, False),
    ],
)
def test_half_the_steps_is_claimed_only_when_sure(ours, concat, holds):
    """A rival that never gets there counts as one that does at the end of the 400 steps."""
    steps = {control.OURS: ours, "concat": concat}
    made = [record(model, seed, found) for model, found in steps.items() for seed in range(5)]
    (claim,) = control.claims(Results(control.STUDY, made))
    assert claim.holds is holds
