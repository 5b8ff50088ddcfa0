"""Performance targets on a GPU, evaluated from the results of gpu_check.py; nothing is measured here."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.harness import summary
from benchmarks.suites import shapes
from mi_kernels.ops import counts

GEMM_SHARE = {"forward": 0.60, "forward+backward": 0.55}  # of the time of cuBLAS of equal work, large shapes
COPY_SHARE = 0.85  # of the bandwidth of a copy, by modulation forward
COMPILED = ("triton", "cuda")  # the backends with performance targets
RIVAL_OUTPUTS = 1024  # up to this many outputs, no rival may be faster
LARGE_MAPS = ("tokens", "maps", "rows", "full")
Figure = dict[str, Any]


def figures(result: dict[str, Any]) -> list[Figure]:
    """What was measured, its shape, the target, and whether it was reached (None: not measured)."""
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
    """The case with one of our backends, if it was measured."""
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


MOST_LINES = 60  # of the summary
MOST_FAULTS = 4  # of a stage


def _cut(text: str, width: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def lines_of_build(build: dict[str, Any] | None) -> Iterator[str]:
    if build is not None:
        yield f"  build: {build['status']}" + (f" ({_cut(build['reason'])})" if build.get("reason") else "")
        if build.get("end"):
            yield f"    {_cut(build['end'][-300:], 300)}"


def lines_of_cases(stage: str, found: dict[str, Any] | None) -> Iterator[str]:
    """Lines for smoke or sanitize: the worst error of each backend's kernels, faults, missing cases."""
    if found is None:
        return
    cases = found.get("cases", {})
    yield f"  {stage}: {found['status']} ({len(cases)} cases)"
    if stage == "smoke":
        yield from _worst_errors(cases)
    faults = {name: one["fault"] for name, one in cases.items() if one["fault"] is not None}
    yield from _few(f"{name}: {_cut(fault)}" for name, fault in faults.items())
    if found.get("missing"):
        yield f"    not reached: {len(found['missing'])} cases, {found['missing'][0]} the first"


def _worst_errors(cases: dict[str, Any]) -> Iterator[str]:
    """Per backend, its kernels with their worst error in any dtype, as a fraction of the allowed one."""
    worst: dict[str, dict[str, float]] = {}
    for name, one in cases.items():
        if one["fault"] is None:
            backend, *kernel, _ = name.split()
            own = worst.setdefault(backend, {})
            own[" ".join(kernel)] = max(own.get(" ".join(kernel), 0.0), one["error"])
    for backend, kernels in worst.items():
        listed = ", ".join(f"{kernel} {error:.2f}" for kernel, error in kernels.items())
        yield f"    {backend}, worst error of what is allowed: {listed}"


def _few(lines: Iterable[str]) -> Iterator[str]:
    """The first lines, and the number of the others."""
    every = list(lines)
    yield from (f"    {line}" for line in every[:MOST_FAULTS])
    if len(every) > MOST_FAULTS:
        yield f"    and {len(every) - MOST_FAULTS} more, which the JSON has"


def lines_of_tests(tests: dict[str, Any] | None) -> Iterator[str]:
    """For each backend: its result, failures with their text, tests not reached."""
    for backend, found in (tests or {}).items():
        words = ("passed", "failed", "error", "skipped")
        counts_of = ", ".join(f"{found[word]} {word}" for word in words if word in found)
        of = f"{counts_of} of {found['collected']}" if "collected" in found else "0 passed"
        yield f"  tests on {backend}: {found['status']} ({of})"
        yield from _few(f"{name}: {_cut(text[-200:])}" for name, text in found.get("failures", {}).items())
        missing = found.get("missing", {})
        if missing:
            yield f"    not reached: {sum(missing.values())} tests, of {', '.join(missing)}"[:160]


def summary_lines(result: dict[str, Any]) -> list[str]:
    """At most ``MOST_LINES`` lines: targets last; those that were reached are dropped first."""
    lines = [result["gpu"]["name"]]
    for backend, reason in result["backends"].items():
        if reason is not None:
            lines.append(f"  {backend}: left out: {reason}")
    lines += lines_of_build(result["build"])
    lines += lines_of_cases("smoke", result["smoke"])
    lines += lines_of_tests(result["tests"])
    lines += lines_of_cases("sanitize", result["sanitize"])
    lines += _few(f"failed: {name}: {_cut(error)}" for name, error in result["broken"].items())
    if result["unmeasured"]:
        lines.append(f"  {len(result['unmeasured'])} cases not measured, {result['unmeasured'][0]} the first")
    words = {True: "reached", False: "NOT REACHED", None: "not measured"}
    for row in result["figures"]:
        value = "" if row["measured"] is None else f"{row['measured']:.2f} ({row['shape']}) "
        lines.append(f"  {row['figure']}: {value}target {row['target']:g}: {words[row['reached']]}")
    end = f"  failed: {', '.join(result['failed stages']) or 'none'}"
    if result["not asked for"]:
        end += f"; not asked for: {', '.join(result['not asked for'])}"
    return [*lines[: MOST_LINES - 1], end]
