"""The dense interaction where rows share a context: generate W' once per context, then apply it.

    generate   W'[g,o,j] = sum_i z[g,i] W[o,i,j] + V[o,j],   b'[g,o] = sum_i U[o,i] z[g,i] + c[o]
    apply      y[c,s,t,o] = sum_j W'[c,s,o,j] x[c,t,j] + b'[c,s,o]

Both are the linear form (without W) of the primitives in autograd.py. Groups are contexts in `apply`, and in
`generate` outputs or inputs, or none where z is outermost or innermost in the memory of W.
So derivatives of all orders follow, and dW' is summed over the rows of a context before the product with W.
Nothing is expanded in memory: groups may have stride 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend as backends
from ..checks import broadcast
from ..rules import Maybe, gradients_wanted, without_features
from . import autograd, cost_model, memory_order, plain


@dataclass(frozen=True)
class Layout:
    """The dimensions of the broadcast ``lead`` that both x and z have, and those of one of them alone."""

    lead: tuple[int, ...]
    common: tuple[int, ...]  # C
    of_z: tuple[int, ...]  # S
    of_x: tuple[int, ...]  # T

    def _size(self, dims: tuple[int, ...]) -> int:
        return math.prod([self.lead[dim] for dim in dims])

    def sizes(self, context: int, width: int, out: int) -> cost_model.Sizes:
        common, of_z, of_x = (self._size(dims) for dims in (self.common, self.of_z, self.of_x))
        return cost_model.Sizes(common, of_z, of_x, context, width, out)

    def _gather(
        self, tensor: Tensor, features: int, first: tuple[int, ...], second: tuple[int, ...]
    ) -> Tensor:
        rank = len(self.lead)
        if tensor.dim() < rank + features:
            tensor = tensor[(None,) * (rank + features - tensor.dim())]
        rest = [dim for dim in range(rank) if dim not in first and dim not in second]
        order = (*first, *second, *rest, *range(rank, rank + features))
        sizes = (self._size(first), self._size(second), *tensor.shape[rank:])
        return _arranged(tensor, order, sizes)

    def rows(self, x: Tensor) -> Tensor:
        """x [..., X] as [C, T, X]."""
        return self._gather(x, 1, self.common, self.of_x)

    def contexts(self, tensor: Tensor, features: int) -> Tensor:
        """z [..., Z], or W' [..., O, X], as [C, S, ...]."""
        return self._gather(tensor, features, self.common, self.of_z)

    def contexts_first(self, z: Tensor) -> Tensor:
        """z [..., Z] as [S, C, Z]."""
        return self._gather(z, 1, self.of_z, self.common)

    def result(self, y: Tensor) -> Tensor:
        """y [C, S, T, O] as [..., O], contiguous."""
        order = (*self.common, *self.of_z, *self.of_x)
        dropped = [dim for dim in range(len(self.lead)) if dim not in order]
        dims = (*order, *dropped)
        y = _arranged(y, range(y.dim()), (*(self.lead[dim] for dim in dims), y.shape[-1]))
        back = [dims.index(dim) for dim in range(len(dims))]
        return _arranged(y, (*back, len(dims)), None).contiguous()

    def restored(self, rows: Tensor) -> Tensor:
        """[C, T, ...] as [..., ...], a view where possible; there is no S."""
        order = (*self.common, *self.of_x)
        dims = (*order, *(dim for dim in range(len(self.lead)) if dim not in order))
        features = rows.shape[2:]
        rows = rows.reshape(*(self.lead[dim] for dim in dims), *features)
        back = [dims.index(dim) for dim in range(len(dims))]
        return _arranged(rows, (*back, *range(len(dims), rows.dim())), None)

    def mirrored(self) -> "Layout":
        return Layout(self.lead, self.common, self.of_x, self.of_z)


def _arranged(tensor: Tensor, order: Sequence[int], sizes: tuple[int, ...] | None) -> Tensor:
    """Permute, then reshape; no-ops are skipped, since every view is a node of the backward pass."""
    if any(dim != axis for axis, dim in enumerate(order)):
        tensor = tensor.permute(*order)
    return tensor if sizes is None or tensor.shape == sizes else tensor.reshape(sizes)


def layout_of(x_lead: torch.Size, z_lead: torch.Size, lead: Sequence[int]) -> Layout:
    """The layout of leading dimensions that broadcast to ``lead``. Dimensions of size 1 are in no class."""
    rank = len(lead)
    x_sizes = (*(1,) * (rank - len(x_lead)), *x_lead)
    z_sizes = (*(1,) * (rank - len(z_lead)), *z_lead)
    common, of_z, of_x = [], [], []
    for dim in range(rank):
        if x_sizes[dim] == z_sizes[dim]:
            if x_sizes[dim] != 1:
                common.append(dim)
        elif x_sizes[dim] == 1:
            of_z.append(dim)
        else:
            of_x.append(dim)
    return Layout(tuple(lead), tuple(common), tuple(of_z), tuple(of_x))


