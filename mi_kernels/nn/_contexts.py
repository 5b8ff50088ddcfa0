"""Which context belongs to which input: the rule that the docstring of mi_kernels.nn states."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops.compiling import is_exporting


def aligned(op: str, x: Any, z: Any, name: str = "z") -> Any:
    """z [..., Z] with as many dimensions as x [..., X], if it has contexts for samples and fewer of them.

    Anything else is returned unchanged, for the functions to broadcast or to reject.
    """
    if not isinstance(x, Tensor) or not isinstance(z, Tensor) or not 1 < z.dim() < x.dim():
        return z
    if x.is_nested or z.is_nested:
        return z
    return filled(z, missing(op, x.shape[:-1], z, name))


def aligned_layers(op: str, x: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W' [..., O, X] and b' [..., O] of samples with dimensions for the positions of x, as `aligned`."""
    if not isinstance(x, Tensor) or x.is_nested or not 2 < weight.dim() <= x.dim():
        return weight, bias
    count = missing(op, x.shape[:-1], weight, "weight", features=2)
    return filled(weight, count, features=2), None if bias is None else filled(bias, count)


def filled(tensor: Tensor, count: int, features: int = 1) -> Tensor:
    """The tensor with ``count`` dimensions of size 1 before its last one, or last ``features``: a view."""
    for _ in range(count):
        tensor = tensor.unsqueeze(-1 - features)
    return tensor


def missing(
    op: str, lead: Sequence[int], z: Tensor, name: str = "z", by_last: bool = True, features: int = 1
) -> int:
    """How many dimensions z lacks behind its own, to have one context for each sample of x [*lead, X].

    Args:
        by_last: whether the dimensions of z might have been meant for the last ones of x.
        features: the dimensions of z for features: 2 of generated layers.

    Raises:
        ValueError: the leading dimensions of z are not the first ones of x, or could as well be the last.
    """
    own, what = z.shape[:-features], _WHAT[features]
    count = len(lead) - len(own)
    if count <= 0 or not own:
        return 0
    as_last = by_last and _always_fit(own, lead[count:])
    if not _fit(own, lead[: len(own)]):
        raise misfit(op, lead, z, name, as_last, features)
    if as_last and not _without_effect(own):
        sample, position = _choices(z, count, name, features)
        raise ValueError(
            f"{op}: {name}: expected {what}s of samples or of positions of x, got {list(z.shape)}, which"
            f" fits both the first and the last of its leading dimensions {list(lead)}: {_VERB[name]}{sample}"
            f" for one {what} per sample, {position} for one per position"
        )
    return count


def misfit(
    op: str, lead: Sequence[int], z: Tensor, name: str = "z", as_last: bool = False, features: int = 1
) -> ValueError:
    """The error for leading dimensions that are not those of x, which are ``lead``."""
    rows = ("".join(f"{size}, " for size in lead[:length]) for length in range(len(lead) + 1))
    *some, last = (f"[{row}{'Z' if features == 1 else 'O, X'}]" for row in rows)
    expected = f"{', '.join(some)} or {last}" if some else last
    message = f"{op}: {name}: expected shape {expected} (sizes of x, or 1), got {list(z.shape)}"
    if as_last:
        position = _choices(z, len(lead) - z.dim() + features, name, features)[1]
        message += f"; {_VERB[name]}{position} for one {_WHAT[features]} per position"
    return ValueError(message)


def always_equal(size: int, other: int) -> bool:
    """Whether two sizes are equal; in an exported program, which cannot exclude sizes, for all its inputs."""
    if not is_exporting():
        return size == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports SymPy

    return statically_known_true(size == other)


def _fit(sizes: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether each size is that of ``whole``, or 1."""
    for size, wanted in zip(sizes, whole, strict=True):
        if size != wanted and size != 1:
            return False
    return True


def _always_fit(sizes: Sequence[int], whole: Sequence[int]) -> bool:
    for size, wanted in zip(sizes, whole, strict=True):
        if not always_equal(size, wanted) and not always_equal(size, 1):
            return False
    return True


def _without_effect(sizes: Sequence[int]) -> bool:
    """Whether both readings give the same: one context, or no elements."""
    one = True
    for size in sizes:
        if size == 0:
            return True
        one = one and size == 1
    return one


# How the contexts are given to a module: as an argument, by its own network, or when it was bound to them.
_VERB = {"z": "pass ", "context_network": "return ", "weight": "bind "}
_WHAT = {1: "context", 2: "layer"}  # by the number of dimensions for features


def _choices(z: Tensor, count: int, name: str, features: int) -> tuple[str, str]:
    """How to write z for its dimensions to be the first ones of x, or the last."""
    rank, ones = z.dim() - features, [1] * count
    none = ", ".join(["None"] * count)
    sample, position = f"z[{':, ' * rank}{none}]", f"z[{none}]"
    if count == 1:
        sample, position = f"z.unsqueeze({rank})", "z.unsqueeze(0)"
    first, last = [*z.shape[:rank], *ones, *z.shape[rank:]], [*ones, *z.shape]
    if name == "weight":
        return f"{sample} (weight of shape {first})", f"{position} (weight of shape {last})"
    return f"{sample} of shape {first}", f"{position} of shape {last}"
