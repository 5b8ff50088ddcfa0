"""What benchmarks write: small, and enough for every table."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import report, results
from benchmarks.suites import drawn
from tools import aot

ROOT = Path(__file__).resolve().parents[2]
MOST = 100_000  # bytes of a file in git
RESULT = {
    "date": "2026-01-02",
    "backends": {"cuda": None, "triton": "a reason"},
    "few": [{"a": 1}, {"b": 2}],
    "cases": [
        {
            "sizes": [[2, 3], [3]],
            "candidates": {name: {"median_s": 1 / 3, "samples_s": [0.25, 1 / 3, 0.5]} for name in "abcde"},
            "base": None,
        }
        for _ in range(6)
    ],
    "overhead": [{"name": "a", "error": 1e-9 / 3}] * 3 + [{"name": "b", "status": "skipped"}],
    "none": [],
}


def test_what_is_read_is_what_was_written_but_for_samples_and_digits(tmp_path):
    path = tmp_path / "folder" / "result.json"
    results.write(path, RESULT)
    found = results.read(path)
    candidate = {"median_s": 0.33333, "samples": 3}
    case = {"sizes": [[2, 3], [3]], "candidates": dict.fromkeys("abcde", candidate), "base": None}
    overhead = [{"name": "a", "error": 3.3333e-10}] * 3 + [{"name": "b", "status": "skipped"}]
    assert found == RESULT | {"cases": [case] * 6, "overhead": overhead}
    first = path.read_text()
    results.write(path, found)  # as gpu_cases.py does after each case
    assert path.read_text() == first and not path.with_suffix(".partial").exists()


def test_names_and_samples_are_not_repeated(tmp_path):
    found = results.compact(RESULT)
    assert found["cases"]["columns"] == ["sizes", "candidates", "base"] and len(found["cases"]["rows"]) == 6
    assert found["cases"]["rows"][0][1]["columns"] == ["", "median_s", "samples"]
    assert found["cases"]["rows"][0][1]["rows"][4] == ["e", 0.33333, 3]
    assert found["overhead"]["columns"] == ["name", "error?", "status?"]
    assert found["overhead"]["rows"][3] == ["b", None, "skipped"]
    results.write(tmp_path / "result.json", RESULT)
    assert (tmp_path / "result.json").read_text().count("median_s") == 6


def test_results_of_earlier_versions_can_be_read(tmp_path):
    (tmp_path / "old.json").write_text('{"cases": [{"candidates": [{"samples_s": [1.5]}]}]}')
    assert results.read(tmp_path / "old.json") == {"cases": [{"candidates": [{"samples_s": [1.5]}]}]}


def test_the_results_in_the_repository_have_what_tables_need():
    found = [results.read(path) for path in results.FOLDER.glob("*dense-*.json") if "drawn" not in path.name]
    text = report.markdown(found, candidates=True)
    assert len(found) == 2 and text.count("### Every candidate") == 2
    assert "### Every candidate" not in report.markdown(found)


def test_the_documentation_has_the_figures_of_drawn_shapes():
    """Each row of the table of the latest results, as it is made from them."""
    paths = sorted(results.FOLDER.glob("*drawn*.json"))
    records = [record for path in paths for record in results.read(path)["cases"]]
    text = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    rows = [f"| {' | '.join(row)} |" for row in drawn.rows_of(records)]
    assert len(rows) >= 8
    assert [row for row in rows if row not in text] == []


def test_kernels_compiled_ahead_of_time_are_summed_up_by_tile():
    def made(registers, spilled, activation, **tile):
        constants = {"ACTIVATION": activation, **tile}
        faults = ("spilled",) * (spilled > 0)
        return aot.Report(90, "tf32", "kernel", constants, 4, 3, 1.0, registers, spilled, 9, (), 0, faults)

    found = [made(20, 0, "silu", BM=64, BN=32), made(10, 8, "tanh", BM=64, BN=32), made(7, 0, "silu", BN=16)]
    first, second = aot.by_tile(found)
    assert (first["tile"], first["count"], first["registers"], first["spilled"]) == ("64x32", 2, 20, 8)
    assert (second["tile"], second["count"], second["registers"], second["spilled"]) == ("16", 1, 7, 0)


def test_no_file_in_git_is_large():
    """Results of a run too large for it: passes or dtypes in runs of their own."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    except OSError:
        pytest.skip("no git")
    if done.returncode:
        pytest.skip("no checkout of git")
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    sizes = {str(file): file.stat().st_size for file in files if file.is_file()}
    assert {name: size for name, size in sizes.items() if size > MOST} == {}
    assert sum(size for name, size in sizes.items() if Path(name).parent == results.FOLDER) < 600_000
