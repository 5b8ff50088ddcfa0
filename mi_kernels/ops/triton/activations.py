"""Activations of gates in Triton: f and f' by name, the formulas of ``ops/activations.py``.

Arguments are float32, or float64 where the operands are. Triton's own exp is ``ex2.approx(t log2 e)`` in
float32, with an error of about |t| ulp, and Triton has no tanh that runs on every target and in the
interpreter; so both are implemented here, by the reduction t = k log 2 + r with an exact r.

Error bounds in float32, in u = 2^-24. CUDA's expf, documented within 2 u, uses ``ex2.approx`` as `exp` does
here (PTX guarantees 4 u for that instruction; for integers it is assumed to be exact). ``/`` is
``div.full``, within 4 u, and 0 for divisors beyond 2^126: one Newton step corrects it. (``div.rn`` would be
exact, but its slow-path call made gates spill registers; so did e^r by a polynomial.) To first order,

    sigmoid = 1 / (1 + e)   2 for e, 1 for the sum, 1 for the quotient: 4 u
    tanh = e / (e + 2)      worst at e = 0.41: 0.83 times 3.8 for e, 0.8 for the sum, 1 for the quotient: 5 u

and tests/ops/test_activations.py requires 6 u; without the Newton step it would be 7 and 8 u. The other
activations have absolute error bounds and use plain division.
"""

import triton
import triton.language as tl

# A constexpr must be the right factor: as the left one the interpreter returns no tensor.
_LOG2E = tl.constexpr(1.4426950408889634)
# log 2 in two parts; the high one has trailing zeros, so that its product with k is exact.
_LOG2_HIGH = tl.constexpr(float.fromhex("0x1.62e4p-1"))
_LOG2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
_LOG2_HIGH_64 = tl.constexpr(float.fromhex("0x1.62e42fefa38p-1"))
_LOG2_LOW_64 = tl.constexpr(float.fromhex("0x1.ef35793c7673p-45"))
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)
_TANH_SCALE = tl.constexpr(0.7978845608028654)
_TANH_CUBE = tl.constexpr(0.044715)
_TANH_CUBE_3 = tl.constexpr(0.134145)
_QUICK = tl.constexpr(1.702)
_SOFTPLUS_LIMIT = tl.constexpr(20.0)


@triton.jit
def _reduced(t):
    """(k, r) with t = k log 2 + r, |r| <= log(2) / 2."""
    k = tl.floor(t * _LOG2E + 0.5)
    if t.dtype == tl.float64:
        return k, (t - k * _LOG2_HIGH_64) - k * _LOG2_LOW_64
    else:
        return k, (t - k * _LOG2_HIGH) - k * _LOG2_LOW


@triton.jit
def exp(t):
    """e^t; in float32 within 3 ulp, Inf from 88.4 on."""
    if t.dtype == tl.float64:
        return tl.exp(t)
    else:
        bounded = tl.where(t > 89.0, 89.0, t)  # propagates NaN
        bounded = tl.where(bounded < -105.0, -105.0, bounded)
        k, r = _reduced(bounded)
        return tl.exp2(r * _LOG2E) * tl.exp2(k)


@triton.jit
def _small_expm1(r):
    """e^r - 1 for |r| <= log(2) / 2: r + r^2 q(r), q a minimax polynomial."""
    if r.dtype == tl.float64:
        q = 2.0926941090615536736e-9 * r + 2.511228843238610704e-8
        q = q * r + 2.7557233365243381885e-7
        q = q * r + 2.7557234099292213311e-6
        q = q * r + 0.000024801587373738906899
        q = q * r + 0.000198412698971945492
        q = q * r + 0.0013888888888858438171
        q = q * r + 0.0083333333333166847213
        q = q * r + 0.041666666666666724539
        q = q * r + 0.16666666666666683914
        q = q * r + 0.49999999999999999966
    else:
        q = 0.001395054047 * r + 0.008368917868
        q = q * r + 0.04166620506
        q = q * r + 0.166665186
        q = q * r + 0.5000000095
    return r + r * r * q


@triton.jit
def _quotient(a, b):
    """a / b for 2 <= b < 2^126, almost correctly rounded."""
    if b.dtype == tl.float64:
        return a / b
    else:
        inverse = 1.0 / b
        q = a * inverse
        return tl.fma(tl.fma(-q, b, a), inverse, q)


@triton.jit
def _expm1_of_double(t):
    """e^(2 |t|) - 1, with |t| clamped to 20, beyond which tanh is 1."""
    size = tl.abs(t)
    bounded = tl.where(size > 20.0, 20.0, size)
    k, r = _reduced(bounded + bounded)
    power = tl.exp2(k)
    return power * _small_expm1(r) + (power - 1.0)


@triton.jit
def _signed(h, t):
    return tl.where(t < 0.0, -h, tl.where(t == 0.0, t, h))


@triton.jit
def tanh(t):
    """e / (e + 2) with e = e^(2 |t|) - 1, accurate for small t."""
    e = _expm1_of_double(t)
    return _signed(_quotient(e, e + 2.0), t)


