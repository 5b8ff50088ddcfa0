"""Proximal policy optimisation (Schulman et al., 2017) of a policy and a value, both told the task."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studies.reacher import STEPS, Reacher, Tasks

DISCOUNT = 0.9
TRACE = 0.9  # lambda of the generalised advantage (Schulman et al., 2016)
CLIP = 0.2
EPOCHS = 8
MINIBATCHES = 8
GRADIENT_NORM = 0.5
FIRST_STD = 0.6  # of actions

Told = Callable[[Tasks], Tensor]  # of the tasks, to the agent: the context of its networks


class Agent(nn.Module):
    """A Gaussian policy and a value: two networks called with x [T, N, X] and a context of each task.

    The standard deviation of an action is learned too, and depends on nothing.
    """

    def __init__(self, policy: nn.Module, value: nn.Module, actions: int) -> None:
        super().__init__()
        self.policy, self.value = policy, value
        self.log_std = nn.Parameter(torch.full((actions,), math.log(FIRST_STD)))

    def act(self, x: Tensor, context: Tensor) -> Tensor:
        """The mean of the action."""
        return self.policy(x, context).tanh()

    def judge(self, x: Tensor, context: Tensor) -> Tensor:
        """The discounted sum of future rewards, as the constant reward that would give it."""
        return self.value(x, context)[..., 0]

    def log_prob(self, action: Tensor, mean: Tensor) -> Tensor:
        error = (action - mean) / self.log_std.exp()
        return -(error.square() / 2 + self.log_std + math.log(2 * math.pi) / 2).sum(-1)


@dataclass(frozen=True)
class Rollout:
    """An episode of all arms, by tasks: [T, S, N, ...], but for S + 1 observations."""

    context: Tensor
    x: Tensor
    action: Tensor
    log_prob: Tensor
    reward: Tensor


@torch.no_grad()
def play(agent: Agent, reacher: Reacher, told: Told, rng: torch.Generator) -> Rollout:
    seen, steps = [reacher.reset()], []
    context = told(reacher.tasks)
    for _ in range(STEPS):
        mean = agent.act(seen[-1], context)
        action = mean + agent.log_std.exp() * torch.randn(mean.shape, generator=rng)
        x, reward = reacher.step(action)
        seen.append(x)
        steps.append((action, agent.log_prob(action, mean), reward))
    return Rollout(context, torch.stack(seen, 1), *(torch.stack(a, 1) for a in zip(*steps, strict=True)))


def advantages(reward: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantages of [T, S, N] rewards and [T, S + 1, N] values, and what the values are to be.

    An episode ends for want of time, which is not observed: the value goes on after it.
    """
    found, later = [], torch.zeros_like(value[:, 0])
    for t in reversed(range(reward.shape[1])):
        error = (1 - DISCOUNT) * reward[:, t] + DISCOUNT * value[:, t + 1] - value[:, t]
        later = error + DISCOUNT * TRACE * later
        found.append(later)
    advantage = torch.stack(found[::-1], 1)
    return advantage, advantage + value[:, :-1]


def improve(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    rng: torch.Generator,
    epochs: int = EPOCHS,
) -> None:
    """Passes over an episode, in minibatches that have as much of every task."""
    context = rollout.context
    with torch.no_grad():
        value = agent.judge(rollout.x.flatten(1, 2), context).unflatten(1, rollout.x.shape[1:3])
        advantage, target = (a.flatten(1) for a in advantages(rollout.reward, value))
        advantage = (advantage - advantage.mean()) / advantage.std()
    x, action = rollout.x[:, :-1].flatten(1, 2), rollout.action.flatten(1, 2)
    old = rollout.log_prob.flatten(1)
    for _ in range(epochs):
        for i in torch.randperm(x.shape[1], generator=rng).chunk(MINIBATCHES):
            gain = advantage[:, i]
            ratio = (agent.log_prob(action[:, i], agent.act(x[:, i], context)) - old[:, i]).exp()
            policy_loss = -torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
            value_loss = (agent.judge(x[:, i], context) - target[:, i]).square().mean()
            optimizer.zero_grad()
            (policy_loss + value_loss).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), GRADIENT_NORM)
            optimizer.step()


@torch.no_grad()
def mean_return(agent: Agent, reacher: Reacher, told: Told) -> float:
    """Of an episode of every arm, with the mean of each action."""
    x, total = reacher.reset(), torch.zeros(())
    context = told(reacher.tasks)
    for _ in range(STEPS):
        x, reward = reacher.step(agent.act(x, context))
        total += reward.mean()
    return total.item()


def learn(
    agent: Agent,
    reacher: Reacher,
    told: Told,
    rate: float,
    episodes: int,
    rng: torch.Generator,
    evaluate: Callable[[], float],
    epochs: int = EPOCHS,
) -> tuple[tuple[float, float], ...]:
    """Adam, whose rate falls to 0 in a line.

    Returns (environment steps, ``evaluate()``) at the start and after each episode of all arms.
    """
    optimizer = torch.optim.Adam(agent.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, episodes)
    curve, steps = [(0.0, evaluate())], 0
    for _ in range(episodes):
        rollout = play(agent, reacher, told, rng)
        improve(agent, optimizer, rollout, rng, epochs)
        schedule.step()
        steps += rollout.reward.numel()
        curve.append((float(steps), evaluate()))
    return tuple(curve)
