"""Argument checks of the public functions: each argument once, before anything is computed.

A message names the operation, the argument, what was expected and what came. Dtypes, layouts and
types raise TypeError; ranks, sizes and devices raise ValueError.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = (
    *FLOATING,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)
_JAGGED_ADVICE = (
    "; for groups of unequal length pass their rows, x.values(), one context or layer for each group, and"
    " segment_ids=torch.repeat_interleave(x.offsets().diff())"
)


def check_tensors(
    op: str,
    names: Sequence[str],
    tensors: Sequence[Tensor | None],
    required: int,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """Every argument is a dense tensor with the dtype and the device of the first; the first are required."""
    first_name = first = None
    for place, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        if tensor is None and place >= required:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            jagged = tensor.layout is torch.jagged and name == "x"
            advice = _JAGGED_ADVICE if jagged and op in ("interaction", "apply_generated") else ""
            raise TypeError(f"{op}: {name}: expected a dense (strided) tensor, got {kind}{advice}")
        if first is None:
            if tensor.dtype not in dtypes:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise TypeError(f"{op}: {name}: expected a dtype of {known}, got {tensor.dtype}")
            first_name, first = name, tensor
        elif tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name}: expected {first.dtype} (the dtype of {first_name}), got {tensor.dtype}"
            )
        elif tensor.device != first.device:
            raise ValueError(
                f"{op}: {name}: expected device {first.device} (that of {first_name}), got {tensor.device}"
            )


def check_rank(op: str, name: str, tensor: Tensor, least: int) -> None:
    """The tensor has at least ``least`` dimensions."""
    if tensor.dim() < least:
        raise ValueError(
            f"{op}: {name}: expected at least {least} dimension(s), got shape {list(tensor.shape)}"
        )


def check_shape(
    op: str,
    name: str,
    tensor: Tensor | None,
    expected: Mapping[str, int | None] | Sequence[tuple[str, int | None]],
) -> None:
    """The tensor has exactly the named sizes; None stands for any size. Pairs where two axes share a name."""
    if tensor is None:
        return
    sizes, pairs = tensor.shape, expected.items() if isinstance(expected, Mapping) else expected
    if len(sizes) == len(pairs):
        for size, (_, wanted) in zip(sizes, pairs, strict=True):
            if wanted is not None and size != wanted:
                break
        else:
            return
    axes = ", ".join(key if size is None else f"{key}={size}" for key, size in pairs)
    raise ValueError(f"{op}: {name}: expected shape [{axes}], got {list(sizes)}")


def broadcast_leading(op: str, names: tuple[str, str], x: Tensor, z: Tensor, features: int = 1) -> torch.Size:
    """The common leading dimensions of two inputs: all but the last, or but the last ``features`` of z."""
    x_lead, z_lead = x.shape[:-1], z.shape[:-features]
    lead = broadcast(x_lead, z_lead)
    if lead is None:
        raise ValueError(
            f"{op}: {names[1]}: expected leading dimensions that broadcast with those of {names[0]}"
            f" {list(x_lead)}, got {list(z_lead)}"
        )
    return lead


def broadcast(shape: torch.Size, other: torch.Size) -> torch.Size | None:
    """``torch.broadcast_shapes``, which takes longer than a small kernel; None where it would raise."""
    if shape == other:
        return shape
    longer, shorter = (shape, other) if len(shape) >= len(other) else (other, shape)
    sizes = list(longer)
    for place, size in enumerate(shorter, len(longer) - len(shorter)):
        if sizes[place] == 1:
            sizes[place] = size
        elif size != 1 and size != sizes[place]:
            return None
    return torch.Size(sizes)


def spread_bias(bias: Any, *weights: Any) -> Any:
    """A bias that is a scalar, or has one row, as [O]; O is the first size of the first weight there is.

    Whatever does not fit is left to the checks.
    """
    if bias is None or not isinstance(bias, Tensor) or bias.is_nested:
        return bias
    out = None
    for weight in weights:
        if isinstance(weight, Tensor) and not weight.is_nested and weight.dim() > 0:
            out = weight.shape[0]
            break
    shape = bias.shape
    if len(shape) == 1 and (out is None or shape[0] == out):  # as it nearly always is
        return bias
    last = shape[-1] if shape else 1
    fits = len(shape) < 2 or (len(shape) == 2 and shape[0] == 1)
    if not fits or bias.layout is not torch.strided or (out is not None and last not in (1, out)):
        return bias
    return bias.reshape(last).expand(last if out is None else out)


def check_size(op: str, name: str, size: int) -> None:
    """A size given as a number is an integer, 0 or more."""
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
    """What the constructors of modules are given: sizes, flags, where parameters lie and what they are."""
    for name, size in sizes.items():
        check_size(op, name, size)
    for name, flag in flags.items():
        if not isinstance(flag, int | np.bool_):
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
    """A part of a module is None or a module itself."""
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"{op}: {name}: expected a torch.nn.Module or None, got {_kind(module)}")


def check_function(op: str, name: str, function: object) -> None:
    """A function, or a module; not the class of one."""
    if isinstance(function, type) or not callable(function):
        raise TypeError(f"{op}: {name}: expected a function, got {_kind(function)}")


def _kind(value: object) -> str:
    """A value of a wrong type in words: what is often passed in place of an instance is its class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__


def broadcast_like(op: str, names: tuple[str, str], shape: torch.Size, tensor: Tensor) -> torch.Size:
    """The common shape of what has been broadcast so far and one more tensor."""
    common = broadcast(shape, tensor.shape)
    if common is None:
        raise ValueError(
            f"{op}: {names[1]}: expected a shape that broadcasts with that of {names[0]} {list(shape)},"
            f" got {list(tensor.shape)}"
        )
    return common


def check_activation(op: str, name: object, known: Sequence[str]) -> None:
    """The name of an activation is known."""
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{op}: activation: expected one of {', '.join(known)}, got {name!r}")


def check_number(op: str, name: str, value: object) -> None:
    """A coefficient is a real number."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{op}: {name}: expected a float, got {type(value).__name__}")


def check_segments(op: str, segment_ids: object, x: Tensor, groups: int, look: bool) -> None:
    """Numbers of groups, int64 [N] from 0 to G - 1; the numbers themselves only with ``look``."""
    if not isinstance(segment_ids, Tensor):
        raise TypeError(f"{op}: segment_ids: expected a torch.Tensor, got {type(segment_ids).__name__}")
    if segment_ids.layout is not torch.strided or segment_ids.is_nested:
        kind = "nested" if segment_ids.is_nested else segment_ids.layout
        raise TypeError(f"{op}: segment_ids: expected a dense (strided) tensor, got {kind}")
    if segment_ids.dtype != torch.int64:
        raise TypeError(f"{op}: segment_ids: expected torch.int64, got {segment_ids.dtype}")
    if segment_ids.device != x.device:
        raise ValueError(
            f"{op}: segment_ids: expected device {x.device} (that of x), got {segment_ids.device}"
        )
    check_shape(op, "segment_ids", segment_ids, {"N": x.shape[0]})
    if not look or segment_ids.numel() == 0:
        return
    least, most = (int(value) for value in torch.aminmax(segment_ids))
    if least < 0 or most >= groups:
        found = least if least < 0 else most
        expected = f"numbers from 0 to G - 1 = {groups - 1}" if groups else "none, as G = 0"
        raise ValueError(f"{op}: segment_ids: expected {expected}, got {found}")
