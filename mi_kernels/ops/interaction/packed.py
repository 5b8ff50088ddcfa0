"""Weights laid out once as the CPU kernels multiply them, for inference.

The kernels read W where it lies if it is contiguous, in a dtype that is multiplied as it is, and if the sum
inside the product runs along x. Otherwise every call converts or transposes W once for each block of rows of
the batch. A :class:`PackedWeight` keeps the result of that. Whether W has changed since cannot be known for
certain (``weight.data.add_(1)`` leaves no trace), so nothing is packed unless it is asked for.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mi_kernels import backends

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class _Packed(NamedTuple):
    state: tuple[Any, ...]
    source: Tensor  # alive as long as its address stands for it: no other tensor can lie there
    weight: Tensor  # the same in the dtype of the call
    words: Tensor | None


class PackedWeight:
    """A weight and its packed copy, made by :func:`mi_kernels.pack` for ``interaction`` and ``bilinear``.

    Attributes:
        weight: the tensor that was packed. Whatever the packed copy cannot serve runs on this one.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._packed: dict[torch.dtype, _Packed] = {}
        self.words()

    def words(self) -> Tensor | None:
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
            packed = self._packed[dtype] = _Packed(state, source, cast, _words(cast))
        return packed.weight, packed.words

    def __repr__(self) -> str:
        words = self.words()
        kept = "read in place" if words is None else f"kept as {list(words.shape)} {words.dtype}"
        return f"PackedWeight({list(self.weight.shape)} {self.weight.dtype}, {kept})"


def pack(weight: Tensor) -> PackedWeight:
    """Lays a weight out once for many calls without gradients.

    Args:
        weight: W of shape ``[O, Z, X]``, of a dtype that :func:`mi_kernels.interaction` takes.

    Returns:
        An object that takes the place of ``weight`` in :func:`mi_kernels.interaction` and
        :func:`mi_kernels.bilinear`. The result is the same, bit for bit. Calls that are differentiated,
        transformed or compiled, other backends, and calls of a few rows use ``weight`` itself.

    The copy has the size of W in the dtype in which W is multiplied (float32 for float16, and for bfloat16
    on CPUs without its instructions). There is none where the kernels read W in place: float32 and float64
    whose X is no shorter than Z. An in-place change of W, an optimiser step, ``load_state_dict`` or a move is
    noticed by its version counter, address, dtype, device and strides, and W is packed again; until then the
    memory that was packed stays alive. A write that PyTorch does not count is not noticed: through
    ``weight.data``, NumPy, DLPack, or by another process. ``load_state_dict(..., assign=True)`` puts another
    parameter in the place of ``weight``: pack that one.

    Raises:
        TypeError: ``weight`` is no dense tensor.
        ValueError: ``weight`` does not have three dimensions, or is an inference tensor (it has no version).
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"pack: weight: expected a torch.Tensor, got {type(weight).__name__}")
    if weight.layout is not torch.strided or weight.is_nested:
        raise TypeError(f"pack: weight: expected a dense (strided) tensor, got {weight.layout}")
    if weight.dim() != 3:
        raise ValueError(f"pack: weight: expected shape [O, Z, X], got {list(weight.shape)}")
    if weight.is_inference():
        raise ValueError("pack: weight: expected a tensor with a version counter, got an inference tensor")
    return PackedWeight(weight)


def _words(weight: Tensor) -> Tensor | None:
    compiled = backends.cpu_library_error() is None and weight.device.type == "cpu"
    if not compiled or weight.dtype not in backends.COMPILED_DTYPES or weight.numel() == 0:
        return None
    out, context, width = weight.shape
    sizes = [
        1,
        1 << 10,
        context,
        width,
        out,
    ]  # the layout does not depend on the batch, if it is no mere few rows
    text = torch.ops.mi_kernels.cpu_interaction_plan("forward", sizes, weight.dtype, 1)
    fields = dict(field.split("=") for field in text.split(";"))
    laid_out = weight if fields["algorithm"] == "width_inside" else weight.mT
    words = laid_out.to(_DTYPES[fields["element"]])
    if padding := -words.shape[-1] % int(fields["pair"]):
        words = torch.nn.functional.pad(words, (0, padding))
    words = words.contiguous()
    return None if words.data_ptr() == weight.data_ptr() else words
