"""The modes of torch.compile, on a model of several families; test_compile.py has the rest."""

import pytest
import torch
from torch import nn

import mi_kernels as mi

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("fresh_compiler")]
MODES = ("default", "reduce-overhead", "max-autotune")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = mi.nn.MultiplicativeInteraction(8, context_features=3, out_features=8)
        self.gate = mi.nn.DiagonalInteraction(8, context_features=3, activation="sigmoid")
        self.glu = mi.nn.GLU(8, out_features=8)

    def forward(self, x, z):
        return mi.modulate(self.glu(self.gate(self.layer(x, z).relu(), z)), x, activation="tanh")


def trained(call, model, given):
    model.zero_grad()
    y = call(*given)
    y.sin().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, place):
    """Whole graphs, for one size and for all."""
    model = Model().to(place.device)
    given = [[torch.randn(rows, n, device=place.device) for n in (8, 3)] for rows in (6, 17)]
    compiled = torch.compile(model, mode=mode, fullgraph=True, dynamic=mode == "default")
    for inputs in given if mode == "default" else given[:1]:
        torch.testing.assert_close(trained(compiled, model, inputs), trained(model, model, inputs))
