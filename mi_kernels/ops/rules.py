"""What the derivative rules of every family share: the base of their Functions, and vmap's folds."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function
from torch.autograd import forward_ad as fw
from torch.autograd.function import BackwardCFunction

from mi_kernels.ops.compiling import constant_while_compiling

Maybe = Tensor | None
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def differentiating(tensors: Iterable[Maybe]) -> bool:
    """Whether a call has to go through its rule, or the kernel alone will do."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return torch._C._are_functorch_transforms_active() or fw._current_level >= 0 or _is_mapped()


@constant_while_compiling  # Dynamo of PyTorch 2.11 cannot trace the question
def _is_mapped() -> bool:
    """Whether ``torch.autograd`` maps over gradients (``is_grads_batched``, ``vectorize=True``)."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


# Multiplications from which on a gradient may cost more than the question whether it is wanted. The answer
# for a leaf that torch.autograd.grad was asked for is an exception, of some 20 us (docs/performance.md).
WORTH_ASKING = 1 << 22


def wanted(ctx: Any, work: int) -> Any:
    """Whose gradients this backward pass goes on with, for each argument of the Function.

    ``ctx.needs_input_grad`` says who requires grad; ``torch.autograd.grad(y, x)`` wants no more than x.
    ``work``: multiplications of the product that makes the gradients. Small ones are all made.
    """
    need = ctx.needs_input_grad
    if not isinstance(ctx, BackwardCFunction) or torch.compiler.is_compiling():
        return need
    if type(work) is int and work < WORTH_ASKING:  # a symbolic one is not compared: that would be a guard
        return need
    edges = iter([node for node, _ in ctx.next_functions if node is not None])
    return tuple(needed and _will_run(next(edges)) for needed in need)


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for, or no backward pass of the engine
        return True


def constant(tensor: Tensor) -> Tensor:
    """The tensor without derivatives.

    What ``torch.autograd`` maps over stays as it is: its vmap has no rule for detach, and the rule for vmap
    comes back with what is inside.
    """
    return tensor if torch._C._functorch.is_legacy_batchedtensor(tensor) else tensor.detach()


def without_features(tensor: Tensor) -> Tensor:
    """[..., 0], to stand for an operand that a product does without. No view: nothing flows back."""
    return tensor.new_empty((*tensor.shape[:-1], 0))


def gradients_wanted(tensors: Sequence[Maybe]) -> list[bool]:
    """Which of the tensors have a gradient coming, when a call is made now."""
    enabled = torch.is_grad_enabled()
    return [enabled and tensor is not None and tensor.requires_grad for tensor in tensors]


def keep(values: Sequence[Maybe], want: Sequence[bool]) -> tuple[Maybe, ...]:
    return tuple(value for value, wanted in zip(values, want, strict=True) if wanted)


def spread(values: Iterable[Maybe], want: Sequence[bool]) -> list[Maybe]:
    values = iter(values)
    return [next(values) if wanted else None for wanted in want]


def add(*terms: Maybe) -> Maybe:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def nests(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a jvp be differentiated by an outer one.

    PyTorch runs a Function's jvp with forward mode switched off. An outer forward level would then take the
    tangent for a constant, and jacfwd of jacfwd would be zero without a word. So the level is switched on
    again, and `primals` strips the tangents of the innermost level, whose derivative this is.
    """

    @functools.wraps(jvp)
    def nested(*arguments: Any) -> Any:
        with fw._set_fwd_grad_enabled(True):
            return jvp(*arguments)

    return nested


def primals(ctx: Any) -> tuple[Any, ...]:
    # All levels of torch.func are level 0 here. `fw.unpack_dual` would ask `fw._current_level`, which a
    # compiled torch.func.jvp does not set.
    level = max(fw._current_level, 0)
    return tuple(
        None if tensor is None else torch._VF._unpack_dual(tensor, level=level)[0]  # type: ignore[attr-defined]
        for tensor in ctx.saved_tensors
    )


