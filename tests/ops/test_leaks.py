"""Calls of registered operations leave nothing on the heap."""

import ctypes
from itertools import islice

import pytest
import torch
from helpers import plain

from mi_kernels.testing import direct

OPS = torch.ops.mi_kernels
COMPILED = [
    name
    for name in direct.operations()
    if plain(name) == name and torch._C._dispatch_has_kernel_for_dispatch_key(f"mi_kernels::{name}", "CPU")
]
CALLS = 100
FORMS = 8  # of an operation
CHUNK = 32  # bytes of the smallest one that glibc gives


class Mallinfo2(ctypes.Structure):
    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(7)] + [
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


def mallinfo2():
    found = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if found is None:
        pytest.skip("needs mallinfo2 of glibc 2.33")
    found.restype = Mallinfo2
    return found


@pytest.mark.parametrize("name", COMPILED)
def test_calls_leave_nothing_on_the_heap(name):
    """Text arguments did (csrc/common/text.h). Less than a chunk for every other call has other causes."""
    info, operation = mallinfo2(), getattr(OPS, name)
    for arguments in islice(direct.GOOD[name](), FORMS):
        for _ in range(CALLS):  # caches fill
            operation(*arguments)
        before = info().uordblks
        for _ in range(CALLS):
            operation(*arguments)
        grown = info().uordblks - before
        assert grown < CALLS // 2 * CHUNK, f"{grown / CALLS:.0f} bytes a call"
