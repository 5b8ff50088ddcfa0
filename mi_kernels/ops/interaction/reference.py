"""The dense interaction as einsum: the oracle of every test, in any dtype, differentiated by PyTorch."""

import torch
from torch import Tensor


def interaction(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    weight: Tensor | None,  # [O, Z, X]
    weight_z: Tensor | None = None,  # [O, Z]
    weight_x: Tensor | None = None,  # [O, X]
    bias: Tensor | None = None,  # [O]
) -> Tensor:
    """y = z^T W x + U z + V x + c, term by term, with no care for speed or memory."""
    terms = []
    if weight is not None:
        terms.append(torch.einsum("...i,oij,...j->...o", z, weight, x))
    if weight_z is not None:
        terms.append(torch.einsum("...i,oi->...o", z, weight_z))
    if weight_x is not None:
        terms.append(torch.einsum("...j,oj->...o", x, weight_x))
    if bias is not None:
        terms.append(bias)
    lead = torch.broadcast_shapes(x.shape[:-1], z.shape[:-1])
    return sum(terms[1:], terms[0]).expand(*lead, terms[0].shape[-1])
