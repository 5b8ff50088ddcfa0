"""Argument checks of the public functions, and of direct calls of the registered operations.

Each argument is checked once, before anything is computed. A message names the operation, the argument,
the expected value and the given one. Dtypes, layouts and types raise TypeError; ranks, sizes and devices
raise ValueError.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dtypes import DTYPES

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
    """Every argument is a dense tensor with dtype and device of the first; only the last ones may be None."""
    first_name = first = None
    for index, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        if tensor is None and index >= required:
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


def all_fit(dtype: torch.dtype, tensors: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether all that are given are dense tensors on the CPU of one dtype, and of these shapes.

    A fraction of the time that checks take which have to word an error. No answer but True means anything.
    """
    try:
        for tensor, shape in zip(tensors, shapes):  # noqa: B905 (strict costs time)
            if tensor is not None and (
                tensor.dtype is not dtype
                or tensor.shape != shape
                or tensor.layout is not torch.strided
                or not tensor.is_cpu
            ):
                return False
    except (AttributeError, RuntimeError):  # no tensor, or a nested one
        return False
    return True


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
    """The tensor has exactly the named sizes; None allows any size. Pairs allow two axes to share a name."""
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
    """The broadcast leading dimensions of two inputs: all but the last (of z, the last ``features``)."""
    x_lead, z_lead = x.shape[:-1], z.shape[:-features]
    lead = broadcast(x_lead, z_lead)
    if lead is None:
        raise ValueError(
            f"{op}: {names[1]}: expected leading dimensions that broadcast with those of {names[0]}"
            f" {list(x_lead)}, got {list(z_lead)}"
        )
    return lead


def broadcast(shape: torch.Size, other: torch.Size) -> torch.Size | None:
    """``torch.broadcast_shapes``, faster (it takes longer than a small kernel); None instead of an error."""
    if len(shape) == len(other) and shape == other:  # tuples compare sizes before lengths: a guard in a trace
        return shape
    longer, shorter = (shape, other) if len(shape) >= len(other) else (other, shape)
    sizes = list(longer)
    for dim, size in enumerate(shorter, len(longer) - len(shorter)):
        if sizes[dim] == 1:
            sizes[dim] = size
        elif size != 1 and size != sizes[dim]:
            return None
    return torch.Size(sizes)


def broadcast_like(op: str, names: tuple[str, str], shape: torch.Size, tensor: Tensor) -> torch.Size:
    """The broadcast shape of ``shape`` (the tensors so far) and one more tensor."""
    common = broadcast(shape, tensor.shape)
    if common is None:
        raise ValueError(
            f"{op}: {names[1]}: expected a shape that broadcasts with that of {names[0]} {list(shape)},"
            f" got {list(tensor.shape)}"
        )
    return common


def check_activation(op: str, name: object, known: Collection[str], argument: str = "activation") -> None:
    """The name of an activation is known."""
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{op}: {argument}: expected one of {', '.join(known)}, got {name!r}")


def is_coefficient(value: object) -> bool:
    """Whether a number is a plain one; symbolic ones take `check_number`."""
    return type(value) is float or type(value) is int


def check_number(op: str, name: str, value: object) -> None:
    """A coefficient is a real number."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{op}: {name}: expected a float, got {type(value).__name__}")


def is_bool(value: object) -> bool:
    """A bool, or one of NumPy's, which need not be installed."""
    kind = type(value)
    return isinstance(value, bool) or kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")


def check_flag(op: str, name: str, value: object) -> None:
    """A flag is a bool."""
    if not is_bool(value):
        raise TypeError(f"{op}: {name}: expected a bool, got {type(value).__name__}")


def check_segments(op: str, segment_ids: object, x: Tensor, groups: int, look: bool) -> None:
    """``segment_ids`` is int64 [N] with values from 0 to G - 1; values are read only with ``look``."""
    ids = check_index(op, "segment_ids", segment_ids, x)
    check_shape(op, "segment_ids", ids, {"N": x.shape[0]})
    if look:
        check_index_values(op, "segment_ids", ids, groups)


