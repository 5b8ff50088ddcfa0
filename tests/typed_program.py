"""A program as users with strict type checkers write them: test_types.py checks it, and what it says it has.

``assert_type`` holds for the checkers; the program also runs.
"""

import sys

import torch
from torch import Tensor, nn

if sys.version_info >= (3, 11):
    from typing import assert_type
else:
    from typing_extensions import assert_type

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


def sequences(x: Tensor) -> Tensor:
    lstm = mi.nn.MultiplicativeLSTM(4, 5, 2, proj_size=3, num_factors=6, memory="low")
    output, state = lstm(x, lengths=[5, 2])
    assert_type(output, Tensor)
    assert_type(state, tuple[Tensor, Tensor])
    rnn = mi.nn.SecondOrderRNN(4, 5, rank=2, nonlinearity="relu", bidirectional=True)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2]))
    assert_type(rnn(packed), tuple[nn.utils.rnn.PackedSequence, Tensor])
    assert_type(rnn(x, rnn(x)[1]), tuple[Tensor, Tensor])
    assert_type(mi.nn.MultiplicativeIntegrationLSTMCell(4, 5)(x[0]), tuple[Tensor, Tensor])
    cell = mi.nn.MultiplicativeIntegrationGRUCell(4, 5)
    assert_type(cell(x[0], cell(x[0])), Tensor)
    return output


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
    sequences(torch.ones(5, 2, 4))
    print(tools(rows, context, weight))
