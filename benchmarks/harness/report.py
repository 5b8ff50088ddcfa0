"""Turns results into a Markdown report and pictures.

python benchmarks/harness/report.py benchmarks/results/today.json                      # Markdown to stdout
python benchmarks/harness/report.py today.json sweep.json --output report.md --pictures folder
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import summary, tables
from benchmarks.harness.results import read

SUMMARY_COLUMNS = [
    "shape", "B", "Z", "X", "O", "ours", "best rival", "its time", "best rival / ours", "mm / ours",
    "fastest GEMM / ours", "einsum / ours", "cores", "GFLOP/s", "GB/s", "extra MiB", "error",
]  # fmt: skip


def _summary_row(case: summary.Case) -> list[str]:
    """One shape: ours against the best rival, the GEMM and einsum."""
    ours, rival, found = summary.fastest(case, "ours"), summary.fastest(case, "rival"), summary.ratios(case)
    shape, time = case["shape"], summary.seconds(ours)
    return [
        shape["name"],
        *(str(shape[letter]) for letter in "BZXO"),
        tables.format_seconds(time),
        "none" if rival is None else rival["name"],
        tables.format_seconds(summary.seconds(rival)),
        *(tables.format_ratio(found[key]) for key in ("rival", "gemm", "fastest gemm", "einsum")),
        f"{ours['cores']:.2f}",
        f"{case['operations'] / time / 1e9:.4g}",
        f"{case['bytes'] / time / 1e9:.3g}",
        f"{ours['extra_bytes'] / 2**20:.1f}",
        f"{ours['error']:.1e}",
    ]


def _about(result: dict[str, Any]) -> list[str]:
    commit, machine = result["commit"], result["machine"]
    dirty = {True: ", with uncommitted changes", False: "", None: ""}[commit["dirty"]]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    versions = ", ".join(
        f"{name} {version or 'not installed'}" for name, version in result["versions"].items()
    )
    load = ", ".join(f"{value:.2f}" for value in machine["load_average"])
    lines = [
        f"* {result['date']}, commit {commit['revision'] or 'unknown'}{dirty}",
        f"* `{result['command']}`",
        f"* {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {caches}",
        f"* load before the run (1, 5, 15 minutes): {load}",
        f"* {versions}; backend {result['backend']}",
    ]
    if result["ceilings"]:
        rates = result["ceilings"]["mm_operations_per_s"]
        shown = ", ".join(f"{rate / 1e9:.4g} GFLOP/s {dtype}" for dtype, rate in rates.items())
        size = result["ceilings"]["mm_size"]
        copy = result["ceilings"]["copy_bytes_per_s"] / 1e9
        lines.append(
            f"* measured ceilings: GEMM of {size}x{size}, torch.mm unless said: {shown}; copy {copy:.3g} GB/s"
        )
    return lines


def markdown(results: list[dict[str, Any]], pictures: list[str] = (), candidates: bool = False) -> str:
    """The report of several result files, one after the other."""
    parts = ["# Benchmarks", "Times are medians. A ratio above 1 means that ours is faster."]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    for result in results:
        parts += _sections(result, candidates)
    return "\n\n".join(parts) + "\n"


def _sections(result: dict[str, Any], candidates: bool) -> list[str]:
    parts = [f"## Run of {result['date']}", "\n".join(_about(result))]
    if result["figures"]:
        rows = tables.figure_rows(result["figures"])
        parts += ["### Figures to reach", tables.text_table(tables.FIGURE_COLUMNS, rows, markdown=True)]
    if result["overhead"]:
        rows = tables.overhead_rows(result["overhead"])
        parts += ["### Call overhead", tables.text_table(tables.OVERHEAD_COLUMNS, rows, markdown=True)]
    if result["base"]:
        rows = tables.base_rows(result["base"])
        parts += [f"### Against {result['base']['revision']}"]
        parts += [tables.text_table(tables.BASE_COLUMNS, rows, markdown=True)]
    for dtype, work, cases in summary.groups(result["cases"]):
        rows = [_summary_row(case) for case in cases]
        parts += [f"### {dtype}, {work}", tables.text_table(SUMMARY_COLUMNS, rows, markdown=True)]
    if not candidates or not result["cases"]:
        return parts
    parts.append("### Every candidate")
    for case in result["cases"]:
        shape = case["shape"]
        sizes = ", ".join(f"{letter}={shape[letter]}" for letter in "BZXO")
        parts.append(f"**{shape['name']}, {case['dtype']}, {case['pass']}** ({sizes}): {shape['origin']}")
        parts.append(tables.text_table(tables.CASE_COLUMNS, tables.case_rows(case), markdown=True))
        parts += filter(None, [tables.not_measured(case)])
    return parts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Turn results into a Markdown report and pictures.", allow_abbrev=False
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSON written by run.py")
    parser.add_argument("--output", type=Path, help="Markdown file (stdout)")
    parser.add_argument("--pictures", type=Path, help="folder for PNG files (none are drawn)")
    parser.add_argument("--candidates", action="store_true", help="a table of each case's candidates, too")
    options = parser.parse_args(argv)
    results = [read(path) for path in options.results]
    drawn: list[Path] = []
    if options.pictures is not None:
        if find_spec("matplotlib") is None:
            print("The pictures need matplotlib: pip install matplotlib", file=sys.stderr)
            return 1
        from benchmarks.harness import pictures

        for path, result in zip(options.results, results, strict=True):
            drawn += pictures.draw(result, options.pictures, path.stem)
    start = (options.output.parent if options.output else Path()).resolve()
    links = [os.path.relpath(path, start) for path in drawn]
    text = markdown(results, links, options.candidates)
    if options.output is None:
        print(text, end="")
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    for path in drawn:
        print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
