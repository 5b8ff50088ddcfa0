"""What a call of the dense interaction will do, as :func:`mi_kernels.explain` tells it.

The plan of the compiled kernels is made where it is used, in ``csrc/cpu/dispatch/plan.cpp``; this module asks
for it and says it in words. It is a pure function of shapes, dtype, instruction set and wanted gradients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mi_kernels.ops.interaction import portable
from mi_kernels.ops.interaction.costs import Cost
from mi_kernels.ops.interaction.shared import gradients_wanted
from mi_kernels.testing import counts
from mi_kernels.testing.samples import Shape

_WHY = {
    "width_inside": "products over x run inside the GEMM and its epilogue sums them over z: nothing of size"
    " B*Z*X or B*O*Z is made, and W is read as it lies",
    "context_inside": "x is short, so products over z run inside the GEMM and its epilogue sums them over x",
    "stream": "a few rows: W is read once, as it lies, against what is made of the rows a stretch at a time",
    "together": "one GEMM makes T = g W tile by tile and its epilogue takes both reductions, dx and dz",
    "separate": "few outputs: dx and dz have a GEMM each, which read W in the order it lies",
    "width_lanes": "the products g z are generated a block at a time and meet x in the vector lanes",
    "context_lanes": "x is shorter than z: the products g x are generated and meet z in the vector lanes",
    "linear": "without W the sum is a plain matrix product",
    "mma": "the products z x (or T = g W) are made a tile at a time on chip and meet the matrix instructions",
    "wgmma": "the products z x are made in registers, where Hopper's matrix instructions read them",
    "wgmma-exact": "as wgmma, but z meets what comes out of x W for one context: z x would overflow float16",
    "mma-tf32": "as mma, on float32 rounded to tf32 as torch.backends.cuda.matmul allows it",
    "mma-exact": "as mma, but z meets what comes out of x W for one context: z x would overflow float16",
    "mma-widened": "as mma, on products made in tf32, which is as precise as float16 and has a larger range",
    "fma": "as on the matrix instructions, with multiply-adds in the dtype itself",
    "chunked": "the generated operand z x (or T) is made a chunk at a time and met by one matmul",
    "einsum": "the formula term by term: the oracle, not meant to be fast",
}


@dataclass(frozen=True)
class Plan:
    """How an operation will run: printable, with one more plan for each gradient primitive wanted.

    Attributes:
        op: the operation, ``forward``, ``input_grads`` or ``weight_grads``.
        backend: the backend that runs it.
        algorithm: the form chosen by the planner.
        operations: multiplications and additions of the contraction.
        bytes: inputs read once and results written once.
        scratch: bytes allocated beyond the results at the present number of threads, copies of broadcast
            inputs included (these live until the backward pass); of the portable backend its largest chunk
            alone, and None if not known.
        why: the reason, in one sentence.
        backward: the plans of the gradients that the arguments ask for.
        alternatives: where x and z do not have the same leading dimensions, what each plan costs with all
            gradients wanted, the chosen one included (costs.py).
        calls: of a module that makes several calls, their plans.
    """

    op: str
    backend: str
    algorithm: str
    operations: int
    bytes: int
    scratch: int | None
    why: str
    backward: "tuple[Plan, ...]" = ()
    alternatives: tuple[Cost, ...] = ()
    calls: "tuple[Plan, ...]" = ()

    def __str__(self) -> str:
        scratch = "unknown" if self.scratch is None else f"{self.scratch:,} bytes"
        lines = [
            f"{self.op}: {self.algorithm} on the {self.backend} backend",
            f"  operations {self.operations:,}, ideal traffic {self.bytes:,} bytes, scratch {scratch}",
            f"  why: {self.why}",
            *(f"  plan {cost}" for cost in self.alternatives),
        ]
        return "\n".join(lines + [str(plan) for plan in (*self.backward, *self.calls)])


def plan(backend: str, x: Tensor, z: Tensor, weights: Sequence[Tensor | None]) -> Plan:
    """The plan of checked arguments x, z and (W, U, V, c) on ``backend``, every row by itself."""
    out = portable.out_features(*weights)
    shape = Shape("call", tuple(x.shape[:-1]), z.shape[-1], x.shape[-1], out, tuple(z.shape[:-1]))
    present = tuple(weight is not None for weight in weights)
    wanted = gradients_wanted((x, z, *weights))
    backward = []
    if backend == "cuda":
        weight_aligned = aligned(_read(weights[0]))
        others_aligned = all(aligned(t) for t in (x, z, *weights[1:3]))
        how: tuple[bool, ...] = (not (weight_aligned and others_aligned), not weight_aligned)
    else:
        how = (*lies(weights[1]), *lies(weights[2]))
    if any(wanted[:2]):
        backward.append(_step("input_grads", backend, shape, x, present, wanted, how))
    if any(wanted[2:]):
        backward.append(_step("weight_grads", backend, shape, x, tuple(wanted[2:]), wanted))
    forward = _step("forward", backend, shape, x, present, wanted, how)
    if forward.scratch is not None:
        weight_copy = _weight_copy(backend, weights[0])
        rows = sum(_broadcast_copy(tensor, shape.lead) for tensor in (x, z))
        forward = replace(forward, scratch=forward.scratch + rows + weight_copy)
        backward = [
            replace(step, scratch=(step.scratch or 0) + weight_copy) if step.op == "input_grads" else step
            for step in backward
        ]
    return replace(forward, backward=tuple(backward))


def lies(matrix: Tensor | None) -> tuple[bool, bool]:
    """Whether a matrix [..., O, K] is contiguous along the sum, and along its outputs."""
    return (False, False) if matrix is None else (matrix.stride(-1) == 1, matrix.stride(-2) == 1)


def _read(weight: Tensor | None) -> Tensor | None:
    """W if the kernels read it where it lies."""
    return weight if weight is not None and weight.is_contiguous() else None


def aligned(tensor: Tensor | None) -> bool:
    """Whether CUDA kernels can bring a tensor to shared memory by whole chunks, so far as it is there."""
    return tensor is None or cuda("cuda_aligned")(tensor)


def cuda(question: str) -> Callable[..., Any]:
    """A question to the CUDA library."""
    return getattr(torch.ops.mi_kernels, question)


def gpu(device: torch.device) -> tuple[int, int]:
    """Architecture and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _broadcast_copy(tensor: Tensor, lead: torch.Size) -> int:
    """Bytes of the copy that spreads x or z over all rows, where no view can."""
    expanded = tensor.expand(*lead, tensor.shape[-1])
    try:
        expanded.view(math.prod(lead), tensor.shape[-1])
    except RuntimeError:
        return expanded.numel() * expanded.element_size()
    return 0


