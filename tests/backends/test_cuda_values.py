"""The values of the CUDA kernels at sizes that reach each of them: on a GPU, some on the emulator too."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import backend

from mi_kernels import backends
from mi_kernels.ops.interaction import portable
from mi_kernels.testing import kernel_values
from mi_kernels.testing.kernel_sizes import MMA, PROCESSORS, SM90, KernelSize
from mi_kernels.testing.kernel_values import check_interaction

CASES = [(size, dtype) for size in (*SM90, *MMA) for dtype in size.dtypes]
BY_NAME = {size.name: size for size in (*SM90, *MMA)}
# An emulated thread is slow: cases of seconds, for each kernel and each dtype.
EMULATED = {"few": ("float32", "bfloat16"), "short x": ("float16",), "odd": ("float64", "bfloat16")}


@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_on_a_gpu(size: KernelSize, dtype: str):
    reason = backends.why_not("cuda")
    if reason is not None:
        pytest.skip(f"the backend cuda does not run here: {reason}")
    properties = torch.cuda.get_device_properties(0)
    if size.kernel is not None:
        if (properties.major, properties.minor) != (9, 0):
            pytest.skip(f"a kernel for 9.0; {properties.name} is {properties.major}.{properties.minor}")
        plan = torch.ops.mi_kernels.cuda_interaction_plan(
            "forward", list(size.sizes), getattr(torch, dtype), 15, 90, properties.multi_processor_count
        )
        assert plan.startswith("algorithm=wgmma"), "this build has no kernels for 90a"
    assert check_interaction(torch.ops.mi_kernels, size, getattr(torch, dtype), "cuda") <= 1


@pytest.mark.skipif(backend.COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, dtypes in EMULATED.items() for dtype in dtypes]
)
def test_on_the_emulator(name: str, dtype: str):
    """The emulated library has the mma engine and the small-batch kernels."""
    operations = backend.load()
    before = operations.emulated_processors(PROCESSORS)
    try:
        assert 0 < check_interaction(operations, BY_NAME[name], getattr(torch, dtype), "cpu") <= 1
    finally:
        operations.emulated_processors(before)


def portable_operations(**others: Callable[..., Any]) -> SimpleNamespace:
    names = {"interaction": portable.forward, "interaction_input_grads": portable.input_grads}
    return SimpleNamespace(**(names | {"interaction_weight_grads": portable.weight_grads} | others))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["64x1", "odd"])
def test_the_check_passes_what_is_right(name, dtype, monkeypatch):
    """With groups and without. Checking the rows in parts gives the same error."""
    found = []
    for elements in (kernel_values.CHUNK_ELEMENTS, 20_000):
        monkeypatch.setattr(kernel_values, "CHUNK_ELEMENTS", elements)
        found.append(check_interaction(portable_operations(), BY_NAME[name], getattr(torch, dtype), "cpu"))
    assert 0 < found[0] <= 1
    assert found[1] == pytest.approx(found[0], rel=0.2)


def one_element_off(x, *arguments):
    y = portable.forward(x, *arguments)
    y.view(-1)[7] += 0.5
    return y


def other_bits_each_time(x, *arguments):
    y = portable.forward(x, *arguments)
    return y * (1 + 1e-3 * random.random())


def dx_without_v(grad, x, z, w, u, v, *wanted):
    return portable.input_grads(grad, x, z, w, u, None, *wanted)


def dw_of_other_rows(grad, x, z, *wanted):
    return portable.weight_grads(grad.flip(-2), x, z, *wanted)


WRONG = {
    "interaction": (one_element_off, r"y \(WUVc\): result 0: an element is off"),
    "the same bits": (other_bits_each_time, "other bits in a second run"),
    "interaction_input_grads": (dx_without_v, r"gradients \(WUVc\): result 0"),
    "interaction_weight_grads": (dw_of_other_rows, r"gradients \(WUVc\): result 2"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_check_notices(what):
    function, message = WRONG[what]
    name = "interaction" if what == "the same bits" else what
    with pytest.raises(AssertionError, match=message):
        check_interaction(portable_operations(**{name: function}), BY_NAME["odd"], torch.float32, "cpu")
