"""The environments of `make check-wheel`: how they are named, and which Python each gets."""

import argparse
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import check_wheel

ROOT = check_wheel.ROOT
pytestmark = pytest.mark.tools


def test_an_environment_is_a_torch_and_a_python():
    assert check_wheel.Environment.of("2.11.0@3.12") == ("2.11.0", "3.12")
    for wrong in ("2.11.0", "2.11.0@", "@3.12", "2.11.0@python3", "2.11/0@3.12"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected TORCH@PYTHON such as 2.11.0@3.12"):
            check_wheel.Environment.of(wrong)


def test_the_last_wheel_of_this_machine_is_taken(tmp_path):
    machine = os.uname().machine
    for index, name in enumerate(("a", "b", "other")):
        platform = machine if name != "other" else "other"
        path = tmp_path / f"mi_kernels-{name}-py3-none-linux_{platform}.whl"
        path.touch()
        os.utime(path, (index, index))
    assert check_wheel.the_wheel(tmp_path).name == f"mi_kernels-b-py3-none-linux_{machine}.whl"
    with pytest.raises(SystemExit, match="`make wheel` builds it"):
        check_wheel.the_wheel(tmp_path / "nothing")


@pytest.mark.subprocess
def test_an_interpreter_is_of_the_version_that_is_asked_for():
    version = "{}.{}".format(*sys.version_info)
    assert Path(check_wheel.interpreter(version)).exists()
    with pytest.raises(SystemExit, match="no Python 2.0 on PATH"):
        check_wheel.interpreter("2.0")


def test_the_tests_that_run_there_are_there():
    for name in check_wheel.TESTS:
        assert list((ROOT / "tests").glob(f"*/test_{name}.py")), name


def test_the_oldest_torch_is_checked():
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    for file in ("Makefile", ".ci/run"):
        assert re.search(rf"\b{re.escape(oldest)}\.\d+@3\.\d+", (ROOT / file).read_text()), file
