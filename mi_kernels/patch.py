"""``mi.patch`` and ``mi.patched``: programs that call PyTorch's bilinear function run on these kernels."""

import sys
import threading
from collections import Counter
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import _builtins
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from .functional.interaction import bilinear
from .ops.autocast import dtype_in_force
from .ops.dtypes import FLOATING

__all__ = ["Patch", "patch", "patched"]

_TORCH = F.bilinear  # also torch.bilinear: one built-in function
_DENSE = (Tensor, nn.Parameter)
_lock = threading.RLock()
_active: list["Patch"] = []


class Patch(AbstractContextManager["Patch"]):
    """What :func:`patch` returns: it undoes the patch, and says which calls ran on these kernels.

    Attributes:
        taken: how many calls of ``torch.nn.functional.bilinear`` ran on these kernels since.
        refused: how many did not, by reason. These ran in PyTorch, as without a patch.

    Example:
        >>> layer = torch.nn.Bilinear(3, 4, 2)
        >>> with mi.patched() as patch:
        ...     y = layer(torch.randn(5, 3), torch.randn(5, 4))
        >>> patch.taken, dict(patch.refused)
        (1, {})
    """

    def __init__(self) -> None:
        self.taken = 0
        self.refused: Counter[str] = Counter()
        self._entered = 0

    def _activate(self) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("patch: expected a call outside of torch.compile, got one that it traces")
        with _lock:
            if not _active:
                _replace()
            if self not in _active:
                _active.append(self)

    def remove(self) -> None:
        """Undo this patch; a second time does nothing. PyTorch's function is back when no patch is left.

        Example:
            >>> mi.patch().remove()
        """
        with _lock:
            if self in _active:
                _active.remove(self)
                if not _active:
                    _exchange(_bilinear, _TORCH)

    def __enter__(self) -> "Patch":
        self._activate()
        self._entered += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            self.remove()

    def __repr__(self) -> str:
        state = "active" if self in _active else "removed"
        return f"Patch({state}, taken={self.taken}, refused={dict(self.refused)})"


def patch() -> Patch:
    r"""Run ``torch.nn.Bilinear`` and ``torch.nn.functional.bilinear`` on these kernels, in the whole process.

    .. math:: y = x_1^T A x_2 + b

    Models that exist already need no change: their layers look the function up when they are called. Modules
    that have imported the function itself (``from torch.nn.functional import bilinear``) get it, too; those
    that hold it elsewhere, in a variable of a class or a closure, do not; what is taken there during a patch
    computes in PyTorch after it. Results are PyTorch's to rounding, of the same shape and dtype, and can be
    differentiated to any order. Under autocast PyTorch returns the dtype of the arguments, and so does this,
    with all of it computed in that dtype.

    A call is left to PyTorch, and counted in :attr:`Patch.refused` with the reason, wherever the result could
    be another one: tensors that are no plain dense ones (subclasses such as DTensor, sparse, quantised),
    dtypes other than float64, float32, bfloat16 and float16, or several, several devices, arguments that
    PyTorch refuses (its error is raised), and while a program is recorded to be run without this package
    (``torch.jit.trace``, ``torch.jit.script``, ``torch.export``, ``torch.onnx.export``). Under
    ``torch.compile`` the graph holds these operations, and its calls are not counted.

    Returns:
        a :class:`Patch`, whose ``remove`` undoes it. Patches may overlap, in any order of removal.

    Raises:
        RuntimeError: ``torch.nn.functional.bilinear`` is not PyTorch's own function, as another package has
            replaced it, or ``torch.compile`` is tracing this call.

    To change single layers instead, and what is saved with a model: :func:`convert`.

    Example:
        >>> handle = mi.patch()
        >>> y = torch.nn.functional.bilinear(torch.randn(5, 3), torch.randn(5, 4), torch.randn(2, 3, 4))
        >>> handle.remove()
    """
    active = Patch()
    active._activate()
    return active


