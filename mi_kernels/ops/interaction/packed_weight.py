"""Weights laid out once as the CPU kernels multiply them, for inference.

The kernels read W where it lies if it is contiguous, in a dtype that is multiplied as it is, and if the sum
inside the product runs along x. Otherwise every call converts or transposes W once for each block of rows of
the batch. A :class:`PackedWeight` keeps the result of that. Whether W has changed since cannot be known for
certain (``weight.data.add_(1)`` leaves no trace), so nothing is packed unless it is asked for.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mi_kernels.ops import backend as backends

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class _Packed(NamedTuple):
    state: tuple[Any, ...]
    source: Tensor  # alive as long as its address stands for it: no other tensor can lie there
    weight: Tensor  # the same in the dtype of the call
    packed_weight: Tensor | None


class PackedWeight:
    """A weight and its packed copy, made by :func:`mi_kernels.pack` for ``interaction`` and ``bilinear``.

    Attributes:
        weight: the tensor that was packed. Whatever the packed copy cannot serve runs on this one.

    Example:
        >>> mi.pack(torch.ones(4, 3, 5)).weight.shape
        torch.Size([4, 3, 5])
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._packed: dict[torch.dtype, _Packed] = {}
        self.packed()

    def packed(self) -> Tensor | None:
        """W as the kernels multiply it, made anew if W has changed; None where they read W itself."""
        return self.laid_out(self.weight.dtype)[1]

    def laid_out(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """W in this dtype (that of autocast), without a graph, and as the kernels multiply that."""
        weight = self.weight
        state = (
            weight._version,
            weight.data_ptr(),
            weight.dtype,
            weight.device,
            weight.shape,
            weight.stride(),
        )
        packed = self._packed.get(dtype)
        if packed is None or packed.state != state:
            source = weight.detach()
            cast = source.to(dtype)
            packed = self._packed[dtype] = _Packed(state, source, cast, _pack(cast))
        return packed.weight, packed.packed_weight

    def __repr__(self) -> str:
        packed = self.packed()
        kept = "read in place" if packed is None else f"kept as {list(packed.shape)} {packed.dtype}"
        return f"PackedWeight({list(self.weight.shape)} {self.weight.dtype}, {kept})"


def _pack(weight: Tensor) -> Tensor | None:
    """W as the kernels of the backend that packs multiply it; None where they read W itself."""
    if weight.numel() == 0 or not any(one.packs and one.takes(weight) for one in backends.registered()):
        return None
    out, context, width = weight.shape
    sizes = [1, 1 << 10, context, width, out]  # the layout depends on the batch only below a few rows
    text = torch.ops.mi_kernels.cpu_interaction_plan("forward", sizes, weight.dtype, 1)
    fields = dict(field.split("=") for field in text.split(";"))
    laid_out = weight if fields["algorithm"] == "width_inside" else weight.mT
    packed = laid_out.to(_DTYPES[fields["element"]])
    if padding := -packed.shape[-1] % int(fields["pair"]):
        packed = torch.nn.functional.pad(packed, (0, padding))
    packed = packed.contiguous()
    return None if packed.data_ptr() == weight.data_ptr() else packed
