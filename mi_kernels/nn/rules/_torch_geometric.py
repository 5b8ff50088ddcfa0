"""Layers of torch_geometric."""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import FastRGCNConv, NNConv, RGCNConv

from mi_kernels.functional import hyper, interaction
from mi_kernels.functional._call import call
from mi_kernels.functional.heads import split_head
from mi_kernels.nn.heads import HOOKS
from mi_kernels.nn.hyper import HyperLinear


class FusedNNConv(NNConv):
    def message(self, x_j: Tensor, edge_attr: Tensor) -> Tensor:  # [E, X], [E, ...]
        layers = _layers(self.nn)
        if isinstance(layers, str):
            return super().message(x_j, edge_attr)
        *body, head = layers
        for layer in body:
            edge_attr = layer(edge_attr)
        z = edge_attr.reshape(-1, edge_attr.shape[-1])
        shape = self.in_channels_l, self.out_channels
        ((weight, weight_x),) = split_head(head.weight, head.bias, [shape], order="in,out")
        return call(interaction.interaction, x_j, z, weight, None, weight_x)


class FusedFastRGCNConv(FastRGCNConv):
    def message(self, x_j: Tensor, edge_type: Tensor, edge_index_j: Tensor) -> Tensor:
        if not x_j.is_floating_point():  # indices of nodes: rows of weights, nothing to multiply
            return super().message(x_j, edge_type, edge_index_j)
        return _of_relations(self, x_j, edge_type)


class FusedRGCNConv(RGCNConv):
    """One product for each edge, by its relation, instead of one for each node and relation."""

    def forward(self, x: Any, edge_index: Any, edge_type: Tensor | None = None) -> Tensor:
        x_l, x_r = x if isinstance(x, tuple) else (x, x)
        if edge_type is None or not self._suits(x_l, x_r, edge_index):
            return super().forward(x, edge_index, edge_type)
        source, target = edge_index if self.flow == "source_to_target" else edge_index.flip(0)
        messages = _of_relations(self, x_l[source], edge_type)
        if self.aggr == "mean":  # of each relation
            pairs = target.long() * self.num_relations + edge_type
            _, pair, counts = torch.unique(pairs, return_inverse=True, return_counts=True)
            messages = messages / counts[pair].unsqueeze(1)
        dtype = torch.promote_types(messages.dtype, torch.get_default_dtype())  # there, too
        y = messages.new_zeros(len(x_r), self.out_channels, dtype=dtype)
        y = y.index_add(0, target, messages.to(dtype))
        if self.root is not None:
            y = y + x_r @ self.root
        return y if self.bias is None else y + self.bias

    def _suits(self, x_l: Any, x_r: Any, edge_index: Any) -> bool:
        """Features, not numbers of nodes; fewer products than RGCNConv has; no hooks in between."""
        if type(edge_index) is not Tensor or self.explain or any(getattr(self, name) for name in _PROPAGATE):
            return False
        features = all(isinstance(each, Tensor) and each.is_floating_point() for each in (x_l, x_r))
        # One thread, 16 to 128 features: 1.3 to 9 times as fast from here on; with half as many products, at
        # one for each edge, 0.5 to 1.5 times.
        return features and 2 * edge_index.shape[1] <= self.num_relations * len(x_r)


_PROPAGATE = [
    f"_{part}_forward_{when}hooks"
    for part in ("propagate", "message", "aggregate", "message_and_aggregate")
    for when in ("pre_", "")
]


def _of_relations(layer: RGCNConv, x: Tensor, edge_type: Tensor) -> Tensor:
    """The product of each row with the weight of its relation, which is read where it lies."""
    weight = layer.weight  # [R, X, O], or of the bases
    if layer.num_bases is not None:
        weight = (layer.comp @ weight.flatten(1)).view(-1, *weight.shape[1:])
    relations = edge_type if edge_type.is_floating_point() else edge_type.long()  # int32 will do there, too
    return call(hyper.apply_generated, x, weight.transpose(1, 2), segment_ids=relations)


def _layers(network: Any) -> list[Any] | str:
    """The layers of a network whose last one may be read instead of called, or why there are none."""
    layers = list(network) if type(network) is nn.Sequential else [network]
    if not layers or type(layers[-1]) is not nn.Linear:
        return "its nn is neither an nn.Linear nor an nn.Sequential that ends with one"
    for part in (network, layers[-1]):
        if "forward" in vars(part) or any(getattr(part, name) for name in HOOKS):
            return "its nn, or the last layer of that, has hooks or another forward"
    return layers


def _nn_conv(layer: NNConv) -> NNConv | str:
    layers = _layers(layer.nn)
    if isinstance(layers, str):
        return layers
    try:
        HyperLinear.from_linear(
            layers[-1],
            in_features=layer.in_channels_l,
            out_features=layer.out_channels,
            order="in,out",
            bias=None,
        )
    except (TypeError, ValueError) as error:
        return f"its nn: {error}"
    layer.__class__ = FusedNNConv
    return layer


def _rgcn_conv(layer: RGCNConv) -> RGCNConv | str:
    if layer.num_blocks is not None:
        return "its weight is block-diagonal (num_blocks)"
    if not layer.weight.is_floating_point():
        return "its parameters are complex"
    if type(layer) is FastRGCNConv:
        layer.__class__ = FusedFastRGCNConv
        return layer
    if layer.aggr not in ("add", "sum", "mean"):
        return f"its messages are not summed or averaged (aggr={layer.aggr!r})"
    layer.__class__ = FusedRGCNConv
    return layer


RULES = {NNConv: _nn_conv, RGCNConv: _rgcn_conv, FastRGCNConv: _rgcn_conv}
