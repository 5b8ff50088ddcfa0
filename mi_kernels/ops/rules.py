"""Shared by the derivative rules of all families: the base of their Functions, and vmap's folds."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd import forward_ad as fw
from torch.autograd.function import BackwardCFunction, FunctionMeta
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .compiling import constant_while_compiling, is_transformed

Maybe = Tensor | None
# As Function.apply does with tensors of transforms that are over.
_unwrap = torch._C._functorch.unwrap_if_dead
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def differentiating(tensors: Iterable[Maybe]) -> bool:
    """Whether a call needs its derivative rule; else the kernel is called directly."""
    return recorded(tensors) or transformed()


def recorded(tensors: Iterable[Maybe]) -> bool:
    """Whether a call is to be part of a graph that is differentiated backwards."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def transformed() -> bool:
    """Whether forward mode, vmap or any transform of torch.func is active."""
    return torch._C._are_functorch_transforms_active() or fw._current_level >= 0 or _is_mapped()


def is_watched() -> bool:
    """Whether a dispatch mode sees the operations. Selective checkpoints refuse results changed in place."""
    return torch._C._len_torch_dispatch_stack() > 0


def sees_values() -> bool:
    """Whether a rule may look at the values of tensors: nothing traces or transforms but FLOP counters."""
    if torch.compiler.is_compiling() or transformed():
        return False
    if torch._C._len_torch_dispatch_stack() == 0:
        return True
    return all(
        type(mode).__module__ == "torch.utils.flop_counter" for mode in _get_current_dispatch_mode_stack()
    )


@constant_while_compiling  # Dynamo of PyTorch 2.11 cannot trace this query
def _is_mapped() -> bool:
    """Whether ``torch.autograd`` vmaps over gradients (``is_grads_batched``, ``vectorize=True``)."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


# Multiplications above which a gradient may cost more than the query whether it is needed. For a leaf that is
# an input of torch.autograd.grad the query raises an exception, about 20 us (docs/performance.md).
MIN_QUERY_WORK = 1 << 22


def wanted(ctx: Any, work: int) -> Any:
    """For each argument of the Function, whether this backward pass uses its gradient.

    ``ctx.needs_input_grad`` says which arguments require grad; ``torch.autograd.grad(y, x)`` uses only that
    of x. ``work``: multiplications of the product of the gradients. Small ones are all computed.
    """
    need = ctx.needs_input_grad
    if not isinstance(ctx, BackwardCFunction) or torch.compiler.is_compiling():
        return need
    if type(work) is int and work < MIN_QUERY_WORK:  # comparing a symbolic size would add a guard
        return need
    edges = iter([node for node, _ in ctx.next_functions if node is not None])
    return tuple(needed and _is_executed(next(edges)) for needed in need)


def _is_executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf among the inputs of torch.autograd.grad, or no backward pass of the engine
        return True


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, whose package need not be imported to ask."""
    return type(tensor) is not Tensor and hasattr(tensor, "placements")


def constant(tensor: Tensor) -> Tensor:
    """The tensor without derivatives.

    A tensor that ``torch.autograd`` vmaps over is returned unchanged: that vmap has no rule for detach, and
    our own vmap rule calls again with the unwrapped tensor.
    """
    return tensor if torch._C._functorch.is_legacy_batchedtensor(tensor) else tensor.detach()


def without_features(tensor: Tensor) -> Tensor:
    """[..., 0], a placeholder for an operand that a product does not use. Not a view: it has no gradient."""
    return tensor.new_empty((*tensor.shape[:-1], 0))


def gradients_wanted(tensors: Sequence[Maybe]) -> list[bool]:
    """Which of the tensors would get a gradient from a call in the current grad mode."""
    enabled = torch.is_grad_enabled()
    return [enabled and tensor is not None and tensor.requires_grad for tensor in tensors]


def select(values: Sequence[Maybe], want: Sequence[bool]) -> tuple[Maybe, ...]:
    """The wanted values."""
    return tuple(value for value, wanted in zip(values, want, strict=True) if wanted)


def scatter(values: Iterable[Maybe], want: Sequence[bool]) -> list[Maybe]:
    """The inverse of `select`, with None for the others."""
    values = iter(values)
    return [next(values) if wanted else None for wanted in want]


