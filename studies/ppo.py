"""Proximal policy optimisation (Schulman et al., 2017) of a policy and a value of what is observed and of the task."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studies.reacher import STEPS, Reacher

DISCOUNT = 0.95
TRACE = 0.9  # lambda of the generalised advantage (Schulman et al., 2016)
CLIP = 0.2
EPOCHS = 4
MINIBATCHES = 4
GRADIENT_NORM = 0.5


class Agent(nn.Module):
    """A Gaussian policy, and a value: two networks called with x [T, N, X] and a row z of a learned table for each task.

    The standard deviation of an action is learned too, and does not depend on x.
    """

    def __init__(self, policy: nn.Module, value: nn.Module, tasks: int, context: int, actions: int) -> None:
        super().__init__()
        self.policy, self.value = policy, value
        self.policy_tasks, self.value_tasks = nn.Embedding(tasks, context), nn.Embedding(tasks, context)
        self.log_std = nn.Parameter(torch.full((actions,), math.log(0.6)))

    def act(self, x: Tensor) -> Tensor:
        """The mean of the action."""
        return self.policy(x, self.policy_tasks.weight).tanh()

    def judge(self, x: Tensor) -> Tensor:
        """The discounted sum of future rewards, in units of a mean reward."""
        return self.value(x, self.value_tasks.weight)[..., 0]


@dataclass(frozen=True)
class Rollout:
    """An episode of all arms: [S, T, N, ...] but for S + 1 observations."""

    x: Tensor
    action: Tensor
    log_prob: Tensor
    reward: Tensor


def log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return -(((action - mean) / log_std.exp()).square() / 2 + log_std + math.log(2 * math.pi) / 2).sum(-1)


@torch.no_grad()
def play(agent: Agent, reacher: Reacher, rng: torch.Generator) -> Rollout:
    seen, actions, probs, rewards = [reacher.reset()], [], [], []
    for _ in range(STEPS):
        mean = agent.act(seen[-1])
        action = mean + agent.log_std.exp() * torch.randn(mean.shape, generator=rng)
        x, reward = reacher.step(action)
        seen.append(x)
        actions.append(action)
        probs.append(log_prob(action, mean, agent.log_std))
        rewards.append(reward)
    return Rollout(torch.stack(seen), torch.stack(actions), torch.stack(probs), torch.stack(rewards))


@torch.no_grad()
def advantages(agent: Agent, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Generalised advantages, and what the value is to be.

    An episode ends for want of time, which is not observed: the value goes on after it.
    """
    values = agent.judge(by_task(rollout.x)).unflatten(1, (len(rollout.x), -1)).transpose(0, 1)
    found, later = [], torch.zeros_like(values[0])
    for t in reversed(range(len(rollout.reward))):
        error = (1 - DISCOUNT) * rollout.reward[t] + DISCOUNT * values[t + 1] - values[t]
        later = error + DISCOUNT * TRACE * later
        found.append(later)
    advantage = torch.stack(found[::-1])
    return advantage, advantage + values[:-1]


def by_task(x: Tensor) -> Tensor:
    """[T, S N, ...] of [S, T, N, ...]."""
    return x.transpose(0, 1).flatten(1, 2)


def improve(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, rng: torch.Generator) -> None:
    """EPOCHS passes over an episode, in minibatches that have as much of every task."""
    advantage, target = (by_task(a) for a in advantages(agent, rollout))
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    x, action, old = by_task(rollout.x[:-1]), by_task(rollout.action), by_task(rollout.log_prob)
    for _ in range(EPOCHS):
        for i in torch.randperm(x.shape[1], generator=rng).chunk(MINIBATCHES):
            ratio = (log_prob(action[:, i], agent.act(x[:, i]), agent.log_std) - old[:, i]).exp()
            a = advantage[:, i]
            policy_loss = -torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a).mean()
            value_loss = (agent.judge(x[:, i]) - target[:, i]).square().mean()
            optimizer.zero_grad()
            (policy_loss + value_loss).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), GRADIENT_NORM)
            optimizer.step()


@torch.no_grad()
def mean_return(agent: Agent, reacher: Reacher) -> float:
    """Of an episode of every arm, with the mean of each action."""
    x, total = reacher.reset(), torch.zeros(())
    for _ in range(STEPS):
        x, reward = reacher.step(agent.act(x))
        total = total + reward.mean()
    return total.item()


def learn(
    agent: Agent, reacher: Reacher, rate: float, episodes: int, rng: torch.Generator, evaluate: Callable[[], float]
) -> tuple[tuple[float, float], ...]:
    """Adam with a constant rate; (environment steps, evaluate()) at the start and after every episode of all arms."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=rate, fused=True)
    curve = [(0.0, evaluate())]
    for episode in range(1, episodes + 1):
        improve(agent, optimizer, play(agent, reacher, rng), rng)
        curve.append((float(episode * STEPS * len(reacher.tasks) * reacher.arms), evaluate()))
    return tuple(curve)
