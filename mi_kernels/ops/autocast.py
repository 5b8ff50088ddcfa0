"""Queries of autocast's state that Dynamo can trace in every supported release, and its cast of weights."""

import collections
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from .compiling import constant_while_compiling


def dtype_in_force(device: str) -> torch.dtype | None:
    """The autocast dtype for tensors on this type of device, or None outside autocast.

    Dynamo evaluates it at trace time and guards on the autocast state: another state recompiles.
    """
    if not _available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@constant_while_compiling  # Dynamo of PyTorch 2.11 cannot trace is_autocast_available
def _available(device: str) -> bool:
    # is_autocast_enabled raises on devices without autocast, such as meta.
    return torch.amp.is_autocast_available(device)


class _Cast(NamedTuple):
    source: Tensor  # kept alive so that its id stays unique
    state: tuple[int, int]
    cast: Tensor


class _Region:
    """A cache of casts on one type of device, as long-lived as autocast's own: its outermost region.

    PyTorch does not report the end of that region. So autocast's own cache is made to hold the cast of a
    small tensor, to which nothing else refers: a weak reference to it (``sentinel``) dies with that cache.
    """

    def __init__(self) -> None:
        self.casts: dict[tuple[int, torch.dtype, bool], _Cast] = {}
        self.sentinel: Callable[[], object] = lambda: None

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if self.sentinel() is None:
            self.casts.clear()
            self.sentinel = weakref.ref(_cached_by_autocast(tensor.device), lambda _: self.casts.clear())
        # The grad mode is part of the key: the cast has a graph only where it is enabled.
        key = id(tensor), dtype, torch.is_grad_enabled()
        state = tensor._version, tensor.data_ptr()
        found = self.casts.get(key)
        if found is None or found.state != state:
            found = self.casts[key] = _Cast(tensor, state, tensor.to(dtype))
        return found.cast


_REGIONS: dict[str, _Region] = collections.defaultdict(_Region)


def _cached_by_autocast(device: torch.device) -> Tensor:
    """A tensor that autocast has just cast and cached."""
    saved: list[Tensor] = []

    def pack_hook(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def leaf(rows: int) -> Tensor:
        # Autocast caches float32 leaves only, whatever the default dtype is.
        return torch.zeros(rows, 1, dtype=torch.float32, device=device, requires_grad=True)

    # The product saves the cast tensor for backward. These hooks hide it from the caller's (a checkpoint's).
    hooks = saved_tensors_hooks(pack_hook, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), hooks:
        torch.mm(leaf(0), leaf(1))
    return next(tensor for tensor in saved if tensor.shape == (1, 1))


def lower(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the autocast dtype; a weight is cast once per region, as by autocast itself."""
    if tensor.dtype == dtype:
        return tensor
    if _is_cacheable(tensor):
        return _REGIONS[tensor.device.type].cast(tensor, dtype)
    return tensor.to(dtype)


def _is_cacheable(tensor: Tensor) -> bool:
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
