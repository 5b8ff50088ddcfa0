"""How a module calls the public functions: as they are, or told apart for :func:`mi_kernels.explain`."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mi_kernels.ops.interaction.plan import Plan

P = ParamSpec("P")
R = TypeVar("R")
Explain = Callable[..., Plan]


class _Recording(threading.local):
    def __init__(self) -> None:
        self.instead: Callable[..., Any] | None = None


_recording = _Recording()


def call(function: Callable[P, R], *arguments: P.args, **keywords: P.kwargs) -> R:
    """``function(*arguments)``, of a module's forward; while the module is explained, its plan instead."""
    if torch.compiler.is_compiling() or _recording.instead is None:
        return function(*arguments, **keywords)
    return _recording.instead(function, *arguments, **keywords)


def plan_of(
    module: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], explain: Explain
) -> Plan:
    """The plan of the calls that a module makes: that of one, or of all together."""
    found: list[Plan] = []
    mode = FakeTensorMode()

    def instead(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        found.append(explain(function, *given, **named))
        fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, (given, named))
        with mode, _calls(None):
            y = function(*fake[0], **fake[1])
        zeros = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device).zero_()
        # Not a leaf: what comes next may work in place.
        return zeros.requires_grad_().clone() if y.requires_grad else zeros

    with _calls(instead), _uncompiled(), _as_it_was(module):
        module(*arguments, **keywords)
    name = type(getattr(module, "_orig_mod", module)).__name__  # of torch.compile
    if not found:
        raise ValueError(
            f"explain: op: expected a module that calls functions of this package, got {name}, which calls"
            " none (mi.convert makes layers of torch.nn call them)"
        )
    return found[0] if len(found) == 1 else _together(name, found)


def _together(name: str, calls: list[Plan]) -> Plan:
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
def _calls(instead: Callable[..., Any] | None) -> Iterator[None]:
    before, _recording.instead = _recording.instead, instead
    try:
        yield
    finally:
        _recording.instead = before


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """What layers around the calls change is put back: running statistics, and random numbers drawn."""
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
    """Compiled modules run as they are written; where Dynamo was not imported, there are none."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
