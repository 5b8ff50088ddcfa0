"""The dense interaction in pure PyTorch with bounded memory, on any device.

The generated operand P[b, (i, j)] = z[b, i] x[b, j] is computed chunk by chunk, with one matmul per chunk.
Chunks are ranges of rows b and of context features i, so that no temporary exceeds ``CHUNK_ELEMENTS``
(or one row of one context feature, whichever is larger); the sum over i is accumulated in the accumulation
dtype: float32 for 16-bit inputs.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype

Maybe = Tensor | None

CHUNK_ELEMENTS = 1 << 20
# float32 results of up to MAX_SPLIT_RESULT elements are summed in parts of at least MIN_PART products each: a
# sum of sums rounds less than the one dot product of Z * X elements that PyTorch would compute. Larger
# results use the plain matrix product.
MAX_SPLIT_RESULT, MIN_PART = 1 << 12, 32


def out_features(weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe) -> int:
    """O, from the first weight that is given."""
    if weight is not None:
        return weight.shape[-3]
    for matrix in (weight_z, weight_x):
        if matrix is not None:
            return matrix.shape[-2]
    assert bias is not None, "an interaction needs at least one of weight, weight_z, weight_x and bias"
    return bias.shape[-1]


def _wide(tensor: Tensor) -> Tensor:
    """float16 as float32: products of two elements (z x, g W) may overflow float16."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _stays_finite(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Repeats a call in float64 where its result is not finite: a product of two elements may overflow though
    the sum does not.

    Only on CPUs: on other devices the check of the result would synchronise.
    """

    @functools.wraps(kernel)
    def checked(*arguments: Any) -> Any:
        results = kernel(*arguments)
        tensors = results if isinstance(results, tuple) else (results,)
        first = tensors[0]
        if first.device.type != "cpu" or first.dtype not in (torch.float32, torch.bfloat16):
            return results
        if all(bool(result.isfinite().all()) for result in tensors):
            return results
        exact = kernel(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
        exact = exact if isinstance(exact, tuple) else (exact,)
        tensors = tuple(
            torch.where(result.isfinite(), result, repeated.to(result.dtype))
            for result, repeated in zip(tensors, exact, strict=True)
        )
        return tensors if isinstance(results, tuple) else tensors[0]

    return checked


def chunks(rows: int, context: int, width: int) -> tuple[int, int]:
    """Rows and context features of one chunk of an operand of ``width`` elements per (row, feature)."""
    budget = max(CHUNK_ELEMENTS // max(width, 1), 1)
    features = min(context, budget)
    return max(min(rows, budget // max(features, 1)), 1), max(features, 1)


def _ranges(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _operand(z: Tensor, x: Tensor) -> Tensor:
    # [..., B, I], [..., B, X] -> [..., B, I * X]. Transposed inputs would give a transposed result, and the
    # matrix product of such an operand rounds more. Callers bind it to no name: two chunks would be alive.
    return (_wide(z).contiguous().unsqueeze(-1) * _wide(x).contiguous().unsqueeze(-2)).flatten(-2)


def _groups(x: Tensor) -> int:
    return x.shape[0] if x.dim() == 3 else 1


def _single_product(operand: Tensor, matrix: Tensor) -> Tensor:
    """[..., B, K], [..., O, K] -> [..., B, O] in the accumulation dtype."""
    return (operand @ matrix.mT).to(accumulation_dtype(operand.dtype))


def _by_parts(operand: Tensor, matrix: Tensor) -> Tensor:
    """The same in float32, as a sum over up to 16 equal parts of K and a remainder."""
    count = operand.shape[-1]
    parts = min(count // MIN_PART, 16)
    if parts < 2:
        return operand @ matrix.mT
    whole = count - count % parts
    left, right = (t[..., :whole].unflatten(-1, (parts, -1)).transpose(-2, -3) for t in (operand, matrix))
    y = (left @ right.mT).sum(-3)
    return y if whole == count else y + operand[..., whole:] @ matrix[..., whole:].mT


@_stays_finite
def forward(x: Tensor, z: Tensor, weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe) -> Tensor:
    """y of ``mi_kernels::interaction``; shapes as in schema.py."""
    dtype = accumulation_dtype(x.dtype)
    size = (*x.shape[:-1], out_features(weight, weight_z, weight_x, bias))
    y = x.new_zeros(size, dtype=dtype)
    if weight is not None:
        row_step, feature_step = chunks(z.shape[-2], z.shape[-1], x.shape[-1] * _groups(x))
        in_parts = x.dtype == torch.float32 and y.numel() <= MAX_SPLIT_RESULT
        product = _by_parts if in_parts else _single_product
        for rows in _ranges(z.shape[-2], row_step):
            for features in _ranges(z.shape[-1], feature_step):
                matrix = _wide(weight[..., features, :]).flatten(-2)
                y[..., rows, :] += product(_operand(z[..., rows, features], x[..., rows, :]), matrix)
    if weight_z is not None:
        y += (z @ weight_z.mT).to(dtype)
    if weight_x is not None:
        y += (x @ weight_x.mT).to(dtype)
    if bias is not None:
        y += bias.unsqueeze(-2)
    return y.to(x.dtype)


def packed_forward(
    x: Tensor, z: Tensor, weight: Tensor, packed_weight: Tensor, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> Tensor:
    """y of ``mi_kernels::interaction_packed``; ``packed_weight`` is not used."""
    return forward(x, z, weight, weight_z, weight_x, bias)


@_stays_finite
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
    dtype = accumulation_dtype(x.dtype)
    dx = x.new_zeros(x.shape if want_x else (0,), dtype=dtype)
    dz = z.new_zeros(z.shape if want_z else (0,), dtype=dtype)
    if weight is not None:
        row_step, feature_step = chunks(z.shape[-2], z.shape[-1], x.shape[-1] * _groups(x))
        for rows in _ranges(z.shape[-2], row_step):
            for features in _ranges(z.shape[-1], feature_step):
                w = _wide(weight[..., features, :])
                t = (
                    (_wide(grad[..., rows, :]) @ w.flatten(-2)).unflatten(-1, w.shape[-2:]).to(dtype)
                )  # [b, i, X]
                # Not matrix-vector products: sum() adds pairwise, which rounds less along long axes.
                if want_x:
                    dx[..., rows, :] += (z[..., rows, features].unsqueeze(-1).to(dtype) * t).sum(
                        -2, dtype=dtype
                    )
                if want_z:
                    dz[..., rows, features] = (x[..., rows, :].unsqueeze(-2).to(dtype) * t).sum(
                        -1, dtype=dtype
                    )
    if want_x and weight_x is not None:
        dx += (grad @ weight_x).to(dtype)
    if want_z and weight_z is not None:
        dz += (grad @ weight_z).to(dtype)
    return dx.to(x.dtype), dz.to(z.dtype)


@_stays_finite
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
    return (
        _weight_grad(grad, x, z) if want_weight else grad.new_empty(0),
        _sum_over_rows(grad, z) if want_weight_z else grad.new_empty(0),
        _sum_over_rows(grad, x) if want_weight_x else grad.new_empty(0),
        grad.sum(-2, dtype=grad.dtype) if want_bias else grad.new_empty(0),
    )


def _part(rows: int) -> int:
    """Rows of each of up to 16 parts of the batch: a long sequential sum rounds more than a sum of sums."""
    return max(-(-rows // 16), 32)


def _sum_over_rows(grad: Tensor, features: Tensor) -> Tensor:
    """g^T f by parts of the batch, but as one product in 16-bit dtypes.

    PyTorch accumulates those in float32 and rounds once. Parts would be rounded each, or overflow float16
    where the whole sum does not.
    """
    rows = grad.shape[-2]
    step = rows if accumulation_dtype(grad.dtype) != grad.dtype else _part(rows)
    if rows <= step:
        return grad.mT @ features
    parts = [grad[..., part, :].mT @ features[..., part, :] for part in _ranges(rows, step)]
    return torch.stack(parts).sum(0, dtype=grad.dtype)


def _weight_grad(grad: Tensor, x: Tensor, z: Tensor) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    groups, o, context, width = grad.shape[:-2], grad.shape[-1], z.shape[-1], x.shape[-1]
    dw = grad.new_empty((*groups, o, context, width))
    row_step, feature_step = chunks(z.shape[-2], context, width * _groups(x))
    feature_step = min(feature_step, max(CHUNK_ELEMENTS // max(o * width * _groups(x), 1), 1))
    if x.dtype in (torch.float32, torch.float16):  # float16 is multiplied in float32
        row_step = min(row_step, _part(z.shape[-2]))
    for features in _ranges(context, feature_step):
        shape = (*groups, o, (features.stop - features.start) * width)
        part = grad.new_zeros(shape, dtype=dtype)  # [O, i * X]
        for rows in _ranges(z.shape[-2], row_step):
            part += (_wide(grad[..., rows, :]).mT @ _operand(z[..., rows, features], x[..., rows, :])).to(
                dtype
            )
        dw[..., features, :] = part.unflatten(-1, (-1, width)) if width else 0
    return dw
