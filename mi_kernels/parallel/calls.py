"""What the public functions ask of this package: whether a call is one of DTensors, and to run it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..ops.library import Axes
from ..ops.rules import is_distributed


def given(*tensors: Any) -> bool:
    """Whether one of the tensors is a DTensor, in a call that no export traces: that follows sharding.py.

    ``torch.compile`` breaks its graph at `run`: what it traces would see views of DTensors, whose sharding it
    cannot follow.
    """
    if not any(is_distributed(tensor) for tensor in tensors):
        return False
    return torch.compiler.is_dynamo_compiling() or not torch.compiler.is_compiling()


def run(
    op: str,
    function: Callable[..., Any],
    tensors: Mapping[str, Any],
    arguments: Mapping[str, str],
    results: tuple[Axes | None, ...],
    cuts: str,
) -> Any:
    """``function(**tensors)``: see `local.run`."""
    from . import local

    return local.run(op, function, tensors, local.Signature(arguments, results, cuts))


def whole_index(index: Any) -> Any:
    """An index as a plain tensor, the same on all devices."""
    return index.full_tensor() if is_distributed(index) else index


def expanded(tensor: Any, shape: torch.Size) -> Any:
    """`Tensor.expand`; a DTensor is gathered first along what is expanded, of which PyTorch has no rule."""
    if is_distributed(tensor):
        from . import local

        tensor = local.unsharded(tensor, [dim for dim, size in enumerate(tensor.shape) if size == 1])
    return tensor.expand(shape)


def sharded(*tensors: Any) -> bool:
    """Whether one of the tensors is sharded along its first dimension."""
    placements = [placement for tensor in tensors for placement in getattr(tensor, "placements", ())]
    return any(placement.is_shard(0) for placement in placements)


def halves(packed: Any) -> Any:
    """See `local.halves`; of a plain tensor, which `run` refuses by name."""
    from . import local

    return local.halves(packed) if is_distributed(packed) else packed.chunk(2)
