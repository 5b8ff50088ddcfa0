"""Products and distances: which network has them in few parameters, and how that grows with the dimension."""

import math
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import mi_kernels as mi
from studies.core.colours import COLOURS
from studies.core.models import fitted, parameters, smallest
from studies.core.study import Claim, Outcome, Results, Study, Trial
from studies.core.training import fit, stream

BATCH, STEPS, TEST = 256, 2000, 20_000
RATES = (5e-4, 2e-3, 8e-3, 3e-2, 1e-1, 3e-1)
PRODUCTS, DISTANCES = (2, 4, 8, 16, 32, 64), (2, 8, 64)
CLAIMED, FEW = 8, 2000  # the dimension and the parameters of the seed's claim
ENOUGH = 0.1  # of the variance: an error at which a size is large enough

OURS, PLAIN = "dense MI", "dense MI, one layer"
TIMES = {"MLP 1x": 1, "MLP 3x": 3, "MLP 6x": 6, "MLP 12x": 12, "MLP 24x": 24}
DEEP = "MLP 1x, 2 hidden silu"  # for the distance: squares, then a root
LADDER = tuple(TIMES)[:3]  # of MLPs, for every dimension
ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh}
# All below FEW parameters, so that "no MLP" is a search.
SEARCHED = {
    f"MLP 24x, {depth} hidden {activation}": (activation, depth)
    for depth in (1, 2)
    for activation in ACTIVATIONS
    if (activation, depth) != ("silu", 1)  # MLP 24x itself
}


def kind_of(task: str) -> tuple[str, int]:
    """("product" or "distance", d)."""
    kind, d = task.split(" d=")
    return kind, int(d)


def models(task: str) -> list[str]:
    kind, d = kind_of(task)
    if kind == "distance":
        return [OURS, PLAIN, *LADDER[:2], DEEP]
    if d == CLAIMED:
        return [OURS, "diagonal MI", "low-rank MI", "FiLM", "gated", *TIMES, *SEARCHED]
    return [OURS, *LADDER]


