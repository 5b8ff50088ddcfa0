"""The planners of all backends, for :func:`mi_kernels.explain`.

The compiled libraries report the plans that they execute (``csrc/cpu`` and ``csrc/cuda``); those of Triton
are recorded from its launches on meta tensors. This module queries them and adds the reason in one sentence.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops.backend import Answer, DenseCall, DualCall, GateCall, Planner
from .ops.dtypes import accumulation_dtype
from .ops.dual_linear import portable as dual_portable
from .ops.interaction import memory_order, portable
from .ops.interaction.plan_shared import major
from .ops.namespace import OPS

_WHY = {
    "width_inside": "the GEMM sums over x and its epilogue over z: nothing of size B*Z*X or B*O*Z is"
    " materialised, and W is read where it lies",
    "context_inside": "x is short, so the GEMM sums over z and its epilogue over x",
    "stream": "few rows: W is streamed once; the products z x are generated range by range",
    "fused": "one GEMM computes T = g W tile by tile and its epilogue reduces it to dx and dz",
    "split": "few outputs: dx and dz are separate GEMMs, which read W in its memory order",
    "width_lanes": "the products g z are generated block by block and multiplied by x along the vector lanes",
    "context_lanes": "x is shorter than z: the products g x are generated and multiplied by z, likewise",
    "outer": "few rows: dW is written once, each of its rows as a sum of outer products of g, z and x",
    "materialised": "W's rows are short, or the rows are few: z x (or T = g W), no larger than the largest of"
    " inputs, outputs and weights, is an operand in memory, and the sum a plain matrix product",
    "linear": "without W the sum is a plain matrix product",
    "mma": "the products z x (or T = g W) are generated on chip, tile by tile, for the matrix instructions",
    "wgmma": "the products z x are generated in registers, from which Hopper's matrix instructions read them",
    "wgmma-exact": "as wgmma, but x W of each context feature is scaled by z: z x could overflow float16",
    "mma-tf32": "as mma, on float32 rounded to tf32, which torch.backends.cuda.matmul allows",
    "mma-exact": "as mma, but x W of each context feature is scaled by z: z x could overflow float16",
    "mma-widened": "as mma, on products in tf32, which is as precise as float16 and has a larger range",
    "fma": "as mma, with multiply-adds in the dtype itself instead of matrix instructions",
    "one_pass": "both products are summed tile by tile, and multiplied while the tiles are in cache",
    "blocks": "both products are computed for a block of rows at a time, and multiplied from the cache",
    "chunked": "the generated operand z x (or T) is computed in chunks, one matmul each",
    "einsum": "the formula term by term: the oracle, not meant to be fast",
}


def query(name: str) -> Callable[..., Any]:
    """An operation by which a compiled library describes itself or its plans."""
    return getattr(OPS, name)


def fields(text: str) -> dict[str, str]:
    """The result of such a query, "name=value;...", parsed."""
    return dict(field.split("=") for field in text.split(";"))


def _answer(text: str) -> Answer:
    found = fields(text)
    why = _WHY.get(found["algorithm"], "")
    if found.get("lanes") == "outputs":
        why += "; the outputs, contiguous in W, are in the vector lanes"
    if found.get("exchanged") == "1":
        why = f"as W is more contiguous along z, x and z change places; then {why}"
    if copied := int(found.get("copied", "0")):
        order = "[O, X, Z]" if found["exchanged"] == "1" else "[O, Z, X]"
        why = f"W, in a memory order unsuited to the kernel, is copied to {order} ({copied} bytes); {why}"
    return Answer(found["algorithm"], int(found["scratch"]), why)


def strides(weight: Tensor | None) -> tuple[int, ...]:
    """The strides of W [O, Z, X] for a plan query, none where it is contiguous."""
    return () if weight is None or weight.is_contiguous() else weight.stride()


def bits(flags: Sequence[bool]) -> int:
    return sum(bit << index for index, bit in enumerate(flags))


class Reference(Planner):
    def dense(self, call: DenseCall) -> Answer:
        return Answer("einsum", None, _WHY["einsum"])

    def dual_linear(self, call: DualCall) -> Answer:
        return Answer("einsum", None, _WHY["einsum"])


class Portable(Planner):
    def dense(self, call: DenseCall) -> Answer:
        if not call.terms[0]:
            return Answer("linear", 0, _WHY["linear"])
        rows, context, width, _ = call.sizes
        row_step, feature_step = portable.chunks(rows, context, width)
        scratch = row_step * feature_step * width * accumulation_dtype(call.x.dtype).itemsize
        return Answer("chunked", scratch, _WHY["chunked"])

    def dual_linear(self, call: DualCall) -> Answer:
        features = call.out * call.ranks
        rows = call.rows if call.keep else dual_portable.chunk_rows(call.rows, features)
        return Answer("blocks", 2 * rows * features * call.dtype.itemsize, _WHY["blocks"])


class Compiled(Planner):
    """The CPU library; base of the CUDA library."""

    gate = "gate in the epilogue"
    ragged = True

    def dense(self, call: DenseCall) -> Answer:
        flags = () if call.primitive == "weight_grads" else self._flags(call)
        sizes = [1, *call.sizes, *strides(call.weights[0])]
        return self._ask(call.primitive, sizes, call.x, (*call.terms, *call.wanted[:2], *flags))

    def _flags(self, call: DenseCall) -> tuple[bool, ...]:
        """The memory order of the matrices U and V."""
        return *major(call.weights[1]), *major(call.weights[2])

    def _ask(self, primitive: str, sizes: list[int], like: Tensor, flags: Sequence[bool]) -> Answer:
        return _answer(query("cpu_interaction_plan")(primitive, sizes, like.dtype, bits(flags)))

    def gate_scratch(self, call: GateCall) -> int:
        softmax = call.activation == "softmax"
        sizes = [call.rows, call.context, call.x.shape[-1], *strides(call.weight)]
        scratch = self._ask_gate(sizes, call.x, bits(self._gate_flags(call)), softmax).scratch
        assert scratch is not None
        return scratch

    def _gate_flags(self, call: GateCall) -> tuple[bool, ...]:
        return call.terms

    def _ask_gate(self, sizes: list[int], like: Tensor, terms: int, softmax: bool) -> Answer:
        return _answer(query("cpu_gate_plan")(sizes, like.dtype, terms, softmax))

    def dual_linear(self, call: DualCall) -> Answer:
        sizes = [call.rows, *call.widths, call.out, call.ranks]
        return _answer(query("cpu_dual_linear_plan")(sizes, call.dtype, call.k_major, call.keep))

    def linear_scratch(self, dtype, groups, rows, features, out, bias, major=(True, False)):
        flags = (False, False, True, bias, False, False, False, False, *major)
        sizes = [groups, rows, 0, features, out]
        return _answer(query("cpu_interaction_plan")("forward", sizes, dtype, bits(flags))).scratch


class Cuda(Compiled):
    ragged = False

    def dense(self, call: DenseCall) -> Answer:
        order = memory_order.order(call.weights[0])
        if call.primitive != "weight_grads" or not call.terms[0] or order == memory_order.CONTIGUOUS:
            return super().dense(call)
        # dW has the order of W (autograd.py): a call of its own, with the factors in that order.
        rows, context, width, out = call.sizes
        outer, middle, inner = ((out, context, width)[axis] for axis in order)
        found = super().dense(
            call._replace(sizes=(rows, middle, inner, outer), terms=(True, False, False, False))
        )
        rest = super().dense(call._replace(terms=(False, *call.terms[1:])))
        return found._replace(scratch=max(found.scratch or 0, rest.scratch or 0))

    def _flags(self, call: DenseCall) -> tuple[bool, ...]:
        """Whether an operand besides W cannot be copied to shared memory in whole chunks; where W begins."""
        others = call.x, call.z, *call.weights[1:3]
        return not all(aligned(t) for t in others), not begins_aligned(call.weights[0])

    def _gate_flags(self, call: GateCall) -> tuple[bool, ...]:
        return *call.terms, not begins_aligned(call.weight)

    def _ask(self, primitive: str, sizes: list[int], like: Tensor, flags: Sequence[bool]) -> Answer:
        plan = query("cuda_interaction_plan")
        return _answer(plan(primitive, sizes, like.dtype, bits(flags), *gpu(like.device)))

    def _ask_gate(self, sizes: list[int], like: Tensor, terms: int, softmax: bool) -> Answer:
        return _answer(query("cuda_gate_plan")(sizes, like.dtype, terms, softmax, *gpu(like.device)))

    def gate_algorithm(self, activation: str) -> str:
        return _rows_after_tiles(activation) or self.gate

    def dual_linear(self, call: DualCall) -> Answer:
        return Planner.dual_linear(self, call)

    def linear_scratch(self, dtype, groups, rows, features, out, bias, major=(True, False)):
        return None


def _rows_after_tiles(activation: str) -> str | None:
    return "rows after the tiles" if activation == "softmax" else None


def aligned(tensor: Tensor | None) -> bool:
    """Whether CUDA kernels can copy a tensor to shared memory in whole chunks; None counts as aligned."""
    return tensor is None or query("cuda_aligned")(tensor)


def begins_aligned(weight: Tensor | None) -> bool:
    """Whether W [O, Z, X] begins at a multiple of 16 bytes; the library looks at its strides itself."""
    return weight is None or aligned(weight[:1, :1, :1])


def gpu(device: torch.device) -> tuple[int, int]:
    """Architecture and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


