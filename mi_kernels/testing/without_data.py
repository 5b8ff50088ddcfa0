"""Execution of whole calls on meta tensors, down to the launches of kernels."""

import importlib
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .. import ops as operations
from ..ops.library import DEFINED
from ..ops.namespace import NAMESPACE


def module_of(family: str, backend: str) -> str:
    """The module of a family's kernels, portable or Triton."""
    ops = operations.__name__
    return f"{ops}.triton.{family}" if backend == "triton" else f"{ops}.{family}.portable"


class WithoutData(TorchDispatchMode):
    """Runs this package's kernels on meta tensors, where PyTorch would only run fakes.

    For the operations of the portable backend and of Triton (whose launches must be recorded). Reading a
    value fails, as does creating a tensor on another device.

    Attributes:
        names: the called operations, with the suffix of their backend.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != NAMESPACE:
            results = func(*args, **(kwargs or {}))
            for tensor in results if isinstance(results, tuple | list) else (results,):
                if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                    raise RuntimeError(f"{func} made a tensor on {tensor.device}")
            return results
        name = func.__name__.split(".")[0]
        self.names.append(name)
        operation, _, backend = name.rpartition("_")
        definition = DEFINED[operation]
        if definition.composed:
            with self:
                return func(*args)
        module = importlib.import_module(module_of(definition.module, backend))
        with self:
            return getattr(module, definition.function)(*args)