class Diagonal(nn.Module):
    """The features of x, each times a linear function of z, and a linear layer: o . ((A z + a) x)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.interaction = mi.nn.DiagonalInteraction(d, context_features=d, shift=False)
        self.out = nn.Linear(d, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.out(self.interaction(x, z))


class Quadratic(nn.Module):
    """An interaction of s = [x; z] with itself, so all squares and products, and a small network of it."""

    def __init__(self, d: int, width: int = 8) -> None:
        super().__init__()
        self.interaction = mi.nn.MultiplicativeInteraction(2 * d, context_features=2 * d, out_features=1)
        self.out = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        s = torch.cat([x, z], -1)
        return self.out(self.interaction(s, s))


class Mlp(nn.Module):
    """[x; z] -> hidden layers -> y."""

    def __init__(self, d: int, width: int, activation: str = "silu", depth: int = 1) -> None:
        super().__init__()
        sizes = [2 * d, *[width] * depth]
        hidden = [
            layer
            for a, b in zip(sizes, sizes[1:], strict=False)
            for layer in (nn.Linear(a, b), ACTIVATIONS[activation]())
        ]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.layers(torch.cat([x, z], -1))


def plain(d: int) -> nn.Module:
    return mi.nn.MultiplicativeInteraction(d, context_features=d, out_features=1)


def low_rank(d: int, rank: int) -> nn.Module:
    return mi.nn.LowRankInteraction(d, context_features=d, out_features=1, rank=rank)


def ours(task: str) -> nn.Module:
    kind, d = kind_of(task)
    return Quadratic(d) if kind == "distance" else plain(d)


def build(task: str, model: str) -> nn.Module:
    d = kind_of(task)[1]
    if model == OURS:
        return ours(task)
    if model == PLAIN:
        return plain(d)
    if model == "diagonal MI":
        return Diagonal(d)
    least = parameters(ours(task))
    if model in ("FiLM", "gated"):
        return fitted(model, d, d, 1, least)
    if model == "low-rank MI":
        return smallest(partial(low_rank, d), least)
    activation, depth = SEARCHED.get(model, ("silu", 2 if model == DEEP else 1))
    return smallest(lambda width: Mlp(d, width, activation, depth), TIMES[model.partition(",")[0]] * least)


def moments(task: str) -> tuple[float, float]:
    """Mean and variance of the target: x - z has variance 2, and ||x - z|| is sqrt(2) times a chi."""
    kind, d = kind_of(task)
    if kind == "product":
        return 0.0, float(d)
    mean = 2 * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    return mean, 2 * d - mean**2


def target(task: str, x: Tensor, z: Tensor) -> Tensor:
    """Of x, z [B, d]: [B], with mean 0 and variance 1."""
    mean, variance = moments(task)
    y = (x * z).sum(-1) if kind_of(task)[0] == "product" else torch.linalg.vector_norm(x - z, dim=-1)
    return (y - mean) / math.sqrt(variance)


def train(trial: Trial) -> Outcome:
    torch.manual_seed(trial.seed)  # of the weights
    d = kind_of(trial.task)[1]
    model = build(trial.task, trial.model)
    data = stream(trial.seed, "data")

    def error(rows: int) -> Tensor:
        x, z = torch.randn(2, rows, d, generator=data)
        return (model(x, z).squeeze(-1) - target(trial.task, x, z)).square().mean()

    fit(model, lambda step: error(BATCH), trial.rate, 40 if trial.quick else STEPS)
    with torch.no_grad():
        score = float(error(TEST))
    figures = {"MSE": score * moments(trial.task)[1]}
    return Outcome(parameters(model), score, figures=figures)


def needed(results: Results, task: str, family: str, seed: int, enough: float = ENOUGH) -> float:
    """Parameters with which a model, or the MLPs from small to large, have an error; infinite if none has.

    Between the last MLP that misses it and the first that has it, log(parameters) is linear in log(error).
    """
    ladder = [name for name in LADDER if name in results.models(task)] if family == "MLP" else [family]
    before: tuple[float, float] | None = None
    for name in ladder:
        record = results.of(task, name)[seed]
        size, excess = math.log(record.parameters), math.log(max(record.score, 1e-30) / enough)
        if excess <= 0:
            part = 0.0 if before is None else before[1] / (before[1] - excess)
            return math.exp(size if before is None else before[0] + part * (size - before[0]))
        if excess < math.inf:
            before = size, excess
    return math.inf


def all_needed(results: Results, task: str, family: str, enough: float = ENOUGH) -> list[float]:
    """Of each seed."""
    return [needed(results, task, family, seed, enough) for seed in range(len(results.of(task, OURS)))]


def growth(results: Results, products: list[str]) -> list[Claim]:
    """What an MLP needs for x.z, as a multiple of our parameters, over d."""
    times = {
        kind_of(task)[1]: median(all_needed(results, task, "MLP")) / results.parameters(task, OURS)
        for task in products
    }
    listed = ", ".join(f"{value:.1f} (d = {d})" for d, value in times.items())
    largest = max(times)
    claims = [
        Claim(
            "To 10 % of the variance of x.z an MLP needs at least twice our parameters at every d.",
            "medians of 2 or more",
            listed,
            2 <= min(times.values()) and max(times.values()) < math.inf,
        )
    ]
    if CLAIMED in times and largest > CLAIMED:
        claims.append(
            Claim(
                "That multiple grows with d.",
                f"at d = {largest} at least twice that of d = {CLAIMED}",
                f"{times[largest]:.2f} after {times[CLAIMED]:.2f}",
                2 * times[CLAIMED] <= times[largest] < math.inf,
            )
        )
    return claims


def claims(results: Results) -> list[Claim]:
    found = []
    products = [task for task in results.tasks if kind_of(task)[0] == "product"]
    distances = [task for task in results.tasks if kind_of(task)[0] == "distance"]
    claimed = f"product d={CLAIMED}"
    if claimed in results.tasks:
        error, size = mse(results, claimed, OURS), results.parameters(claimed, OURS)
        found.append(
            Claim(
                f"The MI layer has x.z at d = {CLAIMED} with 81 parameters.",
                "81 parameters, median MSE < 0.001",
                f"{size} parameters, {error:.2g}",
                size == 81 and error < 1e-3,
            )
        )
        small = [
            name
            for name in results.models(claimed)
            if name.startswith("MLP") and results.parameters(claimed, name) < FEW
        ]
        best = min(small, key=lambda name: mse(results, claimed, name))
        least = [name for name in small if mse(results, claimed, name) < 0.1]
        first = min((results.parameters(claimed, name) for name in least), default=None)
        says = f", under 0.1 from {first} parameters on" if first else ""
        found.append(
            Claim(
                f"No MLP with fewer than {FEW} parameters comes under MSE 0.1 there.",
                f"median MSE > 0.1 for all {len(small)}",
                f"{mse(results, claimed, best):.2g} ({best}){says}",
                mse(results, claimed, best) > 0.1,
            )
        )
    if len(products) > 1:
        found += growth(results, products)
    for task in distances:
        rival = min(("MLP 1x", DEEP), key=lambda name: results.median(task, name))
        wins = f"better in {results.wins(task, OURS, rival)} of {len(results.of(task, OURS))} seeds"
        found.append(
            Claim(
                f"||x - z||, d = {kind_of(task)[1]}: less error than the better MLP of equal size.",
                "smaller error in the median",
                f"{results.median(task, OURS):.2g} of the variance against {results.median(task, rival):.2g}"
                f" ({rival}), {wins}",
                results.median(task, OURS) < results.median(task, rival),
            )
        )
    return found


def mse(results: Results, task: str, model: str) -> float:
    return results.median(task, model) * moments(task)[1]


def draw(axes: Any, results: Results) -> None:
    """Error of x.z against parameters: the interaction, and MLPs of one hidden layer, for each d."""
    products = [task for task in results.tasks if kind_of(task)[0] == "product"]
    for place, task in enumerate(products):
        ladder = [name for name in TIMES if name in results.models(task)]
        shade = 0.35 + 0.65 * (place + 1) / len(products)
        _line(axes, results, task, ladder, COLOURS["concat"], shade, "o-", f"MLP, d = {kind_of(task)[1]}")
        _line(
            axes, results, task, [OURS], COLOURS[OURS], shade, "*", "" if place else "dense MI, d = 2 to 64"
        )
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="error (share of the variance of x.z)")
    axes.legend(fontsize=8, loc="center right")
    axes.grid(alpha=0.3)


def _line(
    axes: Any, results: Results, task: str, names: list[str], tint: str, shade: float, mark: str, label: str
) -> None:
    """Medians, and the interval of each as a bar."""
    middle = [results.median(task, name) for name in names]
    ends = [results.interval(task, name) for name in names]
    lengths = [(m - low, high - m) for m, (low, high) in zip(middle, ends, strict=True)]
    axes.errorbar(
        [results.parameters(task, name) for name in names], middle, list(zip(*lengths, strict=True)),
        fmt=mark, markersize=9 if mark == "*" else 4, color=tint, alpha=shade, linewidth=1.2, label=label,
    )  # fmt: skip


STATEMENT = f"""
Learn the product x.z and the distance ||x - z|| of x, z ~ N(0, 1) in d dimensions. The target is brought to
mean 0 and variance 1 by its exact moments; the score is the mean squared error, so a share of the variance,
on {TEST:,} fresh pairs; `MSE` is in the target's own units.

