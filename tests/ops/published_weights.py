"""Published layers whose weights are generated, kept for each sample, or chosen by an id.

Plain PyTorch of explicit tensors, written from the formulas: what tests compare with. No layer here is a
module, as what differs between packages is the arithmetic and how weights lie in memory. ``HEADS`` are layers
that a linear head generates; ``WEIGHTS`` have a weight of each sample, or one of several that an id chooses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Heads. Of each form: (what the head gives [B, P], x [B, X]) -> y [B, O], and how the head is laid out.


def linear(context: int, size: int, bias: bool = True, **options: Any) -> nn.Linear:
    """A head whose bias is as large as its weight."""
    head = nn.Linear(context, size, bias, **{"dtype": torch.float64} | options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def nn_conv(generated: Tensor, x: Tensor) -> Tensor:
    """The message of torch_geometric's NNConv: x W, [X, O] with no bias."""
    weight = generated.view(-1, x.shape[-1], generated.shape[-1] // x.shape[-1])
    return torch.matmul(x.unsqueeze(1), weight).squeeze(1)


def apg(generated: Tensor, x: Tensor) -> Tensor:
    """FuxiCTR's APG with a generated bias: x W + b, b before [X, O]."""
    out = generated.shape[-1] // (x.shape[-1] + 1)
    bias, weight = generated[:, :out], generated[:, out:].reshape(-1, x.shape[-1], out)
    return torch.bmm(x.unsqueeze(1), weight).squeeze(1) + bias


def list_of_shapes(generated: Tensor, x: Tensor) -> Tensor:
    """hypnettorch, hyper-nn, hyperlight: the shapes [O, X] and [O] of an nn.Linear, one after the other."""
    width = x.shape[-1]
    out = generated.shape[-1] // (width + 1)
    weight, bias = generated.split([out * width, out], -1)
    return torch.bmm(weight.view(-1, out, width), x.unsqueeze(-1)).squeeze(-1) + bias


def bias_first(generated: Tensor, x: Tensor) -> Tensor:
    out = generated.shape[-1] // (x.shape[-1] + 1)
    return torch.einsum("boj,bj->bo", generated[:, out:].view(-1, out, x.shape[-1]), x) + generated[:, :out]


HEADS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "NNConv": (nn_conv, {"order": "in,out", "bias": None}),
    "APG": (apg, {"order": "in,out", "bias": "first"}),
    "shapes": (list_of_shapes, {"order": "out,in", "bias": "last"}),
    "bias first": (bias_first, {"order": "out,in", "bias": "first"}),
}


# Weights of each sample, and by id.

Tensors = dict[str, Tensor]


class Published(NamedTuple):
    """A published layer, and the product in it.

    ``draw(seed, dtype)`` gives its tensors, ``formula(**tensors)`` its result. ``arguments(**tensors)`` are
    those of the product y [..., O]: ``x [..., X]``, ``z [..., Z]`` and ``weight [..., O, Z, X]``, or ``weight
    [G, O, Z, X]`` with ``weight_ids [...]``; weight is a view of the published one. ``finish(y, **tensors)``
    makes the layer's result of y.
    """

    draw: Callable[..., Tensors]
    formula: Callable[..., Tensor]
    arguments: Callable[..., Tensors]
    finish: Callable[..., Tensor]


def product(x: Tensor, z: Tensor, weight: Tensor, weight_ids: Tensor | None = None) -> Tensor:
    """y of ``Published.arguments``, by einsum."""
    weight = weight if weight_ids is None else weight[weight_ids]
    return torch.einsum("...i,...oij,...j->...o", z, weight, x)


