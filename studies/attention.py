"""Masks of features by x and z together, y = m(x, z) * x: who learns them, and which bounded mask is best."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mi_kernels as mi
from studies.core import plots
from studies.core.models import fitted, parameters, smallest
from studies.core.study import Claim, Outcome, Results, Study, Trial
from studies.core.training import fit, stream

X = Z = 16
BATCH, STEPS, TEST = 256, 2000, 8192
RATES = (2e-3, 6e-3, 2e-2, 6e-2, 2e-1)
TASKS = ("bilinear", "switch", "network", "z alone")
PRODUCTS = TASKS[:2]  # products of z and x decide
TEACHER = 64  # hidden units of the task "network"

OURS = "dense MI"  # sigmoid
CLEARLY = 0.9  # less than that is a tie
BOUNDED = {OURS: "sigmoid", "MI hardsigmoid": "hardsigmoid", "MI tanh": "tanh", "MI softmax": "softmax"}
RIVALS = ("low-rank MI", "concat mask", "gated", "diagonal", "FiLM", "concat")
MODELS = (*BOUNDED, *RIVALS)
CONCATENATED, GATES = ("concat mask", "concat"), ("gated", "diagonal")


def models(task: str) -> list[str]:
    """The bounded masks where a product decides; the small gate where nothing more is needed."""
    left_out = {"diagonal"} if task in PRODUCTS else set(BOUNDED) - {OURS}
    if task == "network":
        left_out.add("diagonal")
    return [model for model in MODELS if model not in left_out]


class Masks:
    """The masks of a task: of x [B, X], z [B, Z] to 0 or 1, [B, X]. Each is open half of the time."""

    def __init__(self, task: str, random: torch.Generator) -> None:
        self.task = task

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        if task == "bilinear":
            self.weight = draw(X, Z, X)
        elif task == "switch":
            self.looked_at = torch.randperm(X, generator=random)  # [Z]
            self.sign = draw(Z, X).sign()
        elif task == "network":
            self.hidden, self.out = draw(TEACHER, X + Z) / (X + Z) ** 0.5, draw(X, TEACHER)
        elif task == "z alone":
            self.weight = draw(X, Z)
        else:
            raise ValueError(f"attention: unknown task {task!r}")

    def context(self, rows: int, random: torch.Generator) -> Tensor:
        """z: numbers, or in the task "switch" one of Z questions."""
        if self.task == "switch":
            return nn.functional.one_hot(torch.randint(Z, (rows,), generator=random), Z).float()
        return torch.randn(rows, Z, generator=random)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        if self.task == "bilinear":
            score = torch.einsum("bi,oij,bj->bo", z, self.weight, x)
        elif self.task == "switch":
            question = z.argmax(-1)
            score = self.sign[question] * x.gather(1, self.looked_at[question].unsqueeze(-1))
        elif self.task == "network":
            score = torch.tanh(3 * torch.cat([x, z], -1) @ self.hidden.T) @ self.out.T
        else:
            score = z @ self.weight.T
        return (score > 0).float()


class Scaled(nn.Module):
    """A masked x, times a number that is learned."""

    def __init__(self, masked: nn.Module, scale: float) -> None:
        super().__init__()
        self.masked = masked
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.scale * self.masked(x, z)


class LowRankMask(nn.Module):
    """sigmoid of a low-rank interaction, times x."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.logits = mi.nn.LowRankInteraction(
            X, context_features=Z, out_features=X, rank=rank, weight_z=True, weight_x=True
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return mi.modulate(x, self.logits(x, z), activation="sigmoid")