def known(sizes: cost_model.Sizes) -> cost_model.Sizes:
    """The sizes that choose a plan: those of the example where a graph is exported."""
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return cost_model.Sizes(*map(memory_order.of_example, sizes))
    return sizes


def sharing_costs(
    backend: str, lead: Sequence[int], x: Tensor, z: Tensor, weights: Sequence[Maybe]
) -> tuple[Layout, tuple[cost_model.Cost, ...]] | None:
    """The layout of a call and the costs of its plans, or None where nothing is shared."""
    weight = weights[0]
    if weight is None or x.shape[:-1] == z.shape[:-1] or backends.get(backend).is_reference:
        return None
    layout = layout_of(x.shape[:-1], z.shape[:-1], lead)
    sizes = known(layout.sizes(z.shape[-1], x.shape[-1], weight.shape[0]))
    wanted = cost_model.Wanted(*gradients_wanted((x, z, *weights[:3])))
    return layout, cost_model.all_costs(sizes, wanted, x.dtype, backend, x.device.type)


def linear(backend: str, x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """y[g,t,p] = sum_j weight[g,p,j] x[g,t,j] + bias[g,p]; the group dimension g is optional."""
    return autograd.forward(backend, x, without_features(x), None, None, weight, bias)


class Matrices(NamedTuple):
    """W [..., O, Z, X] as matrices [N, Z] of linear products, which are views of it."""

    # The axes of W: those that are the dimension N, and one of groups before them, if z is in the middle.
    # W' has them in this order, with the contexts before N.
    groups: tuple[int, ...]
    outs: tuple[int, ...]

    def of(self, weight: Tensor) -> Tensor:
        """[..., (groups,) N, Z]."""
        lead = weight.dim() - 3
        axes = (lead + axis for axis in (*self.groups, *self.outs, 1))
        matrices = weight.permute(*range(lead), *axes)
        return matrices if self.groups else matrices.flatten(-3, -2)

    def offsets(self, weight_x: Tensor) -> Tensor:
        """V [..., O, X] as [..., (groups,) N]."""
        ordered = weight_x if (*self.groups, *self.outs) == (0, 2) else weight_x.mT
        return ordered if self.groups else ordered.flatten(-2)

    def generated(self, y: Tensor, weight: Tensor) -> Tensor:
        """The result [(groups,) G, N] as W' [G, O, X]."""
        if not self.groups:
            y = y.unflatten(-1, [weight.shape[axis - 3] for axis in self.outs])
            return y if self.outs == (0, 2) else y.mT
        return y.movedim(0, 1) if self.groups == (0,) else y.movedim(0, -1)


def matrices_of(weight: Tensor, of_z: int) -> Matrices:
    """How to read W without a copy, where ``of_z`` contexts share their inputs.

    For several of these the axes S and O of W' have to merge.
    """
    outer, middle, inner = memory_order.order(weight)
    if middle == 1:
        return Matrices((outer,), (inner,))
    first, second = (middle, inner) if outer == 1 else (outer, middle)
    strides = [memory_order.of_example(stride) for stride in weight.stride()[-3:]]
    merge = strides[first] == strides[second] * memory_order.of_example(weight.shape[second - 3])
    if not merge or (first == 2 and of_z > 1):
        return Matrices((first,), (second,))
    return Matrices((), (first, second))


def generate(
    backend: str,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
    *,
    matrices: Matrices | None = None,
) -> tuple[Maybe, Maybe]:
    """W' [G, O, X] and b' [G, O] of contexts z [G, Z]; None without terms. ``matrices``: how W is read."""
    generated = offset = None
    if weight is not None:
        matrices = matrices or matrices_of(weight, 1)
        rows = z.expand(weight.shape[matrices.groups[0]], *z.shape) if matrices.groups else z
        read = matrices.of(weight)
        y = linear(backend, rows, read, None if weight_x is None else matrices.offsets(weight_x))
        generated = matrices.generated(y, weight)
    elif weight_x is not None:
        generated = weight_x.expand(z.shape[0], *weight_x.shape)
    if weight_z is not None:
        offset = linear(backend, z, weight_z, bias)
    elif bias is not None:
        offset = bias.expand(z.shape[0], *bias.shape)
    return generated, offset


def apply_generated(backend: str, x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """y [C, S, T, O] of x [C, T, X], W' [C, S, O, X] and b' [C, S, O].

    The S contexts of a row become outputs of one product, in the memory order of W'.
    """
    groups, of_z, out, width = weight.shape
    if of_z == 1:
        y = _grouped(backend, x, weight.squeeze(1), None if bias is None else bias.squeeze(1))
        return y.unsqueeze(1)
    if out == 1:  # scores of all pairs: contexts are the rows, so that y is in its final order
        y = _grouped(backend, weight.squeeze(2), x, None)
        return (y if bias is None else y + bias).unsqueeze(-1)
    if weight.stride(1) < weight.stride(2):  # [C, O, S, X]
        weight, bias = weight.transpose(1, 2), None if bias is None else bias.transpose(1, 2)
        order = (0, 3, 1, 2)
    else:
        order = (0, 2, 1, 3)
    sizes = weight.shape[1:3]
    weight = weight.reshape(groups, of_z * out, width)
    bias = None if bias is None else bias.reshape(groups, of_z * out)
    return _grouped(backend, x, weight, bias).unflatten(-1, sizes).permute(order)


def _grouped(backend: str, x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """`linear`, with a single group squeezed: ungrouped products have faster kernels."""
    if x.shape[0] != 1:
        return linear(backend, x, weight, bias)
    bias = None if bias is None else bias.squeeze(0)
    return linear(backend, x.squeeze(0), weight.squeeze(0), bias).unsqueeze(0)


def interaction(backend: str, plan: str, layout: Layout, x: Tensor, z: Tensor, *weights: Maybe) -> Tensor:
    """y [..., O] of x [..., X] and z [..., Z] by one of the sharing plans; W is given."""
    weight, weight_z, weight_x, bias = weights
    assert weight is not None, "without W there is nothing to share"
    if plan == cost_model.PER_X:
        layout, x, z = layout.mirrored(), z, x
        weight, weight_z, weight_x = weight.transpose(1, 2), weight_x, weight_z
    return layout.result(_generate_and_apply(backend, layout, x, z, weight, weight_z, weight_x, bias))


def by_leading_dimensions(
    backend: str,
    x: Tensor,
    z: Tensor,
    weights: Sequence[Maybe],
    packed_weight: Maybe = None,
    force: str | None = None,
) -> Tensor:
    """y [..., O] of x [..., X] and z [..., Z], whose leading dimensions broadcast, by the cheapest plan."""
    lead = broadcast(x.shape[:-1], z.shape[:-1])
    assert lead is not None, "checked by the caller"
    # Fast path. Not len(x), which would specialise a symbolic size.
    alike = len(lead) == 1 and x.dim() == z.dim() == 2 and x.shape[0] == z.shape[0]
    sharing = None if alike else sharing_costs(backend, lead, x, z, weights)
    if sharing is not None:
        layout, found = sharing
        how = force or cost_model.cheapest(found).plan
        if how != cost_model.FUSED:
            return interaction(backend, how, layout, x, z, *weights)
    weight, weight_z, weight_x, bias = weights
    rows = flatten_rows(x, lead), flatten_rows(z, lead)
    run = autograd.forward if force else plain.forward
    y = run(backend, *rows, weight, weight_z, weight_x, bias, packed_weight)
    return y if len(lead) == 1 else y.view(*lead, y.shape[-1])


def flatten_rows(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """A tensor [..., F] as the rows [B, F] of a call whose leading dimensions are ``lead``."""
    if len(lead) == 1 and tensor.shape[0] == lead[0] and tensor.dim() == 2:
        return tensor
    return tensor.expand(*lead, tensor.shape[-1]).reshape(math.prod(lead), tensor.shape[-1])


def _generate_and_apply(backend: str, layout: Layout, x: Tensor, z: Tensor, *weights: Maybe) -> Tensor:
    weight = weights[0]
    assert weight is not None
    of_z, groups = layout.sizes(1, 1, 1)[1::-1]
    matrices = matrices_of(weight, of_z)
    # S and O merge without a copy: the memory of W' is [O, S, C, X], [X, C, S, O] or [C, S, O, X].
    if matrices.groups == (0,):
        generated, offset = generate(
            backend, layout.contexts_first(z).flatten(0, 1), *weights, matrices=matrices
        )
        split = lambda tensor: tensor.unflatten(0, (of_z, groups)).transpose(0, 1)  # noqa: E731
    else:
        generated, offset = generate(
            backend, layout.contexts(z, 1).flatten(0, 1), *weights, matrices=matrices
        )
        split = lambda tensor: tensor.unflatten(0, (groups, of_z))  # noqa: E731
    assert generated is not None
    offset = None if offset is None else split(offset)
    return apply_generated(backend, layout.rows(x), split(generated), offset)
