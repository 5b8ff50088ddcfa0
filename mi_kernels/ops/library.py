"""Definition of the operations: schemas, fakes and Python kernels, registered with the dispatcher.

Schemas are in Python, so that the package imports without a compiler; the compiled libraries only add kernels
for their dispatch keys. Each schema is defined three times: as ``<name>``, for which a compiled library may
register kernels; as ``<name>_portable``, always the pure-PyTorch implementation; and as ``<name>_triton``,
whose kernel is the function of the same name in ``ops/triton/<family>.py``, imported at its first call.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from . import backend as backends
from .autocast import dtype_in_force
from .checks import LIKE, Operands
from .compiling import is_transformed, opaque_while_compiling
from .dtypes import DTYPES, FLOATING
from .namespace import NAMESPACE, OPS
from .rules import is_distributed

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
F = TypeVar("F", bound=Callable[..., Any])
Results = Callable[[dict[str, Any]], Sequence[Any]]


class Axes(NamedTuple):
    """The axes of a result, and the products that it is a sum of, by the names of their factors.

    The last factor of a product is in no other product of the result. Without ``terms`` the result is no sum
    of products, but of what is computed along each of the ``cuts``.
    """

    letters: str
    terms: tuple[tuple[str, ...], ...] = ()


class Definition(NamedTuple):
    """What FLOP counters and DTensor need to know about an operation.

    ``flops(*shapes)``: floating-point operations of a call, from the shapes of its tensors (flops.py).
    ``axes``: those of each tensor, one letter a size, also of tensors that only sharding asks for.
    ``results(arguments)``: for each result its `Axes`, or None where it is not wanted; for an ``elementwise``
    operation its sizes instead. ``cuts(arguments)``: the axes along which a device may compute its part
    alone; of a result without such an axis, a term of its sum.
    """

    flops: Callable[..., int]
    axes: Mapping[str, str]
    results: Results
    cuts: Callable[[dict[str, Any]], str]
    groups: bool
    elementwise: bool
    module: str  # of its family: the kernels are in ops/<module>/portable.py and ops/triton/<module>.py
    function: str
    composed: bool  # whether its kernels are calls of other operations of the same backend


DEFINED: dict[str, Definition] = {}
# By family, the families whose kernels one of its calls runs, itself first.
FAMILIES: dict[str, tuple[str, ...]] = {}


def define_family(name: str, *others: str) -> None:
    """A family whose kernels are verified together; a call of it runs those of ``others`` too."""
    FAMILIES[name] = (name, *others)


def define(
    name: str,
    schema: str,
    portable: Callable,
    fake: Callable,
    axes: Mapping[str, str],
    more: Callable | None = None,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    groups: bool = False,
    composed: bool = False,
    more_axes: Mapping[str, str] | None = None,
    cuts: str | Callable[[dict[str, Any]], str] = "",
    flops: Callable[..., int],
    results: Results,
) -> None:
    """Define ``name``, ``name_portable`` and ``name_triton`` with one schema and one fake.

    ``axes`` and ``groups`` give the shapes of the tensors (checks.Operands), ``dtypes`` those of the portable
    kernel; ``more(*arguments)`` raises for other invalid arguments. These checks serve direct calls, as the
    public functions have checked already. The compiled kernels check in C++ (csrc/common/checks.h).
    ``composed``: ``portable(suffix)`` is a kernel that calls the operations with that suffix.
    ``flops``, ``results`` and ``cuts``: see :class:`Definition`; ``more_axes``: of tensors that
    ``more`` checks.
    """
    family = portable.__module__.split(".")[-2]
    alike = LIKE in axes.values()
    along = cuts if callable(cuts) else lambda _: cuts
    DEFINED[name] = Definition(
        flops,
        {**axes, **(more_axes or {})},
        results,
        along,
        groups,
        alike,
        family,
        portable.__name__,
        composed,
    )
    parsed = torch._C.parse_schema(f"{NAMESPACE}::{name}{schema}").arguments
    required = sum(argument.name in axes and str(argument.type) == "Tensor" for argument in parsed)
    operands = Operands(name, [argument.name for argument in parsed], axes, required, groups)

    # Mixed meta and real tensors dispatch to the fake too: unchecked, they would return uninitialised memory.
    def checked_fake(*arguments):
        operands.check(arguments, dtypes)
        if more is not None:
            more(*arguments)
        return fake(*arguments)

    if composed:
        kernels = {name + suffix: (portable(suffix), dtypes) for suffix in ("", "_portable", "_triton")}
    else:
        kernels = {
            name: (portable, dtypes),
            f"{name}_portable": (portable, dtypes),
            f"{name}_triton": (_triton_twin(portable), FLOATING),
        }
    for op, (kernel, taken) in kernels.items():
        LIBRARY.define(op + schema)
        LIBRARY.impl(op, _checked_kernel(kernel, operands, more, taken), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op}", checked_fake, lib=LIBRARY)


def _checked_kernel(
    kernel: Callable, operands: Operands, more: Callable | None, dtypes: Sequence[torch.dtype]
) -> Callable:
    """The kernel behind its argument checks, with autocast disabled."""
    known = frozenset(dtypes)

    # The caller has cast already; autocast must not cast the kernel's float32 intermediates.
    def checked(*arguments):
        if not operands.fit(arguments, known):
            operands.check(arguments, dtypes)
        if more is not None:
            more(*arguments)
        device = arguments[operands.first].device.type
        if dtype_in_force(device) is None:
            return kernel(*arguments)
        with torch.autocast(device, enabled=False):
            return kernel(*arguments)

    return checked


def _triton_twin(portable: Callable) -> Callable:
    family = portable.__module__.split(".")[-2]

    @functools.cache
    def kernel() -> Callable:
        return getattr(importlib.import_module(f".triton.{family}", __package__), portable.__name__)

    return lambda *arguments: kernel()(*arguments)


class _Overloads(dict[str, torch._ops.OpOverload]):
    """Overloads by backend, looked up on first use."""

    def __init__(self, operation: str) -> None:
        self._operation = operation

    def __missing__(self, backend: str) -> torch._ops.OpOverload:
        suffix = backends.get(backend).suffix
        if suffix is None:
            known = ", ".join(sorted(backends.suffixes()))
            raise ValueError(f"mi_kernels: backend: expected one of {known}, got {backend!r}")
        found = getattr(OPS, self._operation + suffix).default
        self[backend] = found
        return found


def overloads(name: str) -> dict[str, torch._ops.OpOverload]:
    """The overload of ``name`` by backend."""
    return _Overloads(name)


def twins(name: str) -> list[torch._ops.OpOverload]:
    """All distinct overloads of ``name``: one per suffix."""
    suffixes = dict.fromkeys(backends.suffixes().values())
    return [getattr(OPS, name + suffix).default for suffix in suffixes]


def _refuse_mixed(arguments: tuple[Any, ...]) -> None:
    """Raises if only some tensors are DTensors. Asked after an error: small calls have no time for it."""
    tensors = [one for one in arguments if isinstance(one, torch.Tensor) and one.is_floating_point()]
    if len({is_distributed(tensor) for tensor in tensors}) > 1:
        raise TypeError(
            "mi_kernels: expected DTensors for all tensors of a call or for none, got a torch.Tensor beside a"
            " DTensor: torch.distributed.tensor.distribute_tensor makes one"
        )


def traceable(name: str, schema: str, check: Callable[..., None] | None = None) -> Callable[[F], F]:
    """Makes a differentiable function of tensors one operation to Dynamo, torch.export and torch.jit.trace.

    The operation is composite: executing it, also in AOTAutograd and compilers, calls the function. So an
    exported program is differentiated by the same rules. Inside a transform of torch.func a composite
    operation is not possible (the rules re-enter the transform), so there Dynamo keeps an opaque call of the
    function. ``check(*arguments)`` raises for invalid arguments of direct calls that the operations called by
    the function do not check themselves.
    """

    def decorate(function: F) -> F:
        def checked(*arguments):
            if check is not None:
                check(*arguments)
            return function(*arguments)

        LIBRARY.define(name + schema)
        LIBRARY.impl(name, checked, "CompositeImplicitAutograd")
        operation = getattr(OPS, name).default
        opaque, admit = opaque_while_compiling(function)

        @functools.wraps(function)
        def call(*arguments):
            if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
                try:
                    return function(*arguments)
                except RuntimeError:
                    _refuse_mixed(arguments)
                    raise
            if not is_transformed():
                return operation(*arguments)
            admit()
            return opaque(*arguments)

        return call  # type: ignore[return-value]

    return decorate


# Queries of the compiled CPU library: its instruction sets as "compiled;supported;selected", and the plan
# of a primitive for sizes [G, B, Z, X, O], or of a gate for sizes [B, Z, X], as "name=value;...".
LIBRARY.define("cpu_isa() -> str")
LIBRARY.define("cpu_gate_plan(int[] sizes, ScalarType dtype, int terms, bool softmax) -> str")
LIBRARY.define("cpu_dual_linear_plan(int[] sizes, ScalarType dtype, bool k_major, bool keep) -> str")
LIBRARY.define("cpu_interaction_plan(str primitive, int[] sizes, ScalarType dtype, int terms) -> str")
# The same of the CUDA library, for a GPU of an architecture (80, 90, ...) with a number of multiprocessors.
LIBRARY.define(
    "cuda_interaction_plan(str primitive, int[] sizes, ScalarType dtype, int terms, int arch, int processors)"
    " -> str"
)
LIBRARY.define(
    "cuda_gate_plan(int[] sizes, ScalarType dtype, int terms, bool softmax, int arch, int processors) -> str"
)
# The architectures that the CUDA library was built for, as in "80 90a".
LIBRARY.define("cuda_architectures() -> str")
# Whether the rows of a tensor are contiguous and begin on 16-byte boundaries.
LIBRARY.define("cuda_aligned(Tensor tensor) -> bool")
