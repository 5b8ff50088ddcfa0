"""Public functions of DTensors: each device calls the function on its parts.

The axes of all arguments say along which of them a call may be cut (rules.py); for each dimension of the mesh
the cut is taken that moves the fewest elements between devices. What a device computes is a call on plain
tensors, with its fastest kernels and its derivative rule: no view of a DTensor is in between.

`_Local` and `_Global` go from a DTensor to the part of this device and back. Each is the other's backward
pass, with the placements that a gradient has: where an argument is the same on all devices of a cut, its
gradient is a sum over them, and the reverse. So derivatives of any order follow.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from ..ops.library import Axes
from . import rules

Placed = tuple[Placement, ...]

_IN_PARTS = "mi_kernels runs this call of DTensors on their parts, outside of the graph"


class _Local(Function):
    """The part of this device of a DTensor, redistributed to ``placements``."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, placements: Placed, duals: Placed) -> Tensor:
        ctx.mesh, ctx.shape, ctx.placements, ctx.duals = tensor.device_mesh, tensor.shape, placements, duals
        ctx.set_materialize_grads(False)
        local = _part(tensor, placements)
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if grad is None:
            return None, None, None
        return _Global.apply(grad, ctx.mesh, ctx.shape, ctx.duals, ctx.placements), None, None


class _Global(Function):
    """A DTensor of ``shape`` of the parts of all devices."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, mesh: DeviceMesh, shape: torch.Size, placements: Placed, duals: Placed
    ) -> Any:
        ctx.placements, ctx.duals = placements, duals
        ctx.set_materialize_grads(False)
        return _wrapped(local, mesh, shape, placements)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if grad is None:
            return (None,) * 5
        return _Local.apply(grad, ctx.duals, ctx.placements), None, None, None, None


def _part(tensor: DTensor, placements: Placed) -> Tensor:
    """The local tensor of a DTensor that is redistributed; a partial sum of a whole one is its P-th part."""
    pairs = list(zip(tensor.placements, placements, strict=True))
    first = [here if here == there or not there.is_partial() else Replicate() for here, there in pairs]
    reached = [
        there if not there.is_partial() else here for here, (_, there) in zip(first, pairs, strict=True)
    ]
    if list(tensor.placements) != reached:
        tensor = tensor.redistribute(placements=reached)
    local = tensor.to_local()
    parts = 1
    for dim, (here, there) in enumerate(zip(reached, placements, strict=True)):
        if there.is_partial() and not here.is_partial():
            parts *= tensor.device_mesh.size(dim)
    return local if parts == 1 else local / parts


def _strides(local: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Of the whole tensor, in the memory order of the part."""
    own = local.stride()
    order = sorted(range(len(shape)), key=lambda dim: (-own[dim], dim))
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def to_local(tensor: DTensor, placements: Placed) -> Tensor:
    """`DTensor.to_local` of these placements, differentiable to any order; gradients are placed as it is."""
    return _Local.apply(tensor, placements, placements)


def to_global(local: Tensor, mesh: DeviceMesh, shape: torch.Size, placements: Placed) -> DTensor:
    """`DTensor.from_local`, differentiable to any order; gradients are placed as it is."""
    duals = tuple(Replicate() if placement.is_partial() else placement for placement in placements)
    return _Global.apply(local, mesh, shape, placements, duals)


def unsharded(tensor: DTensor, dims: Sequence[int]) -> DTensor:
    """A DTensor that is sharded along none of these dimensions."""
    placements = tuple(
        Replicate() if getattr(placement, "dim", None) in dims else placement
        for placement in tensor.placements
    )
    return moved(tensor, placements)


class _Moved(Function):
    """A DTensor in other placements: the same tensor, so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, placements: Placed) -> Any:
        return tensor.redistribute(placements=placements)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, None


def moved(tensor: DTensor, placements: Placed) -> DTensor:
    """`DTensor.redistribute`, differentiable to any order; the gradient stays where it is."""
    return tensor if tuple(tensor.placements) == placements else _Moved.apply(tensor, placements)


@torch.compiler.disable(reason=_IN_PARTS)
def halves(packed: DTensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Both halves of a packed weight along ``dim``; its parts may have those of each (`packed_shard`)."""
    if any(placement.is_shard(dim) and not is_packed(placement, dim) for placement in packed.placements):
        first, second = packed.chunk(2, dim)
        return first, second
    return _Halves.apply(packed, dim, packed.placements)


def packed_shard(dim: int) -> Placement:
    """The placement of two tensors, one behind the other along ``dim``, each sharded along it."""
    try:
        from torch.distributed.tensor.placement_types import _StridedShard
    except ImportError as error:  # private
        raise NotImplementedError("this release of PyTorch cannot shard both halves of a weight") from error
    return _StridedShard(dim, split_factor=2)


