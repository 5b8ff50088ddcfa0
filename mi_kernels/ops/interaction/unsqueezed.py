"""Calls whose rows lack a dimension that the primitives have: one row [X], or rows with weights of each."""

from typing import NamedTuple

from torch import Tensor

from mi_kernels.ops.rules import Maybe


class Unsqueezed(NamedTuple):
    """In place of a backend's name in autograd.py: inputs, their gradients and y lack the dimension ``dim``.

    Views outside of the Function would each be a node of the backward pass, which costs more than a product
    of a few rows. A placeholder has all dimensions.
    """

    backend: str
    dim: int  # 0 for one row [X], 1 for rows [B, X] that each have weights [B, O, X]

    def unsqueeze(self, rank: int, *tensors: Tensor) -> list[Tensor]:
        """The tensors of this rank with the dimension."""
        return [tensor.unsqueeze(self.dim) if tensor.dim() == rank else tensor for tensor in tensors]

    def squeeze(self, *results: Maybe) -> list[Maybe]:
        return [None if result is None else result.squeeze(self.dim) for result in results]