def add(*terms: Maybe) -> Maybe:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def nestable(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a jvp differentiable by an outer forward mode.

    PyTorch runs a Function's jvp with forward mode disabled. An outer level would then treat the tangent as a
    constant, and jacfwd of jacfwd would silently be zero. So forward mode is enabled again, and `primals`
    strips the tangents of the innermost level, which this jvp differentiates.
    """

    @functools.wraps(jvp)
    def nested(*arguments: Any) -> Any:
        with fw._set_fwd_grad_enabled(True):
            return jvp(*arguments)

    return nested


def primals(ctx: Any) -> tuple[Any, ...]:
    # All levels of torch.func are level 0 here. `fw.unpack_dual` reads `fw._current_level`, which a
    # compiled torch.func.jvp does not set.
    level = max(fw._current_level, 0)
    return tuple(
        None if tensor is None else torch._VF._unpack_dual(tensor, level=level)[0]  # type: ignore[attr-defined]
        for tensor in ctx.saved_tensors
    )


class _Named(FunctionMeta):
    """Names the nodes of a rule by its function: those of ``InteractionRule`` are ``InteractionBackward``.

    A rule of a name of its own, for the same function, says which in ``function``.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> None:  # noqa: N805
        super().__init__(attributes.get("function", name.removesuffix("Rule")), bases, attributes)


class Rule(Function, metaclass=_Named):
    """Base of the derivative rules; ``call`` replaces ``apply``."""

    @classmethod
    def call(cls, *args):
        """``apply`` without binding default arguments, which takes longer than a small kernel."""
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        if _is_mapped():
            return cls._mapped(args)
        return cls.record(*args)

    @classmethod
    def record(cls, *args):
        """``call`` where nothing is `transformed`."""
        live = [_unwrap(value) if isinstance(value, Tensor) else value for value in args]
        return super(Function, cls).apply(*live)  # type: ignore[misc]

    @classmethod
    def _mapped(cls, args):
        """Applies the vmap rule to tensors wrapped by the vmap of ``torch.autograd``.

        That vmap would run the Function on the wrapped tensors and lose the graph with the wrapper.
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
        # Only jvp reads these. Dynamo does not know the level, and compiles what transforms differentiate.
        if fw._current_level >= 0 or torch.compiler.is_compiling() or is_transformed():
            ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)


class _MapInfo(NamedTuple):
    """The ``info`` argument of a vmap rule."""

    batch_size: int


def _unwrapped(value: Any, level: int) -> tuple[Any, int | None]:
    """A tensor mapped at this level with its mapped dimension first (dim 0); other values with dim None."""
    if not isinstance(value, Tensor) or not torch._C._functorch.is_legacy_batchedtensor(value):
        return value, None
    # A tensor mapped only at other levels comes back expanded to size 0.
    inside = torch._remove_batch_dim(value, level, 0, 0)
    return (value, None) if inside.shape[0] == 0 else (inside, 0)


def _wrapped(result: Tensor, dim: int, level: int) -> Tensor:
    """A result of a vmap rule, wrapped for this level."""
    if dim != 0:  # forward mode reads tangents in memory order and requires the mapped dimension outermost
        result = result.movedim(dim, 0).contiguous()
    return torch._add_batch_dim(result, 0, level)


def unbatched(dims: Sequence[int | None], tensors: Sequence[Maybe]) -> bool:
    return all(dim is None for dim, tensor in zip(dims, tensors, strict=True) if tensor is not None)


def _split(tensor: Tensor, dim: int, first: int, second: int) -> Tensor:
    """``unflatten``, for which the vmap of ``torch.autograd`` has no rule."""
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], first, second, *shape[dim + 1 :])


class Fold:
    """Folds the dimension that vmap maps over into the rows or the groups of a call, and back.

    With shared weights the dimension becomes part of the rows. Where weights are mapped, or are results of
    the call, it becomes part of the groups: expanded operands cost no memory unless there are groups already.
    """

    def __init__(self, size: int, activation: Tensor, dim: int | None, by_segment: bool = False) -> None:
        shape = list(activation.shape)
        if dim is not None:
            del shape[dim]
        self.size = size
        self.grouped = len(shape) == 3
        self.row_dim = 1 if self.grouped else 0
        self.row_count = shape[-2]
        # By segment, rows [B, ...] are one dimension and weights [G, ...] are always in groups.
        self.flat = self.grouped or by_segment

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
        if not self.flat:
            return tensor
        return tensor.reshape(self.size * tensor.shape[1], *tensor.shape[2:])

    def ungroups(self, result: Tensor) -> tuple[Tensor, int]:
        if not self.flat:
            return result, 0
        return _split(result, 0, self.size, result.shape[0] // self.size), 0

    def all(
        self, unfold: Callable[[Any], tuple[Tensor, int]], results: Sequence[Maybe]
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        pairs = [unfold(result) for result in results]
        return tuple(tensor for tensor, _ in pairs), tuple(dim for _, dim in pairs)
