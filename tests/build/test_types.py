"""What type checkers make of a program that uses the package: tests/typed_program.py, which runs, too."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops import activations

pytestmark = pytest.mark.subprocess

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "typed_program.py"
PACKAGE = Path(mi.__file__).parents[1]
SCRIPTS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
PYRIGHT = shutil.which("pyright", path=SCRIPTS)


def run(*command, **environment):
    found = os.environ | environment
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=found, timeout=300)


def mypy(tmp_path, program):
    # Of an installed package, whose place is not named here, mypy shows no errors either.
    options = ("--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={tmp_path / 'cache'}")
    return run(sys.executable, "-m", "mypy", *options, program, MYPYPATH=str(PACKAGE))


def pyright(tmp_path, program):
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{PACKAGE}"]}}')
    return run(PYRIGHT, "--pythonpath", sys.executable, "--project", tmp_path, program)


CHECKERS = [
    pytest.param(mypy, marks=pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")),
    pytest.param(pyright, marks=pytest.mark.skipif(PYRIGHT is None, reason="pyright is not installed")),
]
# Each line is wrong, in a way that a checker can know.
WRONG = """
import torch
import mi_kernels as mi
x = torch.ones(4, 4)
mi.modulate(x, x, activation="swish")
mi.backend("gpu")
mi.nn.GatedInteraction(4, context_features=4, activation="sigmoidal")
mi.nn.FiLM(4, context_features=4, activation="softmax")
mi.nn.HyperLinear(4, out_features=4, context_features=4)("x", x)
mi.nn.HyperMLP([4, 4], context_features=4)(x)
mi.nn.HyperLinear(4, out_features=4, context_features=4).bind([1.0])
mi.convert(mi.nn.Bilinear(4, 4, 4), to="jax")
mi.nn.HyperLinear(4, out_features=4, context_features=4, context_network=torch.nn.Linear)
"""


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_program_has_the_types_that_it_says(checker, tmp_path):
    found = checker(tmp_path, PROGRAM)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("checker", CHECKERS)
def test_what_is_wrong_is_found(checker, tmp_path):
    program = tmp_path / "wrong.py"
    program.write_text(WRONG)
    found = checker(tmp_path, program)
    lines = WRONG.splitlines()
    wrong = range(lines.index("x = torch.ones(4, 4)") + 2, len(lines) + 1)
    missed = [lines[number - 1] for number in wrong if f"wrong.py:{number}:" not in found.stdout]
    assert found.returncode == 1 and not missed, f"{missed}\n{found.stdout}"


def test_the_program_runs():
    done = run(sys.executable, PROGRAM, PYTHONPATH=os.pathsep.join([str(PACKAGE), *sys.path]))
    assert done.returncode == 0 and "on the" in done.stdout, done.stderr


def test_names_are_those_that_run():
    assert tuple(activations.ELEMENTWISE) == get_args(activations.ElementwiseName)
    assert get_args(mi.BackendName) == backends.NAMES
    assert activations.NAMES == (*activations.ELEMENTWISE, "softmax")
