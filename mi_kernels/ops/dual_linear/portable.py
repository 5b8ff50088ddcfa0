"""Two linear maps and their product in pure PyTorch with bounded memory, on any device.

As PyTorch's own products, p and q are rounded to the dtype of x.
"""

from torch import Tensor

from .. import activations
from ..interaction import portable as dense

Maybe = Tensor | None


def chunk_rows(rows: int, features: int) -> int:
    """Rows whose p and q, ``features`` each, are in memory at a time where they are not kept."""
    return max(min(rows, dense.CHUNK_ELEMENTS // max(2 * features, 1)), 1)


def dual_linear(
    x: Tensor,
    z: Maybe,
    weight_x: Tensor,
    weight_z: Tensor,
    bias_x: Maybe,
    bias_z: Maybe,
    activation_x: str,
    activation_z: str,
    ranks: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mi_kernels::dual_linear``."""
    z = x if z is None else z
    rows, features = x.shape[0], weight_x.shape[0]
    out = x.new_empty(rows, features // ranks)
    p = q = x.new_empty(0, features)
    step = rows if keep else chunk_rows(rows, features)
    for start in range(0, max(rows, 1), max(step, 1)):
        b = slice(start, start + step)
        p = _linear(x[b], weight_x, bias_x)
        q = _linear(z[b], weight_z, bias_z)
        y = activations.value(activation_x, p) * activations.value(activation_z, q)
        out[b] = y if ranks == 1 else y.unflatten(1, (ranks, -1)).sum(1)
    return (out, p, q) if keep else (out, x.new_empty(0, features), x.new_empty(0, features))


def _linear(x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    return dense.forward(x, x[:, :0], None, None, weight, bias)


def dual_linear_grads(
    grad: Tensor, p: Tensor, q: Tensor, activation_x: str, activation_z: str, ranks: int
) -> Tensor:
    """``mi_kernels::dual_linear_grads``."""
    d = p.new_empty(p.shape[0], 2 * p.shape[1])
    grad = grad if ranks == 1 else grad.repeat(1, ranks)
    dp, dq = d[:, : p.shape[1]], d[:, p.shape[1] :]
    dp.copy_(activations.tangent(activation_x, p, grad * activations.value(activation_z, q)))
    dq.copy_(activations.tangent(activation_z, q, grad * activations.value(activation_x, p)))
    return d
