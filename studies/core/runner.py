"""Runs a study: tunes every model alike, then trains each with fresh seeds, in processes of one thread.

A trial draws everything from its seed and runs on one thread, so the figures do not depend on how many
processes there are, nor on their order.
"""

import importlib
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from contextlib import contextmanager
from statistics import median

import torch

from studies.core.study import Outcome, Record, Study, Trial, worst_if_not_finite

STUDIES = ("compact", "conditional", "sequence", "control", "attention")


def find(name: str) -> Study:
    if name not in STUDIES:
        raise ValueError(f"study: expected one of {', '.join(STUDIES)}, got {name!r}")
    return importlib.import_module(f"studies.{name}").STUDY


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    """Processes that each keep to one thread; what waits is dropped when the block ends early."""
    executor = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    try:
        yield executor
    except BaseException:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def run(
    study: Study, executor: Executor, seeds: int, quick: bool, tasks: Iterable[str] | None = None
) -> tuple[list[Record], list[Record]]:
    """(records of tuning, records of the chosen rates)."""
    chosen = list(tasks or (study.quick_tasks or study.tasks[:1] if quick else study.tasks))
    pairs = [(task, model) for task in chosen for model in study.models(task)]
    tuning_seeds = study.tuning_seeds[:1] if quick else study.tuning_seeds
    rates_tried = study.rates[:2] if quick else study.rates
    tried = [
        Trial(study.name, task, model, rate, seed, quick)
        for task, model in pairs
        for rate in rates_tried
        for seed in tuning_seeds
    ]
    tuning = _all(executor, tried, f"{study.name}: tuning")
    rates = {pair: best_rate(study, [r for r in tuning if (r.task, r.model) == pair]) for pair in pairs}
    numbers = range(study.first_seed, study.first_seed + seeds)
    final = [Trial(study.name, *pair, rates[pair], seed, quick) for pair in pairs for seed in numbers]
    return tuning, _all(executor, final, f"{study.name}: seeds")


def best_rate(study: Study, tuning: list[Record]) -> float:
    """The rate with the best median validation over the tuning seeds."""
    found = defaultdict(list)
    for record in tuning:
        found[record.rate].append(worst_if_not_finite(record.validation, study.better))
    pick = min if study.better == "lower" else max
    return pick(found, key=lambda rate: median(found[rate]))


def train(trial: Trial) -> Outcome:
    """What a worker does."""
    return find(trial.study).train(trial)


def _all(executor: Executor, trials: list[Trial], title: str) -> list[Record]:
    """Records in the order of the trials."""
    futures = {executor.submit(train, trial): trial for trial in trials}
    done: dict[Trial, Record] = {}
    with progress(title, len(trials)) as advance:
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            # A set has no order: of those found together, go by the order of the trials, also for errors.
            for future, trial in futures.items():
                if future not in finished:
                    continue
                try:
                    done[trial] = Record.of(trial, future.result())
                except Exception as error:
                    if hasattr(error, "add_note"):  # Python 3.11
                        error.add_note(f"while training {trial}")
                    raise
                advance(f"{trial.task}, {trial.model}: {done[trial].score:.3g}")
    return [done[trial] for trial in trials]


@contextmanager
def progress(title: str, total: int):
    """Gives a function that advances a bar and says what was done; without a terminal, a line a tenth."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[last]}")) as bar:
            task = bar.add_task(title, total=total, last="")
            yield lambda said: bar.update(task, advance=1, last=said)
        return
    count = 0
    print(f"{title}: {total} trials", flush=True)

    def advance(said: str) -> None:
        nonlocal count
        count += 1
        if count == total or count % max(total // 10, 1) == 0:
            print(f"{title}: {count} of {total} ({said})", flush=True)

    yield advance