For the product ours is one `MultiplicativeInteraction` with one output, y = z^T W x + u.z + v.x + c: (d +
1)^2 parameters, 81 at d = 8. It has no x_i^2, which the distance needs, so there ours is the interaction of
s = [x; z] with itself, one number s^T W s + u.s + c, and eight silus of it for the root; "one layer" is the
plain layer on the distance. An MLP takes [x; z]; "MLP 6x" has one hidden layer of silu (x sigmoid(x)) and
at least six times our parameters. At d = 8 there are more: diagonal MI (o.((A z + a) x)), low-rank MI, FiLM
and gated networks with our number of parameters, and MLPs just under {FEW:,} parameters with one and two
hidden layers of silu, relu and tanh.

Adam, {STEPS:,} steps on {BATCH} fresh pairs each, the rate falls to 0 along a cosine; the rate is chosen
from {", ".join(f"{rate:g}" for rate in RATES)} by a seed of its own. The other seeds draw other data and
weights.
"""

SHOWS = """
x.z is in the layer's own family, so its error ends at the rounding of float32, at every d. An MLP can only
come near, but nearer than the claim says: with a smooth activation (the sum of silu(s) and silu(-s) is
almost a square near 0) fewer than 1,000 parameters are under MSE 0.1 at d = 8. That part of the claim does
not hold; with one hidden layer of relu it does not hold either, but barely. The parameters that an MLP
needs to 10 % of the variance grow as ours do, as d^2, from d = 8 on with a nearly constant factor: the
advantage is a factor, and exactness, not another order.

That the layer is dense is not the point: o.((A z + a) x), a diagonal interaction and a linear layer, has
x.z with as many parameters. A factorised W of as many parameters does not: x.z has full rank d, and what is
left over is the share of the missing rank. FiLM and gated networks of 97 to 99 parameters are no better
than an MLP, as there is a relu between the product and y. A hypernetwork whose generated layer is affine is
the layer itself.

The plain layer misses the distance: it has no squares. An interaction of [x; z] with itself has them; its
error is then that of eight silus for a square root. From d = 8 on it is far ahead of MLPs of its size. At d
= 2 it is ahead with three seeds of five, and one of the others fails altogether. With eight relus instead
of silus, as we tried first, its error was several times larger.

Not shown: data that are no normal noise, training sets that end (each batch here is new), or MLPs trained
for longer than these steps; they gain from it.
"""

STUDY = Study(
    name="compact",
    title="Compact representation of products and distances",
    statement=STATEMENT,
    metric="test error (share of the target's variance)",
    better="lower",
    tasks=[*(f"product d={d}" for d in PRODUCTS), *(f"distance d={d}" for d in DISTANCES)],
    models=models,
    rates=RATES,
    train=train,
    claims=claims,
    draw=draw,
    shows=SHOWS,
    quick_tasks=["distance d=2", "product d=2"],
    figures=("MSE",),
)
