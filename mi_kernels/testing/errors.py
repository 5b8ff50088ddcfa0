"""The error rule: how far a result may be from float64, judged by PyTorch's own error in the same dtype.

For inputs in dtype d, with y64 the formula in float64 on the same (rounded) inputs and y_ref the einsum
reference in d:

    float64   ||y - y64|| <= 1e-12 ||y64||
    others    ||y - y64|| <= max(2 ||y_ref - y64||, floor)

Why 2: PyTorch's own error measures how hard the data are in this dtype, and another order of summation may
cost as much again, no more.

Rounding errors are random: the norms of two such errors over N independent elements differ by chance alone
by about 1 / sqrt(N) of themselves. So results with few elements are pooled over draws until N is in the
hundreds, and nothing is left to chance. Elements much smaller than the largest ones have no say in a norm
and do not count: N = (sum S^2)^2 / sum S^4, S below. Nor do the elements of expanded arguments, which are one
number, so that all results may be too: these are drawn ``REPEATED`` times at least.

The floor only matters where the reference is exact by luck. Each of the terms t whose sum is y is rounded
with a relative error below u = eps / 2, so the error is a random sum of spread u S with S^2 = sum t^2, and
floor = 4 u ||S|| / sqrt(N): 2 ulps for one element; beyond N = 100 less than the rounding of the result.

A norm hides a single bad element among many. So each element is held to its own scale too: its error in
units of S + |y64| may be 4 times the worst of the reference, or 4 u. What float16 cannot resolve at all, the
distance between its subnormal numbers, is taken off before.

Where y is a sum of products of the inputs, S^2 is the same function of the squared inputs. Where an
activation is in it, squares.py has S^2: the terms of the last sum and what the rounding of the earlier ones
does to them.

Where y64 is not finite, y is not finite either, and NaN where an input NaN reaches it. An infinite input may
come out as Inf or as NaN (Inf - Inf), because the order of summation decides that. Where both y64 and y_ref
are finite, so is y.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

FLOAT64_LIMIT = 1e-12
REPEATED = 20
Function = Callable[..., Sequence[Tensor]]
Arguments = Sequence[Tensor | None]
Oracles = tuple[Sequence[Tensor], ...]

# The oracles of the last names (check_errors), by seed, with the arguments that they were computed from.
_known: dict[Hashable, dict[int, tuple[Arguments, Oracles]]] = {}
_REMEMBERED = 4


def require(holds: bool, otherwise: str) -> None:
    """Raises AssertionError, also where Python leaves assertions out: kernels are admitted by this judge."""
    if not holds:
        raise AssertionError(otherwise)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """||result - truth|| / ||truth|| in float64; 0 where both vanish."""
    truth = truth.detach()
    error = (result.detach().double() - truth).norm()
    return 0.0 if error == 0 else float(error / truth.norm())


def check_errors(
    function: Function,
    reference: Function,
    draw: Callable[[int], Arguments],
    enough: int = 500,
    most: int = 100,
    squares: Function | None = None,
    oracle: Hashable = None,
) -> float:
    """Raises AssertionError if one of the results of ``function`` breaks the error rule.

    Returns the worst error as a part of what is allowed: 0 is exact, beyond 1 raises.

    Few elements would make the comparison a matter of luck. So arguments are drawn anew until each result
    has ``enough`` elements (and ``REPEATED`` times where one is expanded), ``most`` times at most, and the
    norms are taken over all draws together.

    Args:
        function: the implementation under test, a sequence of tensors.
        reference: the same function of the same arguments in any dtype. Without ``squares``, each of its
            results must be a sum of products of the arguments, with no coefficients but 1.
        draw: arguments, made from a seed: tensors of one floating-point dtype, or None.
        squares: S^2 of each result, from the arguments in float64.
        oracle: a name of ``reference`` and ``squares`` together. What they return is remembered under it, so
            that another ``function`` on the same arguments soon after, on another backend, costs no more.
    """
    pools: list[list[tuple[Tensor, ...]]] = []
    has_infinities = False
    for seed in range(most):
        arguments = draw(seed)
        has_infinities |= any(t is not None and bool(t.isinf().any()) for t in arguments)
        found = function(*arguments)
        results = list(zip(found, *_remembered(oracle, seed, reference, squares, arguments), strict=True))
        pools = pools or [[] for _ in results]
        for index, (pool, tensors) in enumerate(zip(pools, results, strict=True)):
            result, truth = tensors[:2]
            wrong = f"result {index}: expected shape {list(truth.shape)}, got {list(result.shape)}"
            require(result.shape == truth.shape, wrong)
            pool.append(tuple(tensor.detach().flatten() for tensor in tensors))
        least = min((result.numel() for result, *_ in results if result.numel()), default=enough)
        draws = REPEATED if any(t is not None and _is_expanded(t) for t in arguments) else 1
        if results[0][2].dtype == torch.float64 or (least * (seed + 1) >= enough and seed + 1 >= draws):
            break
    parts = [0.0]
    for index, pool in enumerate(pools):
        result, truth, rival, square = map(torch.cat, zip(*pool, strict=True))
        parts.append(check_error(result, truth, rival, square, has_infinities, f"result {index}"))
    return max(parts)


def _is_expanded(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _remembered(
    oracle: Hashable, seed: int, reference: Function, squares: Function | None, arguments: Arguments
) -> Oracles:
    if oracle is None:
        return _oracles(reference, squares, arguments)
    oracle = oracle, torch.backends.cuda.matmul.fp32_precision  # by which the reference rounds on a GPU
    by_seed = _known.setdefault(oracle, {})
    if seed not in by_seed or not _same(by_seed[seed][0], arguments):
        kept = [None if tensor is None else tensor.detach() for tensor in arguments]
        by_seed[seed] = kept, _oracles(reference, squares, arguments)
    while len(_known) > _REMEMBERED:
        del _known[next(iter(_known))]
    return by_seed[seed][1]


def _same(arguments: Arguments, others: Arguments) -> bool:
    """Bit for bit, on one device and in one layout, which may change what PyTorch rounds."""

    def described(tensor: Tensor | None) -> tuple | None:
        return None if tensor is None else (tensor.dtype, tensor.device, tensor.shape, tensor.stride())

    if [*map(described, arguments)] != [*map(described, others)]:
        return False
    pairs = zip(arguments, others, strict=True)
    return all(one is None or other is None or one.equal(other) for one, other in pairs)


def _oracles(reference: Function, squares: Function | None, arguments: Arguments) -> Oracles:
    """The truth, the reference in the dtype of the arguments, and S^2."""
    exact = [None if tensor is None else tensor.detach().double() for tensor in arguments]
    if all(tensor is None or tensor.dtype == torch.float64 for tensor in arguments):
        truth = reference(*exact)
        return truth, truth, truth  # float64 has a limit of its own, which asks neither of the others
    return (
        reference(*exact),
        reference(*(None if tensor is None else tensor.detach() for tensor in arguments)),
        squares(*exact)
        if squares is not None
        else reference(*(None if tensor is None else tensor.square() for tensor in exact)),
    )


def check_error(
    result: Tensor, truth: Tensor, rival: Tensor, square: Tensor, has_infinities: bool, name: str
) -> float:
    """The rule for one tensor; ``rival`` is the reference in the dtype, ``square`` is S^2.

    Returns its error as a part of what is allowed.
    """
    dtype, result = rival.dtype, result.double()
    truth, rival, scale = truth.double(), rival.double(), square.sqrt()
    keep = truth.isfinite() & rival.isfinite()  # the rival overflows where the dtype does
    wrong = torch.where(keep, ~result.isfinite(), result.isfinite() & ~truth.isfinite())
    if not has_infinities:
        wrong |= truth.isnan() & ~result.isnan()
    strange = f"{name}: {int(wrong.sum())} elements are finite or not where they should not be"
    require(not wrong.any(), strange)
    result, truth, rival, scale = result[keep], truth[keep], rival[keep], scale[keep]
    if result.numel() == 0:
        return 0.0
    error, rival_error = (result - truth).abs(), (rival - truth).abs()
    part = 0.0
    if dtype == torch.float64:
        limit = FLOAT64_LIMIT * truth.norm()
    else:
        unit = torch.finfo(dtype).eps / 2
        count = scale.square().sum().square() / scale.pow(4).sum()
        count = count.nan_to_num(nan=1.0)  # 0 / 0: all terms vanish, and so does every error allowed
        floor = 4 * unit * scale.norm() / count.sqrt()
        limit = torch.maximum(2 * rival_error.norm(), floor)
        own, step = scale + truth.abs(), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        worst, theirs = (_largest((e - step).clamp(min=0), own) for e in (error, rival_error))
        allowed = max(4 * theirs, 4 * unit)
        off = f"{name}: an element is off by {worst:.3g} of its scale, allowed {allowed:.3g}"
        require(worst <= allowed, off)
        part = worst / allowed
    require(
        bool(error.norm() <= limit),
        f"{name}: error {float(error.norm()):.3g} in L2, allowed {float(limit):.3g}, "
        f"reference {float(rival_error.norm()):.3g}, norm of the result {float(truth.norm()):.3g}",
    )
    return max(part, float(error.norm() / limit) if error.any() else 0.0)


def _largest(error: Tensor, scale: Tensor) -> float:
    # Where the scale vanishes all terms are 0, and so must be the error.
    return float(torch.where(error == 0, error, error / scale).max())


def check_second_order_errors(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], draw: Callable[[int], list[Tensor]]
) -> float:
    """The rule for the gradients of a weighted sum of the gradients, in norm; norms are over three draws.

    ``draw``: a seed -> the inputs, then dy. Returns the worst error as a part of what is allowed.
    """

    def second(function, tensors, weights):
        *inputs, grad = leaves = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)
        # That of a bias, for one, depends on nothing where all is linear.
        pairs = [(t, w) for t, w in zip(first, weights, strict=True) if t.requires_grad]
        firsts, kept = zip(*pairs, strict=True)
        return torch.autograd.grad(firsts, leaves, kept, allow_unused=True, materialize_grads=True)

    errors, exact = [], []
    for seed in range(3):
        tensors, weights = draw(seed), draw(seed + 2000)[:-1]
        truth = second(reference, [t.double() for t in tensors], [t.double() for t in weights])
        both = (second(f, tensors, weights) for f in (function, reference))
        errors.append([[(a - b).square().sum() for a, b in zip(found, truth, strict=True)] for found in both])
        exact.append([t.square().sum() for t in truth])
    own, limit = torch.tensor(errors, dtype=torch.float64).sum(0).sqrt()
    if tensors[0].dtype == torch.float64:
        limit = FLOAT64_LIMIT / 2 * torch.tensor(exact, dtype=torch.float64).sum(0).sqrt()
    beyond = f"second order: errors {own / limit} times the reference's, allowed 2"
    require(bool((own <= 2 * limit).all()), beyond)
    return float((own / (2 * limit)).nan_to_num(nan=0.0).max())
