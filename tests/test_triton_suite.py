"""Files of tests of every backend in the interpreter: activations, compile and export, autocast, overflow."""

from pathlib import Path

import pytest
from helpers import assert_passes_interpreted

from mi_kernels import backends

pytest.importorskip("triton")
FILES = (
    "test_activations.py",
    "test_compile.py",
    "test_gates_compile.py",
    "test_autocast.py",
    "test_overflow.py",
)


@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter")
def test_in_the_interpreter():
    """Without bfloat16, whose numbers the interpreter holds as integers."""
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    assert_passes_interpreted(*files, "-k", "triton and not bfloat16")
