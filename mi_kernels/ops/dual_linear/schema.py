"""Schemas and fakes of two linear maps that are multiplied, and of the elementwise part of their gradients.

    p = x A^T + a,  q = z C^T + c                                                              [B, N]
    dual_linear        y[b,o] = sum_{r<ranks} f(p[b, r O + o]) h(q[b, r O + o])                [B, O]
    dual_linear_grads  d = (dp | dq),  dp[b, r O + o] = g[b,o] f'(p) h(q),  dq = g f(p) h'(q)  [B, 2N]

N = ranks * O; f and h are ``activation_x`` and ``activation_z``, elementwise. Without z it is x. With
``keep`` p and q come in the dtype of x, which saves the backward pass two products, else as empty [0, N].
"""

from .. import activations
from ..checks import check_activation, match_sizes
from ..dtypes import FLOATING
from ..flops import elementwise, products
from ..library import Axes, define, define_family
from . import portable

# Gradients of p and q are products of the dense interaction; softmax, shared contexts and derivatives of
# gradients are its products and modulation.
define_family("glu", "interaction", "modulate")
define_family("low_rank", "interaction", "modulate")


def _check_options(op, activation_x, activation_z, ranks, features):
    check_activation(op, activation_x, activations.ELEMENTWISE, "activation_x")
    check_activation(op, activation_z, activations.ELEMENTWISE, "activation_z")
    if ranks < 1 or features % ranks != 0:
        raise ValueError(f"{op}: ranks: expected a positive divisor of N={features}, got {ranks}")


def _fake(x, z, weight_x, weight_z, bias_x, bias_z, activation_x, activation_z, ranks, keep):
    rows, features = x.shape[0], weight_x.shape[0]
    kept = rows if keep else 0
    y = x.new_empty(rows, features // ranks)
    return y, x.new_empty(kept, features), x.new_empty(kept, features)


def _check(x, z, weight_x, weight_z, bias_x, bias_z, activation_x, activation_z, ranks, keep):
    _check_options("dual_linear", activation_x, activation_z, ranks, weight_x.shape[0])
    if z is None:
        sizes = [("N", weight_x.shape[0]), ("X", x.shape[1])]
        match_sizes("dual_linear", "weight_z", weight_z.shape, sizes)


def _flops(x, z, weight_x, weight_z, *_, **__):
    return products(x, weight_x) + products(x if z is None else z, weight_z)


def _results(arguments):
    kept = Axes("BN" if arguments["keep"] else "0N")  # [0, N] where it is not kept
    return [Axes("BN" if arguments["ranks"] == 1 else "BO"), kept, kept]


def _cuts(arguments):
    return "BN" if arguments["ranks"] == 1 else "B"  # a part of N would have other ranks


define(
    "dual_linear",
    "(Tensor x, Tensor? z, Tensor weight_x, Tensor weight_z, Tensor? bias_x, Tensor? bias_z,"
    " str activation_x, str activation_z, int ranks, bool keep) -> (Tensor, Tensor, Tensor)",
    portable.dual_linear,
    _fake,
    {"x": "BX", "weight_x": "NX", "weight_z": "NZ", "z": "BZ", "bias_x": "N", "bias_z": "N"},
    _check,
    dtypes=FLOATING,
    flops=_flops,
    cuts=_cuts,
    results=_results,
)


def _grads_fake(grad, p, q, activation_x, activation_z, ranks):
    return p.new_empty(p.shape[0], 2 * p.shape[1])


def _check_grads(grad, p, q, activation_x, activation_z, ranks):
    op, features = "dual_linear_grads", p.shape[1]
    _check_options(op, activation_x, activation_z, ranks, features)
    match_sizes(op, "grad", grad.shape, [("B", p.shape[0]), ("O", features // ranks)])


define(
    "dual_linear_grads",
    "(Tensor grad, Tensor p, Tensor q, str activation_x, str activation_z, int ranks) -> Tensor",
    portable.dual_linear_grads,
    _grads_fake,
    {"grad": "BO", "p": "BN", "q": "BN"},
    _check_grads,
    dtypes=FLOATING,
    flops=elementwise,
    cuts="B",  # a part of N has dp and dq in two places of d
    results=lambda arguments: [Axes("BD")],
)