def _weight_copy(backend: str, weight: Tensor | None) -> int:
    """Bytes of the contiguous copy of W that the compiled kernels make of another layout."""
    if backend not in ("cpu", "cuda") or weight is None or weight.is_contiguous():
        return 0
    return weight.numel() * weight.element_size()


def _step(
    primitive: str,
    backend: str,
    shape: Shape,
    like: Tensor,
    terms: tuple[bool, ...],
    wanted: Sequence[bool],
    how: tuple[bool, ...] = (),
) -> Plan:
    dtype = like.dtype
    count = getattr(counts, primitive)(shape, dtype, terms)
    scratch: int | None = None
    if backend == "reference":
        algorithm = "einsum"
    elif backend == "portable":
        algorithm = "chunked" if terms[0] else "linear"
        row_step, feature_step = portable.chunks(shape.rows, shape.context, shape.width)
        chunk = row_step * feature_step * shape.width
        scratch = chunk * portable.accumulation_dtype(dtype).itemsize if terms[0] else 0
    elif backend == "triton":
        algorithm, scratch, why = _on_triton(primitive, shape, like, terms, wanted)
        return Plan(primitive, backend, algorithm, count.operations, count.bytes, scratch, why)
    elif backend == "cuda":
        sizes = [1, shape.rows, shape.context, shape.width, shape.out]
        algorithm, scratch = on_gpu(primitive, sizes, like, (*terms, *wanted[:2], *how))
    else:
        sizes = [1, shape.rows, shape.context, shape.width, shape.out]
        algorithm, scratch = compiled(primitive, sizes, dtype, (*terms, *wanted[:2], *how))
    return Plan(primitive, backend, algorithm, count.operations, count.bytes, scratch, _WHY[algorithm])


def _on_triton(
    primitive: str, shape: Shape, like: Tensor, terms: tuple[bool, ...], wanted: Sequence[bool]
) -> tuple[str, int, str]:
    """Algorithm, scratch and reason of the Triton kernels, as if all operands were contiguous."""
    from mi_kernels.ops.interaction import triton as kernels  # needs the package triton
    from mi_kernels.ops.triton.plan import describe, record, without_data

    B, Z, X, O = shape.rows, shape.context, shape.width, shape.out  # noqa: E741
    rows = without_data((B, O), (B, X), (B, Z), dtype=like.dtype)
    sizes = [size if there else None for size, there in zip(shape.sizes()[2:], terms, strict=True)]
    weights = without_data(*sizes, dtype=like.dtype)
    kernel: Callable[..., Any]
    arguments: list[Any]
    if primitive == "forward":
        kernel, arguments = kernels.forward, [*rows[1:], *weights]
    elif primitive == "input_grads":
        kernel, arguments = kernels.input_grads, [*rows, *weights[:3], *wanted[:2]]
    else:
        kernel, arguments = kernels.weight_grads, [*rows, *terms]
    launches, scratch = record(kernel, arguments, like.device)
    return describe(launches)[0], scratch, describe(launches)[1]


def compiled(primitive: str, sizes: list[int], dtype: torch.dtype, flags: Sequence[bool]) -> tuple[str, int]:
    """Algorithm and bytes of scratch of a compiled kernel for sizes [G, B, Z, X, O]; flags: terms, wants, how
    U and V lie."""
    return answer(torch.ops.mi_kernels.cpu_interaction_plan(primitive, sizes, dtype, _bits(flags)))


def on_gpu(primitive: str, sizes: list[int], like: Tensor, flags: Sequence[bool]) -> tuple[str, int]:
    """The same of a CUDA kernel; flags: terms, wants, whether an operand is not aligned, and W."""
    ask = cuda("cuda_interaction_plan")
    return answer(ask(primitive, sizes, like.dtype, _bits(flags), *gpu(like.device)))


def _bits(flags: Sequence[bool]) -> int:
    return sum(bit << place for place, bit in enumerate(flags))


def answer(text: str) -> tuple[str, int]:
    fields = dict(field.split("=") for field in text.split(";"))
    return fields["algorithm"], int(fields["scratch"])
