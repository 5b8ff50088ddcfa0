"""Modules: parameters, initialisation, state dict, copies; the arithmetic is tested with the functions."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import mi_kernels as mi

MAKERS = {
    "interaction": lambda **kw: mi.nn.MultiplicativeInteraction(4, context_features=3, out_features=5, **kw),
    "interaction-w-only": lambda **kw: mi.nn.MultiplicativeInteraction(
        4, context_features=3, out_features=5, bias=False, weight_z=False, weight_x=False, **kw
    ),
    "bilinear": lambda **kw: mi.nn.Bilinear(4, 3, 5, **kw),
    "bilinear-no-bias": lambda **kw: mi.nn.Bilinear(4, 3, 5, bias=False, **kw),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def seeded(make, **kwargs):
    torch.manual_seed(0)
    return make(**kwargs)


def assert_same_state(one, other):
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, 6, size, generator=generator, dtype=dtype) for size in (4, 3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bilinear_has_the_parameters_and_the_stream_of_torch(bias, dtype):
    theirs = seeded(lambda: nn.Bilinear(7, 5, 3, bias=bias, dtype=dtype))
    after_theirs = torch.rand(3)
    ours = seeded(lambda: mi.nn.Bilinear(7, 5, 3, bias=bias, dtype=dtype))
    assert torch.equal(after_theirs, torch.rand(3))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_state(ours, theirs)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.Bilinear)


def test_bilinear_computes_what_torch_computes():
    theirs = nn.Bilinear(4, 3, 5, dtype=torch.float64)
    ours = mi.nn.Bilinear(4, 3, 5, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    a, b = inputs(torch.float64)
    expected, result = theirs(a, b), ours(a, b)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    expected.sum().backward()
    result.sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_bilinear_broadcasts_leading_dimensions():
    layer = mi.nn.Bilinear(4, 3, 5)
    assert layer(torch.randn(6, 4), torch.randn(2, 1, 3)).shape == (2, 6, 5)


def test_bilinear_refuses_what_torch_refuses():
    with pytest.raises(ValueError, match="in1_features must be > 0"):
        mi.nn.Bilinear(0, 3, 5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_z", [True, False])
@pytest.mark.parametrize("weight_x", [True, False])
def test_interaction_adds_the_terms_that_it_has(bias, weight_z, weight_x):
    terms = {"bias": bias, "weight_z": weight_z, "weight_x": weight_x}
    layer = mi.nn.MultiplicativeInteraction(
        4, context_features=3, out_features=5, dtype=torch.float64, **terms
    )
    names = [name for name, on in (("weight_z", weight_z), ("weight_x", weight_x), ("bias", bias)) if on]
    assert list(layer.state_dict()) == ["weight", *names]
    for flag in ("bias", "weight_z", "weight_x"):
        assert f"{flag}={flag in names}" in repr(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x, z = inputs(torch.float64)
    expected = torch.einsum("...i,oij,...j->...o", z, layer.weight, x)
    expected = expected + (z @ layer.weight_z.T if weight_z else 0)
    expected = expected + (x @ layer.weight_x.T if weight_x else 0)
    expected = expected + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x, z), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 50), (50, 1), (8, 8), (40, 70)])
@pytest.mark.parametrize("terms", [(True, True), (True, False), (False, False)])
def test_output_variance_does_not_depend_on_the_sizes(sizes, terms):
    torch.manual_seed(0)
    x_size, z_size = sizes
    terms = dict(zip(("weight_z", "weight_x"), terms, strict=True))
    layer = mi.nn.MultiplicativeInteraction(x_size, context_features=z_size, out_features=512, **terms)
    y = layer(torch.randn(4096, x_size), torch.randn(4096, z_size))
    assert y.square().mean().item() == pytest.approx(1, abs=0.15)


def test_each_term_has_its_share_of_the_variance():
    torch.manual_seed(0)
    layer = mi.nn.MultiplicativeInteraction(30, context_features=20, out_features=400)
    for term in (layer.weight, layer.weight_z, layer.weight_x):
        fan = math.prod(term.shape[1:])
        assert term.abs().max() <= math.sqrt(1 / fan)
        assert fan * term.square().mean().item() == pytest.approx(1 / 3, rel=0.05)
    assert not layer.bias.any()


def test_terms_without_elements_take_no_share():
    torch.manual_seed(0)
    layer = mi.nn.MultiplicativeInteraction(50, context_features=0, out_features=400)
    assert layer.weight.shape == (400, 0, 50)
    assert 50 * layer.weight_x.square().mean().item() == pytest.approx(1, rel=0.05)
    assert layer(torch.randn(3, 50), torch.randn(3, 0)).shape == (3, 400)
    nothing = mi.nn.MultiplicativeInteraction(0, context_features=0, out_features=2)
    assert torch.equal(nothing(torch.randn(3, 0), torch.randn(3, 0)), torch.zeros(3, 2))


@pytest.mark.parametrize("name", ["in_features", "context_features", "out_features"])
def test_negative_sizes_are_named(name):
    sizes = {"in_features": 4, "context_features": 3, "out_features": 5, name: -1}
    with pytest.raises(ValueError, match=f"MultiplicativeInteraction: {name}: expected >= 0, got -1"):
        mi.nn.MultiplicativeInteraction(**sizes)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="weight"):
        mi.nn.MultiplicativeInteraction(4, context_features=3, out_features=5)(
            torch.randn(2, 4), torch.randn(2, 4)
        )
    with pytest.raises(ValueError, match="weight"):
        mi.nn.Bilinear(4, 3, 5)(torch.randn(2, 3), torch.randn(2, 3))


def test_same_seed_same_parameters(make):
    assert_same_state(seeded(make), seeded(make))


def test_factory_arguments(make):
    layer = make(device="meta", dtype=torch.float64)
    for parameter in layer.parameters():
        assert parameter.is_meta and parameter.dtype == torch.float64


def test_meta_device_then_reset_is_a_fresh_layer(make):
    with torch.device("meta"):
        layer = make()
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    assert_same_state(layer, seeded(make))


def test_skip_init(make):
    layer = type(make())
    sizes = {"in_features": 4, "context_features": 3, "out_features": 5}
    if layer is mi.nn.Bilinear:
        sizes = {"in1_features": 4, "in2_features": 3, "out_features": 5}
    layer = nn.utils.skip_init(layer, **sizes)
    assert not any(parameter.is_meta for parameter in layer.parameters())


def _deepcopied(layer):
    return copy.deepcopy(layer)


def _pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def _saved_whole(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def _saved_state(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    other = copy.deepcopy(layer)
    other.reset_parameters()
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return other


@pytest.mark.parametrize("duplicate", [_deepcopied, _pickled, _saved_whole, _saved_state])
def test_copies_are_equal_and_independent(make, duplicate):
    layer = make().eval()
    layer.weight.requires_grad_(False)
    other = duplicate(layer)
    assert type(other) is type(layer) and repr(other) == repr(layer)
    assert not other.training and not other.weight.requires_grad
    assert_same_state(other, layer)
    a, b = inputs()
    assert torch.equal(other(a, b), layer(a, b))
    with torch.no_grad():
        other.weight.add_(1)
    assert not torch.equal(other.weight, layer.weight)


def test_a_step_of_training_reaches_every_parameter(make):
    layer = seeded(make)
    before = copy.deepcopy(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    a, b = inputs()
    loss = layer(a, b).square().mean()
    loss.backward()
    optimizer.step()
    assert layer(a, b).square().mean() < loss
    for old, new in zip(before.parameters(), layer.parameters(), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.parametrize("size", ["2", 2.5, None, True], ids=repr)
@pytest.mark.parametrize("place", range(3))
def test_sizes_are_integers(size, place):
    name = ("in_features", "context_features", "out_features")[place]
    sizes = {"in_features": 2, "context_features": 3, "out_features": 4, name: size}
    message = f"MultiplicativeInteraction: {name}: expected an int, got {type(size).__name__}"
    with pytest.raises(TypeError, match=message):
        mi.nn.MultiplicativeInteraction(**sizes)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_parameters_are_floating(dtype):
    with pytest.raises(TypeError, match=f"MultiplicativeInteraction: dtype: expected one of .*, got {dtype}"):
        mi.nn.MultiplicativeInteraction(2, context_features=3, out_features=4, dtype=dtype)
