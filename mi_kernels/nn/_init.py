"""Shared by the constructors of modules: checks, parameters, initialisation."""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from ..ops.checks import is_bool
from ..ops.dtypes import FLOATING

P = ParamSpec("P")


def keywords_after_first(init: Callable[P, None]) -> Callable[P, None]:
    """Makes a constructor take its keyword-only arguments by position too, in their order, with a warning.

    That was possible once, and ``(in, context, out)`` of one module is ``(in, out, context)`` of another.
    """
    kinds = inspect.signature(init).parameters.values()
    first = next(one.name for one in list(kinds)[1:])
    names = [one.name for one in kinds if one.kind is one.KEYWORD_ONLY]
    op = init.__qualname__.partition(".")[0]

    @functools.wraps(init)
    def constructor(*arguments: Any, **keywords: Any) -> None:
        if len(arguments) > 2:  # the module and the first argument
            values = arguments[2:]
            if len(values) > len(names):
                raise TypeError(f"{op}: expected at most {len(names) + 1} arguments, got {len(values) + 1}")
            given = dict(zip(names, values, strict=False))
            for name in given:
                if name in keywords:
                    raise TypeError(f"{op}: {name}: expected one value, got one by position and one by name")
            shown = ", ".join(f"{name}=" for name in given)
            warnings.warn(
                f"{op}: arguments after {first} will be keyword-only: write {shown}",
                FutureWarning,
                stacklevel=2,
            )
            arguments, keywords = arguments[:2], given | keywords
        init(*arguments, **keywords)  # type: ignore[arg-type]

    return constructor


def parameters(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...] | None],
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
) -> None:
    for name, shape in shapes.items():
        empty = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        module.register_parameter(name, empty)


def draw_uniform(weight: Tensor | None, fan_in: int, terms: int, gain: float = 1.0) -> None:
    """Uniform with variance gain^2 / (terms * fan_in)."""
    if weight is not None and weight.numel() > 0:
        bound = gain * math.sqrt(3 / (terms * max(fan_in, 1)))
        nn.init.uniform_(weight, -bound, bound)


def check_size(op: str, name: str, size: int) -> None:
    """The size is an integer >= 0."""
    if isinstance(size, bool) or not isinstance(size, int | torch.SymInt):
        raise TypeError(f"{op}: {name}: expected an int, got {type(size).__name__}")
    if size < 0:
        raise ValueError(f"{op}: {name}: expected >= 0, got {size}")


def check_construction(
    op: str,
    sizes: Mapping[str, Any],
    flags: Mapping[str, Any],
    device: Any,
    dtype: Any,
) -> None:
    """Checks the arguments of a constructor: sizes, flags, device and dtype of the parameters."""
    for name, size in sizes.items():
        check_size(op, name, size)
    for name, flag in flags.items():
        if not (isinstance(flag, int) or is_bool(flag)):
            raise TypeError(f"{op}: {name}: expected a bool, got {_kind(flag)}")
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int | None):
        raise TypeError(f"{op}: device: expected a torch.device, a str or an int, got {_kind(device)}")
    if isinstance(device, str):
        try:
            torch.device(device)
        except RuntimeError:
            raise ValueError(f"{op}: device: expected one such as cpu or cuda:0, got {device!r}") from None
    if dtype is not None and dtype not in FLOATING:
        known = ", ".join(str(known) for known in FLOATING)
        raise TypeError(f"{op}: dtype: expected one of {known}, got {dtype!r}")


def check_module(op: str, name: str, module: object) -> None:
    """The argument is a module or None."""
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"{op}: {name}: expected a torch.nn.Module or None, got {_kind(module)}")


def check_function(op: str, name: str, function: object) -> None:
    """The argument is callable and not a class."""
    if isinstance(function, type) or not callable(function):
        raise TypeError(f"{op}: {name}: expected a function, got {_kind(function)}")


def _kind(value: object) -> str:
    """A value of a wrong type for messages; classes passed instead of instances are named."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__


def given_axes(module: nn.Module, names: dict[str, str]) -> dict[str, str]:
    """The axes of those parameters that a module has, for parallel.ModuleAxes, computed ones too."""
    return {name: axes for name, axes in names.items() if getattr(module, name, None) is not None}
