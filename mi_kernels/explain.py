"""`explain`: the plan of a public function, or of the calls that a module makes."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import backends
from .functional import biaffine, gates, glu, hyper, interaction, low_rank, mix, norms, recurrent
from .functional._arguments import autocast
from .functional._call import instead_of_calls
from .ops.library import DEFINED, FAMILIES
from .ops.plan import Plan

# By name, the function and its planner, which takes the bound arguments as keywords.
EXPLAINED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {
    **interaction.PLANNED,
    **gates.PLANNED,
    **hyper.PLANNED,
    **biaffine.PLANNED,
    **glu.PLANNED,
    **low_rank.PLANNED,
    **mix.PLANNED,
    **norms.PLANNED,
    **recurrent.PLANNED,
}


def explain(op: Callable[..., Any] | str, *arguments: Any, **keywords: Any) -> Plan:
    """The plan of ``op(*arguments)``, without executing it.

    Args:
        op: a public function of this package that computes, or its name; or a module of ``mi.nn``, or one
            that contains such modules.
        arguments, keywords: the arguments of ``op``; arguments and parameters that require grad add the
            plans of their gradients.

    Returns:
        A printable :class:`~mi_kernels.ops.plan.Plan`: backend, algorithm, operations, bytes,
        scratch memory and the reason, for the forward pass and for each wanted gradient primitive.
        For a module that calls several functions of this package, such as ``mi.nn.HyperMLP``, the sums, and
        the plan of each call in ``calls``.

    The forward of a module is executed except for those calls, which return zeros: context networks,
    activations between layers and hooks do run. Buffers and the random state are restored afterwards.

    Raises:
        ValueError: ``op`` is unknown or a module without such calls, or as the function itself.
        TypeError: as the function itself.

    Example:
        >>> plan = mi.explain(mi.interaction, torch.ones(8, 5), torch.ones(8, 3), torch.ones(4, 3, 5))
        >>> plan.operations
        960
    """
    if isinstance(op, torch.nn.Module):
        return _plan_of(op, arguments, keywords)
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    function, planner = EXPLAINED.get(name, (None, None))
    if function is None or planner is None or not (isinstance(op, str) or op is function):
        known = f"one of {', '.join(f'mi.{one}' for one in EXPLAINED)}, or a module"
        raise ValueError(f"explain: op: expected {known}, got {_describe(op, name)}")
    try:
        bound = inspect.signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        raise TypeError(f"explain: {name}: {error}") from None
    bound.apply_defaults()
    found = planner(**bound.arguments)
    tensor = next(t for t in bound.arguments.values() if isinstance(t, Tensor))
    (tensor,) = autocast((tensor,))
    remark = backends.remark(tensor, _family(name))
    return found if remark is None else replace(found, why=f"{found.why}; {remark}")


def _family(name: str) -> str:
    """The family whose kernels a function calls."""
    if name.startswith("gated_residual"):  # the sum alone is modulation
        return "modulate" if name == "gated_residual" else "norm"
    if name == "multiplicative_rnn":
        return "recurrent"
    module = DEFINED[name].module if name in DEFINED else "interaction"
    return name if name in FAMILIES else module


def _describe(op: object, name: str) -> str:
    """An argument that is not one of this package's functions, for the error message."""
    if isinstance(op, str):
        return repr(op)
    if not callable(op):
        return type(op).__name__
    if isinstance(op, type):
        return f"the class {name}; pass an instance"
    torchs = getattr(torch.nn.functional, name, None) is op
    module = "torch.nn.functional" if torchs else getattr(op, "__module__", None)
    return f"{module}.{name}" + (f", which is another function; pass mi.{name}" if name in EXPLAINED else "")


def _plan_of(module: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Plan:
    """The plan of the calls that a module makes: that of one, or of all together."""
    found: list[Plan] = []
    mode = FakeTensorMode()

    def instead(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        found.append(explain(function, *given, **named))
        fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, (given, named))
        with mode, instead_of_calls(None):
            y = function(*fake[0], **fake[1])
        return torch.utils._pytree.tree_map_only(Tensor, _zeros, y)

    with instead_of_calls(instead), _uncompiled(), _preserved_state(module):
        module(*arguments, **keywords)
    name = type(getattr(module, "_orig_mod", module)).__name__  # of torch.compile
    if not found:
        raise ValueError(
            f"explain: op: expected a module that calls functions of this package, got {name}, which calls"
            " none (mi.convert makes layers of torch.nn call them)"
        )
    return found[0] if len(found) == 1 else _combined(name, found)


def _zeros(fake: Tensor) -> Tensor:
    zeros = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device).zero_()
    # Not a leaf, so that the module may modify it in place.
    return zeros.requires_grad_().clone() if fake.requires_grad else zeros


def _combined(name: str, calls: list[Plan]) -> Plan:
    scratch = [plan.scratch for plan in calls if plan.scratch is not None]
    return Plan(
        op=name,
        backend=", ".join(dict.fromkeys(plan.backend for plan in calls)),
        algorithm=f"{len(calls)} calls",
        operations=sum(plan.operations for plan in calls),
        bytes=sum(plan.bytes for plan in calls),
        scratch=max(scratch) if len(scratch) == len(calls) else None,
        why="one call after the other: the sums of their operations and bytes, the largest scratch",
        calls=tuple(calls),
    )


@contextmanager
def _preserved_state(module: nn.Module) -> Iterator[None]:
    """Restores what a forward pass changes: buffers such as running statistics, and the random state."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers()) if tensor.is_cuda}
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _uncompiled() -> Any:
    """Runs compiled modules eagerly; without Dynamo imported there are none."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