def distribute_packed(
    tensor: Tensor, mesh: DeviceMesh, placement: Placement, src_data_rank: int | None
) -> DTensor:
    """`distribute_tensor` for `packed_shard`, of sizes that need not be divisible."""
    whole = distribute_tensor(tensor, mesh, [Replicate()], src_data_rank=src_data_rank).to_local()
    dim: int = placement.dim  # type: ignore[attr-defined]
    placed = [distribute_tensor(half, mesh, [Shard(dim)], src_data_rank=None) for half in whole.chunk(2, dim)]
    parts = [half.to_local() for half in placed]
    return _wrapped(torch.cat(parts, dim), mesh, tensor.shape, (placement,))


def is_packed(placement: Placement, dim: int) -> bool:
    return getattr(placement, "split_factor", 1) == 2 and getattr(placement, "dim", None) == dim


class _Halves(Function):
    """The halves of a packed tensor, a view of it; its gradient is packed of theirs by `_Packed`."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, dim: int, placements: Placed) -> Any:
        ctx.dim, ctx.placements, ctx.shape = dim, placements, tensor.shape
        ctx.set_materialize_grads(False)
        local = tensor.to_local()
        placed = tuple(Shard(dim) if is_packed(one, dim) else one for one in tensor.placements)
        if any(
            is_packed(one, dim) and one != own for one, own in zip(placements, tensor.placements, strict=True)
        ):
            whole = tensor.redistribute(placements=[Replicate()] * len(placements))
            placed = tuple(Shard(dim) if is_packed(one, dim) else Replicate() for one in placements)
            return tuple(half.redistribute(placements=placed) for half in whole.chunk(2, dim))
        size = torch.Size(size // 2 if axis == dim else size for axis, size in enumerate(tensor.shape))
        mesh = tensor.device_mesh
        return tuple(_wrapped(half, mesh, size, placed) for half in local.chunk(2, dim))

    @staticmethod
    def backward(ctx: Any, first: Any, second: Any) -> Any:
        if first is None and second is None:
            return None, None, None
        first = torch.zeros_like(second) if first is None else first
        second = torch.zeros_like(first) if second is None else second
        return _Packed.apply(first, second, ctx.dim, ctx.placements, ctx.shape), None, None


class _Packed(Function):
    @staticmethod
    def forward(ctx: Any, first: Any, second: Any, dim: int, placements: Placed, shape: torch.Size) -> Any:
        ctx.dim, ctx.placements = dim, placements
        reached, placed = [], []
        for one, left, right in zip(placements, first.placements, second.placements, strict=True):
            if left.is_partial() and left == right and not is_packed(one, dim):
                placed.append(left)
            else:  # nothing can be made a sum that is none: the gradient of a partial sum is whole
                placed.append(Replicate() if one.is_partial() else one)
            reached.append(Shard(dim) if is_packed(one, dim) else placed[-1])
        parts = [half.redistribute(placements=reached).to_local() for half in (first, second)]
        return _wrapped(torch.cat(parts, dim), first.device_mesh, shape, tuple(placed))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return *_Halves.apply(grad, ctx.dim, ctx.placements), None, None, None


def _wrapped(local: Tensor, mesh: DeviceMesh, shape: torch.Size, placements: Placed) -> DTensor:
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=shape, stride=_strides(local, shape)
    )


class Signature(NamedTuple):
    """The axes of a function: ``*`` are leading dimensions that broadcast, as in ``"*OZX"``."""

    arguments: Mapping[str, str]
    results: Sequence[Axes | None]
    cuts: str  # axes that a call may be cut along, ``*`` for leading ones


@torch.compiler.disable(reason=_IN_PARTS)
def run(op: str, function: Callable[..., Any], tensors: Mapping[str, Any], signature: Signature) -> Any:
    """``function(**tensors)`` of DTensors whose shapes have been checked: a DTensor, or a tuple of them."""
    mesh, given = _given(op, tensors)
    axes, lead, sizes = _axes(given, signature.arguments)
    results = [one and Axes(one.letters.replace("*", lead), one.terms) for one in signature.results]
    letters = signature.cuts.replace("*", lead)
    chosen = [_cheapest(number, mesh, given, axes, results, letters) for number in range(mesh.ndim)]
    parts = dict(tensors)
    for name, tensor in given.items():
        placements = tuple(cut.arguments[name] for cut in chosen)
        duals = tuple(_dual(cut, cut.arguments[name]) for cut in chosen)
        parts[name] = _Local.apply(tensor, placements, duals)
    found = function(**parts)
    values = found if isinstance(found, tuple) else (found,)
    wrapped = []
    for number, (value, result) in enumerate(zip(values, results, strict=True)):
        if value is None or result is None:
            wrapped.append(value)
            continue
        placements = tuple(cut.results[number] for cut in chosen)
        duals = tuple(_dual(cut, cut.results[number]) for cut in chosen)
        shape = torch.Size(sizes[letter] for letter in result.letters)
        wrapped.append(_Global.apply(value, mesh, shape, placements, duals))
    return tuple(wrapped) if isinstance(found, tuple) else wrapped[0]


def _given(op: str, tensors: Mapping[str, Any]) -> tuple[DeviceMesh, dict[str, DTensor]]:
    """The mesh, and all tensors as DTensors; plain indices are the same on all devices."""
    mesh = next(tensor.device_mesh for tensor in tensors.values() if isinstance(tensor, DTensor))
    given = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(tensor, DTensor):
            if tensor.is_floating_point():
                raise TypeError(
                    f"{op}: {name}: expected a DTensor, as other arguments are, got a torch.Tensor"
                )
            whole = [Replicate()] * mesh.ndim
            tensor = DTensor.from_local(tensor, mesh, whole, run_check=False)
        elif tensor.device_mesh != mesh:
            raise ValueError(f"{op}: {name}: expected a DTensor of {mesh}, got one of {tensor.device_mesh}")
        given[name] = tensor
    return mesh, given


def _axes(
    given: Mapping[str, DTensor], patterns: Mapping[str, str]
) -> tuple[dict[str, str], str, dict[str, int]]:
    """The axes of each tensor, those of the leading dimensions of results, and the sizes of all."""
    leads = {}
    for name, tensor in given.items():
        if patterns[name][0] == "*":
            leads[name] = tensor.shape[: tensor.ndim - len(patterns[name]) + 1]
    rank = max((len(sizes) for sizes in leads.values()), default=0)
    common = torch.broadcast_shapes(*leads.values()) if leads else torch.Size()
    lead = "".join(chr(ord("a") + dim) for dim in range(rank))
    sizes = dict(zip(lead, common, strict=True))
    axes = {}
    for name, tensor in given.items():
        letters = patterns[name].lstrip("*")
        if name in leads:
            own = leads[name]
            start = rank - len(own)
            # A dimension of size 1 that is shared is no axis.
            before = [
                lead[start + dim] if size == common[start + dim] else "." for dim, size in enumerate(own)
            ]
            letters = "".join(before) + letters
        axes[name] = letters
        sizes |= {axis: size for axis, size in zip(letters, tensor.shape, strict=True) if axis != "."}
    return axes, lead, sizes


def _cheapest(
    number: int,
    mesh: DeviceMesh,
    given: Mapping[str, DTensor],
    axes: Mapping[str, str],
    results: Sequence[Axes | None],
    letters: str,
) -> rules.Cut:
    """The cut for a dimension of the mesh that moves the fewest elements, and changes the least."""
    cuts = [rules.whole(axes, results)]
    for letter in letters:
        found = rules.cut(letter, axes, results) if any(letter in own for own in axes.values()) else None
        if found is not None:
            cuts.append(found)
    size = mesh.size(number)

    def cost(cut: rules.Cut) -> tuple[float, int]:
        moved, changed = 0.0, 0
        for name, tensor in given.items():
            here, there = tensor.placements[number], cut.arguments[name]
            changed += here != there
            moved += _moved(here, there, size) * _elements(tensor)
        return moved, changed

    return min(cuts, key=cost)


def _elements(tensor: DTensor) -> float:
    """Of a part, the same on all devices: they have to choose the same cut."""
    mesh, shards = tensor.device_mesh, 1
    for number, placement in enumerate(tensor.placements):
        shards *= mesh.size(number) if placement.is_shard() else 1
    return tensor.numel() / shards


def _moved(here: Placement, there: Placement, size: int) -> float:
    """Elements that a device receives, for each that it has."""
    if here == there or here.is_replicate():
        return 0
    if here.is_partial():
        return (size - 1) / size * (1 if there.is_shard() else 2)
    return (size - 1) / size if there.is_shard() else size - 1


def _dual(cut: rules.Cut, placement: Placement) -> Placement:
    """Where the gradient of what is placed so lies."""
    is_cut = not all(one.is_replicate() for one in (*cut.arguments.values(), *cut.results))
    if not is_cut or placement.is_shard():
        return placement
    return Replicate() if placement.is_partial() else Partial()
