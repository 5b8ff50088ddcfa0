"""The figures to reach on a GPU, from the results of gpu_check.py. Arithmetic; nothing is measured here."""

from collections.abc import Iterator
from typing import Any

from benchmarks import shapes, summary
from mi_kernels.testing import counts

GEMM_SHARE = {"forward": 0.60, "forward+backward": 0.55}  # of the time of cuBLAS of equal work, large shapes
COPY_SHARE = 0.85  # of the bandwidth of a copy, by modulation forward
COMPILED = ("triton", "cuda")  # the backends that have figures to reach
RIVAL_OUTPUTS = 1024  # up to this many outputs, no rival may be faster
LARGE_MAPS = ("tokens", "maps", "rows", "full")
Figure = dict[str, Any]


def figures(result: dict[str, Any]) -> list[Figure]:
    """What was measured, at which shape, the target, and whether it was reached; None: not measured."""
    return [*_dense(result["cases"]), *_modulation(result)]


def _dense(cases: list[summary.Case]) -> Iterator[Figure]:
    large = {entry.shape.name for entry in shapes.GPU_LARGE}
    for backend in COMPILED:
        own = [_only(case, backend) for case in cases]
        for work, target in GEMM_SHARE.items():
            of_pass = [case for case in own if case["pass"] == work]
            chosen = [c for c in of_pass if c["dtype"] == "bfloat16" and c["shape"]["name"] in large]
            figure = f"cuBLAS of equal work / {backend}, {work}, worst large shape"
            yield _row(figure, summary.worst(chosen, "gemm"), target)
            chosen = [c for c in of_pass if c["shape"]["O"] <= RIVAL_OUTPUTS]
            figure = f"best rival / {backend}, {work}, worst shape"
            yield _row(figure, summary.worst(chosen, "rival"), 1.0)


def _only(case: summary.Case, backend: str) -> summary.Case:
    """The case with one backend of ours; it may not be there."""
    kept = [c for c in case["candidates"] if c["kind"] != "ours" or c["name"] == f"mi_kernels {backend}"]
    return {**case, "candidates": kept}


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


def lines_of_tests(tests: dict[str, Any] | None) -> Iterator[str]:
    """For each backend: how it ended, failures, and the files that were not, or not wholly, reached."""
    if not tests:
        yield "  tests: not run"
    for backend, found in (tests or {}).items():
        words = ("passed", "failed", "error", "skipped")
        counts_of = ", ".join(f"{found[word]} {word}" for word in words if word in found)
        of = f"{counts_of} of {found['collected']}" if "collected" in found else "0 passed"
        yield f"  tests on {backend}: {found['status']} ({of})"
        yield from (f"    {name}" for name in found.get("failures", [])[:20])
        for file, count in found.get("missing", {}).items():
            yield f"    not reached: {count} tests of {file}"


def summary_lines(result: dict[str, Any]) -> Iterator[str]:
    yield result["gpu"]["name"]
    yield f"  build: {result['build']['status'] if result['build'] else 'not run'}"
    for backend, reason in result["backends"].items():
        if reason is not None:
            yield f"  {backend}: neither tested nor measured: {reason}"
    yield from lines_of_tests(result["tests"])
    words = {True: "reached", False: "NOT REACHED", None: "not measured"}
    for row in result["figures"]:
        value = "" if row["measured"] is None else f"{row['measured']:.2f} ({row['shape']})"
        yield f"  {row['figure']}: {value} target {row['target']:g}: {words[row['reached']]}"
    yield from (f"  failed: {name}: {error}" for name, error in result["broken"].items())
    if result["unmeasured"]:
        yield f"  {len(result['unmeasured'])} cases were not measured, {result['unmeasured'][0]} the first"
