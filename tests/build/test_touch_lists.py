"""How many files a new family or activation has to be named in, by those that are there (CONTRIBUTING.md)."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST = {"family": 12, "activation": 8}


def named_in(word: str, *folders: str) -> list[Path]:
    """The files of the checkout in which a word stands, also as a part of names."""
    command = ["git", "grep", "-lIi", word, "--", *folders]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode > 1:
        pytest.skip("no git checkout: the files of the repository cannot be told from others")
    return [Path(line) for line in found.stdout.splitlines()]


def of_the_family(path: Path) -> bool:
    """Files that are there for gates alone, in whichever room."""
    return path.parent.name == "gate" or path.stem in ("gate", "gates", "diagonal")


def test_a_family_stands_in_its_own_files_and_few_others():
    found = named_in("diagonal", "mi_kernels", "csrc", "tools")
    own = [path for path in found if of_the_family(path)]
    others = [str(path) for path in found if not of_the_family(path)]
    assert len(own) >= 8, "the search finds nothing"
    assert 0 < len(others) <= MOST["family"], others


def test_an_activation_stands_in_few_files():
    # Not silu, the default of gated linear units.
    found = named_in("hardsigmoid", "mi_kernels", "csrc", "tools", "benchmarks/suites", "benchmarks/harness")
    found = [path for path in found if path.parent.name != "rules"]  # other packages' classes of it
    assert 0 < len(found) <= MOST["activation"], found
