"""A program as users with strict type checkers write them: test_types.py checks it, and what it says it has.

``assert_type`` holds for the checkers; the program also runs.
"""

from typing import assert_type

import torch
from torch import Tensor, nn

import mi_kernels as mi


def functions(x: Tensor, z: Tensor, w: Tensor, u: Tensor, groups: Tensor) -> Tensor:
    y = mi.interaction(x, z, w, None, None, torch.zeros(()))
    assert_type(y, Tensor)
    assert_type(mi.bilinear(z, x, mi.pack(w)), Tensor)
    assert_type(mi.interaction(x, z, w, segment_ids=groups), Tensor)
    assert_type(mi.generate(z, w), tuple[Tensor, Tensor | None])
    assert_type(mi.diagonal(x, z, u, activation="sigmoid", scale_offset=1.0), Tensor)
    activation: mi.ActivationName = "softmax"
    assert_type(mi.gated_interaction(x, z, w, activation=activation), Tensor)
    return mi.modulate(y, y, activation="gelu_tanh")


def modules(x: Tensor, z: Tensor) -> Tensor:
    layer = mi.nn.HyperLinear(4, out_features=4, context_features=3, context_network=nn.Linear(3, 3))
    assert_type(layer(x, z), Tensor)
    assert_type(layer.weight, nn.Parameter)
    assert_type(layer.bias, nn.Parameter | None)
    assert_type(layer.bind(z[0]), nn.Linear | mi.nn.BoundLinear)
    network = mi.nn.HyperMLP([4, 5, 4], context_features=3, activation=torch.tanh)
    assert_type(network(x, z), Tensor)
    assert_type(network.bind(z), nn.Sequential)
    film = mi.nn.FiLM(4, context_features=3, activation="sigmoid")
    gated = mi.nn.GatedInteraction(4, context_features=3, activation="softmax")
    diagonal = mi.nn.DiagonalInteraction(4, context_features=3)
    dense = mi.nn.MultiplicativeInteraction(4, context_features=3, out_features=4)
    bilinear = mi.nn.Bilinear(3, 4, 4)
    optimizer = torch.optim.SGD([dense.weight, diagonal.weight, gated.weight, bilinear.weight], lr=0.1)
    y = film(gated(diagonal(dense(x, z), z), z), z)
    assert_type(y, Tensor)
    assert_type(bilinear(z, y), Tensor)
    torch.autograd.backward([y.sum()])
    optimizer.step()
    return y


@mi.backend("portable")
def decorated(x: Tensor) -> Tensor:
    return mi.modulate(x, x)


def tools(x: Tensor, z: Tensor, w: Tensor) -> mi.Plan:
    name: mi.BackendName = "reference"
    with mi.backend(name):
        assert_type(decorated(x), Tensor)
    model = nn.Bilinear(3, 4, 4)
    assert_type(mi.convert(model), nn.Bilinear)
    plan = mi.explain(mi.nn.HyperMLP([4, 5, 4], context_features=3), x, z)
    assert_type(plan.calls, tuple[mi.Plan, ...])
    assert_type(plan.scratch, int | None)
    return mi.explain(mi.interaction, x, z, w)


if __name__ == "__main__":
    rows, context, weight = torch.ones(5, 4), torch.ones(5, 3), torch.ones(4, 3, 4)
    groups = torch.arange(5)
    functions(rows, context, weight, torch.ones(4, 3), groups)
    modules(rows, context)
    print(tools(rows, context, weight))
