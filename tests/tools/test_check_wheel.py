"""The environments of `make check-wheel`: how they are named, and which Python each gets."""

import argparse
import os
import re
import shutil
import subprocess
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


def test_the_last_wheel_is_taken(tmp_path):
    machine = os.uname().machine
    for index, name in enumerate(("b", "a")):
        path = tmp_path / f"mi_kernels-{name}-py3-none-linux_{machine}.whl"
        path.touch()
        os.utime(path, (index, index))
    assert check_wheel.the_wheel(tmp_path) == path == check_wheel.the_wheel(path)
    with pytest.raises(SystemExit, match="`make wheel` builds it"):
        check_wheel.the_wheel(tmp_path / "nothing")


def test_a_wheel_of_another_processor_is_refused_not_exchanged_for_an_older_one(tmp_path, monkeypatch):
    machine = os.uname().machine
    for index, platform in enumerate((machine, "other")):
        path = tmp_path / f"mi_kernels-0-py3-none-linux_{platform}.whl"
        path.touch()
        os.utime(path, (index, index))
    for name in ("prepare", "check"):  # nothing is downloaded for it
        monkeypatch.setattr(check_wheel.Environment, name, lambda *_: pytest.fail("no refusal"))
    with pytest.raises(SystemExit, match=f"linux_other.whl does not run on this machine.* {machine}"):
        check_wheel.main(["--wheel", str(tmp_path), "2.11.0@3.12"])


@pytest.mark.subprocess
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("archs, folder", [("", "dist"), ("80;90a", "dist/cuda")])
def test_make_checks_the_wheel_that_it_builds(archs, folder):
    command = ["make", "-n", "check-wheel", f"WHEEL_CUDA_ARCHS={archs}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
    (built,) = re.findall(r"auditwheel repair .* -w (\S+) ", said)
    (checked,) = re.findall(r"tools/check_wheel.py --wheel (\S+) ", said)
    assert built == checked == folder


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
