"""Results as tables of text: for the terminal, and as Markdown for a report."""

import math
from typing import Any

from benchmarks.harness.summary import Candidate, Case, fastest, named, ratio, ratios, seconds


def format_seconds(value: float | None) -> str:
    """Four significant digits with a unit; empty for None."""
    if value is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.4g} {unit}"
    raise AssertionError("unreachable")


def format_ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def text_table(columns: list[str], rows: list[list[str]], *, markdown: bool = False) -> str:
    """Aligned columns, the first to the left and the others to the right; as Markdown with bars."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" if markdown else "-" * width for width in widths[1:])]
    return "\n".join([line(columns), line(rule), *map(line, rows)])


CASE_COLUMNS = [
    "candidate",
    "time",
    "IQR",
    "best other rival / this",
    "mm / this",
    "fastest GEMM / this",
    "cores",
    "GFLOP/s",
    "GB/s",
    "extra MiB",
    "error",
]


def case_rows(case: Case) -> list[list[str]]:
    """One row for each candidate, the fastest first; those without a time last."""

    def time(candidate: Candidate) -> float:
        found = seconds(candidate)
        return math.inf if found is None else found

    return [_case_row(case, candidate) for candidate in sorted(case["candidates"], key=time)]


def not_measured(case: Case) -> str:
    """The candidates without a time, and why, in one line; empty if all have one."""
    found = [f"{c['name']} ({c['status']})" for c in case["candidates"] if seconds(c) is None]
    return f"Not measured: {'; '.join(found)}" if found else ""


def _case_row(case: Case, candidate: Candidate) -> list[str]:
    name = f"**{candidate['name']}**" if candidate["kind"] == "ours" else candidate["name"]
    time = seconds(candidate)
    if time is None:
        return [name, candidate["status"].split(":")[0], *[""] * (len(CASE_COLUMNS) - 2)]
    found = ratios(case, candidate)
    extra, error = candidate.get("extra_bytes"), candidate.get("error")
    own = candidate["kind"] in (
        "ours",
        "rival",
    )  # the GEMM gets its operand ready, so it has neither memory nor error
    return [
        name,
        format_seconds(time),
        f"{100 * (candidate['q75_s'] - candidate['q25_s']) / time:.0f} %",
        format_ratio(found["rival"]),
        format_ratio(found["gemm"]),
        format_ratio(found["fastest gemm"]),
        f"{candidate['cores']:.2f}" if "cores" in candidate else "",
        f"{case['operations'] / time / 1e9:.4g}",
        f"{case['bytes'] / time / 1e9:.3g}",
        f"{extra / 2**20:.1f}" if own and extra is not None else "",
        f"{error:.1e}" if own and error is not None else "",
    ]


FIGURE_COLUMNS = ["figure", "dtype", "pass", "measured", "target", "", "shape"]


def figure_rows(figures: list[dict[str, Any]]) -> list[list[str]]:
    words = {True: "reached", False: "NOT REACHED", None: ""}
    return [
        [
            row["figure"],
            row["dtype"],
            row["pass"],
            format_ratio(row["measured"]) or "not measured",
            "" if row["target"] is None else f">= {row['target']:g}",
            words[row["reached"]],
            row["shape"] or "",
        ]
        for row in figures
    ]


OVERHEAD_COLUMNS = [
    "sizes",
    "mode",
    "mi_kernels",
    "einsum",
    "F.bilinear",
    "einsum / ours",
    "F.bilinear / ours",
]


def overhead_rows(overhead: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for entry in overhead:
        ours, rivals = fastest(entry, "ours"), [named(entry, name) for name in ("einsum", "F.bilinear")]
        times = [format_seconds(seconds(candidate)) for candidate in (ours, *rivals)]
        found = [format_ratio(ratio(rival, ours)) for rival in rivals]
        rows.append([entry["shape"], entry["mode"], *times, *found])
    return rows


BASE_COLUMNS = ["shape", "dtype", "pass", "base", "this", "base / this", "larger than the noise"]


def base_rows(base: dict[str, Any]) -> list[list[str]]:
    return [
        [
            case["shape"],
            case["dtype"],
            case["pass"],
            format_seconds(case["base"]["median_s"]),
            format_seconds(case["head"]["median_s"]),
            f"{case['base_over_head']:.3f}",
            "" if _overlap(case["base"], case["head"]) else "yes",
        ]
        for case in base["cases"]
    ]


def _overlap(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether the interquartile ranges overlap."""
    return a["q25_s"] <= b["q75_s"] and b["q25_s"] <= a["q75_s"]
