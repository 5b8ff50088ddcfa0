"""Interleaved timing of candidates. Needs no more than the standard library."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

Start = Callable[[], Callable[[], object]]


class Sample(NamedTuple):
    seconds: float  # of one call
    cores: float  # seconds of CPU for each second: below the number of threads, they had to wait


# Seconds of a call up to which one more is made before each sample, untimed.
WARM = 0.5


Clock = Callable[[Callable[[], object], int], Sample]  # (run, calls) -> the mean of calls in a row


def wall(run: Callable[[], object], calls: int) -> Sample:
    """By the clock on the wall: for what has happened when a call returns. GPUs have theirs in gpu.py."""
    begin, busy = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    return Sample(seconds / calls, busy / seconds)


def cpu(run: Callable[[], object], calls: int) -> Sample:
    """CPU time of the process: for one thread, on a machine that others load."""
    begin = time.process_time()
    for _ in range(calls):
        run()
    return Sample((time.process_time() - begin) / calls, 1.0)


def sample(start: Start, calls: int, warm: bool = False, clock: Clock = wall) -> Sample:
    """The mean of ``calls`` calls in a row; what ``start`` prepares is not timed.

    ``warm``: one call before, so that memory which other candidates have cooled down (in caches, or given
    back to the system by a machine that reclaims what lies idle) is not on this one's account.
    """
    run = start()
    if warm:
        run()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return clock(run, calls)
    finally:
        if enabled:
            gc.enable()


def calibrate(start: Start, shortest: float, clock: Clock = wall) -> tuple[int, float]:
    """(calls, seconds of one call) so that one sample lasts at least ``shortest`` seconds; warms up, too."""
    calls = 1
    while True:
        seconds = sample(start, calls, clock=clock).seconds
        if seconds * calls >= shortest:
            return calls, seconds
        # At most tenfold at once: the first calls are slow, and the clock is coarse against a single one.
        wanted = math.ceil(1.2 * shortest / max(seconds, 1e-9))
        calls = min(10 * calls, max(wanted, calls + 1))


def interleave(
    starts: Mapping[str, Start],
    rounds: int,
    shortest: float,
    longest: float,
    expected: Mapping[str, float] | None = None,
    seed: int = 0,
    clock: Clock = wall,
    failed: Callable[[str, Exception], None] | None = None,
) -> Iterator[tuple[str, int, Sample]]:
    """Yields (name, calls, sample), round by round, each round in another order.

    A candidate sits out the later rounds once its samples would take more than ``longest`` seconds; it
    always gets one. ``expected`` has seconds of one call where they are known, to save calibration runs.
    ``failed`` is told of a candidate that raises, which is then left out; without it the exception goes on.
    """
    plan: dict[str, tuple[int, int, bool]] = {}
    for name, start in starts.items():
        seconds = (expected or {}).get(name, 0.0)
        try:
            calls, seconds = (1, seconds) if seconds >= shortest else calibrate(start, shortest, clock)
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
            continue
        plan[name] = calls, max(1, min(rounds, int(longest / (seconds * calls)))), seconds < WARM
    order = random.Random(seed)
    for number in range(rounds):
        names = [name for name, (_, limit, _) in plan.items() if number < limit]
        order.shuffle(names)
        for name in names:
            calls, _, warm = plan[name]
            try:
                one = sample(starts[name], calls, warm, clock)
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del plan[name]
                continue
            yield name, calls, one


def statistics_of(samples: list[float]) -> dict[str, float]:
    """Median and quartiles; of one sample all three are that sample."""
    if len(samples) == 1:
        return {"median_s": samples[0], "q25_s": samples[0], "q75_s": samples[0]}
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median_s": middle, "q25_s": low, "q75_s": high}
