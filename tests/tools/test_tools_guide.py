"""docs/guides/tools.md: each row of its tables names a test, and the tests are there; its code runs."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guides" / "tools.md"
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def rows():
    """The cells of each row of a table."""
    lines = [line for line in GUIDE.read_text().splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [row for row in cells if row[-1].strip() not in ("test", "---")]


def functions_in(file):
    (path,) = ROOT.glob(f"tests/*/{file}")
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_each_row_names_its_test():
    assert len(rows()) > 40
    for row in rows():
        assert NAMED.fullmatch(row[-1].strip()), row


def test_the_named_tests_are_there():
    named = set(NAMED.findall(GUIDE.read_text()))
    for file, test in named:
        assert test in functions_in(file), f"{file}::{test}"


def test_every_test_of_these_files_has_a_row():
    """So that what is tested can be found, too."""
    named = {test for _, test in NAMED.findall(GUIDE.read_text())}
    for file in ("test_modules_in_tools.py", "test_packages.py"):
        tests = {test for test in functions_in(file) if test.startswith("test_")}
        assert tests - named <= {"test_every_module_is_here"}


def test_its_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert blocks
    scope = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), scope)
    assert scope["y"].shape == (8, 4) and not scope["layer"].weight.requires_grad
    assert len(list(scope["traced"].graph.nodes)) == 4
