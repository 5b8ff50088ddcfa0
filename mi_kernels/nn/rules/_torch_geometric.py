"""Layers of torch_geometric."""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import FastRGCNConv, FiLMConv, MessagePassing, NNConv, RGCNConv
from torch_geometric.nn.dense import Linear

from ...functional import gates, hyper, interaction
from ...functional._call import call
from ...functional.heads import split_head
from ..heads import HOOKS
from ..hyper import HyperLinear


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
        """As the layer of the package: one product for each edge."""
        x_l, x_r = x if isinstance(x, tuple) else (x, x)
        if edge_type is None or not _has_few_edges(self, x_l, x_r, edge_index):
            return super().forward(x, edge_index, edge_type)
        source, target = _ends(self, edge_index)
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


class FusedFiLMConv(FiLMConv):
    """Products for the pairs of a node and a relation that occur, instead of all there are."""

    def forward(self, x: Any, edge_index: Any, edge_type: Tensor | None = None) -> Tensor:
        """As the layer of the package: products for the pairs that occur."""
        x_l, x_r = x if isinstance(x, tuple) else (x, x)
        if (
            edge_type is None
            or not _has_few_edges(self, x_l, x_r, edge_index)
            or _why_not_read(self) is not None
            or not self._knows(edge_type)
        ):
            return super().forward(x, edge_index, edge_type)
        source, target = (end.long() for end in _ends(self, edge_index))
        relation, count = edge_type.long(), self.num_relations
        y = self._modulated(self.lin_skip(x_r), self.film_skip(x_r))
        weight = torch.stack([each.weight for each in self.lins])
        pairs, pair = torch.unique(source * count + relation, return_inverse=True)
        features = _by_relation(x_l, pairs, count, weight)[pair]
        weight, bias = (
            torch.stack([getattr(each, name) for each in self.films]) for name in ("weight", "bias")
        )
        pairs, pair, edges = torch.unique(target * count + relation, return_inverse=True, return_counts=True)
        messages = self._modulated(features, _by_relation(x_r, pairs, count, weight, bias)[pair])
        if self.aggr == "mean":  # of each relation
            messages = messages / edges[pair].unsqueeze(1)
        return y.index_add(0, target, messages)

    def _modulated(self, x: Tensor, film: Tensor) -> Tensor:
        shift, scale = film.split(self.out_channels, -1)
        y = call(gates.modulate, x, scale, shift)
        return y if self.act is None else self.act(y)

    def _knows(self, relation: Tensor) -> bool:
        """FiLMConv leaves edges of other types out."""
        return bool(((relation >= 0) & (relation < self.num_relations)).all())


def _by_relation(x: Tensor, pairs: Tensor, relations: int, *weights: Tensor) -> Tensor:
    rows = x.index_select(0, pairs.div(relations, rounding_mode="floor"))
    return call(hyper.apply_generated, rows, *weights, segment_ids=pairs % relations)


def _ends(layer: MessagePassing, edge_index: Tensor) -> tuple[Tensor, Tensor]:
    """Where edges start and where they end."""
    source, target = edge_index if layer.flow == "source_to_target" else edge_index.flip(0)
    return source, target


def _has_few_edges(layer: RGCNConv | FiLMConv, x_l: Any, x_r: Any, edge_index: Any) -> bool:
    """Features, not numbers of nodes; fewer products than the layer has; no hooks in between."""
    if type(edge_index) is not Tensor or layer.explain or any(getattr(layer, name) for name in _PROPAGATE):
        return False
    features = all(isinstance(each, Tensor) and each.is_floating_point() for each in (x_l, x_r))
    # One thread, 16 to 128 features: 1.3 to 9 times as fast from here on; with half as many products, at
    # one for each edge, 0.5 to 1.5 times.
    return features and 2 * edge_index.shape[1] <= layer.num_relations * len(x_r)


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


_HOOKS_OF_CALLS = [name for name in HOOKS if "state_dict" not in name]
# Of each element alone, and the same each time.
_ELEMENTWISE = nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus


def _why_not_read(layer: FiLMConv) -> str | None:
    """Why its parts may not be read instead of called; None if they may."""
    if layer.act is not None and type(layer.act) not in _ELEMENTWISE:
        return f"its act is no activation of each element that is known here ({type(layer.act).__name__})"
    for part in (*layer.lins, *layer.films):
        if type(part) not in (Linear, nn.Linear):
            return f"its nn is no linear layer ({type(part).__name__})"
        if "forward" in vars(part) or any(getattr(part, name) for name in _HOOKS_OF_CALLS):
            return "a linear layer of it has hooks, another forward, or no sizes yet"
        if not part.weight.is_floating_point():
            return "its parameters are complex"
    if any(part.bias is None for part in layer.films):
        return "its nn has no bias"
    return None


def _film_conv(layer: FiLMConv) -> FiLMConv | str:
    if layer.aggr not in ("add", "sum", "mean"):
        return f"its messages are not summed or averaged (aggr={layer.aggr!r})"
    if layer.num_relations == 1:
        return "it has one relation: its message is one multiplication and addition"
    reason = _why_not_read(layer)
    if reason is None:
        layer.__class__ = FusedFiLMConv
    return reason or layer


RULES = {NNConv: _nn_conv, RGCNConv: _rgcn_conv, FastRGCNConv: _rgcn_conv, FiLMConv: _film_conv}