def check_index(op: str, name: str, index: object, x: Tensor) -> Tensor:
    """An index is a dense int64 tensor on the device of x."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(index).__name__}")
    if index.layout is not torch.strided or index.is_nested:
        kind = "nested" if index.is_nested else index.layout
        raise TypeError(f"{op}: {name}: expected a dense (strided) tensor, got {kind}")
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: {name}: expected torch.int64, got {index.dtype}")
    if index.device != x.device:
        raise ValueError(f"{op}: {name}: expected device {x.device} (that of x), got {index.device}")
    return index


def check_index_values(op: str, name: str, index: Tensor, groups: int) -> None:
    if index.numel() == 0:
        return
    least, most = (int(value) for value in torch.aminmax(index))
    if least < 0 or most >= groups:
        found = least if least < 0 else most
        expected = f"numbers from 0 to G - 1 = {groups - 1}" if groups else "none, as G = 0"
        raise ValueError(f"{op}: {name}: expected {expected}, got {found}")


# Instead of axis letters: the shape of the first tensor, or one that broadcasts to it.
LIKE, BROADCAST = "=", "=1"


class Operands:
    """The shapes of an operation's tensors, checked where it is called directly.

    Args:
        op: name of the operation in messages.
        arguments: the names of all arguments of its schema.
        axes: the axes of each tensor, one letter per size, as in ``"OZX"``; or ``LIKE`` or ``BROADCAST`` for
            all tensors.
        required: the number of leading tensors that may not be None.
        groups: whether all tensors may have one more leading axis.
    """

    def __init__(
        self, op: str, arguments: Sequence[str], axes: Mapping[str, str], required: int, groups: bool = False
    ) -> None:
        self.op, self.groups, self.axes, self.required = op, groups, axes, required
        self._alike = LIKE in axes.values()
        letters = dict.fromkeys("G" + "".join(axes.values()))
        number = {letter: index for index, letter in enumerate(letters)}
        self._unknown: list[int | None] = [None] * len(letters)
        self._rank = len(next(iter(axes.values())))
        self.first = arguments.index(next(iter(axes)))
        # Of each tensor: position, whether it is required, and axes as numbers, or whether it is LIKE.
        self._plain, self._grouped, self._like = [], [], []
        for index, (name, axis) in enumerate(axes.items()):
            position, needed = arguments.index(name), index < required
            numbers = tuple(number[letter] for letter in axis)
            self._plain.append((position, needed, numbers))
            self._grouped.append((position, needed, (0, *numbers)))
            self._like.append((position, needed, axis == LIKE))

    def fit(self, arguments: Sequence[Any], dtypes: frozenset[torch.dtype]) -> bool:
        """Whether `check` would pass: the fast path of each call, for sizes that are not symbolic."""
        first = arguments[self.first]
        if first is None or first.dtype not in dtypes:
            return False
        dtype, device, shape = first.dtype, first.device, first.shape
        if self._alike:
            for position, needed, same in self._like:
                tensor = arguments[position]
                if tensor is None:
                    if needed:
                        return False
                    continue
                if tensor.dtype is not dtype or tensor.device != device or tensor.layout is not torch.strided:
                    return False
                own = tensor.shape
                if own != shape and (same or not _broadcasts(own, shape)):
                    return False
            return True
        sizes = self._unknown.copy()
        grouped = self.groups and len(shape) > self._rank
        for position, needed, axes in self._grouped if grouped else self._plain:
            tensor = arguments[position]
            if tensor is None:
                if needed:
                    return False
                continue
            shape = tensor.shape
            if len(shape) != len(axes) or tensor.dtype is not dtype or tensor.device != device:
                return False
            if tensor.layout is not torch.strided:
                return False
            for axis, size in zip(axes, shape):  # noqa: B905 (equal lengths; strict costs time)
                if sizes[axis] is None:
                    sizes[axis] = size
                elif sizes[axis] != size:
                    return False
        return True

    def check(self, arguments: Sequence[Any], dtypes: Sequence[torch.dtype]) -> None:
        """Raises as the public functions do. Sizes may be symbolic."""
        tensors = [arguments[position] for position, *_ in self._plain]
        check_tensors(self.op, tuple(self.axes), tensors, self.required, dtypes)
        first, sizes = tensors[0], dict[str, Any]()
        lead = "G" if self.groups and first.dim() == self._rank + 1 else ""
        for (name, letters), tensor in zip(self.axes.items(), tensors, strict=True):
            if tensor is None:
                continue
            if self._alike:
                pairs: list[tuple[str, Any]] = axes_like(first.shape)
            else:
                pairs = [(letter, sizes.get(letter)) for letter in lead + letters]
            match_sizes(self.op, name, tensor.shape, pairs, or_one=letters == BROADCAST)
            sizes |= {letter: size for (letter, _), size in zip(pairs, tensor.shape, strict=True)}


def axes_like(shape: torch.Size) -> list[tuple[str, Any]]:
    """The sizes of a shape, named by their index, for `match_sizes`."""
    return [(str(dim), size) for dim, size in enumerate(shape)]


def _broadcasts(own: torch.Size, shape: torch.Size) -> bool:
    if len(own) != len(shape):
        return False
    for size, wanted in zip(own, shape):  # noqa: B905 (as above)
        if size != wanted and size != 1:
            return False
    return True


def match_sizes(
    op: str, name: str, sizes: Sequence[Any], pairs: Sequence[tuple[str, Any]], or_one: bool = False
) -> None:
    """`check_shape` for sizes that may be symbolic; their equality becomes an assertion in the graph."""
    one = " or 1 in the place of a size" if or_one else ""

    def message() -> str:
        axes = ", ".join(letter if size is None else f"{letter}={size}" for letter, size in pairs)
        return f"{op}: {name}: expected shape [{axes}]{one}, got {list(sizes)}"

    if len(sizes) != len(pairs):
        raise ValueError(message())
    for size, (_, wanted) in zip(sizes, pairs, strict=True):
        if wanted is None or or_one and isinstance(size, int) and size == 1:
            continue
        if isinstance(size, int) and isinstance(wanted, int):
            if size != wanted:
                raise ValueError(message())
        else:
            torch._check_value(size == wanted, message)


def check_needed(op: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """At least one of the tensors is given."""
    if all(tensor is None for tensor in tensors):
        raise ValueError(f"{op}: expected at least one of {', '.join(names)}, got None for all")
