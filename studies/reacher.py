"""A planar arm of two joints that reaches for points: many tasks, hundreds of arms at once, in tensors.

Tasks share what is observed and differ in what is not: where the goal is, and how an action turns the joints.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 32  # of an episode
DT = 0.1  # s
TORQUE = 8.0  # rad / s^2 of an action of norm 1
DAMPING = 1.0  # 1 / s
LINK = 0.5  # m, both of them
NEAREST, FARTHEST = 0.3, 0.9  # m, of goals from the shoulder
FEATURES = 6
ACTIONS = 2
DESCRIPTION = 6
STIFFNESS, BRAKE = 4.0, 0.8  # of the scripted controller


@dataclass(frozen=True)
class Tasks:
    """What T tasks differ in: ``goal`` [T, 2]; orthogonal ``actuator`` [T, 2, 2]: how actions turn joints."""

    goal: Tensor
    actuator: Tensor

    def __len__(self) -> int:
        return len(self.goal)

    @property
    def number(self) -> Tensor:
        """[T, 1]: all that an agent is told of a task that it may know by heart."""
        return torch.arange(len(self))[:, None]

    @property
    def description(self) -> Tensor:
        """[T, 1, DESCRIPTION]: goal and actuator, each feature with a mean square of 1 over all tasks."""
        goal = self.goal / math.sqrt((NEAREST**2 + FARTHEST**2) / 4)
        return torch.cat([goal, self.actuator.flatten(1) * math.sqrt(2)], -1)[:, None]


def draw_tasks(tasks: int, rng: torch.Generator) -> Tasks:
    """Goals evenly over a ring. Actuators evenly over all rotations and reflections."""
    radius = torch.empty(tasks).uniform_(NEAREST**2, FARTHEST**2, generator=rng).sqrt()
    angle, turn = torch.empty(2, tasks).uniform_(-math.pi, math.pi, generator=rng)
    side = 2.0 * torch.randint(2, (tasks, 1), generator=rng) - 1
    actuator = torch.stack([unit(turn), side * unit(turn + math.pi / 2)], -1)
    return Tasks(radius[:, None] * unit(angle), actuator)


def unit(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


class Reacher:
    """N arms for each of T tasks, all in step; joints q and their speeds [T, N, 2].

    An action u, shortened to norm 1 where it is longer, turns the joints by q'' = TORQUE A u - DAMPING q', in
    steps of DT (semi-implicit Euler). The reward of a step is minus the distance of the fingertip from the
    goal after it. ``tasks()`` says at each reset what the tasks are.
    """

    def __init__(self, tasks: Callable[[], Tasks], arms: int, rng: torch.Generator) -> None:
        self.draw, self.arms = tasks, arms
        self.rng = rng

    def reset(self) -> Tensor:
        """Arms at rest, in postures drawn evenly over all angles."""
        self.tasks = self.draw()
        shape = len(self.tasks), self.arms, 2
        self.q = torch.empty(shape).uniform_(-math.pi, math.pi, generator=self.rng)
        self.speed = torch.zeros(shape)
        return self.observe()

    def observe(self) -> Tensor:
        """[T, N, FEATURES]: in which direction each link points, and the speeds of the joints."""
        directions = self.q.cumsum(-1)
        return torch.cat([directions.cos(), directions.sin(), self.speed / 4], -1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """What is observed next, and the reward [T, N]."""
        action = action / action.norm(dim=-1, keepdim=True).clamp_min(1)
        self.speed = self.speed + DT * (TORQUE * (action @ self.tasks.actuator.mT) - DAMPING * self.speed)
        self.q = self.q + DT * self.speed
        return self.observe(), -(fingertip(self.q) - self.tasks.goal[:, None]).norm(dim=-1)


def fingertip(q: Tensor) -> Tensor:
    """Where an arm ends: [..., 2] of its joints' angles, the second one relative to the first link."""
    return LINK * unit(q.cumsum(-1)).sum(-2)


def postures(goal: Tensor) -> Tensor:
    """Both pairs of angles with which the fingertip is at a goal: [2, ..., 2]."""
    bend = (goal.square().sum(-1) / (2 * LINK**2) - 1).clamp(-1, 1).acos()
    direction = torch.atan2(goal[..., 1], goal[..., 0])
    return torch.stack([torch.stack([direction - s * bend / 2, s * bend], -1) for s in (1, -1)])


class Scripted:
    """A controller that knows the task: a spring and a brake, to the posture that is nearest at the start."""

    def __init__(self, reacher: Reacher, stiffness: float = STIFFNESS, brake: float = BRAKE) -> None:
        self.reacher, self.stiffness, self.brake = reacher, stiffness, brake
        way = postures(reacher.tasks.goal)[:, :, None] - reacher.q
        way = torch.remainder(way + math.pi, 2 * math.pi) - math.pi
        self.target = (
            reacher.q + way.take_along_dim(way.norm(dim=-1, keepdim=True).argmin(0, keepdim=True), 0)[0]
        )

    def __call__(self) -> Tensor:
        torque = self.stiffness * (self.target - self.reacher.q) - self.brake * self.reacher.speed
        return torque @ self.reacher.tasks.actuator  # A^-1 = A^T


def episode(reacher: Reacher, act: Callable[[], Tensor]) -> float:
    """The mean sum of rewards from where the arms are."""
    return torch.stack([reacher.step(act())[1] for _ in range(STEPS)]).sum(0).mean().item()


def scripted_return(reacher: Reacher) -> float:
    reacher.reset()
    return episode(reacher, Scripted(reacher))


def random_return(reacher: Reacher) -> float:
    """Of actions drawn evenly from a square."""
    reacher.reset()
    return episode(reacher, lambda: torch.empty_like(reacher.q).uniform_(-1, 1, generator=reacher.rng))
