"""The CUDA kernels without a GPU: the same sources on an emulator, under the suite's own tests.

What this shows: checks, plans, index arithmetic, layouts of fragments and of shared memory, waits, barriers,
epilogues, reductions. What it does not: that a GPU does what the PTX ISA says, how it rounds, its speed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated import backend

from mi_kernels.ops import activations
from mi_kernels.ops.diagonal import portable as diagonal
from mi_kernels.ops.gated import portable as gated
from mi_kernels.ops.interaction import portable
from mi_kernels.testing.errors import relative_error

pytestmark = pytest.mark.skipif(backend.COMPILER is None, reason="no C++ compiler")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Of each file the cases that take little work: an emulated thread is slow.
SUITE = {
    "test_interaction": (
        "test_values and (odd or past-powers or outer or no-input or no-features or offset or transposed)"
        " and (bfloat16 or float32) and not threaded or nan_and_inf and middle-weight-torch.bfloat16",
        60,
    ),
    "test_gradients": ("test_error_rule and (odd-UVc or no-input) and (float64 or bfloat16)", 4),
    "test_modulate": ("test_error_rule and not threaded and not long and (float64 or bfloat16)", 100),
    "test_gates": ("test_error_rule and odd-AaCcG and (float32 or bfloat16)", 2),
    "test_activations": ("(test_kernels_agree or test_small_values) and not float16", 20),
}


@pytest.fixture(scope="module")
def emulated():
    operations = backend.load()
    before = operations.emulated_processors(4)
    yield operations
    operations.emulated_processors(before)


@pytest.mark.parametrize("name", SUITE)
def test_suite(name):
    """The error rule and the gradients, as the other tests state them."""
    chosen, least = SUITE[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "MI_KERNELS_TEST_EMULATED": "1"}
    file = Path(__file__).with_name(f"{name}.py")
    run = subprocess.run([*command, file], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= least


def draw(sizes, dtype, groups=()):
    """x, z, W, U, V, c, g for sizes B, Z, X, O."""
    b, i, j, o = sizes
    shapes = ((b, j), (b, i), (o, i, j), (o, i), (o, j), (o,), (b, o))
    return [torch.randn(*groups, *shape, dtype=torch.float64).to(dtype) for shape in shapes]


def primitives(operations, x, z, w, u, v, c, g):
    return (
        operations.interaction(x, z, w, u, v, c),
        *operations.interaction_input_grads(g, x, z, w, u, v, True, True),
        *operations.interaction_weight_grads(g, x, z, True, True, True, True),
    )


def truth(x, z, w, u, v, c, g):
    x, z, w, u, v, c, g = (t.double() for t in (x, z, w, u, v, c, g))
    return (
        portable.forward(x, z, w, u, v, c),
        *portable.input_grads(g, x, z, w, u, v, True, True),
        *portable.weight_grads(g, x, z, True, True, True, True),
    )


LIMITS = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


SPLITS = [
    *((sizes, 40, dtype) for sizes in ((70, 6, 32, 140), (131, 5, 72, 20)) for dtype in FLOATS),
    *((sizes, 1, torch.bfloat16) for sizes in ((131, 5, 72, 130), (37, 5, 13, 11))),
    ((300, 9, 16, 24), 5, torch.bfloat16),
    ((200, 9, 13, 5), 40, torch.float16),
    # A few rows: whole chunks and odd ones, one block of rows and two, more splits than one.
    *((sizes, 3, dtype) for sizes in ((3, 70, 64, 9), (1, 5, 7, 4)) for dtype in FLOATS),
    ((8, 40, 33, 6), 60, torch.float32),
    ((4, 301, 24, 3), 60, torch.float16),
    ((5, 3, 1100, 2), 9, torch.float32),
    ((2, 5, 40, 600), 2, torch.float64),
]


@pytest.mark.parametrize(("sizes", "processors", "dtype"), SPLITS, ids=str)
def test_every_split_of_the_work(sizes, processors, dtype, emulated):
    """Several tiles in each direction, whole chunks and odd ones, sums in one piece and in many."""
    emulated.emulated_processors(processors)
    arguments = draw(sizes, dtype)
    for index, (found, exact) in enumerate(
        zip(primitives(emulated, *arguments), truth(*arguments), strict=True)
    ):
        assert relative_error(found, exact) < LIMITS[dtype], index
    assert emulated.emulated_conflicts() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [20, 3])
def test_groups_and_shared_weights(rows, dtype, emulated):
    arguments = draw((rows, 3, 16, 24), dtype, groups=(3,))
    for shared in (False, True):
        if shared:
            arguments[2:6] = [t[:1].expand_as(t) for t in arguments[2:6]]
        for found, exact in zip(primitives(emulated, *arguments), truth(*arguments), strict=True):
            assert relative_error(found, exact) < LIMITS[dtype]


@pytest.mark.parametrize("activation", ["tanh", "softmax"])
def test_a_few_rows(activation, emulated):
    """Gates on the streaming kernel, and products z x that float16 cannot hold."""
    x, z, w, u, v, c, _ = draw((3, 40, 72, 72), torch.float16)
    arguments = (400 * x, 400 * z, w / 160000, u / 400, v / 400, c)
    expected = gated.gated_interaction(*(t.double() for t in arguments), activation, True)
    for found, true in zip(emulated.gated_interaction(*arguments, activation, True), expected, strict=True):
        assert relative_error(found, true) < 2 * LIMITS[torch.float16]
    plan = emulated.cuda_interaction_plan("forward", [1, 3, 40, 72, 72], torch.float16, 15, 90, 132)
    assert plan.startswith("algorithm=stream;scratch=")
    plan = emulated.cuda_interaction_plan("input_grads", [1, 4, 40, 72, 72], torch.bfloat16, 63, 90, 132)
    assert plan.startswith("algorithm=stream;scratch=")


def test_the_same_bits_again(emulated):
    arguments = draw((70, 6, 32, 24), torch.bfloat16)
    first, second = (primitives(emulated, *arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", activations.NAMES)
def test_gates_of_every_activation(activation, dtype, emulated):
    """Two tiles in each direction; the gates that were kept, too."""
    x, z, _, a, g, c, _ = draw((70, 6, 72, 72), dtype)
    shift_weight, shift_bias = torch.randn(72, 6).to(dtype), torch.randn(72).to(dtype)
    w = torch.randn(72, 6, 72).to(dtype)
    g, w = g / 8, w / 20
    for shift in ((shift_weight, shift_bias), (None, shift_bias)):
        arguments = (x, z, a, c, *shift, g)
        exact = (None if t is None else t.double() for t in arguments)
        expected = diagonal.diagonal(*exact, activation, 0.5, True)
        for found, true in zip(emulated.diagonal(*arguments, activation, 0.5, True), expected, strict=True):
            assert relative_error(found, true) < LIMITS[dtype]
    arguments = (x, z, w, a, g, c)
    expected = gated.gated_interaction(*(t.double() for t in arguments), activation, True)
    for found, true in zip(emulated.gated_interaction(*arguments, activation, True), expected, strict=True):
        assert relative_error(found, true) < 2 * LIMITS[dtype]
    assert emulated.emulated_conflicts() == 0


@pytest.mark.parametrize("primitive", ["forward", "input_grads", "weight_grads"])
def test_plans(primitive, emulated):
    def plan(sizes, processors):
        text = emulated.cuda_interaction_plan(primitive, sizes, torch.bfloat16, 63, 90, processors)
        return dict(field.split("=") for field in text.split(";"))

    large, small = plan([1, 8192, 64, 512, 512], 132), plan([1, 128, 64, 512, 128], 132)
    assert large["algorithm"] == small["algorithm"] == "mma"
    assert int(small["blocks"]) >= 64, "a small product is split over the chip"
    assert int(plan([1, 128, 64, 512, 128], 1)["splits"]) <= 2, "nor where there is nothing to fill"
    for sizes in ([0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 5, 1 << 20, 1 << 20, 3], [70000, 3, 4, 5, 6]):
        assert int(plan(sizes, 132)["blocks"]) >= 0
