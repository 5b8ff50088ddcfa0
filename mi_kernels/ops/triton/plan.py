"""The launches and the scratch of a call, recorded by running it on meta tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, recording, target

_WHY = {
    "linear": "without W the sum is a plain matrix product",
    "held": "z_i x is generated from a tile of x that stays in registers while W is streamed",
    "scaled": "z_i x is generated tile by tile in registers, between load and matrix instruction",
    "promoted": "x W_i is summed over x and then scaled by z_i in the accumulation dtype, which rounds less"
    " and keeps the range of float16",
    "reduced": "few outputs: z W_o is computed tile by tile and immediately reduced with x",
    "fused": "T = g W_i is computed tile by tile and reduced to both dx and dz",
    "k_scaled": "g z_i is generated along the rows of the batch, which are the K axis of the product with x",
    "nothing": "the sum is empty",
}


def without_data(*shapes: Sequence[int] | None, dtype: torch.dtype) -> list[Tensor | None]:
    """Meta tensors of these shapes."""
    return [None if s is None else torch.empty(s, dtype=dtype, device="meta") for s in shapes]


def record(
    kernel: Callable[..., Any], arguments: Sequence[Any], device: torch.device
) -> tuple[list[Launch], int]:
    """The launches of a call, and the largest scratch of any launch in bytes."""
    capability, old = target(device)
    with recording(capability, old) as launches:
        results = kernel(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    known = {_storage(t) for t in (*arguments, *results) if isinstance(t, Tensor)}
    scratch = 0
    for launch in launches:
        operands = (a[0] for a in launch.arguments.values() if isinstance(a, tuple))
        sizes = {_storage(t): t.untyped_storage().nbytes() for t in operands}
        scratch = max(scratch, sum(size for storage, size in sizes.items() if storage not in known))
    return launches, scratch


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def describe(launches: Sequence[Launch]) -> tuple[str, str]:
    """The name of the algorithm that the launches implement, and the reason in words."""
    for launch in launches:
        arguments = launch.arguments
        name = arguments.get("STYLE", "linear")
        if arguments.get("dz") is not None:
            name = "reduced" if arguments["y"] is None else "fused"
        if arguments.get("w") is not None or name == "k_scaled":
            parts = arguments["splits"]
            shared = (
                f"; {parts} programs share a sum; their partial sums are added in order" if parts > 1 else ""
            )
            tile = "x".join(str(arguments[size]) for size in ("BM", "BN", "BK"))
            return name, f"{_WHY[name]} (tiles of {tile}){shared}"
    name = "linear" if launches else "nothing"
    return name, _WHY[name]
