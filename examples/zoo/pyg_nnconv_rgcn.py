"""PyTorch Geometric's NNConv and RGCNConv: a matrix for each edge, and one for each relation.

    python examples/zoo/pyg_nnconv_rgcn.py

NNConv (Gilmer et al., ICML 2017) generates a matrix for each edge of its attributes. mi.convert with its
rule makes the last layer of the edge network the weight of an interaction, and the matrices are never
made. RGCNConv (Schlichtkrull et al., ESWC 2018) multiplies all nodes by the matrix of every relation in
turn. Its rule has a product for each edge. FusedRGCN, here, has one for each pair of a node and a relation
that occurs; with a basis decomposition, the coefficients of a relation are the context z of an
interaction.

Timed on random graphs of the sizes of PyG's examples (QM9: batches of 128 molecules, 64 channels; AIFB: 90
relations, 16 channels, 30 bases), without pyg_lib. Trained on the karate club, which PyG ships: NNConv
alone.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from _compare import Result, Step, compare, fit, main, need, steps_of
from torch import Tensor, nn

import mi_kernels as mi

pyg = need("torch_geometric.nn", "torch_geometric")
datasets = need("torch_geometric.datasets", "torch_geometric")
RELATIONS = 90


class FusedRGCN(pyg.RGCNConv):
    """Of aggr="mean" and no blocks: the same parameters, one product over pairs of a node and a relation."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor) -> Tensor:
        source, target = edge_index
        # Rows are the pairs that occur: the mean of the neighbours of a node by one relation.
        pairs, row, count = torch.unique(edge_type * len(x) + target, return_inverse=True, return_counts=True)
        relation, node = pairs // len(x), pairs % len(x)
        mean = x.new_zeros(len(pairs), x.shape[1]).index_add(0, row, x[source]) / count.unsqueeze(1)
        weight = self.weight.permute(2, 0, 1)  # [O, bases, X], or [O, relations, X]
        if self.num_bases is None:
            y = mi.apply_generated(mean, weight.transpose(0, 1), segment_ids=relation)
        else:
            y = mi.interaction(mean, self.comp, weight, segment_ids=relation)
        return (x @ self.root + self.bias).index_add(0, node, y)


def edge_network(attributes: int, hidden: int, inputs: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(attributes, hidden), nn.ReLU(), nn.Linear(hidden, inputs * out))


def converted(model: nn.Module) -> nn.Module:
    return mi.convert(model, rules=mi.nn.rules.torch_geometric())


def nnconv(dtype: torch.dtype, nodes: int, edges: int, channels: int) -> tuple[Step, Step]:
    theirs = pyg.NNConv(channels, channels, edge_network(5, 2 * channels, channels, channels), aggr="mean")
    theirs = theirs.to(dtype)
    ours = converted(copy.deepcopy(theirs))
    x = torch.randn(nodes, channels, dtype=dtype, requires_grad=True)
    index, attributes = torch.randint(nodes, (2, edges)), torch.randn(edges, 5, dtype=dtype)
    return steps_of(ours, theirs, x, index, attributes)


def rgcn(
    dtype: torch.dtype, rule: bool, bases: int | None, nodes: int, edges: int, channels: int
) -> tuple[Step, Step]:
    theirs = pyg.RGCNConv(channels, channels, RELATIONS, bases).to(dtype)
    ours = copy.deepcopy(theirs)
    if rule:
        converted(ours)
    else:
        ours.__class__ = FusedRGCN
    x = torch.randn(nodes, channels, dtype=dtype, requires_grad=True)
    index, kinds = torch.randint(nodes, (2, edges)), torch.randint(RELATIONS, (edges,))
    return steps_of(ours, theirs, x, index, kinds)


class Club(nn.Module):
    """The faction of each member, from two layers; an edge is described by degrees and common friends."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.first = pyg.NNConv(34, hidden, edge_network(3, 16, 34, hidden), aggr="mean")
        self.second = pyg.NNConv(hidden, 4, edge_network(3, 16, hidden, 4), aggr="mean")

    def forward(self, x: Tensor, index: Tensor, attributes: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x, index, attributes)), index, attributes)


def train(convert: bool, steps: int) -> tuple[list[float], float]:
    """(losses on every second member, accuracy on the others)."""
    torch.manual_seed(0)
    club = datasets.KarateClub()[0]
    labelled = torch.arange(34) % 2 == 0
    adjacency = torch.zeros(34, 34).index_put(tuple(club.edge_index), torch.ones(1))
    a, b = club.edge_index
    common = (adjacency @ adjacency)[a, b]
    attributes = torch.stack([adjacency.sum(0)[a], adjacency.sum(0)[b], common], 1) / 10
    model = converted(Club()) if convert else Club()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=5e-4)

    def scores() -> Tensor:
        return model(club.x, club.edge_index, attributes)

    losses = fit(lambda _: F.cross_entropy(scores()[labelled], club.y[labelled]), optimizer, steps)
    right = (scores().argmax(1) == club.y)[~labelled]
    return losses, right.float().mean().item()


def run(steps: int, quick: bool) -> Result:
    qm9, aifb = ((40, 80, 8), (50, 200, 8)) if quick else ((2300, 4700, 64), (8000, 58000, 16))
    cases = {f"NNConv, {qm9[1]} edges": lambda dtype: nnconv(dtype, *qm9)}
    for bases in (None, 30):
        for rule in (True, False):
            name = f"RGCNConv, {aifb[1]} edges, bases {bases}, by {'its rule' if rule else 'FusedRGCN'}"
            cases[name] = lambda dtype, chosen=(rule, bases): rgcn(dtype, *chosen, *aifb)
    comparisons = [compare(name, make, quick) for name, make in cases.items()]
    (theirs, before), (ours, after) = (train(convert, steps) for convert in (False, True))
    scores = {"accuracy on the other members": f"theirs {100 * before:.1f} %, ours {100 * after:.1f} %"}
    return Result(comparisons, {"theirs": theirs, "ours": ours}, scores)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, steps=100))