@triton.jit
def sigmoid(t):
    if t.dtype == tl.float64:
        return 1.0 / (1.0 + exp(-t))
    else:
        divisor = 1.0 + exp(-t)
        inverse = 1.0 / divisor
        rest = tl.fma(-inverse, divisor, tl.full(t.shape, 1.0, t.dtype))
        rest = tl.where(divisor < 1e37, rest, 0.0)  # avoids 0 * Inf
        return tl.fma(rest, inverse, inverse)


@triton.jit
def _gelu_tanh_inner(t):
    inner = (t + t * t * t * _TANH_CUBE) * _TANH_SCALE
    e = _expm1_of_double(inner)
    return _signed(e / (e + 2.0), inner)


@triton.jit
def _log1p(t):
    """log(1 + t) for 0 <= t <= 1: 2 artanh(s), s = t / (2 + t) <= 1/3, by its series."""
    s = t / (t + 2.0)
    square = s * s
    terms: tl.constexpr = 17 if t.dtype == tl.float64 else 8
    total = square * 0.0 + 1.0 / (2 * terms + 1)
    for i in tl.static_range(terms - 1):
        total = total * square + 1.0 / (2 * (terms - i) - 1)
    return 2.0 * (s + s * square * total)


@triton.jit
def _mish_parts(t):
    """tanh(softplus(t)) = n / (n + 2), n = e^t (e^t + 2), and its derivative."""
    e = exp(tl.where(t > _SOFTPLUS_LIMIT, _SOFTPLUS_LIMIT, t))
    n = e * (e + 2.0)
    h = n / (n + 2.0)
    rest = tl.where(t > _SOFTPLUS_LIMIT, 0.0, 2.0 / (n + 2.0))
    return h, rest * (1.0 + h) * (e / (1.0 + e))


@triton.jit
def value(name: tl.constexpr, t):
    """f(t)."""
    if name == "sigmoid":
        return sigmoid(t)
    elif name == "tanh":
        return tanh(t)
    elif name == "relu":
        return tl.where(t < 0.0, 0.0, t)
    elif name == "gelu":
        return t * 0.5 * (1.0 + tl.erf(t * _ROOT_HALF))
    elif name == "gelu_tanh":
        return 0.5 * t * (1.0 + _gelu_tanh_inner(t))
    elif name == "silu":
        return t / (1.0 + exp(-t))
    elif name == "quick_gelu":
        return t / (1.0 + exp(-(t * _QUICK)))
    elif name == "mish":
        return t * _mish_parts(t)[0]
    elif name == "softplus":
        total = tl.where(t < 0.0, 0.0, t) + _log1p(exp(-tl.abs(t)))
        return tl.where(t > _SOFTPLUS_LIMIT, t, total)
    elif name == "hardswish":
        raised = tl.where(t + 3.0 < 0.0, 0.0, t + 3.0)
        return t * tl.where(raised > 6.0, 6.0, raised) / 6.0
    elif name == "hardsigmoid":
        raised = tl.where(t + 3.0 < 0.0, 0.0, t + 3.0)
        return tl.where(raised > 6.0, 6.0, raised) / 6.0
    else:
        tl.static_assert(name == "identity", "unknown activation")
        return t


@triton.jit
def slope(name: tl.constexpr, t):
    """f'(t); at kinks and NaN that of PyTorch's backward formulas."""
    if name == "sigmoid":
        s = sigmoid(t)
        return (1.0 - s) * s
    elif name == "tanh":
        h = tanh(t)
        return 1.0 - h * h
    elif name == "relu":
        return tl.where(t <= 0.0, 0.0, 1.0).to(t.dtype)
    elif name == "gelu":
        return 0.5 * (1.0 + tl.erf(t * _ROOT_HALF)) + t * (exp(-0.5 * t * t) * _DENSITY)
    elif name == "gelu_tanh":
        h = _gelu_tanh_inner(t)
        inner_slope = (1.0 + t * t * _TANH_CUBE_3) * _TANH_SCALE
        return 0.5 * (1.0 + h) + 0.5 * t * (1.0 - h * h) * inner_slope
    elif name == "silu":
        s = sigmoid(t)
        return s * (1.0 + t * (1.0 - s))
    elif name == "quick_gelu":
        s = sigmoid(t * _QUICK)
        return s + s * _QUICK * (t * (1.0 - s))  # 1.702 t may leave the range
    elif name == "mish":
        h, by = _mish_parts(t)
        return h + t * by
    elif name == "softplus":
        return tl.where(t > _SOFTPLUS_LIMIT, 1.0, sigmoid(t))
    elif name == "hardswish":
        inside = tl.where(t <= -3.0, 0.0, t / 3.0 + 0.5)
        return tl.where(t >= 3.0, 1.0, inside)
    elif name == "hardsigmoid":
        return tl.where((t > -3.0) & (t < 3.0), tl.full(t.shape, 1.0 / 6.0, t.dtype), 0.0)
    else:
        tl.static_assert(name == "identity", "unknown activation")
        return tl.full(t.shape, 1.0, t.dtype)


@triton.jit
def tangent(name: tl.constexpr, t, direction):
    """f'(t) times a direction; 0 where f'(t) is 0, also if the direction is Inf."""
    if name == "identity":
        return direction
    else:
        by = slope(name, t)
        product = by * direction
        if name == "relu" or name == "hardsigmoid" or name == "hardswish":
            product = tl.where(by == 0.0, 0.0, product)
        return product
