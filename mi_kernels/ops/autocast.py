"""Autocast is asked for in one place, in words that Dynamo traces in every supported release of PyTorch."""

import collections
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from mi_kernels.ops.compiling import constant_while_compiling


def dtype_in_force(device: str) -> torch.dtype | None:
    """The autocast dtype for tensors on this type of device, or None outside autocast.

    Dynamo answers it while it traces, and guards on autocast: another state is another graph.
    """
    if not _available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@constant_while_compiling  # Dynamo of PyTorch 2.11 cannot trace the question
def _available(device: str) -> bool:
    # Asking whether autocast is enabled raises on devices that have none, such as meta.
    return torch.amp.is_autocast_available(device)


class _Cast(NamedTuple):
    source: Tensor  # alive as long as its id stands for it
    state: tuple[int, int]
    cast: Tensor


class _Region:
    """What autocast has cast since its outermost region began, on one type of device.

    The clock is autocast's own cache, which keeps what it casts as long as that region lasts: the cast of a
    small tensor is kept by nobody else, and when it goes, ours go with it.
    """

    def __init__(self) -> None:
        self.casts: dict[tuple[int, torch.dtype, bool], _Cast] = {}
        self.clock: Callable[[], object] = lambda: None

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if self.clock() is None:
            self.casts.clear()
            self.clock = weakref.ref(_kept_by_autocast(tensor.device), lambda _: self.casts.clear())
        # With and without gradients are two, since one of them has a graph.
        key = id(tensor), dtype, torch.is_grad_enabled()
        state = tensor._version, tensor.data_ptr()
        found = self.casts.get(key)
        if found is None or found.state != state:
            found = self.casts[key] = _Cast(tensor, state, tensor.to(dtype))
        return found.cast


_REGIONS: dict[str, _Region] = collections.defaultdict(_Region)


def _kept_by_autocast(device: torch.device) -> Tensor:
    """A tensor that autocast has just cast and cached."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    def leaf(rows: int) -> Tensor:
        # The cache takes float32 alone, whatever the default dtype is.
        return torch.zeros(rows, 1, dtype=torch.float32, device=device, requires_grad=True)

    # What the product saves for backward is what autocast has cast. These hooks see it; those of the caller,
    # such as a checkpoint's, do not.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.mm(leaf(0), leaf(1))
    return next(tensor for tensor in kept if tensor.shape == (1, 1))


def lower(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the autocast dtype; a weight once a region, as where autocast casts by itself."""
    if tensor.dtype == dtype:
        return tensor
    if _is_kept(tensor):
        return _REGIONS[tensor.device.type].cast(tensor, dtype)
    return tensor.to(dtype)


def _is_kept(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or not tensor.requires_grad or not tensor.is_leaf:
        return False
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype == torch.float32
    if not plain or tensor._is_view() or tensor.is_inference() or not torch.is_autocast_cache_enabled():
        return False
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )
