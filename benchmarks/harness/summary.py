"""Ratios, geometric means, and the figures to reach. Arithmetic on results; nothing is measured here."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

Case = dict[str, Any]
Candidate = dict[str, Any]

# (figure, pass) -> target: the geometric mean or the worst shape has to reach it.
RIVAL, RIVAL_WORST, GEMM, EINSUM = (
    "best rival's time / ours, geometric mean",
    "best rival's time / ours, worst shape",
    "GEMM of equal work / ours, geometric mean",
    "einsum / ours, geometric mean",
)
FASTEST_GEMM = "fastest GEMM, oneDNN included / ours, geometric mean"
TARGETS = {
    (RIVAL, "forward"): 1.3,
    (RIVAL, "forward+backward"): 1.5,
    (RIVAL_WORST, "forward"): 1.0,
    (RIVAL_WORST, "forward+backward"): 1.0,
    (GEMM, "forward"): 1.0,
    (GEMM, "forward+backward"): 0.95,
    (EINSUM, "forward"): 4.0,
    (EINSUM, "forward+backward"): 4.0,
}
OVERHEAD = "call overhead, smallest shape, einsum / ours"
OVERHEAD_MODES = {
    "forward": ("forward, no grad", "forward, with grad"),
    "forward+backward": ("forward+backward",),
}


def seconds(candidate: Candidate | None) -> float | None:
    return None if candidate is None else candidate.get("median_s")


def named(case: Case, name: str) -> Candidate | None:
    return next((c for c in case["candidates"] if c["name"] == name), None)


def fastest(case: Case, *kinds: str) -> Candidate | None:
    """The fastest candidate of these kinds (ours, rival, gemm, onednn) that has a time."""
    measured = [c for c in case["candidates"] if c["kind"] in kinds and seconds(c) is not None]
    return min(measured, key=lambda c: c["median_s"], default=None)


def ratio(numerator: Candidate | None, denominator: Candidate | None) -> float | None:
    """Time of the one by time of the other: above 1, the denominator is the faster."""
    above, below = seconds(numerator), seconds(denominator)
    return None if above is None or below is None else above / below


def ratios(case: Case, candidate: Candidate | None = None) -> dict[str, float | None]:
    """How a candidate (ours, if none is given) stands against the best rival, the GEMM and einsum.

    The best rival of a rival is the best of the others.
    """
    candidate = candidate or fastest(case, "ours")
    others = {**case, "candidates": [c for c in case["candidates"] if c is not candidate]}
    return {
        "rival": ratio(fastest(others, "rival"), candidate),
        "gemm": ratio(fastest(case, "gemm"), candidate),
        "fastest gemm": ratio(fastest(case, "gemm", "onednn"), candidate),
        "einsum": ratio(named(case, "einsum"), candidate),
    }


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are not None; None if there are none."""
    logarithms = [math.log(value) for value in values if value is not None]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else None


def worst(cases: list[Case], key: str) -> tuple[float, str] | None:
    """(smallest ratio, name of the shape), or None."""
    found = [(ratios(case)[key], case["shape"]["name"]) for case in cases]
    return min(((value, name) for value, name in found if value is not None), default=None)


LARGE = 10**9  # operations; below, a kernel may well choose fewer threads


def starved(case: Case, threads: int) -> list[str]:
    """Ours and the GEMMs where a large case got under 90 % of the cores: its rates are not those of
    ``threads`` threads, because other programs ran."""
    if case["operations"] < LARGE:
        return []
    kinds = ("ours", "gemm", "onednn")
    return [
        c["name"]
        for c in case["candidates"]
        if c["kind"] in kinds and c.get("cores", threads) < 0.9 * threads
    ]


def groups(cases: list[Case]) -> Iterator[tuple[str, str, list[Case]]]:
    """(dtype, pass, cases) in the order of first appearance."""
    for dtype, work in dict.fromkeys((case["dtype"], case["pass"]) for case in cases):
        yield dtype, work, [c for c in cases if (c["dtype"], c["pass"]) == (dtype, work)]


def figures(cases: list[Case], overhead: list[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The rows of the table of figures, for each dtype and pass, with the target beside the measurement."""
    rows = []
    for dtype, work, group in groups(cases):
        found = [ratios(case) for case in group]
        low, where = worst(group, "rival") or (None, None)
        gemm_low, gemm_where = worst(group, "gemm") or (None, None)
        hard_low, hard_where = worst(group, "fastest gemm") or (None, None)
        measured = {
            RIVAL: (geometric_mean(r["rival"] for r in found), None),
            RIVAL_WORST: (low, where),
            GEMM: (geometric_mean(r["gemm"] for r in found), None),
            "GEMM of equal work / ours, worst shape": (gemm_low, gemm_where),
            # Without a target, but the harder yardstick: torch.mm can be slow (see peers.onednn_gemm).
            FASTEST_GEMM: (geometric_mean(r["fastest gemm"] for r in found), None),
            "fastest GEMM, oneDNN included / ours, worst shape": (hard_low, hard_where),
            EINSUM: (geometric_mean(r["einsum"] for r in found), None),
        }
        for figure, (value, shape) in measured.items():
            rows.append(_row(figure, dtype, work, value, shape, TARGETS.get((figure, work)), len(group)))
    if overhead:
        rows += _overhead_figures(overhead)
    return rows


def _row(figure: str, dtype: str, work: str, value, shape, target, count: int) -> dict[str, Any]:
    reached = None if value is None or target is None else value >= target
    row = {"figure": figure, "dtype": dtype, "pass": work, "measured": value, "shape": shape}
    return row | {"target": target, "reached": reached, "shapes": count}


def _overhead_figures(overhead: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    smallest = overhead[0]["shape"]
    for work, modes in OVERHEAD_MODES.items():
        entries = [e for e in overhead if e["shape"] == smallest and e["mode"] in modes]
        found = [(ratio(named(e, "einsum"), fastest(e, "ours")), e["mode"]) for e in entries]
        value, mode = min(((v, m) for v, m in found if v is not None), default=(None, None))
        yield _row(OVERHEAD, "float32", work, value, f"{smallest} ({mode})", 1.0, 1)
