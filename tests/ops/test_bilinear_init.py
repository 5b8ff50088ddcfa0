"""Initialisation of mi.nn.Bilinear: PyTorch's by default, unit variance on request."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import mi_kernels as mi


def outputs(layer, size, rows=512):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(rows, size, generator=generator) for _ in range(2))
    return layer(a, b).detach()


def test_the_variance_of_outputs_is_one():
    torch.manual_seed(0)
    theirs = mi.nn.Bilinear(256, 256, 16, bias=False)
    ours = mi.nn.Bilinear(256, 256, 16, init="unit")
    assert outputs(theirs, 256).std() > 8.5  # sqrt(256 / 3) = 9.2
    # Of 512 x 16 products: |x|^2 |z|^2 varies by a few percent from row to row, W by less.
    assert abs(outputs(ours, 256).std() - 1) < 0.05


@pytest.mark.parametrize("sizes", [(3, 7, 64), (64, 5, 32), (1, 1, 4096)])
def test_the_weight_is_uniform_with_that_variance(sizes):
    torch.manual_seed(0)
    weight = mi.nn.Bilinear(*sizes, init="unit").weight.detach()
    bound = math.sqrt(3 / (sizes[0] * sizes[1]))
    assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    # The square of a uniform variable has variance (4/5) of its squared mean.
    assert abs(weight.square().mean() / (bound**2 / 3) - 1) < 4 * math.sqrt(0.8 / weight.numel())
    assert abs(weight.mean()) < 4 * bound / math.sqrt(3 * weight.numel())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [{}, {"init": "torch"}], ids=["default", "by name"])
def test_the_default_is_that_of_pytorch_bit_for_bit(bias, given):
    torch.manual_seed(5)
    expected = nn.Bilinear(4, 3, 2, bias)
    after = torch.rand(())
    torch.manual_seed(5)
    layer = mi.nn.Bilinear(4, 3, 2, bias, **given)
    assert torch.equal(after, torch.rand(()))
    torch.testing.assert_close(layer.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert repr(layer) == repr(expected)


def test_one_draw_of_the_weight_and_a_zero_bias():
    """No number of the random stream is lost to a draw that is thrown away."""
    torch.manual_seed(5)
    layer = mi.nn.Bilinear(4, 3, 2, init="unit")
    torch.manual_seed(5)
    bound = math.sqrt(3 / 12)
    assert torch.equal(layer.weight, nn.init.uniform_(torch.empty(2, 4, 3), -bound, bound))
    assert torch.equal(layer.bias, torch.zeros(2))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_reset_parameters_draws_the_same_again():
    torch.manual_seed(5)
    layer = mi.nn.Bilinear(4, 3, 2, init="unit")
    expected = copy.deepcopy(layer.state_dict())
    nn.init.ones_(layer.bias)
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), expected, rtol=0, atol=0)


def test_copies_keep_it_and_say_so():
    layer = mi.nn.Bilinear(4, 3, 2, init="unit")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert other.init == "unit" and repr(other) == repr(layer)
    assert repr(layer).endswith("bias=True, init='unit')")


def test_converted_layers_are_drawn_as_before():
    layer = mi.convert(nn.Bilinear(4, 3, 2))
    assert layer.init == "torch" and "init" not in vars(layer)
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    torch.testing.assert_close(layer.state_dict(), nn.Bilinear(4, 3, 2).state_dict(), rtol=0, atol=0)


def test_there_and_back():
    layer = mi.convert(mi.nn.Bilinear(4, 3, 2, init="unit"), to="torch")
    assert type(layer) is nn.Bilinear and b"mi_kernels" not in pickle.dumps(layer)
    layer.reset_parameters()  # PyTorch's
    assert mi.convert(layer).init == "unit"


@pytest.mark.parametrize("sizes", [(2, 0, 3), (2, 3, 0)])
def test_empty_weights(sizes):
    assert mi.nn.Bilinear(*sizes, init="unit").weight.numel() == 0


def test_on_the_meta_device():
    assert mi.nn.Bilinear(2, 3, 4, device="meta", init="unit").weight.is_meta


@pytest.mark.parametrize("init", ["one", None, 1, ["unit"]], ids=str)
def test_choices(init):
    with pytest.raises(ValueError, match="^Bilinear: init: expected one of torch, unit, got "):
        mi.nn.Bilinear(2, 3, 4, init=init)
