"""32 regression tasks y = a_t.x + b_t learned together, from a learned embedding of the task.

    python examples/hyper_tasks.py

A hypernetwork makes the layer of each task from its embedding: the tasks are linear in x, and the layer can
be exactly that. The usual alternative, an MLP that sees x and the embedding side by side, has to make
products of the two out of sums and relus. Both have the same number of parameters, embeddings included.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import mi_kernels as mi

TASKS, WIDTH, EMBEDDING, ROWS = 32, 16, 16, 32


class Hyper(nn.Module):
    """y of all tasks [T, N], from x [T, N, X]: the rows of a task share its context."""

    def __init__(self) -> None:
        super().__init__()
        embedding = nn.Embedding(TASKS, EMBEDDING)
        self.layer = mi.nn.HyperLinear(
            WIDTH, out_features=1, context_features=EMBEDDING, context_network=embedding
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, torch.arange(TASKS).unsqueeze(1)).squeeze(-1)


class Concat(nn.Module):
    """The same from an MLP of x and the embedding side by side."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TASKS, EMBEDDING)
        self.layers = nn.Sequential(nn.Linear(WIDTH + EMBEDDING, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:
        task = self.embedding.weight.unsqueeze(1).expand(TASKS, x.shape[1], EMBEDDING)
        return self.layers(torch.cat([x, task], -1)).squeeze(-1)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make(name: str) -> nn.Module:
    """The hypernetwork, or the smallest MLP with no fewer parameters."""
    hyper = Hyper()
    if name == "hyper":
        return hyper
    return next(model for model in map(Concat, range(1, 1000)) if parameters(model) >= parameters(hyper))


def train(name: str, seed: int, steps: int) -> list[float]:
    """Mean squared errors on fresh inputs, from time to time and at the end; y has variance 1 or so."""
    torch.manual_seed(seed)
    slopes, offsets = torch.randn(TASKS, 1, WIDTH) * WIDTH**-0.5, torch.randn(TASKS, 1) * 0.5
    held_out = torch.randn(TASKS, 256, WIDTH)
    model = make(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    errors = []
    for step in range(steps):
        x = torch.randn(TASKS, ROWS, WIDTH)
        loss = (model(x) - (slopes * x).sum(-1) - offsets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(steps // 50, 1) == 0 or step == steps - 1:
            with torch.no_grad():
                truth = (slopes * held_out).sum(-1) + offsets
                errors.append((model(held_out) - truth).square().mean().item())
    return errors


def plot(curves: dict[str, list[list[float]]], steps: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for color, (name, runs) in zip(("tab:blue", "tab:orange"), curves.items(), strict=True):
        for number, errors in enumerate(runs):
            places = torch.linspace(0, steps, len(errors)).tolist()
            axes.plot(places, errors, color=color, label=None if number else name)
    axes.set(xlabel="step", ylabel="mean squared error, held out", yscale="log", title=f"{TASKS} tasks")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("hyper_tasks.png"))
    options = parser.parse_args(argv)
    curves: dict[str, list[list[float]]] = {"hyper": [], "concat": []}
    for name, runs in curves.items():
        print(f"{name}: {parameters(make(name))} parameters")
        for seed in range(options.seeds):
            runs.append(train(name, seed, options.steps))
            print(f"  seed {seed}: mean squared error {runs[-1][-1]:.2e}")
    plot(curves, options.steps, options.output)
    worst = max(one[-1] / other[-1] for one, other in zip(*curves.values(), strict=True))
    print(f"error of the hypernetwork by that of the MLP, worst seed: {worst:.2e} (wanted: at most 0.2)")
    print(f"plot: {options.output}")
    return int(worst > 0.2)


if __name__ == "__main__":
    raise SystemExit(main())
