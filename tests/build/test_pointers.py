"""Every file that comments, docstrings and documents name exists."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (".py", ".h", ".cpp", ".cuh", ".cu", ".md")
SCANNED = (
    "mi_kernels/",
    "csrc/",
    "docs/",
    "tools/",
    "benchmarks/",
    "examples/",
    "studies/",
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
)
# A path in plain text, with * and <name> for any name; not of an #include of another package.
NAME = re.compile(r"(?<![\w.])(?:[\w.*<>-]+/)*[\w*<>-]+(?:\.py|\.h|\.cpp|\.cuh|\.cu|\.md)\b")
INCLUDE = re.compile(r"\s*#\s*include\s*<")
# Names in the text that are no files of the repository: outputs, placeholders, and members h of structs.
ALLOWED = {
    "tools/NAME.py",
    "NAME.md",
    "fusions/common_fusions.py",  # of MultiBench
    "report.md",
    "build/guard.md",
    *("build_facts.py", "mi_kernels/ops/build_facts.py"),  # a build writes it
    *("program.py", "schemas.cpp"),  # of a reader
    "_ops.py",  # of the builder of the kernels hub
    *("a.h", "call.h", "row.h", "tensors.h"),
}


def tracked() -> list[str]:
    """The files of the repository, new ones included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout of the repository")
    return [name for name in text.splitlines() if (ROOT / name).is_file()]


def exists(name: str, files: list[str]) -> bool:
    """Whether a name, or a path from any folder, is that of a file."""
    pattern = re.sub(r"<\w*>", "*", name).replace("**/", "*").replace("../", "")
    return any(fnmatch(file, pattern) or fnmatch(file, f"*/{pattern}") for file in files)


def stale(text: str, files: list[str]) -> list[str]:
    text = re.sub(r"https?://\S+", "", text)  # test_docs.py
    lines = (line for line in text.splitlines() if not INCLUDE.match(line))
    names = (name for line in lines for name in NAME.findall(line))
    return [name for name in dict.fromkeys(names) if name not in ALLOWED and not exists(name, files)]


def test_named_files_exist():
    files = tracked()
    scanned = [f for f in files if f.startswith(SCANNED) and f.endswith((*SOURCES, "Makefile"))]
    scanned = [f for f in scanned if not f.startswith("benchmarks/results/")]  # dated, never edited
    assert len(scanned) > 100
    found = {file: stale((ROOT / file).read_text(), files) for file in scanned}
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("as test_pointers.py and tests/build/test_pointers.py say", []),
        ("a kernel of `ops/triton/<family>.py`, of csrc/*/plan.h", []),
        ("#include <torch/csrc/stable/library.h>", []),
        ("https://example.org/blob/main/NO_FILE.md", []),
        ("see csrc/no_such_file.h.", ["csrc/no_such_file.h"]),
        ("see docs/test_pointers.py", ["docs/test_pointers.py"]),
    ],
)
def test_a_stale_name_is_found(text, names):
    files = ["tests/build/test_pointers.py", "mi_kernels/ops/triton/gate.py", "csrc/cpu/plan.h"]
    assert stale(text, files) == names
