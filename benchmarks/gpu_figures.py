"""The figures to reach on a GPU, from the results of gpu_check.py. Arithmetic; nothing is measured here."""

from collections.abc import Iterator
from typing import Any

from benchmarks import shapes, summary
from mi_kernels.testing import counts

GEMM_SHARE = {"forward": 0.60, "forward+backward": 0.55}  # of the time of cuBLAS of equal work, large shapes
COPY_SHARE = 0.85  # of the bandwidth of a copy, by modulation forward
RIVAL_OUTPUTS = 1024  # up to this many outputs, no rival may be faster
LARGE_MAPS = ("tokens", "maps", "rows", "full")
Figure = dict[str, Any]


def figures(result: dict[str, Any]) -> list[Figure]:
    """What was measured, at which shape, the target, and whether it was reached; None: not measured."""
    return [*_dense(result["cases"]), *_modulation(result)]


def _dense(cases: list[summary.Case]) -> Iterator[Figure]:
    large = {entry.shape.name for entry in shapes.GPU_LARGE}
    for work, target in GEMM_SHARE.items():
        chosen = [
            c for c in cases if (c["dtype"], c["pass"]) == ("bfloat16", work) and c["shape"]["name"] in large
        ]
        yield _row(
            f"cuBLAS of equal work / ours, {work}, worst large shape", summary.worst(chosen, "gemm"), target
        )
        chosen = [c for c in cases if c["pass"] == work and c["shape"]["O"] <= RIVAL_OUTPUTS]
        yield _row(f"best rival / ours, {work}, worst shape", summary.worst(chosen, "rival"), 1.0)


def _modulation(result: dict[str, Any]) -> Iterator[Figure]:
    copy = (result["ceilings"] or {}).get("copy_bytes_per_s")
    for backend in dict.fromkeys(case["backend"] for case in result["gates"]):
        rates = []
        for case in result["gates"]:
            if (case["backend"], case["pass"]) == (backend, "forward") and case["name"] in LARGE_MAPS:
                sizes = tuple(_elements(size) for size in case["sizes"])
                item = 4 if case["dtype"] == "float32" else 2
                seconds = case["candidates"]["mi_kernels"]["median_s"]
                rates.append((counts.modulate(sizes, item).bytes / seconds / copy, case["name"]))
        yield _row(f"bandwidth of modulation on {backend} / of a copy", min(rates, default=None), COPY_SHARE)


def _elements(size: list[int]) -> int:
    product = 1
    for one in size:
        product *= one
    return product


def _row(figure: str, worst: tuple[float, str] | None, target: float) -> Figure:
    value, shape = worst or (None, None)
    reached = None if value is None else value >= target
    return {"figure": figure, "measured": value, "shape": shape, "target": target, "reached": reached}


def summary_of_tests(tests: dict[str, Any] | None) -> str:
    if tests is None:
        return "tests: not run"
    counts_of = ", ".join(
        f"{tests[word]} {word}" for word in ("passed", "failed", "error", "skipped") if word in tests
    )
    return f"tests: {tests['status']} ({counts_of})"


def summary_lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['gpu']['name']}: {summary_of_tests(result['tests'])}"
    if result["tests"] is not None:
        yield from (f"  {name}" for name in result["tests"]["failures"][:20])
    words = {True: "reached", False: "NOT REACHED", None: "not measured"}
    for row in result["figures"]:
        value = "" if row["measured"] is None else f"{row['measured']:.2f} ({row['shape']})"
        yield f"  {row['figure']}: {value} target {row['target']:g}: {words[row['reached']]}"
    yield from (f"  failed: {name}: {error}" for name, error in result.get("broken", {}).items())
    if result.get("unmeasured"):
        yield f"  not measured for lack of time: {len(result['unmeasured'])} cases"
