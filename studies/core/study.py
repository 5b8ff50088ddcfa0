"""What a study is: tasks, models of equal size, one way to tune them, claims that the results decide."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

Better = Literal["lower", "higher"]
DIGITS = 5


def rounded(value: float) -> float:
    """Counts stay whole: of steps one may be exactly half of another."""
    return int(value) if float(value).is_integer() else float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class Trial:
    """One model trained once: all that a worker process is told."""

    study: str
    task: str
    model: str
    rate: float  # the learning rate
    seed: int
    quick: bool = False  # seconds for the whole study: the code is tried, the figures mean nothing


@dataclass(frozen=True)
class Outcome:
    """What training gave."""

    parameters: int
    score: float  # on data that training has not seen, and tuning neither
    validation: float | None = (
        None  # what tuning goes by; None: the score, where data are drawn afresh for each seed
    )
    curve: tuple[
        tuple[float, float], ...
    ] = ()  # (steps, value) from time to time, for pictures and thresholds
    figures: dict[str, float] = field(default_factory=dict)  # anything else to be reported, by name


@dataclass(frozen=True)
class Record:
    """A trial and its outcome."""

    task: str
    model: str
    rate: float
    seed: int
    parameters: int
    score: float
    validation: float
    curve: tuple[tuple[float, float], ...] = ()
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, trial: Trial, outcome: Outcome) -> "Record":
        """Rounded to DIGITS, as results are written: what is read again leads to the same sentences."""
        validation = outcome.score if outcome.validation is None else outcome.validation
        return cls(
            trial.task, trial.model, trial.rate, trial.seed, outcome.parameters,
            rounded(outcome.score), rounded(validation),
            tuple((rounded(step), rounded(value)) for step, value in outcome.curve),
            {name: rounded(value) for name, value in outcome.figures.items()},
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Claim:
    """A sentence that the figures confirm or do not."""

    text: str
    wanted: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Study:
    """A study as `python -m studies NAME` runs it.

    ``train`` is a function of a module (worker processes import it) and deterministic: it draws
    everything from ``trial.seed``. Every model of ``models(task)`` gets the same rates and seeds.
    """

    name: str
    title: str
    statement: str  # Markdown: task, models, data, optimiser, how tuned
    metric: str  # what the score is, with its unit
    better: Better
    tasks: Sequence[str]
    models: Callable[[str], Sequence[str]]  # of a task; ours first
    rates: Sequence[float]
    train: Callable[[Trial], Outcome]
    claims: Callable[["Results"], list[Claim]]
    draw: Callable[[Any, "Results"], None]  # the main plot, into a matplotlib Axes
    shows: str  # Markdown: what the figures show, and what they do not
    tuning_seeds: Sequence[int] = (1000,)
    first_seed: int = 0  # another where the first ones were seen while the study was being designed
    quick_tasks: Sequence[str] | None = None  # of --quick; None: the first task
    infinite: str = "diverged"  # what a score that is not finite means
    figures: Sequence[str] = ()  # names of Outcome.figures that have a column in the table


class Results:
    """The records of a study, by task and model; a run that diverged counts as the worst."""

    def __init__(self, study: Study, records: Sequence[Record]) -> None:
        self.study = study
        self.records = [record for record in records]

    def of(self, task: str, model: str) -> list[Record]:
        """The records of a model, by seed."""
        found = [record for record in self.records if (record.task, record.model) == (task, model)]
        return sorted(found, key=lambda record: record.seed)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(record.task for record in self.records))

    def models(self, task: str) -> list[str]:
        return list(dict.fromkeys(record.model for record in self.records if record.task == task))

    def scores(self, task: str, model: str) -> list[float]:
        return [worst_if_not_finite(record.score, self.study.better) for record in self.of(task, model)]

    def median(self, task: str, model: str) -> float:
        return median(self.scores(task, model))

    def interval(self, task: str, model: str) -> tuple[float, float]:
        return interval_of_median(self.scores(task, model))

    def parameters(self, task: str, model: str) -> int:
        return self.of(task, model)[0].parameters

    def wins(self, task: str, model: str, rival: str) -> int:
        """The number of seeds with which the model is better than the rival."""
        pairs = zip(self.scores(task, model), self.scores(task, rival), strict=True)
        return sum(a < b if self.study.better == "lower" else a > b for a, b in pairs)

    def best_rival(self, task: str, ours: str) -> str:
        """The model with the best median besides ``ours``."""
        rivals = [model for model in self.models(task) if model != ours]
        return (min if self.study.better == "lower" else max)(
            rivals, key=lambda name: self.median(task, name)
        )


def worst_if_not_finite(score: float, better: Better) -> float:
    return score if math.isfinite(score) else math.inf if better == "lower" else -math.inf


def interval_of_median(values: Sequence[float], coverage: float = 0.9) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with that probability or more.

    Whatever the distribution is: the k-th smallest and k-th largest of n independent values miss its median
    with probability 2 P(Binomial(n, 1/2) < k). Of five values it is the range of all, with 15/16.
    """
    ordered, k = sorted(values), order_of(len(values), coverage)
    return ordered[k - 1], ordered[-k]


def order_of(n: int, coverage: float = 0.9) -> int:
    """The largest k that ``interval_of_median`` may take of n values."""
    return max((k for k in range(1, n // 2 + 1) if coverage_of(n, k) >= coverage), default=1)


def coverage_of(n: int, k: int = 1) -> float:
    """The probability that the k-th smallest and the k-th largest of n values enclose the median."""
    return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n


def first_reaching(curve: Sequence[tuple[float, float]], threshold: float, better: Better) -> float:
    """The first step at which a curve is at the threshold or better; infinite if it never is."""
    for step, value in curve:
        if value <= threshold if better == "lower" else value >= threshold:
            return step
    return math.inf
