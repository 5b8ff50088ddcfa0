"""Reinforcement learning of many tasks with one policy: which way of conditioning it needs the fewest steps."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mi_kernels as mi
from studies import ppo
from studies.core import models
from studies.core.colours import colour
from studies.core.study import Claim, Outcome, Results, Study, Trial, first_reaching
from studies.reacher import (
    ACTIONS,
    DESCRIPTION,
    FEATURES,
    Reacher,
    Tasks,
    draw_tasks,
    random_return,
    scripted_return,
)

GOALS, KNOWN, ANY = "30 goals", "30 goals and actuators", "any goal and actuator"
OURS = "dense MI"
THRESHOLD = 0.9
TASKS, ARMS = 30, 13  # 390 arms in all, as near to ANY_TASKS as may be
ANY_TASKS = 384
EMBEDDING = 8
LEAST = 3000  # parameters of the policy, and of the value, without embeddings
EPISODES = 48
SMALL = 0.1  # the policy's last layer at the start, against its usual size
EVALUATED = 240


class Concat(models.Concat):
    """An MLP of both side by side."""

    @property
    def out(self) -> nn.Module:
        return self.layers[-1]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(x, z.expand(*x.shape[:-1], -1))


class Modulated(nn.Module):
    """An MLP of x with two hidden layers; z modulates the units of each before their relu."""

    def __init__(self, x: int, z: int, out: int, width: int, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.linear = nn.ModuleList([nn.Linear(x, width), nn.Linear(width, width)])
        self.modulation = nn.ModuleList([layer(width, context_features=z, channel_dim=-1) for _ in range(2)])
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        for linear, modulation in zip(self.linear, self.modulation, strict=True):
            x = torch.relu(modulation(linear(x), z))
        return self.out(x)


def film(x: int, z: int, out: int, width: int) -> nn.Module:
    return Modulated(x, z, out, width, mi.nn.FiLM)


def gated(x: int, z: int, out: int, width: int) -> nn.Module:
    def gate(features: int, **sizes: int) -> nn.Module:
        return mi.nn.DiagonalInteraction(features, activation="sigmoid", shift=False, **sizes)

    return Modulated(x, z, out, width, gate)


class Hyper(nn.Module):
    """A hidden layer of z generates both layers that x meets."""

    HIDDEN = 8

    def __init__(self, x: int, z: int, out: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(z, self.HIDDEN)
        self.first = mi.nn.HyperLinear(x, out_features=width, context_features=self.HIDDEN)
        self.out = mi.nn.HyperLinear(width, out_features=out, context_features=self.HIDDEN)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        hidden = torch.relu(self.hidden(z))
        return self.out(torch.relu(self.first(x, hidden)), hidden)


class Dense(nn.Module):
    """Two multiplicative interactions with z, and a relu between them."""

    def __init__(self, x: int, z: int, out: int, width: int) -> None:
        super().__init__()
        self.first = mi.nn.MultiplicativeInteraction(x, context_features=z, out_features=width)
        self.out = mi.nn.MultiplicativeInteraction(width, context_features=z, out_features=out)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.out(torch.relu(self.first(x, z)), z)


KINDS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "dense MI": Dense,
    "hypernetwork": Hyper,
    "FiLM": film,
    "gated": gated,
    "concat": Concat,
}


def told(task: str) -> ppo.Told:
    """The description where tasks are new each time, else the number."""
    return (lambda tasks: tasks.description) if task == ANY else (lambda tasks: tasks.number)


def network(kind: str, task: str, out: int) -> nn.Module:
    """The smallest network of a kind with LEAST parameters or more; with a table of tasks, where they have numbers."""
    z = DESCRIPTION if task == ANY else EMBEDDING

    def make(width: int) -> nn.Module:
        return KINDS[kind](FEATURES, z, out, width)

    model = make(models.width_for(make, LEAST))
    if out == ACTIONS:
        with torch.no_grad():
            for parameter in model.out.parameters():
                parameter *= SMALL
    return model if task == ANY else models.Embedded(model, TASKS, z)


def agent(kind: str, task: str) -> ppo.Agent:
    return ppo.Agent(network(kind, task, ACTIONS), network(kind, task, 1), ACTIONS)


def worlds(task: str, seed: int, quick: bool = False) -> tuple[Reacher, Callable[[], Reacher]]:
    """Where to train, and where to evaluate, the same each time. Each seed has its own tasks; those of ANY are new each time."""
    rng = torch.Generator().manual_seed(seed)
    tests = torch.Generator().manual_seed(seed + (1 << 32))
    tasks, arms = (ANY_TASKS, 1) if task == ANY else (TASKS, ARMS)
    if quick:
        tasks, arms = (tasks // 8, arms) if task == ANY else (tasks, 2)
    if task == ANY:
        shown = draw_tasks(EVALUATED, tests)
        return Reacher(lambda: draw_tasks(tasks, rng), arms, seed), lambda: Reacher(lambda: shown, 1, seed + 1)
    known: Tasks = draw_tasks(tasks, rng, actuators=task == KNOWN)
    return Reacher(lambda: known, arms, seed), lambda: Reacher(lambda: known, EVALUATED // tasks, seed + 1)


def train(trial: Trial) -> Outcome:
    torch.manual_seed(trial.seed)
    learner = agent(trial.model, trial.task)
    reacher, test = worlds(trial.task, trial.seed, trial.quick)
    lowest, highest = random_return(test()), scripted_return(test())

    def evaluate() -> float:
        return (ppo.mean_return(learner, test(), told(trial.task)) - lowest) / (highest - lowest)

    rng = torch.Generator().manual_seed(trial.seed)
    episodes = 3 if trial.quick else EPISODES
    curve = ppo.learn(learner, reacher, told(trial.task), trial.rate, episodes, rng, evaluate)
    steps = first_reaching(curve, THRESHOLD, "higher")
    budget, final = curve[-1]
    area = sum(value for _, value in curve[1:]) / episodes
    return Outcome(
        parameters=models.parameters(learner),
        score=steps,
        validation=steps if math.isfinite(steps) else budget * (2 - final) if math.isfinite(final) else math.inf,
        curve=curve,
        figures={"final return": final, "mean return": area},
    )
