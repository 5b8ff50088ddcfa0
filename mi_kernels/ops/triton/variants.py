"""Every kernel as it is really launched, for ahead-of-time compilation: no GPU is needed, nor a driver.

The launches are recorded from the operations themselves, on meta tensors, so that what is compiled here is
what runs there: the same constants, tiles, and specialisations of arguments.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from mi_kernels.ops import activations
from mi_kernels.ops.diagonal import triton as diagonal
from mi_kernels.ops.gated import triton as gated
from mi_kernels.ops.interaction import triton as interaction
from mi_kernels.ops.triton.launch import Launch, recording

# B, Z, X, O: powers of two, ragged ones, one output, one row.
SIZES = ((4096, 32, 256, 256), (1000, 17, 100, 75), (4096, 16, 64, 1), (1, 64, 1024, 1024))


def launches(capability: tuple[int, int], dtype: torch.dtype, old: bool | None = None) -> list[Launch]:
    """The distinct kernels of all primitives at ``SIZES`` with their heuristic or tabled tiles."""
    found: dict[str, Launch] = {}
    for sizes in SIZES:
        with recording(capability, *(() if old is None else (old,))) as recorded:
            _run(dtype, *sizes)
        for launch in recorded:
            found.setdefault(str(_specialised(launch, capability)[1:]), launch)
    return list(found.values())


def _run(dtype: torch.dtype, B: int, Z: int, X: int, O: int) -> None:  # noqa: E741
    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

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
        gated.gated_interaction(x, z, w, u, v, c, "sigmoid", keep)
        diagonal.diagonal(x, z, u, c, u, c, None, "sigmoid", 0.0, keep)
    diagonal.diagonal(x, z, u, c, u, c, None, "softmax", 1.0, True)
    if (B, Z, X, O) == SIZES[0]:
        for activation in activations.NAMES:
            gated.gated_interaction(x, z, w, None, None, c, activation, False)
            diagonal.diagonal(x, z, u, None, None, None, v, activation, 1.0, True)


def _specialised(launch: Launch, capability: tuple[int, int]) -> tuple[Any, ...]:
    backend = make_backend(GPUTarget("cuda", capability[0] * 10 + capability[1], 32))
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**launch.arguments, **launch.options)
    return kernel._pack_args(backend, options, bound, specialization, options)


def source(launch: Launch, capability: tuple[int, int]) -> tuple[ASTSource, dict[str, Any]]:
    """What ``triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)`` takes."""
    _, signature, constants, attributes = _specialised(launch, capability)
    return ASTSource(launch.kernel, signature, constants, attributes), dict(launch.options)