class NetworkMask(nn.Module):
    """sigmoid of an MLP of [x; z], or of z, times x; the MLP has two hidden layers."""

    def __init__(self, width: int, with_x: bool) -> None:
        super().__init__()
        self.with_x = with_x
        seen = X + Z if with_x else Z
        self.logits = nn.Sequential(
            nn.Linear(seen, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, X)
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return mi.modulate(x, self.logits(torch.cat([x, z], -1) if self.with_x else z), activation="sigmoid")


def ours(activation: str = "sigmoid") -> nn.Module:
    gate = mi.nn.GatedInteraction(X, context_features=Z, activation=activation)  # type: ignore[arg-type]
    # A softmax of X features has a mean of 1 / X.
    return Scaled(gate, float(X) if activation == "softmax" else 1.0)


def build(model: str) -> nn.Module:
    if model in BOUNDED:
        return ours(BOUNDED[model])
    if model == "diagonal":
        return Scaled(
            mi.nn.DiagonalInteraction(X, context_features=Z, activation="sigmoid", shift=False), 1.0
        )
    least = parameters(ours())
    if model in ("FiLM", "concat"):
        return fitted(model, X, Z, X, least)
    makes: dict[str, Callable[[int], nn.Module]] = {
        "low-rank MI": LowRankMask,
        "concat mask": partial(NetworkMask, with_x=True),
        "gated": partial(NetworkMask, with_x=False),
    }

    def make(width: int) -> nn.Module:
        return Scaled(makes[model](width), 1.0)

    return smallest(make, least)


def train(trial: Trial) -> Outcome:
    torch.manual_seed(trial.seed)  # of the weights
    data = stream(trial.seed, "data")
    masks = Masks(trial.task, data)
    model = build(trial.model)

    def draw(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        x, z = torch.randn(rows, X, generator=data), masks.context(rows, data)
        return x, z, masks(x, z)

    def loss(step: int) -> Tensor:
        x, z, mask = draw(BATCH)
        return (model(x, z) - mask * x).square().mean()

    fit(model, loss, trial.rate, 30 if trial.quick else STEPS)
    with torch.no_grad():
        x, z, mask = draw(TEST)
        y = model(x, z)
        error = float((y - mask * x).square().mean() / (mask * x).square().mean())
        # A feature passes where y is nearer to x than to 0: so networks without a mask have one too.
        accuracy = float(((y * x > x.square() / 2) == mask.bool()).float().mean())
    return Outcome(parameters(model), error, figures={"mask accuracy": accuracy})


def claims(results: Results) -> list[Claim]:
    found = []
    for task in results.tasks:
        if task == "z alone":
            continue
        medians = {name: results.median(task, name) for name in (OURS, *CONCATENATED)}
        found.append(
            Claim(
                f'Mask "{task}": ours has less error than the concat mask and the MLP of equal size.',
                f"a median of at most {CLEARLY} of each of the two",
                f"{listed(medians)}; better than the concat mask"
                f" in {results.wins(task, OURS, CONCATENATED[0])} of {len(results.of(task, OURS))} seeds",
                all(medians[OURS] <= CLEARLY * medians[name] for name in CONCATENATED),
            )
        )
        if task not in PRODUCTS:
            continue
        bounded = {name: results.median(task, name) for name in BOUNDED}
        closing, others = list(bounded.values())[:2], list(bounded.values())[2:]
        found.append(
            Claim(
                f'Mask "{task}": activations with limits 0 and 1 are better than tanh and softmax.',
                "sigmoid and hardsigmoid with smaller medians than the other two",
                listed({BOUNDED[name]: value for name, value in bounded.items()}),
                max(closing) < min(others),
            )
        )
    if "z alone" in results.tasks:
        medians = {name: results.median("z alone", name) for name in (OURS, *GATES)}
        found.append(
            Claim(
                "Where the mask depends on z alone, a gate by z alone is at least as good.",
                "a gate by z with an error no larger than ours",
                listed(medians),
                min(medians[name] for name in GATES) <= medians[OURS],
            )
        )
    return found


def listed(medians: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in medians.items())


def draw(axes: Any, results: Results) -> None:
    """The error of each model in each task, with the interval as a bar."""
    plots.dots(axes, results)
    axes.axhline(0.5, color="#8d99ae", linewidth=0.8, linestyle=":", label="y = x / 2")
    axes.set_yscale("log")
    axes.set_ylim(top=8)  # room for the legend
    axes.set_xlabel("what decides the mask")
    axes.set_ylabel("error / E (m x)²")
    axes.legend(fontsize="x-small", ncols=3, loc="upper center")


STATEMENT = f"""
A mask m of {X} features, each 0 or 1, depends on x and on a context z ({X} and {Z} numbers, N(0, 1)); learn
y = m x from pairs alone, without seeing m. In the task

- "bilinear", m_o = 1 where z^T W_o x > 0, W random;
- "switch", z is one of {Z} questions (one-hot): each looks at one feature of x, whose sign decides which
  half of the features passes;
- "network", m_o = 1 where a random network of [x; z] (one layer of {TEACHER} tanh) is positive: the concat
  mask's home;
- "z alone", m_o = 1 where a_o.z > 0: x has no say.

Ours is `GatedInteraction`, y = s act(z^T W x + U z + V x + c) x with a learned number s (4,625 parameters),
"dense MI" with a sigmoid, and with hardsigmoid, tanh and softmax (there s begins with {X}). Low-rank MI,
concat mask (an MLP of [x; z]) and gated (an MLP of z) are sigmoids of their logits, times x; FiLM and
concat are networks that give y themselves. All have at least our number of parameters and at most 3 % more.
In "z alone" there is also the diagonal gate, s sigmoid(A z + a) x, which is smaller. The other activations
than sigmoid are tried where products decide.

Adam, {STEPS:,} steps on {BATCH} fresh samples each, mean squared error, the rate falls to 0 along a cosine;
the rate is chosen from {", ".join(f"{rate:g}" for rate in RATES)} by two seeds of their own. The other
seeds draw W, data and weights anew. The score is the error on {TEST:,} fresh samples over the mean of (m
x)^2: 1 for y = 0, 0.5 for y = x / 2. Mask accuracy: how often y is on the right side of x / 2.
"""

SHOWS = """
Where products of z and x decide ("bilinear"), the MI mask finds nearly every mask, and the concat mask of
equal size about seven of ten; networks without a mask hardly beat y = x / 2. This task is in our own
family, and its random W has no low rank, which the factorised mask pays for. In "switch" the concat mask
comes close: a hidden unit can look at one feature for one question, and sixteen questions are few. There
the low-rank mask is better than the dense one, as each question looks at one feature alone. In "network",
where no product decides, all that see x and z end alike, with or without a mask: the gain is the task's,
not the form's. A gate by z alone is lost wherever products of x decide.

In "z alone" a diagonal gate with 6 % of the parameters does better than ours; a gate that an MLP makes of
z, with as many, does not.

Of the bounded activations sigmoid and hardsigmoid are alike. tanh leaves more than ten times their error:
its logit would have to be exactly 0 to close a feature, not only below a limit. softmax shares one sum
among features, while here any number of them may pass; where one has to be chosen, that may be another
matter, which is not shown.

An error of 1 or 2 % is left to all masks near their limit, z^T W x = 0, where a sigmoid of finite weights
is not yet steep; it falls with more steps and larger rates. FiLM and concat differ much between seeds in
"switch". The best rate of our masks is the largest one in two of the tasks. Only one size of task was
tried.
"""

STUDY = Study(
    name="attention",
    title="Attention and gating: masks of features",
    statement=STATEMENT,
    metric="test error (share of the mean of (m x)^2)",
    better="lower",
    tasks=TASKS,
    models=models,
    rates=RATES,
    train=train,
    claims=claims,
    draw=draw,
    shows=SHOWS,
    tuning_seeds=(1000, 1001),
    figures=("mask accuracy",),
)