class Triton(Planner):
    gate = "gate in the epilogue"

    def dense(self, call: DenseCall) -> Answer:
        """The plan with all operands contiguous."""
        from .ops.triton import interaction as kernels  # imports triton
        from .ops.triton.plan import describe, record, without_data

        B, Z, X, O = call.sizes  # noqa: E741
        dtype = call.x.dtype
        rows = without_data((B, O), (B, X), (B, Z), dtype=dtype)
        sizes = ((O, Z, X), (O, Z), (O, X), (O,))
        present = (size if there else None for size, there in zip(sizes, call.terms, strict=True))
        weights = without_data(*present, dtype=dtype)
        kernel: Callable[..., Any] = getattr(kernels, call.primitive)
        arguments: list[Any] = [*rows, *call.terms]
        if call.primitive == "forward":
            arguments = [*rows[1:], *weights]
        elif call.primitive == "input_grads":
            arguments = [*rows, *weights[:3], *call.wanted[:2]]
        launches, scratch = record(kernel, arguments, call.x.device)
        algorithm, why = describe(launches)
        return Answer(algorithm, scratch, why)

    def gate_algorithm(self, activation: str) -> str:
        return _rows_after_tiles(activation) or self.gate

    def gate_scratch(self, call: GateCall) -> int:
        from .ops.triton.host import GateEpilogue, gated
        from .ops.triton.plan import record, without_data

        width, context, dtype = call.x.shape[-1], call.context, call.x.dtype
        x, z = without_data((call.rows, width), (call.rows, context), dtype=dtype)
        sizes = ((width, context, width), (width, context), (width, width), (width,), (width, context))
        present = (size if there else None for size, there in zip(sizes, call.terms, strict=True))
        weight, weight_z, weight_x, shift_bias, shift_weight = without_data(*present, dtype=dtype)
        assert x is not None
        gate = GateEpilogue(call.activation, 0.0, x, shift_weight, shift_bias, False)
        return record(gated, (gate, z, weight, weight_z, weight_x, None), call.x.device)[1]
