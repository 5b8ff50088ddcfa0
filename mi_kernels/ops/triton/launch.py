"""Kernel launches on the device of the tensors and its current stream; empty grids are skipped."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .tile_limits import AMD


class Target(NamedTuple):
    """The compilation target: compute capability, and whether Triton is older than 3.9."""

    capability: tuple[int, int]
    old: bool


class Launch(NamedTuple):
    """A kernel with its arguments, including constexprs, and its options."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]


class Recorder(NamedTuple):
    target: Target
    launches: list[Launch]


_MOST_PROGRAMS = 2**31 - 1
_OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)


class _Recorders(threading.local):
    """Per thread, since autograd launches kernels in other threads."""

    def __init__(self) -> None:
        self.stack: list[Recorder] = []


_recorders = _Recorders()


@functools.cache
def _device_target(index: int | None) -> Target:
    return Target(torch.cuda.get_device_capability(index) if torch.version.hip is None else AMD, _OLD)


def target(device: torch.device) -> Target:
    """The target of a device; the interpreter uses the choices for capability 8.0."""
    if _recorders.stack:
        return _recorders.stack[-1].target
    return _device_target(device.index) if device.type == "cuda" else Target((8, 0), _OLD)


def launch(
    device: torch.device, kernel: Any, programs: int, arguments: dict[str, Any], warps: int, stages: int
) -> None:
    """Launch ``programs`` instances of a kernel; does nothing if there are none.

    Raises ValueError: the grid of a GPU cannot have that many.
    """
    if programs == 0:
        return
    # enable_fp_fusion is explicit as its default depends on the version; fma avoids a second rounding.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if _recorders.stack:
        _recorders.stack[-1].launches.append(Launch(kernel, programs, arguments, options))
        return
    if programs > _MOST_PROGRAMS:
        raise ValueError(
            f"triton: {kernel.__name__}: expected at most {_MOST_PROGRAMS} programs in a grid,"
            f" got {programs}; cut the batch into parts"
        )
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](**arguments, **options)


@contextlib.contextmanager
def recording(capability: tuple[int, int], old: bool = _OLD) -> Iterator[list[Launch]]:
    """Record launches instead of executing them, as for a device of this capability.

    Operands may be meta tensors.
    """
    recorder = Recorder(Target(capability, old), [])
    _recorders.stack.append(recorder)
    try:
        yield recorder.launches
    finally:
        _recorders.stack.pop()


def operand(tensor: Tensor | None, dims: int) -> tuple[Any, ...] | None:
    """The kernel argument (tensor, strides...); missing leading dimensions have stride 0."""
    return None if tensor is None else (tensor, *(0,) * (dims - tensor.dim()), *tensor.stride())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