def drawn(ids: dict[str, list[int]] | None = None, **sizes: tuple[int, ...]) -> Callable[..., Tensors]:
    """Normal numbers of these sizes, the same in every dtype, rounded; and these ids."""

    def draw(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        found = {
            name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            for name, size in sizes.items()
        }
        return found | {name: torch.tensor(numbers) for name, numbers in (ids or {}).items()}

    return draw


def rescal(h: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """pykeen's RESCAL: the score h^T R t of [..., D] with R [..., D, D]; leading dimensions broadcast."""
    return torch.einsum("...d,...de,...e->...", h, r, t)


def rescal_by_id(h: Tensor, relations: Tensor, t: Tensor, ids: Tensor) -> Tensor:
    """R of the triple's relation, from [G, D, D]."""
    return rescal(h, relations[ids], t)


def ntn(h: Tensor, t: Tensor, w: Tensor, vh: Tensor, vt: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """pykeen's NTN: u^T tanh(h^T W t + V h + V' t + b), W [..., K, D, D], V [..., K, D], b and u [..., K]."""
    hidden = torch.einsum("...i,...kij,...j->...k", h, w, t)
    hidden = hidden + torch.einsum("...ki,...i->...k", vh, h) + torch.einsum("...ki,...i->...k", vt, t) + b
    return (u * torch.tanh(hidden)).sum(-1)


def ntn_by_id(
    h: Tensor, t: Tensor, w: Tensor, vh: Tensor, vt: Tensor, b: Tensor, u: Tensor, ids: Tensor
) -> Tensor:
    return ntn(h, t, w[ids], vh[ids], vt[ids], b[ids], u[ids])


def finish_ntn(
    y: Tensor, h: Tensor, t: Tensor, vh: Tensor, vt: Tensor, b: Tensor, u: Tensor, **others: Tensor
) -> Tensor:
    if "ids" in others:
        vh, vt, b, u = (each[others["ids"]] for each in (vh, vt, b, u))
    linear = (vh @ h.unsqueeze(-1) + vt @ t.unsqueeze(-1)).squeeze(-1)
    return (u * torch.tanh(y + linear + b)).sum(-1)


def q_diagonal_bilinear(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """QDiagBilin: y_q = x1_q^T W_q x2 + bias_q, x1 [..., Q, A], x2 [..., B], W [Q, A, B]."""
    left = torch.einsum("...qa,qab->...qb", x1, weight)
    return (left * x2.unsqueeze(-2)).sum(-1) + bias


def tensor_product(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """e3nn's FullyConnectedTensorProduct of scalars with a weight of each edge, [E, X * Z * O] ("uvw")."""
    width, context = x.shape[-1], z.shape[-1]
    paths = weight.view(-1, width, context, weight.shape[-1] // max(width * context, 1))
    return torch.einsum("euvw,eu,ev->ew", paths, x, z) / (width * context) ** 0.5


def radial_tensor_product(x: Tensor, z: Tensor, radial: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """The same with weights from a radial network of two layers: outer silu(inner r)."""
    return tensor_product(x, z, F.silu(radial @ inner.t()) @ outer.t())


def paths_of(x: Tensor, z: Tensor, weight: Tensor) -> Tensors:
    out = weight.shape[-1] // (x.shape[-1] * z.shape[-1])
    return {"x": x, "z": z, "weight": weight.view(-1, x.shape[-1], z.shape[-1], out).permute(0, 3, 2, 1)}


def finish_tensor_product(y: Tensor, x: Tensor, z: Tensor, **others: Tensor) -> Tensor:
    return y / (x.shape[-1] * z.shape[-1]) ** 0.5


def rgcn(x: Tensor, weight: Tensor, root: Tensor, source: Tensor, target: Tensor, types: Tensor) -> Tensor:
    """torch_geometric's RGCNConv: x root + the sum over relations of the mean message x_source W_relation."""
    y = x @ root
    for relation in range(weight.shape[0]):
        chosen = types == relation
        messages = x[source[chosen]] @ weight[relation]
        degree = torch.bincount(target[chosen], minlength=len(x)).clamp(min=1).to(x.dtype)
        y = y + torch.zeros_like(y).index_add(0, target[chosen], messages) / degree.unsqueeze(-1)
    return y


def messages_of(
    x: Tensor, weight: Tensor, source: Tensor, target: Tensor, types: Tensor, **_: Tensor
) -> Tensors:
    """The mean as a context of one feature: one over the number of edges of this type into the target."""
    cell = target * weight.shape[0] + types
    degree = torch.bincount(cell, minlength=len(x) * weight.shape[0])[cell]
    return {
        "x": x[source],
        "z": degree.to(x.dtype).reciprocal().unsqueeze(-1),
        "weight": weight.mT.unsqueeze(-2),
        "weight_ids": types,
    }


def finish_rgcn(y: Tensor, x: Tensor, root: Tensor, target: Tensor, **_: Tensor) -> Tensor:
    return (x @ root).index_add(0, target, y)


def pair(h: Tensor, r: Tensor, t: Tensor) -> Tensors:
    return {"x": t, "z": h, "weight": r.unsqueeze(-3)}


def first(y: Tensor, **_: Tensor) -> Tensor:
    return y.squeeze(-1)


D, K, G = 6, 4, 5
UNSORTED = [3, 0, 0, 4, 3, 0, 4, 0]  # of five groups, two of which are empty
TRIPLES = {"h": (8, D), "t": (8, D)}
EDGES = {"source": [0, 1, 2, 3, 0, 4, 2, 2, 1], "target": [1, 0, 0, 2, 2, 0, 0, 4, 1]}
TYPES = [2, 0, 0, 1, 2, 0, 2, 2, 0]
NTN_SIZES = {"w": (K, D, D), "vh": (K, D), "vt": (K, D), "b": (K,), "u": (K,)}


def leading(lead: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {name: (*lead, *size) for name, size in NTN_SIZES.items()}


WEIGHTS: dict[str, Published] = {
    "RESCAL": Published(drawn(**TRIPLES, r=(8, D, D)), rescal, pair, first),
    "RESCAL, all tails": Published(drawn(h=(8, 1, D), r=(8, 1, D, D), t=(7, D)), rescal, pair, first),
    "RESCAL, all relations": Published(drawn(h=(8, 1, D), r=(G, D, D), t=(8, 1, D)), rescal, pair, first),
    "RESCAL by id": Published(
        drawn({"ids": UNSORTED}, **TRIPLES, relations=(G, D, D)),
        rescal_by_id,
        lambda h, relations, t, ids: {"x": t, "z": h, "weight": relations.unsqueeze(1), "weight_ids": ids},
        first,
    ),
    "NTN": Published(
        drawn(**TRIPLES, **leading((8,))),
        ntn,
        lambda h, t, w, **_: {"x": t, "z": h, "weight": w},
        finish_ntn,
    ),
    "NTN, all tails": Published(
        drawn(h=(8, 1, D), t=(1, 7, D), **leading((8, 1))),
        ntn,
        lambda h, t, w, **_: {"x": t, "z": h, "weight": w},
        finish_ntn,
    ),
    "NTN by id": Published(
        drawn({"ids": UNSORTED}, **TRIPLES, **leading((G,))),
        ntn_by_id,
        lambda h, t, w, ids, **_: {"x": t, "z": h, "weight": w, "weight_ids": ids},
        finish_ntn,
    ),
    "QDiagBilin": Published(
        drawn(x1=(2, 9, G, D), x2=(2, 9, K), weight=(G, D, K), bias=(G,)),
        q_diagonal_bilinear,
        lambda x1, x2, weight, bias: {"x": x2.unsqueeze(-2), "z": x1, "weight": weight.unsqueeze(1)},
        lambda y, bias, **_: y.squeeze(-1) + bias,
    ),
    "e3nn": Published(
        drawn(x=(9, D), z=(9, 4), weight=(9, D * 4 * K)), tensor_product, paths_of, finish_tensor_product
    ),
    "e3nn, one context feature": Published(
        drawn(x=(9, D), z=(9, 1), weight=(9, D * K)), tensor_product, paths_of, finish_tensor_product
    ),
    "e3nn, radial": Published(
        drawn(x=(9, D), z=(9, 4), radial=(9, 3), inner=(5, 3), outer=(D * 4 * K, 5)),
        radial_tensor_product,
        lambda x, z, radial, inner, outer: paths_of(x, z, F.silu(radial @ inner.t()) @ outer.t()),
        finish_tensor_product,
    ),
    "RGCN": Published(
        drawn(EDGES | {"types": TYPES}, x=(5, D), weight=(4, D, K), root=(D, K)),
        rgcn,
        messages_of,
        finish_rgcn,
    ),
    "no triples": Published(drawn(h=(0, D), r=(0, D, D), t=(0, D)), rescal, pair, first),
}
