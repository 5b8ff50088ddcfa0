"""The dense interaction on Triton: three primitives as calls of two kernels (ops/triton/kernels.py).

    forward       rows b, columns o, sums over i and j
    input_grads   rows b, columns j, sums over i and o: T = g W_i tile by tile, dx += z_i T, dz_i = sum_j x T
    weight_grads  rows o, columns j, sums over b, one i at a time

Compiled ahead of time and interpreted, not yet run on a GPU.
"""

from torch import Tensor

from ..dtypes import accumulation_dtype
from ..interaction.portable import out_features
from .host import (
    SHORT,
    contraction,
    fused_reduction,
    fused_reduction_parts,
    groups_of,
    max_rows,
    nonempty,
    weight_grad,
)

Maybe = Tensor | None


def forward(x: Tensor, z: Tensor, weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe) -> Tensor:
    """y of ``mi_kernels::interaction``; shapes as in schema.py."""
    y = x.new_empty((*x.shape[:-1], out_features(weight, weight_z, weight_x, bias)))
    contraction(y, x, z, weight, weight_z, weight_x, bias)
    return y


def packed_forward(
    x: Tensor, z: Tensor, weight: Tensor, packed_weight: Tensor, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> Tensor:
    """y of ``mi_kernels::interaction_packed``: these kernels read W in place."""
    return forward(x, z, weight, weight_z, weight_x, bias)


def input_grads(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    want_x: bool,
    want_z: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dz of ``mi_kernels::interaction_input_grads``."""
    dx, dz = x.new_empty(x.shape if want_x else (0,)), z.new_empty(z.shape if want_z else (0,))
    weight, by_x, by_z = nonempty(weight), transposed(weight_x), transposed(weight_z)
    is_short = x.shape[-1] <= SHORT < z.shape[-1]
    if weight is not None and want_z and (want_x or not is_short):
        if is_short:
            fused_grads(grad, z, x, weight.mT, by_z, by_x, dz, dx)
        else:
            fused_grads(grad, x, z, weight, by_x, by_z, dx if want_x else None, dz)
        return dx, dz
    if want_x:
        contraction(dx, grad, z, None if weight is None else weight.transpose(-3, -1), None, by_x)
    if want_z:
        contraction(dz, grad, x, None if weight is None else weight.movedim(-3, -1), None, by_z)
    return dx, dz


def transposed(matrix: Maybe) -> Maybe:
    return None if matrix is None else matrix.mT


def fused_grads(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,  # [(G,) O, Z, X]
    by_x: Maybe,  # [(G,) X, O]
    by_z: Maybe,  # [(G,) Z, O]
    dx: Maybe,
    dz: Tensor,
) -> None:
    """Write dz, and dx unless it is None, from one T."""
    weight = weight.transpose(-3, -1)  # [X, Z, O]
    step = max_rows(grad, x, weight)
    for start in range(0, grad.shape[-2], step):
        rows = slice(start, start + step)
        fused_grads_by_rows(
            grad[..., rows, :],
            x[..., rows, :],
            z[..., rows, :],
            weight,
            by_x,
            by_z,
            None if dx is None else dx[..., rows, :],
            dz[..., rows, :],
        )


def fused_grads_by_rows(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,  # [(G,) X, Z, O]
    by_x: Maybe,
    by_z: Maybe,
    dx: Maybe,
    dz: Tensor,
) -> None:
    """`fused_grads` of a batch whose partial sums of dz are small enough."""
    y, parts = dx, 1 if dx is None else fused_reduction_parts(grad, x, weight)
    if parts > 1:
        y = x.new_empty(parts, groups_of(x), *x.shape[-2:], dtype=accumulation_dtype(x.dtype))
    sums = fused_reduction(y, grad, z, weight, x, by_x, dz if by_z is None else None)
    if dx is not None and parts > 1:
        contraction(dx, grad, grad, weight_x=by_x, sums=y)
    if sums is not None:
        contraction(dz, grad, grad, weight_x=by_z, sums=sums)


def weight_grads(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    want_weight: bool,
    want_weight_z: bool,
    want_weight_x: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dW, dU, dV and dc of ``mi_kernels::interaction_weight_grads``."""
    groups, o, i, j = grad.shape[:-2], grad.shape[-1], z.shape[-1], x.shape[-1]
    dw = grad.new_empty((*groups, o, i, j) if want_weight else (0,))
    dwz = grad.new_empty((*groups, o, i) if want_weight_z else (0,))
    dwx = grad.new_empty((*groups, o, j) if want_weight_x else (0,))
    if want_weight:
        if j <= SHORT < i:
            weight_grad(dw.mT, grad, x, z)
        elif o <= SHORT < i and not groups:
            weight_grad(dw.transpose(0, 1), z, grad, x)
        else:
            weight_grad(dw, grad, z, x)
    if want_weight_z:
        weight_grad(dwz, grad, None, z)
    if want_weight_x:
        weight_grad(dwx, grad, None, x)
    return dw, dwz, dwx, grad.sum(-2, dtype=grad.dtype) if want_bias else grad.new_empty(0)