def patched() -> Patch:
    """:func:`patch` for a ``with`` block: ``torch.nn.Bilinear`` runs on these kernels within it.

    The patch is that of the whole process, so other threads see it as well. It begins and ends with the
    block; the same object may enter several.

    Returns:
        a :class:`Patch`, the target of the ``with``.

    Raises:
        RuntimeError: at the beginning of the block, as :func:`patch`.

    Example:
        >>> layer = torch.nn.Bilinear(3, 4, 2)
        >>> with mi.patched():
        ...     y = layer(torch.randn(5, 3), torch.randn(5, 4))
    """
    return Patch()


def _replace() -> None:
    _builtins._register_builtin(_bilinear, "aten::bilinear")  # torch.jit.script takes PyTorch's operation
    for owner, name in ((torch, "bilinear"), (F, "bilinear")):
        if getattr(owner, name) is not _TORCH:
            other = getattr(getattr(owner, name), "__module__", None) or "another package"
            raise RuntimeError(
                f"patch: expected {owner.__name__}.{name} to be PyTorch's own, got a function of {other}"
            )
    _exchange(_TORCH, _bilinear)


def _exchange(old: object, new: object) -> None:
    """In all modules that there are now: some are imported under a patch."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__ != __name__:
            for name in [name for name, value in list(vars(module).items()) if value is old]:
                setattr(module, name, new)


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tensors = [input1, input2, weight] if bias is None else [input1, input2, weight, bias]
    if not _active:  # kept by somebody, in an attribute or a closure, from the time of a patch
        return _TORCH(input1, input2, weight, bias)
    if torch._C._len_torch_function_stack() and not torch.compiler.is_compiling():
        # As PyTorch's own functions do: modes see the call first, and call it again without them.
        return handle_torch_function(_bilinear, tensors, input1, input2, weight, bias)
    reason = _why_not(tensors)
    if not torch.compiler.is_compiling():
        for one in _active:
            if reason is None:
                one.taken += 1
            else:
                one.refused[reason] += 1
    if reason is not None:
        return _TORCH(input1, input2, weight, bias)
    if dtype_in_force(input1.device.type) is None:
        return bilinear(input1, input2, weight, bias)
    # PyTorch does not cast this function down; a program that is not changed expects the dtype that it had.
    with torch.autocast(input1.device.type, enabled=False):
        return bilinear(input1, input2, weight, bias)


# What PyTorch's own says of itself, in messages about arguments as well.
_bilinear.__name__ = _bilinear.__qualname__ = "bilinear"
_bilinear.__doc__ = _TORCH.__doc__


def _why_not(tensors: list[Any]) -> str | None:
    """Why a call is left to PyTorch."""
    if torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_exporting():
        return "the call is recorded, to run without this package"
    if not all(type(tensor) in _DENSE for tensor in tensors):
        return "an argument is no plain tensor"
    compiling = torch.compiler.is_compiling()  # Dynamo cannot ask this
    if not compiling and any(torch._is_functional_tensor(tensor) for tensor in tensors):
        return "torch.func.functionalize has no rule for these operations"
    input1, input2, weight = tensors[:3]
    if any(tensor.layout != torch.strided or tensor.is_quantized for tensor in tensors):
        return "an argument is not dense"
    if input1.dtype not in FLOATING:
        return f"the dtype is {input1.dtype}"
    if any(tensor.dtype != input1.dtype for tensor in tensors):
        return "the dtypes differ"
    if any(tensor.device != input1.device for tensor in tensors):
        return "the devices differ"
    fits = input1.ndim and input2.ndim and weight.ndim == 3 and input1.shape[:-1] == input2.shape[:-1]
    if not fits or weight.shape[1:] != (input1.shape[-1], input2.shape[-1]) or 0 in weight.shape[1:]:
        return "PyTorch refuses the arguments"
    if len(tensors) == 4 and tensors[3].shape != weight.shape[:1]:
        return "the bias broadcasts"
    return None
