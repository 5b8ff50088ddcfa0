"""The dense interaction as einsum: the oracle of every test, in any dtype, differentiated by PyTorch.

Contracts two factors at a time, from left to right, as PyTorch does with three. An installed opt_einsum would
choose another order, and rounding would depend on it.
"""

import torch
from torch import Tensor


def generate(
    z: Tensor,  # [..., Z]
    weight: Tensor | None,  # [O, Z, X]
    weight_z: Tensor | None = None,  # [O, Z]
    weight_x: Tensor | None = None,  # [O, X]
    bias: Tensor | None = None,  # [O]
) -> tuple[Tensor, Tensor | None]:
    """W' = z W + V [..., O, X] and b' = U z + c [..., O]; W or V is given."""
    lead = z.shape[:-1]
    terms = [] if weight is None else [torch.einsum("...i,oij->...oj", z, weight)]
    terms += [] if weight_x is None else [weight_x]
    offsets = [] if weight_z is None else [torch.einsum("...i,oi->...o", z, weight_z)]
    offsets += [] if bias is None else [bias]
    generated = sum(terms[1:], terms[0])
    generated = generated.expand(*lead, *generated.shape[-2:])
    if not offsets:
        return generated, None
    offset = sum(offsets[1:], offsets[0])
    return generated, offset.expand(*lead, offset.shape[-1])


def apply_generated(
    x: Tensor,  # [..., X]
    weight: Tensor,  # [..., O, X]
    bias: Tensor | None = None,  # [..., O]
) -> Tensor:
    """y = W' x + b'."""
    y = torch.einsum("...oj,...j->...o", weight, x)
    return y if bias is None else y + bias


def apply_low_rank(
    x: Tensor,  # [..., X]
    down: Tensor,  # [..., R, X]
    up: Tensor,  # [..., O, R]
    base: Tensor | None = None,  # [..., O]
    scale: float = 1.0,
) -> Tensor:
    """y = base + B (scale * A x)."""
    features = torch.einsum("...rj,...j->...r", down, x)
    y = torch.einsum("...or,...r->...o", up, features if scale == 1 else features * scale)
    return y if base is None else y + base


def lead(weight: torch.Tensor, rank: int) -> str:
    """The leading dimensions of a weight in an equation; ONNX knows them only where they are."""
    return "..." if weight.dim() > rank else ""


def interaction(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    weight: Tensor | None,  # [..., O, Z, X]
    weight_z: Tensor | None = None,  # [..., O, Z]
    weight_x: Tensor | None = None,  # [..., O, X]
    bias: Tensor | None = None,  # [..., O]
) -> Tensor:
    """y = z^T W x + U z + V x + c, term by term, not optimised."""
    terms = []
    if weight is not None:
        generated = torch.einsum(f"...i,{lead(weight, 3)}oij->...oj", z, weight)
        terms.append(torch.einsum("...oj,...j->...o", generated, x))
    if weight_z is not None:
        terms.append(torch.einsum(f"...i,{lead(weight_z, 2)}oi->...o", z, weight_z))
    if weight_x is not None:
        terms.append(torch.einsum(f"...j,{lead(weight_x, 2)}oj->...o", x, weight_x))
    if bias is not None:
        terms.append(bias)
    y = sum(terms[1:], terms[0])
    rows = torch.broadcast_shapes(x.shape[:-1], z.shape[:-1], y.shape[:-1])
    return y.expand(*rows, y.shape[-1])


def third_order(
    x: Tensor,  # [..., X]
    z1: Tensor,  # [..., Z1]
    z2: Tensor,  # [..., Z2]
    weight: Tensor,  # [O, Z1, Z2, X]
    weight_z1: Tensor | None = None,  # [O, Z1]
    weight_z2: Tensor | None = None,  # [O, Z2]
    weight_x: Tensor | None = None,  # [O, X]
    bias: Tensor | None = None,  # [O]
) -> Tensor:
    """y = sum_ijk W[o,i,j,k] z1[i] z2[j] x[k] + U1 z1 + U2 z2 + V x + c."""
    generated = torch.einsum("...i,oijk->...ojk", z1, weight)
    dots = lead(generated, 3), lead(z2, 1), lead(x, 1)
    both = dots[0] or dots[1]
    layer = torch.einsum(f"{dots[0]}ojk,{dots[1]}j->{both}ok", generated, z2)
    y = torch.einsum(f"{both}ok,{dots[2]}k->{both or dots[2]}o", layer, x)
    for operand, matrix in ((z1, weight_z1), (z2, weight_z2), (x, weight_x)):
        if matrix is not None:
            y = y + torch.einsum("...i,oi->...o", operand, matrix)
    return y if bias is None else y + bias


def biaffine(
    input1: Tensor,  # [..., L1, I1]
    input2: Tensor,  # [..., L2, I2]
    weight: Tensor,  # [O, I1 (+ 1), I2 (+ 1)]
    bias: Tensor | None,  # [O]
    ones: tuple[bool, bool],
    channels_first: bool,
) -> Tensor:
    """y = [x1 | 1]^T W_o [x2 | 1] + c of all pairs."""
    inputs = [
        torch.cat((x, x.new_ones(*x.shape[:-1], 1)), -1) if one else x
        for x, one in zip((input1, input2), ones, strict=True)
    ]
    generated = torch.einsum("...li,oij->...loj", inputs[0], weight)
    y = torch.einsum("...loj,...mj->...lmo", generated, inputs[1])
    y = y if bias is None else y + bias
    return y.movedim(-1, -3) if channels_first else y
