"""A planar arm with two joints that reaches for points: several tasks, hundreds of arms at once, in tensors.

Tasks share what is observed and differ in what is not: where the goal is, and in which direction each action turns
the joints.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 32  # of an episode
DT = 0.1  # s
TORQUE = 6.0  # rad / s^2 of an action of norm 1
DAMPING = 1.0  # 1 / s
LINK = 0.5  # both of them, in m
FEATURES = 6
ACTIONS = 2
STIFFNESS, BRAKE = 8.0, 1.6  # of the scripted controller
FAMILIES = ("goals", "goals and actuators")


@dataclass(frozen=True)
class Tasks:
    """What the tasks differ in: ``goal`` [T, 2]; ``actuator`` [T, 2, 2], orthogonal."""

    goal: Tensor
    actuator: Tensor

    def __len__(self) -> int:
        return len(self.goal)


def draw_tasks(family: str, tasks: int, seed: int) -> Tasks:
    """Goals evenly over the ring of radii 0.3 to 0.9; actuators are I, or rotations by any angle, half reflected."""
    if family not in FAMILIES:
        raise ValueError(f"draw_tasks: family must be one of {FAMILIES}, got {family!r}")
    rng = torch.Generator().manual_seed(seed)
    radius = torch.empty(tasks).uniform_(0.3**2, 0.9**2, generator=rng).sqrt()
    angle = torch.empty(tasks).uniform_(-math.pi, math.pi, generator=rng)
    turn = torch.empty(tasks).uniform_(-math.pi, math.pi, generator=rng)
    goal = radius[:, None] * unit(angle)
    if family == "goals":
        return Tasks(goal, torch.eye(2).expand(tasks, 2, 2))
    side = torch.ones(tasks)
    side[torch.randperm(tasks, generator=rng)[: tasks // 2]] = -1
    first = unit(turn)
    second = side[:, None] * unit(turn + math.pi / 2)
    return Tasks(goal, torch.stack([first, second], -1))


def unit(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


class Reacher:
    """N arms for each of T tasks, all in step: q, dq [T, N, 2].

    An action u, shortened to norm 1 if it is longer, turns the joints by q'' = TORQUE A u - DAMPING q', in steps of
    DT (semi-implicit Euler). The reward of a step is minus the distance of the fingertip from the goal after it.
    """

    def __init__(self, tasks: Tasks, arms: int, seed: int) -> None:
        self.tasks, self.arms = tasks, arms
        self.rng = torch.Generator().manual_seed(seed)
        self.actuator = tasks.actuator.mT.contiguous()  # as rows are multiplied by it
        self.goal = tasks.goal[:, None]

    def reset(self) -> Tensor:
        """Arms at rest, in postures drawn evenly over all angles."""
        shape = len(self.tasks), self.arms, 2
        self.q = torch.empty(shape).uniform_(-math.pi, math.pi, generator=self.rng)
        self.dq = torch.zeros(shape)
        return self.observe()

    def observe(self) -> Tensor:
        """Cosine and sine of both joints' angles, and their speeds: [T, N, FEATURES]."""
        return torch.cat([self.q.cos(), self.q.sin(), self.dq / 4], -1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """What is observed next, and the reward [T, N]."""
        action = action / action.norm(dim=-1, keepdim=True).clamp_min(1)
        acceleration = TORQUE * (action @ self.actuator) - DAMPING * self.dq
        self.dq = self.dq + DT * acceleration
        self.q = self.q + DT * self.dq
        return self.observe(), -(fingertip(self.q) - self.goal).norm(dim=-1)


def fingertip(q: Tensor) -> Tensor:
    """Where the arm ends: [..., 2] of the joints' angles, the second one relative to the first link."""
    return LINK * (unit(q[..., 0]) + unit(q.sum(-1)))


def wrapped(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def postures(goal: Tensor) -> Tensor:
    """Both pairs of angles with which the fingertip is at a goal: [2, ..., 2]."""
    bend = (goal.square().sum(-1) / (2 * LINK**2) - 1).clamp(-1, 1).acos()
    direction = torch.atan2(goal[..., 1], goal[..., 0])
    return torch.stack([torch.stack([direction - s * bend / 2, s * bend], -1) for s in (1, -1)])


class Scripted:
    """A controller that knows the task: proportional and derivative, to the posture that is nearest at the start."""

    def __init__(self, reacher: Reacher, stiffness: float = STIFFNESS, brake: float = BRAKE) -> None:
        self.reacher, self.stiffness, self.brake = reacher, stiffness, brake
        way = wrapped(postures(reacher.goal) - reacher.q)  # [2, T, N, 2]
        nearest = way.norm(dim=-1).argmin(0)
        self.target = reacher.q + torch.where(nearest[..., None] == 0, way[0], way[1])

    def __call__(self, _: Tensor) -> Tensor:
        torque = self.stiffness * (self.target - self.reacher.q) - self.brake * self.reacher.dq
        return torque @ self.reacher.tasks.actuator  # A^-1 = A^T


def random_return(tasks: Tasks, arms: int, seed: int) -> float:
    """Of actions drawn evenly from the square of [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    reacher = Reacher(tasks, arms, seed)
    reacher.reset()
    return sum(reacher.step(2 * torch.rand(reacher.q.shape, generator=rng) - 1)[1] for _ in range(STEPS)).mean().item()


def scripted_return(tasks: Tasks, arms: int, seed: int) -> float:
    reacher = Reacher(tasks, arms, seed)
    observed = reacher.reset()
    control = Scripted(reacher)
    return sum(reacher.step(control(observed))[1] for _ in range(STEPS)).mean().item()
