"""A call of every public function and of every form with a way of its own, for tests of what all share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mi_kernels as mi
from mi_kernels.testing.biaffine_samples import LABEL
from mi_kernels.testing.checks import call_dual
from mi_kernels.testing.dual_samples import GLU, LOW_RANK, MUTAN
from mi_kernels.testing.low_rank_weight_samples import GROUPS, SAMPLES
from mi_kernels.testing.mix_samples import Mixing
from mi_kernels.testing.norm_samples import Normalization
from mi_kernels.testing.recurrent_samples import Recurrence
from mi_kernels.testing.samples import (
    GATE_ODD,
    GATE_TERMS,
    ODD,
    WEIGHT_ONLY,
    GateSample,
    Modulation,
    Sample,
    Shape,
)
from mi_kernels.testing.shared_samples import TINY_RAGGED
from mi_kernels.testing.third_order_samples import ROWS, TOKENS


@dataclass
class Call:
    """``function`` of the tensors of ``sample``; the first of them is x, the second the context."""

    function: Callable[..., Tensor]
    sample: Any

    def __post_init__(self) -> None:
        self.present = [tensor is not None for tensor in self.sample.arguments(torch.float64)]

    def arguments(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
        """Those that are there, each requiring grad."""
        found = self.sample.arguments(dtype, device)
        return [tensor.detach().requires_grad_() for tensor in found if tensor is not None]

    def __call__(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return self.function(*[next(given) if present else None for present in self.present])


def _generated(x: Tensor, z: Tensor, *weights: Tensor | None) -> Tensor:
    return mi.apply_generated(x, *mi.generate(z, *weights))


_SEGMENTS = TINY_RAGGED.segment_ids()


def _by_segments(x: Tensor, z: Tensor, *weights: Tensor | None) -> Tensor:
    return mi.interaction(x, z, *weights, segment_ids=_SEGMENTS.to(x.device))


def _segments_generated(x: Tensor, z: Tensor, *weights: Tensor | None) -> Tensor:
    return mi.apply_generated(x, *mi.generate(z, *weights), segment_ids=_SEGMENTS.to(x.device))


_GROUPS = GROUPS.segment_ids()


def _low_rank_by_segments(x: Tensor, down: Tensor, up: Tensor, base: Tensor | None) -> Tensor:
    return mi.apply_low_rank(x, down, up, base, scale=GROUPS.scale, segment_ids=_GROUPS.to(x.device))


def _diagonal(*tensors: Tensor | None, activation: str = "sigmoid") -> Tensor:
    *others, weight_x = tensors
    return mi.diagonal(*others, weight_x=weight_x, activation=activation, scale_offset=0.5)


def _residual_block(*tensors: Tensor | None) -> Tensor:
    *tensors, weight, bias = tensors
    x_new, y = mi.gated_residual_norm_modulate(*tensors, weight=weight, bias=bias)
    return y + x_new


_TOKENS = Shape("tokens", (3, 4), 5, 6, 6, context_batch=(3, 1))
_MODULATION = Modulation("tokens", (3, 4, 6), (3, 1, 6), (6,))
_CONTEXT = (3, 1, 6)
_BLOCK = Normalization("tokens", (3, 4, 6), _CONTEXT, _CONTEXT, _CONTEXT, True, "wb")
# The older vmap of torch.autograd has no rule for the derivative of PyTorch's group_norm.
_NORM = Normalization("tokens", (3, 4, 6), None, _CONTEXT, _CONTEXT, norm="rms")
_PAIRS = Shape("pairs", (4, 1), 3, 5, 2, context_batch=(1, 3))
_RECURRENT = {"steps": 3, "rows": 2, "width": 4, "units": 3, "factors": 2}
_MLSTM = Recurrence("calls", "mlstm", **_RECURRENT, projected=2)
_MI_GRU = Recurrence("calls", "mi_gru", **_RECURRENT)
_SECOND_ORDER = Recurrence("calls", "second_order", **_RECURRENT)
CALLS = {
    "interaction": Call(mi.interaction, Sample(ODD)),
    "linear": Call(mi.interaction, Sample(ODD, (False, True, True, True))),
    "bilinear": Call(lambda x, z, w, *_: mi.bilinear(z, x, w), Sample(ODD, WEIGHT_ONLY)),
    "shared": Call(mi.interaction, Sample(_TOKENS)),
    "pairs": Call(mi.interaction, Sample(_PAIRS)),
    "segments": Call(_by_segments, TINY_RAGGED),
    "generated": Call(_generated, Sample(ODD)),
    "segments-generated": Call(_segments_generated, TINY_RAGGED),
    "biaffine": Call(partial(mi.biaffine, ones=(True, True)), LABEL),
    "biaffine-channels-first": Call(
        partial(mi.biaffine, channels_first=True), replace(LABEL, ones=(False, False), bias=(5,))
    ),
    "low-rank-weights": Call(SAMPLES.call, SAMPLES),
    "low-rank-weights-segments": Call(_low_rank_by_segments, GROUPS),
    "third-order": Call(ROWS.call, ROWS),
    "third-order-shared": Call(TOKENS.call, TOKENS),
    "glu": Call(call_dual("glu"), GLU),
    "glu-separate": Call(partial(call_dual("glu"), activation="gelu"), replace(GLU, terms="GaVc")),
    "glu-softmax": Call(partial(call_dual("glu"), activation="softmax"), GLU),
    "low-rank": Call(partial(mi.low_rank, activation_x="tanh"), LOW_RANK),
    "low-rank-ranks": Call(partial(mi.low_rank, **MUTAN.options), MUTAN),
    "modulate": Call(partial(mi.modulate, activation="sigmoid"), _MODULATION),
    "mix": Call(mi.mix, Mixing("tokens", (3, 4, 6), (3, 4, 6), (3, 1, 6))),
    "norm": Call(partial(_NORM.call, mi), _NORM),
    "norm-residual": Call(_residual_block, _BLOCK),
    "mlstm": Call(partial(_MLSTM.call, mi.multiplicative_rnn), _MLSTM),
    "mi-gru": Call(partial(_MI_GRU.call, mi.multiplicative_rnn), _MI_GRU),
    "second-order": Call(partial(_SECOND_ORDER.call, mi.multiplicative_rnn), _SECOND_ORDER),
    "diagonal": Call(_diagonal, GateSample("diagonal", GATE_ODD, GATE_TERMS["diagonal"])),
    "diagonal-softmax": Call(
        partial(_diagonal, activation="softmax"), GateSample("diagonal", GATE_ODD, "AaC")
    ),
    "diagonal-shared": Call(_diagonal, GateSample("diagonal", _TOKENS, "AaCc")),
    "gated": Call(
        mi.gated_interaction, GateSample("gated_interaction", GATE_ODD, GATE_TERMS["gated_interaction"])
    ),
}
