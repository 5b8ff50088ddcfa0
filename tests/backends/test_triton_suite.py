"""Files of tests of every backend in the interpreter: activations, compile and export, autocast, overflow."""

import pytest
from helpers import assert_passes_interpreted

from mi_kernels import backends

pytestmark = pytest.mark.subprocess

pytest.importorskip("triton")
# In two processes: most of the time of a short one goes into imports, and one alone, long and among the last,
# left the other workers nothing to do.
PARTS = (
    ("test_activations.py", "test_autocast.py", "test_overflow.py"),
    ("test_compile.py", "test_gates_compile.py"),
)


@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter")
@pytest.mark.parametrize("names", PARTS, ids=lambda names: names[0])
def test_in_the_interpreter(names):
    """Without bfloat16, whose numbers the interpreter holds as integers; thinned as for the inner loop."""
    chosen = "triton and not bfloat16"
    assert_passes_interpreted(*names, "-k", chosen, MI_KERNELS_TEST_SELECTION="fast")


@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter")
def test_orders_of_weights_in_the_interpreter():
    """Derivatives of all kinds, one order of each kind: x innermost, z, and outputs."""
    chosen = "triton and (transforms or kernels_see) and (ZOX or XOZ or ZXO)"
    assert_passes_interpreted("test_weight_layouts.py", "-k", chosen)
