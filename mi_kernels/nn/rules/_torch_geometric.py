"""Layers of torch_geometric."""

from typing import Any

from torch import Tensor, nn
from torch_geometric.nn import FastRGCNConv, NNConv

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
        weight = self.weight  # [R, X, O]
        if self.num_bases is not None:
            weight = (self.comp @ weight.flatten(1)).view(-1, *weight.shape[1:])
        return call(hyper.apply_generated, x_j, weight.transpose(1, 2), segment_ids=edge_type)


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
            layers[-1], layer.in_channels_l, layer.out_channels, order="in,out", bias=None
        )
    except (TypeError, ValueError) as error:
        return f"its nn: {error}"
    layer.__class__ = FusedNNConv
    return layer


def _fast_rgcn_conv(layer: FastRGCNConv) -> FastRGCNConv | str:
    if layer.num_blocks is not None:
        return "its weight is block-diagonal (num_blocks)"
    if not layer.weight.is_floating_point():
        return "its parameters are complex"
    layer.__class__ = FusedFastRGCNConv
    return layer


RULES = {NNConv: _nn_conv, FastRGCNConv: _fast_rgcn_conv}
