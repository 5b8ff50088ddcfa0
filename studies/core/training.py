"""Random streams, and one training loop for all supervised studies."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

Curve = tuple[tuple[float, float], ...]
POINTS = 20  # of a curve


def stream(seed: int, purpose: str) -> torch.Generator:
    """Random numbers of their own for each purpose.

    Two generators with the same seed give the same numbers: weights drawn like the truth that they are to
    find would start with knowledge of it.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(
        int.from_bytes(digest[:4])
    )  # the generator keeps no more than 32 bits


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    rate: float,
    steps: int,
    evaluate: Callable[[], float] | None = None,
    *,
    clip: float = 1.0,
    points: int = POINTS,
) -> Curve:
    """Adam with a rate that falls to 0 along a cosine, and gradients of norm ``clip`` at most.

    ``loss(step)`` draws a batch and gives its loss. Returns the values of ``evaluate()``, without gradients,
    at ``points`` steps evenly spaced and after the last one.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        if evaluate is not None and (step % max(steps // points, 1) == 0 or step == steps):
            model.eval()
            with torch.no_grad():
                curve.append((float(step), float(evaluate())))
            model.train()
    return tuple(curve)
