"""Weights packed once for the CPU kernels, for inference.

The kernels read W in place if it needs no dtype conversion and is contiguous along the inner sum of the
product. Otherwise every call converts or transposes W once per block of rows. A :class:`PackedWeight` caches
that. A change of W cannot be detected reliably (``weight.data.add_(1)`` leaves no trace), so packing
is explicit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend as backends
from ..namespace import OPS

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class _Packed(NamedTuple):
    state: tuple[Any, ...]
    source: Tensor  # kept alive so that no other tensor can have its address
    weight: Tensor  # source in the dtype of the call
    packed_weight: Tensor | None


class PackedWeight:
    """A weight and its packed copy, made by :func:`mi_kernels.pack` for ``interaction`` and ``bilinear``.

    Attributes:
        weight: the original tensor, used by all calls that cannot use the packed copy.

    Example:
        >>> mi.pack(torch.ones(4, 3, 5)).weight.shape
        torch.Size([4, 3, 5])
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._packed: dict[torch.dtype, _Packed] = {}
        self.packed()

    def packed(self) -> Tensor | None:
        """The packed weight, packed again if W has changed; None where the kernels read W itself.

        Example:
            >>> with torch.no_grad():
            ...     packed = mi.pack(torch.ones(64, 32, 48)).packed()
        """
        return self.cast_and_packed(self.weight.dtype)[1]

    def cast_and_packed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """W detached in a dtype (that of autocast), and that packed (None: read in place).

        Example:
            >>> mi.pack(torch.ones(4, 3, 5)).cast_and_packed(torch.bfloat16)[0].dtype
            torch.bfloat16
        """
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
    """The packed weight of the backend that packs; None where its kernels read W itself."""
    if weight.numel() == 0 or not any(one.packs and one.takes(weight) for one in backends.registered()):
        return None
    out, context, width = weight.shape
    # The layout depends on the batch only below a few rows.
    sizes = [1, 1 << 10, context, width, out, *(() if weight.is_contiguous() else weight.stride())]
    text = OPS.cpu_interaction_plan("forward", sizes, weight.dtype, 1)
    fields = dict(field.split("=") for field in text.split(";"))
    if fields["lanes"] == "outputs":
        return None
    inner_last = weight
    if (fields["order"] == "width_inside") == (fields["exchanged"] == "1"):
        inner_last = weight.mT
    if fields["outputs_first"] == "0":
        inner_last = inner_last.transpose(0, 1)
    packed = inner_last.to(_DTYPES[fields["element"]])
    if padding := -packed.shape[-1] % int(fields["pair"]):
        packed = torch.nn.functional.pad(packed, (0, padding))
    packed = packed.contiguous()
    return None if packed.data_ptr() == weight.data_ptr() else packed
