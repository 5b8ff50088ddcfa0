"""The Triton backend on a GPU that is not there: its launches are written down, PyTorch makes the results.

    MI_KERNELS_TEST_REHEARSED=FILE python -m pytest tests/ops/test_gates.py

Every call of an operation lists what it would launch on capability 9.0, on tensors without data that lie as
its arguments do, and then returns what the portable twin computes. So the suite takes the way that it takes
on a GPU, bfloat16 included, and FILE has a line of JSON for each kernel of each test. It says
nothing about results of Triton, and a test of bits or of extremes may fail with those of PyTorch.
"""

import functools
import hashlib
import importlib
import json
import os
from dataclasses import replace

import torch

from mi_kernels.ops.backend import get, register
from mi_kernels.ops.library import DEFINED
from mi_kernels.testing import errors
from mi_kernels.testing.without_data import WithoutData, module_of

CAPABILITY = (9, 0)
SEEN: set[object] = set()  # calls and kernels of the test that runs


def lines_of(path) -> list[dict]:
    """What all processes wrote: the kernel's name, a key for what it is compiled for, and the test."""
    with open(path) as file:
        return [json.loads(line) for line in file]


def without_data(tensor: torch.Tensor) -> torch.Tensor:
    """On the device "meta", with the same strides and the same distance from the start of its memory."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = torch.empty(elements, dtype=tensor.dtype, device="meta")
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def described(argument) -> object:
    """What launches depend on."""
    if not isinstance(argument, torch.Tensor):
        return str(argument)
    offset = argument.storage_offset()
    return (
        argument.dtype,
        tuple(argument.shape),
        argument.stride(),
        offset,
        argument.untyped_storage().nbytes(),
    )


def write(launches, test: str) -> None:
    from tools import variants

    lines = []
    for key, launch in variants.distinct(launches, CAPABILITY).items():
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        if digest not in SEEN:
            SEEN.add(digest)
            lines.append(json.dumps({"kernel": launch.kernel.__name__, "key": digest, "test": test}) + "\n")
    with open(os.environ["MI_KERNELS_TEST_REHEARSED"], "a") as file:
        file.writelines(lines)


def rehearsed(kernel, portable):
    from mi_kernels.ops.triton.launch import recording

    @functools.wraps(kernel)
    def called(*arguments):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        if ("test", test) not in SEEN:
            SEEN.clear()
        call = (kernel, torch.backends.cuda.matmul.fp32_precision, *map(described, arguments))
        if call in SEEN:  # with other numbers
            return portable(*arguments)
        SEEN.update((("test", test), call))
        stand_ins = [without_data(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with recording(CAPABILITY, old=True) as launches, WithoutData():
            kernel(*stand_ins)
        write(launches, test)
        return portable(*arguments)

    return called


def one_draw(function, reference, draw, **options) -> None:
    """In place of the error rule: the portable backend is held to it elsewhere; draws differ in numbers."""
    function(*draw(0))


def install() -> None:
    """Make it the backend "triton" of tensors on the CPU, for the rest of this process."""
    errors.check_errors = one_draw
    for family, name in {(one.module, one.function) for one in DEFINED.values()}:
        twins = [importlib.import_module(module_of(family, backend)) for backend in ("triton", "portable")]
        setattr(twins[0], name, rehearsed(*(getattr(twin, name) for twin in twins)))
    register(
        replace(get("triton"), why_not=lambda: None, devices=lambda: ("cpu",), refuses=lambda tensor: None)
    )