class Rule(Function):
    @classmethod
    def call(cls, *args):
        """``apply`` without its binding of default arguments, which takes longer than a small kernel."""
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        if _is_mapped():
            return cls._mapped(args)
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]

    @classmethod
    def _mapped(cls, args):
        """The rule for vmap, applied to what the vmap of ``torch.autograd`` wraps.

        It would run the Function on the wrapped tensors, and the graph would be lost with the wrapper.
        """
        depth = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        for level in range(depth, 0, -1):
            pairs = [_unwrapped(value, level) for value in args]
            sizes = [value.shape[0] for value, dim in pairs if dim is not None]
            if sizes:
                values, dims = zip(*pairs, strict=True)
                results, out_dims = cls.vmap(_MapInfo(sizes[0]), dims, *values)
                if isinstance(results, Tensor):
                    return _wrapped(results, out_dims, level)
                return tuple(
                    _wrapped(result, dim, level) for result, dim in zip(results, out_dims, strict=True)
                )
        return super(Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def save(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)


class _MapInfo(NamedTuple):
    """What a rule for vmap is told."""

    batch_size: int


def _unwrapped(value: Any, level: int) -> tuple[Any, int | None]:
    """A tensor that is mapped over at this level with its mapped dimension in front; others as they are."""
    if not isinstance(value, Tensor) or not torch._C._functorch.is_legacy_batchedtensor(value):
        return value, None
    # Of a tensor that is mapped over at other levels alone, an expanded one of no size comes back.
    inside = torch._remove_batch_dim(value, level, 0, 0)
    return (value, None) if inside.shape[0] == 0 else (inside, 0)


def _wrapped(result: Tensor, dim: int, level: int) -> Tensor:
    """A result of a rule for vmap, mapped over at this level."""
    if dim != 0:  # forward mode walks over the memory of tangents, and wants that dimension in front of it
        result = result.movedim(dim, 0).contiguous()
    return torch._add_batch_dim(result, 0, level)


def unbatched(dims: Sequence[int | None], tensors: Sequence[Maybe]) -> bool:
    return all(dim is None for dim, tensor in zip(dims, tensors, strict=True) if tensor is not None)


def _split(tensor: Tensor, dim: int, first: int, second: int) -> Tensor:
    """``unflatten``, for which the vmap of ``torch.autograd`` has no rule."""
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], first, second, *shape[dim + 1 :])


class Fold:
    """Folds the dimension that vmap maps over into the rows or into the groups of a call, and back.

    Shared weights see only more rows. Weights that are mapped over, or produced by the call, turn the
    dimension into groups: an expanded operand costs no memory as long as there were no groups before.
    """

    def __init__(self, size: int, activation: Tensor, dim: int | None) -> None:
        shape = list(activation.shape)
        if dim is not None:
            del shape[dim]
        self.size = size
        self.grouped = len(shape) == 3
        self.row_dim = 1 if self.grouped else 0
        self.group_count, self.row_count = shape[0], shape[-2]

    def _expanded(self, tensor: Tensor, dim: int | None, position: int) -> Tensor:
        if dim is None:
            return tensor.unsqueeze(position).expand(
                *tensor.shape[:position], self.size, *tensor.shape[position:]
            )
        return tensor.movedim(dim, position)

    def rows(self, tensor: Tensor, dim: int | None) -> Tensor:
        tensor = self._expanded(tensor, dim, self.row_dim)
        rows = self.size * self.row_count
        return tensor.reshape(*tensor.shape[: self.row_dim], rows, tensor.shape[-1])

    def unrows(self, result: Tensor) -> tuple[Tensor, int]:
        return _split(result, self.row_dim, self.size, self.row_count), self.row_dim

    def groups(self, tensor: Maybe, dim: int | None) -> Any:
        if tensor is None:
            return None
        tensor = self._expanded(tensor, dim, 0)
        if not self.grouped:
            return tensor
        return tensor.reshape(self.size * tensor.shape[1], *tensor.shape[2:])

    def ungroups(self, result: Tensor) -> tuple[Tensor, int]:
        if not self.grouped:
            return result, 0
        return _split(result, 0, self.size, self.group_count), 0

    def all(
        self, unfold: Callable[[Any], tuple[Tensor, int]], results: Sequence[Maybe]
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        pairs = [unfold(result) for result in results]
        return tuple(tensor for tensor, _ in pairs), tuple(dim for _, dim in pairs)
