"""All kernel variants that are actually launched, for ahead-of-time compilation without GPU or driver.

The launches are recorded from the operations themselves, on meta tensors, so that what is compiled here is
what runs there: the same constants, tiles, and specialisations of arguments.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from mi_kernels.ops import activations
from mi_kernels.ops.dual_linear import autograd as dual_rule
from mi_kernels.ops.gate import autograd as gate_rule
from mi_kernels.ops.interaction import autograd as interaction_rule
from mi_kernels.ops.modulate import autograd as modulation_rule
from mi_kernels.ops.norm import autograd as norm_rule
from mi_kernels.ops.recurrent.forms import DENSE as DENSE_FORM
from mi_kernels.ops.recurrent.forms import FACTORED, KINDS, LSTM
from mi_kernels.ops.triton import dual_linear as dual
from mi_kernels.ops.triton import gate, interaction, norm, recurrent
from mi_kernels.ops.triton import modulate as modulation
from mi_kernels.ops.triton.launch import Launch, recording
from mi_kernels.testing.without_data import WithoutData

# B, Z, X, O: powers of two, odd sizes, one output, one row, the largest tiles.
SIZES = (
    *((4096, 32, 256, 256), (1000, 17, 100, 75), (4096, 16, 64, 1), (1, 64, 1024, 1024)),
    (32768, 32, 512, 512),
)
# The same for the dense interaction alone, and which element of a row of memory is the first of an operand.
# Multiples of 8 or 4, which Triton takes for odd numbers: all, some, only Z and O; and operands off 16 bytes.
DENSE = (
    (4096, 40, 264, 264, 0),
    (4096, 32, 200, 256, 0),
    (4096, 24, 256, 300, 0),
    (4096, 32, 256, 256, 1),
)


def launches(
    capability: tuple[int, int], dtype: torch.dtype, old: bool | None = None, short: bool = False
) -> list[Launch]:
    """The distinct kernels of all operations at ``SIZES`` with their heuristic or tabled tiles.

    ``short``: at the first of them, with one activation, and modulation and norm with all of their
    results; the first of ``DENSE``.
    """
    found: dict[str, Launch] = {}
    for sizes in SIZES[:1] if short else SIZES:
        names = activations.NAMES if sizes == SIZES[0] and not short else ("sigmoid",)
        with recording(capability, *(() if old is None else (old,))) as recorded:
            _run(dtype, names, *sizes)
            _run_dual_linear(dtype, names, *sizes)
            if sizes in SIZES[:2]:
                _run_modulation(dtype, names, sizes[0], sizes[2], short)
                _run_norm(dtype, names, sizes[0], sizes[2], short)
        found |= distinct(recorded, capability)
    with recording(capability, *(() if old is None else (old,))) as recorded:
        _run_recurrent(dtype, short)
    found |= distinct(recorded, capability)
    for *rows_and_features, first in DENSE[:1] if short else DENSE:
        with recording(capability, *(() if old is None else (old,))) as recorded:
            _run_dense(dtype, first, not short and first == 1, *rows_and_features)
        found |= distinct(recorded, capability)
    return list(found.values())


def distinct(recorded: Iterable[Launch], capability: tuple[int, int]) -> dict[str, Launch]:
    """One launch per distinct Triton compilation."""
    found: dict[str, Launch] = {}
    for launch in recorded:
        options, *rest = _specialised(launch, capability)
        key = (launch.kernel.__name__, options.num_warps, options.num_stages, *rest)
        found.setdefault(str(key), launch)
    return found


def _modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return modulation_rule.modulate("triton", x, scale, shift, "sigmoid", 1.0)


def _norm_block(*tensors: torch.Tensor) -> torch.Tensor:
    """Of tokens; both results, so that both have gradients."""
    y, x_new = norm_rule.norm_modulate("triton", *tensors, 2, 1, True, 1e-5, "identity", 1.0)
    return y + x_new


def first_calls(
    capability: tuple[int, int], dtype: torch.dtype, sizes: tuple[int, int, int, int] = SIZES[0]
) -> dict[str, dict[str, Launch]]:
    """The kernels that the first forward and backward pass of each operation compiles, with all terms."""
    B, Z, X, O = sizes  # noqa: E741

    def empty(*shape: int) -> torch.Tensor:
        return _empty(dtype, *shape).requires_grad_()

    def dense(outputs: int) -> tuple[torch.Tensor, ...]:
        return empty(outputs, Z, X), empty(outputs, Z), empty(outputs, X), empty(outputs)

    rows = empty(B, X), empty(B, Z)
    modulated = empty(B, 16, X), empty(B, 1, X), empty(B, 1, X)
    context, affine = empty(B, 1, X), empty(1, 1, X)
    block = modulated[0], empty(B, 16, X), context, context, context, affine, affine
    diagonal_weights = None, empty(X, Z), None, empty(X), empty(X, Z), empty(X)
    calls: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor | None, ...]]] = {
        "interaction": (partial(interaction_rule.forward, "triton"), (*rows, *dense(O))),
        "diagonal": (partial(gate_rule.gate, "triton", "sigmoid", 1.0), (*rows, *diagonal_weights)),
        "gated_interaction": (
            partial(gate_rule.gate, "triton", "sigmoid", 0.0),
            (*rows, *dense(X), None, None),
        ),
        "dual_linear": (
            partial(dual_rule.dual_linear, "triton", "silu", "identity", 1),
            (rows[0], None, empty(2 * O, X), None, empty(2 * O), None),
        ),
        "modulate": (_modulate, modulated),
        "norm": (_norm_block, block),
    }
    found = {}
    for name, (call, arguments) in calls.items():
        with recording(capability) as recorded, WithoutData():
            y = call(*arguments)
            torch.autograd.grad(y, [t for t in arguments if t is not None], torch.empty_like(y))
        found[name] = distinct(recorded, capability)
    with recording(capability) as recorded:
        _recurrent(dtype, "mlstm", (3, B, X, Z, X))
    found["recurrent"] = distinct(recorded, capability)
    return found


def _empty(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _run(dtype: torch.dtype, names: tuple[str, ...], B: int, Z: int, X: int, O: int) -> None:  # noqa: E741
    empty = partial(_empty, dtype)
    x, z, grad = empty(B, X), empty(B, Z), empty(B, O)
    w, u, v, c = empty(O, Z, X), empty(O, Z), empty(O, X), empty(O)
    interaction.forward(x, z, w, u, v, c)
    interaction.forward(x, z, w, None, None, None)
    interaction.forward(x, z, None, None, v, c)
    interaction.forward(z.expand(O, B, Z), x.expand(O, B, X), None, None, w.mT, v)
    for want in ((True, True), (True, False), (False, True)):
        interaction.input_grads(grad, x, z, w, u, v, *want)
        interaction.input_grads(grad, x, z, w, None, None, *want)
        interaction.input_grads(grad, x, z, None, u, v, *want)
    interaction.weight_grads(grad, x, z, True, True, True, True)
    w, u, v, c = empty(X, Z, X), empty(X, Z), empty(X, X), empty(X)
    for keep in (True, False):
        gate.gated_interaction(x, z, w, u, v, c, "sigmoid", keep)
        gate.diagonal(x, z, u, c, u, c, None, "sigmoid", 0.0, keep)
    gate.diagonal(x, z, u, c, u, c, None, "softmax", 1.0, True)
    for activation in names:
        gate.gated_interaction(x, z, w, None, None, c, activation, False)
        gate.diagonal(x, z, u, None, None, None, v, activation, 1.0, True)


def _run_dual_linear(dtype: torch.dtype, names: tuple[str, ...], B: int, Z: int, X: int, O: int) -> None:  # noqa: E741
    """Gated linear units, then factorised forms of one rank and of several."""
    empty = partial(_empty, dtype)
    x, z = empty(B, X), empty(B, Z)
    for name in names:
        if name != "softmax":
            v, c, p = empty(O, X), empty(O), empty(B, O)
            dual.dual_linear(x, None, v, v, c, c, name, "identity", 1, True)
            dual.dual_linear(x, None, v, v, None, None, name, "identity", 1, False)
            dual.dual_linear_grads(p, p, p, name, "identity", 1)
    for ranks in (1, 3):
        v, u, c, p = empty(ranks * O, X), empty(ranks * O, Z), empty(ranks * O), empty(B, ranks * O)
        for keep in (True, False):
            dual.dual_linear(x, z, v, u, c, c, "tanh", "tanh", ranks, keep)
        dual.dual_linear(x, z, v, u, None, None, "identity", "identity", ranks, True)
        dual.dual_linear(x, None, v, v, None, None, "identity", "identity", ranks, True)
        dual.dual_linear_grads(empty(B, O), p, p, "tanh", "identity", ranks)


def _run_dense(dtype: torch.dtype, first: int, terms: bool, *sizes: int) -> None:
    B, Z, X, O = sizes  # noqa: E741

    def empty(*shape: int) -> torch.Tensor:
        rows = _empty(dtype, *shape[:-1], shape[-1] + 16 * first)
        return rows[..., first : first + shape[-1]]

    x, z, grad, w = empty(B, X), empty(B, Z), empty(B, O), empty(O, Z, X)
    u, v = (empty(O, Z), empty(O, X)) if terms else (None, None)
    interaction.forward(x, z, w, u, v, None)
    interaction.input_grads(grad, x, z, w, u, v, True, True)
    interaction.weight_grads(grad, x, z, True, terms, False, False)


def _run_modulation(dtype: torch.dtype, names: tuple[str, ...], rows: int, width: int, short: bool) -> None:
    """Tokens, maps in both memory formats, one scale for each row, each feature, each element."""
    samples, tokens = 16, -(-rows // 16)
    maps = _empty(dtype, samples, width, tokens, 4)
    last = maps.contiguous(memory_format=torch.channels_last)
    matrix = _empty(dtype, rows, width)
    for x, sizes in (
        (matrix, (rows, width)),
        (matrix, (rows, 1)),
        (matrix, (1, width)),
        (_empty(dtype, samples, tokens, width), (samples, 1, width)),
        *((x, (samples, width, 1, 1)) for x in (maps, last)),
        (maps, (1, width, 1, 1)),
    ):
        scale = _empty(dtype, *sizes)
        for name in names if sizes == (rows, width) else ("sigmoid",):
            if name != "softmax":
                modulation.modulate(x, scale, scale, name, 1.0)
                modulation.modulate_grads(x, x, scale, list(sizes), name, 1.0, True, True, True)
                modulation.mix(x, x, scale, name)
                modulation.mix_grads(x, x, x, scale, name, True, True, True)
        if short:
            continue
        modulation.modulate(x, scale, None, "identity", 0.0)
        for want in ((True, False, False), (False, True, False), (False, False, True)):
            modulation.modulate_grads(x, x, scale, list(sizes), "identity", 0.0, *want)
            modulation.mix_grads(x, x, x, scale, "identity", *want)


def _run_norm(dtype: torch.dtype, names: tuple[str, ...], rows: int, width: int, short: bool) -> None:
    """Tokens with contexts of a sample and of a token, longer rows, maps that are a tile and larger ones in
    both memory formats; ``short``: half of them."""
    samples, tokens, groups = 16, -(-rows // 16), 4
    small, large = _empty(dtype, samples, width, 5, 7), _empty(dtype, samples, width, tokens, 4)
    cases = (
        (_empty(dtype, samples, tokens, width), (samples, 1, width), 2, 1),
        (_empty(dtype, samples, tokens, width), (samples, tokens, width), 2, 1),
        (_empty(dtype, rows, 4 * width), (1, 4 * width), 1, 1),
        (_empty(dtype, rows, 16 * width), (1, 16 * width), 1, 1),
        (_empty(dtype, rows, 48 * width), (rows, 48 * width), 1, 1),
        *(
            (x.contiguous(memory_format=memory_format), (samples, width, 1, 1), 1, groups)
            for x in (small, large)
            for memory_format in (torch.contiguous_format, torch.channels_last)
        ),
    )
    for x, size, dim, parts in cases[::2] if short else cases:
        for name in names if x.shape[0] == samples and size[1] == 1 else ("identity",):
            if name != "softmax":
                for center in (True,) if short else (True, False):
                    _norm(x, size, dim, parts, center, name, True)
        if not short:
            _norm(x, size, dim, parts, True, "identity", False)


def _norm(
    x: torch.Tensor, size: tuple[int, ...], dim: int, groups: int, center: bool, name: str, full: bool
) -> None:
    """Forward and backward, with all operands and results or with scale and shift alone."""
    context = _empty(x.dtype, *size)
    affine = _empty(x.dtype, *(x.shape[dim] if d == dim else 1 for d in range(x.dim())))
    weights = (affine, affine) if full else (None, None)
    rule = dim, groups, center
    residual = (x, context) if full else (None, None)
    _, _, mean, rstd = norm.norm_modulate(x, *residual, context, context, *weights, *rule, 1e-5, name, 1.0)
    given = (x, x, x if full else None, *residual, context, context, *weights, mean if center else None, rstd)
    norm.norm_modulate_grads(*given, *rule, name, 1.0, True, full, full, True, True, full, full)


def _run_recurrent(dtype: torch.dtype, short: bool) -> None:
    """Every kind with a step a launch and with all steps in one, and states with an output projection;
    ``short``: some of them, without tangents."""
    for kind, form in KINDS.items():
        if not (short and kind in ("mrnn", "mi_rnn")):
            _recurrent(dtype, kind, (3, 512, 256, 64, 256), tangents=not short)
        if not (short and kind in ("mrnn", "mi_rnn", "mi_lstm")):
            _recurrent(dtype, kind, (3, 512, 16, 16, 16), tangents=not short)
        if not short:
            for sizes in ((3, 1, 1024, 512, 1024), (3, 40, 32, 32, 32), (3, 100, 75, 17, 75)):
                _recurrent(dtype, kind, sizes, tangents=True)
            if form.cell == LSTM:
                for sizes in ((3, 512, 256, 64, 96), (3, 512, 32, 32, 16)):
                    _recurrent(dtype, kind, sizes, tangents=True, reverse=True, unequal=True)


def _recurrent(
    dtype: torch.dtype,
    kind: str,
    sizes: tuple[int, int, int, int, int],
    *,
    tangents: bool = False,
    reverse: bool = False,
    unequal: bool = False,
) -> None:
    """Forward and backward of sizes T, B, H, factors and features of the state, and tangents."""
    T, B, H, M, P = sizes
    empty, form = partial(_empty, dtype), KINDS[kind]
    N, lstm = form.gates * H, form.cell == LSTM
    factored, dense = form.structure == FACTORED, form.structure == DENSE_FORM
    factors_x = empty(T, B, M) if factored or dense else None
    inputs = empty(T, B, N), factors_x, empty(B, P), empty(B, H) if lstm else None
    weights = (
        None if factored and P == H else empty(N, P),
        empty(N, M) if factored else None,
        empty(M, P) if factored else None,
        empty(H, P, M) if dense else None,
        empty(P, H) if P != H else None,
        None if factored or dense else empty(4, N),
    )
    rule = _empty(torch.int64, B) if unequal else None, kind, "tanh", reverse
    out, h_n, c_n, gates, products, cells, _ = recurrent.recurrent(*inputs, *weights, *rule, True)
    kept = gates if lstm and factored else None, None if dense else products, cells if lstm else None
    saved = *inputs, out, *kept, *weights, *rule
    recurrent.recurrent_grads(out, h_n, c_n if lstm else None, *saved)
    if tangents:
        out_t = out if P != H else None
        factors_t = factors_x if factored else None
        recurrent.recurrent_tangents(inputs[0], factors_t, kept[1], out_t, *inputs[2:], *saved)


@cache
def _binder(kernel: Any, capability: tuple[int, int]) -> tuple[Any, Any]:
    """Triton's function that sorts the arguments of a launch; it is generated code, so cached."""
    backend = make_backend(GPUTarget("cuda", capability[0] * 10 + capability[1], 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _specialised(launch: Launch, capability: tuple[int, int]) -> tuple[Any, ...]:
    kernel, (backend, binder) = launch.kernel, _binder(launch.kernel, capability)
    bound, specialization, options = binder(**launch.arguments, **launch.options)
    return kernel._pack_args(backend, options, bound, specialization, options)


def source(launch: Launch, capability: tuple[int, int]) -> tuple[ASTSource, dict[str, Any]]:
    """Arguments for ``triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)``."""
    _, signature, constants, attributes = _specialised(launch, capability)
    return ASTSource(launch.kernel, signature, constants, attributes), dict(launch.options)
