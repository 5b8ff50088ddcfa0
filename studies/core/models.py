"""The competitors: ways to condition a network of x on a context z, by the public names of mi_kernels.

Each is called with x [..., X] and z [..., Z], whose leading dimensions broadcast, and gives y [..., O].
``width`` is the number of its hidden units, by which ``fitted`` makes models of equal size.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import mi_kernels as mi

MOST_UNITS = 1 << 16


class Concat(nn.Module):
    """An MLP of both side by side: [x; z] -> hidden layers -> y."""

    def __init__(self, x: int, z: int, out: int, width: int, depth: int = 2) -> None:
        super().__init__()
        sizes = [x + z, *[width] * depth]
        hidden = [
            layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())
        ]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, out))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.layers(torch.cat([x, z.expand(*x.shape[:-1], -1)], -1))


class Film(nn.Module):
    """An MLP of x whose hidden units z scales and shifts (Perez et al., 2018)."""

    def __init__(self, x: int, z: int, out: int, width: int, depth: int = 2) -> None:
        super().__init__()
        sizes = [x, *[width] * depth]
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.film = nn.ModuleList(mi.nn.FiLM(width, context_features=z, channel_dim=-1) for _ in range(depth))
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        for linear, film in zip(self.linear, self.film, strict=True):
            x = torch.relu(film(linear(x), z))
        return self.out(x)


class Gated(nn.Module):
    """An MLP of x whose hidden units a sigmoid of z gates: the diagonal form, without a shift."""

    def __init__(self, x: int, z: int, out: int, width: int, depth: int = 2) -> None:
        super().__init__()
        sizes = [x, *[width] * depth]
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.gate = nn.ModuleList(
            mi.nn.DiagonalInteraction(width, context_features=z, activation="sigmoid", shift=False)
            for _ in range(depth)
        )
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        for linear, gate in zip(self.linear, self.gate, strict=True):
            x = torch.relu(gate(linear(x), z))
        return self.out(x)


class Hyper(nn.Module):
    """A hypernetwork: a hidden layer of z, no narrower than z, generates both layers (Ha et al., 2017)."""

    def __init__(self, x: int, z: int, out: int, width: int) -> None:
        super().__init__()
        hidden = max(8, z)
        network = nn.Sequential(nn.Linear(z, hidden), nn.ReLU())
        self.layers = mi.nn.HyperMLP([x, width, out], context_features=hidden, context_network=network)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.layers(x, z)


class Dense(nn.Module):
    """A hidden layer and a last one, of which the first, last or both are dense interactions with z."""

    def __init__(
        self, x: int, z: int, out: int, width: int, where: Literal["first", "last", "each"] = "first"
    ) -> None:
        super().__init__()
        self.meets_z = where in ("first", "each"), where in ("last", "each")
        sizes = (x, width), (width, out)
        self.layers = nn.ModuleList(
            mi.nn.MultiplicativeInteraction(a, context_features=z, out_features=b)
            if meets
            else nn.Linear(a, b)
            for (a, b), meets in zip(sizes, self.meets_z, strict=True)
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        first, last = self.layers
        x = torch.relu(first(x, z) if self.meets_z[0] else first(x))
        return last(x, z) if self.meets_z[1] else last(x)


class LowRank(nn.Module):
    """Dense, with a factorised W of as many terms as hidden units."""

    def __init__(self, x: int, z: int, out: int, width: int) -> None:
        super().__init__()
        self.interaction = mi.nn.LowRankInteraction(
            x, context_features=z, out_features=width, rank=width, weight_z=True, weight_x=True
        )
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.out(torch.relu(self.interaction(x, z)))


KINDS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "dense MI, last layer": partial(Dense, where="last"),
    "dense MI, each layer": partial(Dense, where="each"),
    "low-rank MI": LowRank,
    "hypernetwork": Hyper,
    "FiLM": Film,
    "gated": Gated,
    "concat": Concat,
}


class Embedded(nn.Module):
    """A model whose context is a row of a table, one for each task, that it learns with the rest."""

    def __init__(self, model: nn.Module, tasks: int, z: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tasks, z)
        self.model = model

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return self.model(x, self.embedding(task))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def width_for(make: Callable[[int], nn.Module], least: int) -> int:
    """The smallest width with which ``make(width)`` has at least so many parameters: they grow with it."""
    with torch.device("meta"):
        low, high = 1, 1
        while parameters(make(high)) < least:
            low, high = high + 1, high * 2
            if high > MOST_UNITS:
                raise ValueError(f"width_for: no model of at most {MOST_UNITS} units has {least} parameters")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if parameters(make(middle)) >= least else (middle + 1, high)
    return high


def smallest(make: Callable[[int], nn.Module], least: int) -> nn.Module:
    """The smallest of the models ``make(width)`` with no fewer than ``least`` parameters."""
    return make(width_for(make, least))


def fitted(kind: str, x: int, z: int, out: int, least: int) -> nn.Module:
    """The smallest model of a kind with no fewer than ``least`` parameters."""
    return smallest(partial(KINDS[kind], x, z, out), least)
