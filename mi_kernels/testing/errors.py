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

y64 and S^2 of many draws are computed at once: the order of sums is of no account in float64. y_ref is
computed draw by draw, since its rounding is what the rule compares with. What the rule allows by them is kept
under a name (``oracle``), for the same sample on another backend.

Where y64 is not finite, y is not finite either, and NaN where an input NaN reaches it. An infinite input may
come out as Inf or as NaN (Inf - Inf), because the order of summation decides that. Where both y64 and y_ref
are finite, so is y.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lru_cache import LRUCache, bytes_of

FLOAT64_LIMIT = 1e-12
REPEATED = 20
STACKED_ELEMENTS = 1 << 15  # of the largest tensor of draws that are evaluated together
REMEMBERED_BYTES = 256 << 20
Function = Callable[..., Sequence[Tensor]]
Arguments = Sequence[Tensor | None]
Draws = list[list[Tensor | None]]


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
            results must be a sum of products of the arguments, with no coefficients but 1. Where it has
            ``stacked``, the same function of stacks of draws, that is called in float64, once for many draws.
        draw: arguments, made from a seed: tensors of one floating-point dtype, or None.
        squares: S^2 of each result, from the arguments in float64; torch.vmap maps it where the reference
            has ``stacked``.
        oracle: a name of ``reference``, ``squares`` and ``draw`` together. What they return is remembered
            under it, so that another ``function`` later on, on another backend, costs no more.
    """
    expected = _expected(reference, draw, enough, most, squares, oracle)
    pools: list[list[Tensor]] = [[] for _ in expected.bounds]
    for arguments in expected.draws:
        for index, (pool, result, shape) in enumerate(
            zip(pools, function(*arguments), expected.shapes, strict=True)
        ):
            wrong = f"result {index}: expected shape {list(shape)}, got {list(result.shape)}"
            require(result.shape == shape, wrong)
            pool.append(result.detach().flatten())
    changed = "an argument was changed in place"
    require(expected.versions == _versions(expected.draws), changed)
    parts = [0.0]
    for index, (bound, pool) in enumerate(zip(expected.bounds, pools, strict=True)):
        parts.append(bound.part_of(torch.cat(pool), f"result {index}"))
    return max(parts)


class Bound:
    """What one result, pooled over draws, may be: the rule, without the result."""

    def __init__(self, truth: Tensor, rival: Tensor, square: Tensor, has_infinities: Callable[[], bool]):
        """``rival`` is the reference in the dtype, ``square`` is S^2; all of them are flat."""
        dtype, truth, rival = rival.dtype, truth.double(), rival.double()
        self.keep: Tensor | None = None  # None: all
        if not (truth.sum() + rival.sum()).isfinite():  # a sum is faster than to look at each
            self.keep, self.finite = truth.isfinite() & rival.isfinite(), truth.isfinite()
            self.must_be_nan = torch.zeros_like(self.keep) if has_infinities() else truth.isnan()
            # The rival overflows where the dtype does.
            truth, rival, square = truth[self.keep], rival[self.keep], square[self.keep]
        self.truth = truth
        self.scale: Tensor | None = None
        if truth.numel() == 0:
            return
        if dtype == torch.float64:
            self.rival_norm = 0.0
            self.limit = float(FLOAT64_LIMIT * truth.norm())
            return
        unit = torch.finfo(dtype).eps / 2
        count = square.sum().square() / square.square().sum()
        count = count.nan_to_num(nan=1.0)  # 0 / 0: all terms vanish, and so does every error allowed
        floor = 4 * unit * square.sum().sqrt() / count.sqrt()
        error = (rival - truth).abs_()
        self.rival_norm = float(error.norm())
        self.limit = max(2 * self.rival_norm, float(floor))
        # Where the scale vanishes all terms are 0, and so must be the error: anything else is huge.
        self.scale = square.sqrt().add_(truth.abs()).clamp_(min=1e-300)
        self.step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        self.allowed = max(4 * self._worst(error, self.scale), 4 * unit)

    def _worst(self, error: Tensor, scale: Tensor) -> float:
        return float((error - self.step).clamp_(min=0).div_(scale).max())

    def part_of(self, result: Tensor, name: str) -> float:
        """The error of the result as a part of what is allowed; AssertionError beyond that."""
        result = result.double()
        if self.keep is not None:
            finite = result.isfinite()
            wrong = torch.where(self.keep, ~finite, finite & ~self.finite)
            _require_none(wrong | (self.must_be_nan & ~result.isnan()), name)
            result = result[self.keep]
        if result.numel() == 0:
            return 0.0
        error, part = (result - self.truth).abs_(), 0.0
        norm = float(error.norm())
        if not math.isfinite(norm):
            _require_none(~result.isfinite(), name)
        if self.scale is not None:
            worst = self._worst(error, self.scale)
            off = f"{name}: an element is off by {worst:.3g} of its scale, allowed {self.allowed:.3g}"
            require(worst <= self.allowed, off)
            part = worst / self.allowed
        if not norm <= self.limit:
            raise AssertionError(
                f"{name}: error {norm:.3g} in L2, allowed {self.limit:.3g}, "
                f"reference {self.rival_norm:.3g}, norm of the result {float(self.truth.norm()):.3g}"
            )
        return max(part, norm / self.limit if norm else 0.0)


def _require_none(wrong: Tensor, name: str) -> None:
    count = int(wrong.sum())
    require(count == 0, f"{name}: {count} elements are finite or not where they should not be")


class Expected(NamedTuple):
    """Arguments, and what the results of a function of them are held to."""

    draws: Draws
    versions: list[int]  # of the arguments, which later functions are to get unchanged
    shapes: list[torch.Size]
    bounds: list[Bound]
    bytes: int


_known = LRUCache(REMEMBERED_BYTES)


def _expected(
    reference: Function,
    draw: Callable[[int], Arguments],
    enough: int,
    most: int,
    squares: Function | None,
    oracle: Hashable,
) -> Expected:
    first = draw(0)
    if oracle is None:
        return _computed(reference, draw, first, enough, most, squares)
    # The reference rounds on a GPU as the precision says.
    name = oracle, enough, most, torch.backends.cuda.matmul.fp32_precision
    found = _known.get(name)
    if found is None or not _same(found.draws[0], first):
        found = _computed(reference, draw, first, enough, most, squares)
        _known.keep(name, found, found.bytes)
    return found


def _same(arguments: Arguments, others: Arguments) -> bool:
    """Bit for bit, on one device and in one layout, which may change what PyTorch rounds."""

    def described(tensor: Tensor | None) -> tuple | None:
        return None if tensor is None else (tensor.dtype, tensor.device, tensor.shape, tensor.stride())

    if [*map(described, arguments)] != [*map(described, others)]:
        return False
    pairs = zip(arguments, others, strict=True)
    return all(one is None or other is None or one.equal(other) for one, other in pairs)


def _versions(draws: Iterable[Arguments]) -> list[int]:
    return [t._version for arguments in draws for t in arguments if t is not None]


def _is_expanded(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _computed(
    reference: Function,
    draw: Callable[[int], Arguments],
    first: Arguments,
    enough: int,
    most: int,
    squares: Function | None,
) -> Expected:
    rivals = [[t.detach() for t in reference(*_detached(first))]]
    shapes = [t.shape for t in rivals[0]]
    tensors = [t for t in first if t is not None]
    count = 1
    if rivals[0][0].dtype != torch.float64:
        least = min((t.numel() for t in rivals[0] if t.numel()), default=enough)
        count = max(-(-enough // least), REPEATED if any(map(_is_expanded, tensors)) else 1)
        count = min(count, most)
    draws = [_detached(first), *(_detached(draw(seed)) for seed in range(1, count))]
    rivals += [[t.detach() for t in reference(*arguments)] for arguments in draws[1:]]
    pooled = [_flat(results) for results in zip(*rivals, strict=True)]
    if tensors[0].dtype == torch.float64:  # has a limit of its own, which asks neither of the others
        exact = squared = pooled
    else:
        largest = max(t.numel() for t in (*tensors, *rivals[0]))
        exact, squared = _in_float64(reference, squares, draws, STACKED_ELEMENTS // max(largest, 1))
    has_infinities = cache(lambda: any(bool(t.isinf().any()) for t in sum(draws, []) if t is not None))
    bounds = [Bound(*three, has_infinities) for three in zip(exact, pooled, squared, strict=True)]
    kept = [*sum(draws, []), *(t for bound in bounds for t in vars(bound).values() if isinstance(t, Tensor))]
    return Expected(draws, _versions(draws), shapes, bounds, bytes_of(kept))


def _detached(arguments: Arguments) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in arguments]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _in_float64(
    reference: Function, squares: Function | None, draws: Draws, together: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The truth and S^2 of each result, over all draws; so many of them are evaluated ``together``."""
    of_stacks: Function = getattr(reference, "stacked", reference)
    together = together if of_stacks is not reference else 1
    truths, squared = [], []
    for start in range(0, len(draws), max(together, 1)):
        some = draws[start : start + max(together, 1)]
        if len(some) < 3:  # by themselves: torch.vmap costs more than it saves
            exact = [[None if t is None else t.double() for t in arguments] for arguments in some]
            truths += [reference(*arguments) for arguments in exact]
            squared += [squares(*a) if squares else reference(*_squares(a)) for a in exact]
            continue
        stacked = _stacked(some)
        if squares is not None:
            truths.append(of_stacks(*stacked))
            squared.append(mapped(squares)(*stacked))
            continue
        both = zip(stacked, _squares(stacked), strict=True)
        found = of_stacks(*(None if a is None or b is None else torch.cat([a, b]) for a, b in both))
        truths.append([t[: len(some)] for t in found])
        squared.append([t[len(some) :] for t in found])
    flat = ([_flat(results) for results in zip(*parts, strict=True)] for parts in (truths, squared))
    return next(flat), next(flat)


def _squares(arguments: Arguments) -> Arguments:
    return [None if t is None else t.square() for t in arguments]


def _stacked(draws: Draws) -> Arguments:
    return [
        None if some[0] is None else torch.stack([t for t in some if t is not None]).double()
        for some in zip(*draws, strict=True)
    ]


def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of each draw, of arguments that are stacks of draws."""

    def of_stacks(*arguments: Tensor | None) -> Any:
        dims = tuple(None if t is None else 0 for t in arguments)
        return torch.vmap(function, in_dims=dims)(*arguments)

    return of_stacks


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
