"""Autocast is asked for in one place, in words that Dynamo traces in every supported release of PyTorch."""

import collections
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


class _Region:
    """What autocast has cast since its outermost region began, on one type of device.

    The clock is autocast's own cache, which keeps what it casts as long as that region lasts: the cast of a
    small tensor is kept by nobody else, and when it goes, ours go with it.
    """

    def __init__(self) -> None:
        self.casts: dict[tuple[int, torch.dtype, bool], tuple[Callable[[], object], int, Tensor]] = {}
        self.clock: Callable[[], object] = lambda: None

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if self.clock() is None:
            self.clock = weakref.ref(_kept_by_autocast(tensor.device), lambda _: self.casts.clear())
        # With and without gradients are two, since one of them has a graph.
        key = id(tensor), dtype, torch.is_grad_enabled()
        source, version, cast = self.casts.get(key, (None, 0, tensor))
        if source is None or source() is not tensor or version != tensor._version:
            cast = tensor.to(dtype)
            self.casts[key] = weakref.ref(tensor), tensor._version, cast
        return cast


_REGIONS: dict[str, _Region] = collections.defaultdict(_Region)


def _kept_by_autocast(device: torch.device) -> Tensor:
    """A tensor that autocast has just cast and cached."""
    with torch.enable_grad():
        leaf = torch.zeros(1, 1, device=device, requires_grad=True)
        product = torch.mm(torch.zeros(0, 1, device=device, requires_grad=True), leaf)
    return product.grad_fn._saved_mat2  # type: ignore[union-attr]


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
