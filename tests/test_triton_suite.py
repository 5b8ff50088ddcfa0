"""Files of tests of every backend in the interpreter: activations, compile and export, autocast, overflow."""

from pathlib import Path

import pytest
from helpers import assert_passes_interpreted

from mi_kernels import backends

pytestmark = pytest.mark.subprocess

pytest.importorskip("triton")
FILES = (
    "test_activations.py",
    "test_compile.py",
    "test_gates_compile.py",
    "test_autocast.py",
    "test_overflow.py",
)


# A process for each file: as one test, long and among the last, it left the other workers nothing to do.
@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter")
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name):
    """Without bfloat16, whose numbers the interpreter holds as integers."""
    assert_passes_interpreted(str(Path(__file__).with_name(name)), "-k", "triton and not bfloat16")
