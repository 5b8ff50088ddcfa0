"""Plans of the biaffine form."""

from dataclasses import replace

from torch import Tensor

from .. import backend as backends
from ..plan import Plan
from ..rules import Maybe, gradients_wanted
from . import biaffine

OF_FIRST, OF_SECOND = "per_input1", "per_input2"


def plan(
    backend: str,
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Maybe,
    one2: bool,
    channels_first: bool,
) -> Plan:
    """The plan of checked arguments [B, L1, I1], [B, L2, I2], [O, I1 (+ 1), I2 (+ 1)] and [O]."""
    want1, want2, want_weight, want_bias = gradients_wanted((input1, input2, weight, bias))
    result = input1.shape[0] * input1.shape[1] * input2.shape[1] * weight.shape[0]
    by_first = biaffine.generates_first(backend, input1, input2, weight, one2, channels_first)
    how, which = (OF_FIRST, "first") if by_first else (OF_SECOND, "second")
    why = f"a layer W' is generated for each position of the {which} sequence and applied to the other one"
    if by_first:
        layers, generate, apply = biaffine.sizes(input2, input1, weight.mT)
        want_generated, want_applied = want1, want2
    else:
        layers, generate, apply = biaffine.sizes(input1, input2, weight)
        want_generated, want_applied = want2, want1
    if backends.get(backend).is_reference:
        how, why = "einsum", "the reference backend computes the formula as it stands"
    moved = sum(t.numel() for t in (input1, input2, weight, bias) if t is not None) + result + 2 * layers
    moved *= input1.element_size()

    def step(op: str, operations: int) -> Plan:
        return Plan(op, backend, how, operations, moved, None, why)

    backward = []
    if want1 or want2:
        operations = apply * (want_applied + want_generated) + generate * want_generated
        backward.append(step("input_grads", operations))
    if want_weight or want_bias:
        # The gradient of the layers is counted in the primitive that needs it first.
        operations = apply * (want_weight and not want_generated) + generate * want_weight
        backward.append(step("weight_grads", operations))
    return replace(step("forward", generate + apply), backward=tuple(backward))
