"""Layouts of every public function on the devices of a mesh: what lies where, and what it costs.

No layout of this table needs a collective in its forward pass, its backward pass or the derivatives of that:
what is missing is a sum that somebody has to ask for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import mi_kernels as mi

R, P = Replicate(), Partial()
_SIZES = {"B": 4, "T": 3, "X": 6, "Z": 3, "Y": 5, "O": 5, "R": 5, "S": 4, "H": 5, "G": 3, "L": 5, "M": 3}
_SIZES |= {"I": 6, "J": 3, "1": 1, "2": 10}


@dataclass
class Layout:
    """``axes``: of each argument, one letter a size; each is sharded along ``cut`` where it has that axis.

    ``partial`` arguments become partial sums, and ``result`` is where y lies. ``gradients``: those of
    arguments without the axis are partial sums, but of ``partial`` ones, which are whole.
    """

    function: Callable[..., Any]
    axes: tuple[str, ...]
    cut: str
    result: Any
    partial: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def arguments(self) -> list[torch.Tensor]:
        sizes = _SIZES | self.sizes
        shapes = [[sizes[letter] for letter in axes] for axes in self.axes]
        return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]

    def placements(self) -> list[Any]:
        return [Shard(axes.index(self.cut)) if self.cut in axes else R for axes in self.axes]

    def gradients(self) -> list[Any]:
        placed = []
        for index, placement in enumerate(self.placements()):
            placed.append(placement if placement != R else R if index in self.partial else P)
        return placed


_DENSE = "BX", "BZ", "OZX", "OZ", "OX", "O"
_TOKENS = "BTX", "B1Z", "OZX", "OZ", "OX", "O"
_THIRD = "BX", "BY", "BZ", "OYZX", "OY", "OZ", "OX", "O"
_LOW = "BX", "BZ", "RX", "RZ", "OR", "OZ", "OX", "O"


def _third(x, z1, z2, weight, weight_z1, weight_z2, weight_x, bias):
    return mi.interaction(x, (z1, z2), weight, (weight_z1, weight_z2), weight_x, bias)


def _generated(x, z, *weights):
    return mi.apply_generated(x, *mi.generate(z, *weights))


def _glu(x, weight, weight_value, bias, bias_value):
    return mi.glu(x, weight, bias, weight_value=weight_value, bias_value=bias_value)


def _by_weight_ids(x, z, *weights):
    return mi.interaction(x, z, *weights, weight_ids=torch.tensor([2, 0, 2, 1]))


def _by_segment(x, z, *weights):
    return mi.interaction(x, z, *weights, segment_ids=torch.tensor([2, 0, 2, 1]))


def _apply_by_segment(x, *layers):
    return mi.apply_generated(x, *layers, segment_ids=torch.tensor([2, 0, 2, 1]))


def _diagonal(x, z, weight, bias, shift_weight, shift_bias):
    return mi.diagonal(x, z, weight, bias, shift_weight, shift_bias, activation="sigmoid")


def _recurrent(kind, *names):
    """Output and last state of a multiplicative RNN, in one tensor."""

    def function(x, *weights):
        given = dict(zip(names, weights, strict=True))
        state = given.pop("h", None)
        state = (state, given.pop("c")) if state is not None and "c" in given else state
        return mi.multiplicative_rnn(kind, x, state, lengths=torch.tensor([3, 1, 2, 0]), **given)[0]

    return function


def every(name: str, function: Any, axes: tuple[str, ...], cuts: dict[str, Any], **others: Any) -> dict:
    """A layout for each cut: where y lies, and which arguments are partial sums."""
    found = {}
    for cut, result in cuts.items():
        result, partly = result if isinstance(result, tuple) else (result, ())
        found[f"{name}-{cut}"] = Layout(function, axes, cut, result, partly, **others)
    return found


LAYOUTS: dict[str, Layout] = {
    **every(
        "interaction",
        mi.interaction,
        _DENSE,
        {"B": Shard(0), "O": Shard(1), "X": (P, (3, 5)), "Z": (P, (4, 5))},
    ),
    **every(
        "tokens",
        mi.interaction,
        _TOKENS,
        {"B": Shard(0), "T": Shard(1), "O": Shard(2), "X": (P, (3, 5)), "Z": (P, (4, 5))},
    ),
    **every(
        "bilinear",
        mi.bilinear,
        ("BI", "BJ", "OIJ", "O"),
        {"B": Shard(0), "O": Shard(1), "I": (P, (3,)), "J": (P, (3,))},
    ),
    **every(
        "own-weights",
        mi.interaction,
        ("BX", "BZ", "BOZX", "BOZ", "BOX", "BO"),
        {"B": Shard(0), "O": Shard(1), "X": (P, (3, 5))},
    ),
    **every(
        "weight-ids",
        _by_weight_ids,
        ("BX", "BZ", "GOZX", "GOZ", "GOX", "GO"),
        {"B": Shard(0), "O": Shard(1), "X": (P, (3, 5))},
    ),
    **every(
        "segments",
        _by_segment,
        ("BX", "GZ", "OZX", "OZ", "OX", "O"),
        {"B": Shard(0), "O": Shard(1), "X": (P, (3, 5))},
    ),
    **every(
        "apply-segments",
        _apply_by_segment,
        ("BX", "GOX", "GO"),
        {"B": Shard(0), "O": Shard(1), "X": (P, (2,))},
    ),
    **every("generated", _generated, ("BTX", "B1Z", "OZX", "OZ", "OX", "O"), {"B": Shard(0), "O": Shard(2)}),
    **every(
        "apply",
        mi.apply_generated,
        ("BTX", "B1OX", "B1O"),
        {"B": Shard(0), "T": Shard(1), "O": Shard(2), "X": (P, (2,))},
    ),
    **every(
        "low-rank-weights",
        mi.apply_low_rank,
        ("BTX", "B1RX", "B1OR", "BTO"),
        {"B": Shard(0), "O": Shard(2), "R": (P, (3,)), "X": (P, (3,))},
    ),
    **every(
        "third-order",
        _third,
        _THIRD,
        {"B": Shard(0), "O": Shard(1), "X": (P, (4, 5, 7)), "Y": (P, (5, 6, 7)), "Z": (P, (4, 6, 7))},
    ),
    **every(
        "biaffine",
        mi.biaffine,
        ("BLI", "BMJ", "OIJ", "O"),
        {"B": Shard(0), "L": Shard(1), "M": Shard(2), "O": Shard(3), "I": (P, (3,)), "J": (P, (3,))},
    ),
    **every(
        "biaffine-first",
        partial(mi.biaffine, channels_first=True),
        ("BLI", "BMJ", "OIJ", "O"),
        {"B": Shard(0), "L": Shard(2), "M": Shard(3), "O": Shard(1)},
    ),
    **every(
        "low-rank",
        mi.low_rank,
        _LOW,
        {"B": Shard(0), "O": Shard(1), "R": (P, (5, 6, 7)), "X": (P, (5, 7)), "Z": (P, (6, 7))},
    ),
    **every(
        "low-rank-tanh",
        partial(mi.low_rank, activation_x="tanh", activation_z="tanh"),
        _LOW,
        {"R": (P, (5, 6, 7))},
    ),
    **every(
        "mutan", mi.low_rank, ("BX", "BZ", "SRX", "SRZ", "OR"), {"B": Shard(0), "O": Shard(1), "S": P, "R": P}
    ),
    **every("ranks", mi.low_rank, ("BX", "BZ", "RX", "RZ"), {"B": Shard(0), "R": Shard(1)}),
    **every("glu", _glu, ("BTX", "HX", "HX", "H", "H"), {"B": Shard(0), "T": Shard(1), "H": Shard(2)}),
    **every("glu-packed", mi.glu, ("BTX", "2X", "2"), {"B": Shard(0), "T": Shard(1)}),
    **every("diagonal", _diagonal, ("BX", "BZ", "XZ", "X", "XZ", "X"), {"B": Shard(0), "X": Shard(1)}),
    **every("gated", mi.gated_interaction, ("BX", "BZ", "XZX", "XZ", "XX", "X"), {"B": Shard(0)}),
    **every(
        "mlstm",
        _recurrent("mlstm", "h", "c", "weight_ih", "weight_hh", "weight_mx", "weight_mh"),
        ("TBX", "BL", "BL", "NX", "NR", "RX", "RL"),
        {"B": Shard(1)},
        sizes={"N": 20},
    ),
    **every(
        "mi-gru",
        _recurrent("mi_gru", "weight_ih", "weight_hh", "bias", "alpha"),
        ("TBX", "NX", "NL", "N", "N"),
        {"B": Shard(1)},
        sizes={"N": 15},
    ),
    **every(
        "second-order",
        _recurrent("second_order", "h", "weight_ih", "weight_hh", "bias", "weight"),
        ("TBX", "BL", "LX", "Ll", "L", "LlX"),
        {"B": Shard(1)},
        sizes={"l": 5},
    ),
    **every(
        "modulate",
        partial(mi.modulate, activation="sigmoid"),
        ("BTX", "B1X", "B1X"),
        {"B": Shard(0), "T": Shard(1), "X": Shard(2)},
    ),
    **every("mix", mi.mix, ("BTX", "BTX", "B1X"), {"B": Shard(0), "T": Shard(1), "X": Shard(2)}),
    **every("norm", mi.norm_modulate, ("BTX", "B1X", "B1X"), {"B": Shard(0), "T": Shard(1)}),
    **every(
        "residual", mi.gated_residual, ("BTX", "BTX", "B1X"), {"B": Shard(0), "T": Shard(1), "X": Shard(2)}
    ),
}


# Registered as operations of DTensor, which shards no dimension that is smaller than the number of devices.
ELEMENTWISE = ("modulate", "mix", "norm", "residual")


def _equal(found: Any, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(
        found.full_tensor(),
        expected,
        rtol=1e-12,
        atol=1e-12,
        msg=lambda text: f"{what} {found.placements}: {text}",
    )


def check_layout(name: str, layout: Layout, mesh: Any, second: bool) -> None:
    """Values and gradients of one process, with ``second`` those of the gradients too, and no collective."""
    torch.manual_seed(1)
    tensors = layout.arguments()
    leaves = [
        distribute_tensor(tensor.detach(), mesh, [placed]).requires_grad_()
        for tensor, placed in zip(tensors, layout.placements(), strict=True)
    ]
    grad = torch.randn_like(layout.function(*tensors))
    where = R if layout.result.is_partial() else layout.result
    grads = distribute_tensor(grad, mesh, [where]).requires_grad_()
    grad.requires_grad_()
    with CommDebugMode() as mode:
        y = layout.function(*leaves)
        found = torch.autograd.grad(y, leaves, grads, create_graph=second)
    expected = layout.function(*tensors)
    gradients = torch.autograd.grad(expected, tensors, grad, create_graph=second)
    _equal(y, expected, name)
    for index, (one, other) in enumerate(zip(found, gradients, strict=True)):
        _equal(one, other, f"{name}: gradient {index}")
    small = min(_SIZES[layout.cut], layout.sizes.get(layout.cut, 99)) < mesh.size()
    if small and name.startswith(ELEMENTWISE):
        return
    assert mode.get_total_counts() == 0, (name, mode.get_comm_counts())
    assert y.placements == (layout.result,), (name, y.placements)
    placed = [one.placements[0] for one in found]
    assert placed == layout.gradients(), (name, placed)
    if second:
        check_second(name, mesh, placed, (*leaves, grads), found, (*tensors, grad), gradients)


def check_second(
    name: str, mesh: Any, placed: Any, leaves: Any, found: Any, tensors: Any, gradients: Any
) -> None:
    """Derivatives of the gradients."""
    cotangents = [torch.randn_like(gradient) for gradient in gradients]
    parts = [
        distribute_tensor(cotangent, mesh, [R if place.is_partial() else place])
        for cotangent, place in zip(cotangents, placed, strict=True)
    ]
    with CommDebugMode() as mode:
        results = torch.autograd.grad(found, leaves, parts, allow_unused=True)
    assert mode.get_total_counts() == 0, (name, mode.get_comm_counts())
    expected = torch.autograd.grad(gradients, tensors, cotangents, allow_unused=True)
    for index, (one, other) in enumerate(zip(results, expected, strict=True)):
        if one is not None and other is not None:
            _equal(one, other, f"{name}: second derivative {index}")
        else:
            assert one is other or (one if other is None else other).abs().max().item() == 0, (name, index)


def check_layouts(mesh: Any, second: bool) -> None:
    for name, layout in LAYOUTS.items():
        check_layout(name, layout, mesh, second)
