"""mi.nn.HyperLoRA: the start, contexts, binding, frozen layers, what moves with it."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import mi_kernels as mi

FEATURES = {"context_features": 3, "rank": 2}


def made(bias=True, scale=1.0, started=True, **options):
    torch.manual_seed(0)
    linear = nn.Linear(5, 4, bias, dtype=torch.float64)
    layer = mi.nn.HyperLoRA(linear, scale=scale, **FEATURES | options)
    if started:  # as after some steps of training
        for weight in (layer.down_weight_x, layer.up_weight, layer.up_weight_x):
            nn.init.normal_(weight)
    return layer


def normal(*size):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(len(size)))


def one(layer, x, z):
    """Of one context [Z], by the formula."""
    down = torch.einsum("i,rij->rj", z, layer.down_weight) + layer.down_weight_x
    up = torch.einsum("i,oir->or", z, layer.up_weight) + layer.up_weight_x
    return layer.linear(x) + layer.scale * (x @ down.T) @ up.T


def test_at_the_start_it_is_the_layer_itself():
    layer = made(started=False)
    x, z = normal(2, 7, 5), normal(2, 3)
    y = layer(x, z)
    assert torch.equal(y, layer.linear(x))
    y.square().sum().backward()
    assert layer.up_weight.grad.norm() > 0 and layer.up_weight_x.grad.norm() > 0
    assert layer.down_weight.grad.norm() == 0  # as B is zero


def test_a_context_of_unit_variance_gives_features_of_unit_variance():
    torch.manual_seed(0)
    layer = mi.nn.HyperLoRA(nn.Linear(200, 3), context_features=30, rank=40)
    down, _ = mi.generate(torch.randn(30, 30), layer.down_weight)
    features = mi.apply_generated(torch.randn(30, 1, 200), down.unsqueeze(1))
    assert 0.8 < features.square().mean() < 1.2


@pytest.mark.parametrize("bias", [True, False])
def test_contexts_belong_to_inputs_as_in_every_module(bias):
    layer, x = made(bias, 0.5), normal(2, 7, 5)
    per_sample = torch.stack([one(layer, *pair) for pair in zip(x, normal(2, 3), strict=True)])
    torch.testing.assert_close(layer(x, normal(2, 3)), per_sample)
    torch.testing.assert_close(layer(x, normal(3)), one(layer, x, normal(3)))
    z = normal(2, 7, 3)
    each = [one(layer, *pair) for pair in zip(x.flatten(0, 1), z.flatten(0, 1), strict=True)]
    torch.testing.assert_close(layer(x, z), torch.stack(each).unflatten(0, (2, 7)))
    with pytest.raises(ValueError, match="^HyperLoRA: z: expected contexts of samples or of positions"):
        layer(normal(3, 3, 5), normal(3, 3))
    with pytest.raises(ValueError, match=r"^HyperLoRA: z: expected shape \[..., Z=3\], got \[2, 4\]"):
        layer(x, normal(2, 4))


def test_groups_of_unequal_length():
    layer, x, z = made(scale=0.5), normal(6, 5), normal(3, 3)
    ids = torch.tensor([2, 0, 0, 2, 2, 0])
    expected = torch.stack([one(layer, row, z[group]) for row, group in zip(x, ids, strict=True)])
    torch.testing.assert_close(layer(x, z, ids), expected)
    torch.testing.assert_close(layer(x, z, segment_ids=ids), expected)


def test_derivatives():
    layer = made(scale=0.5)
    gradcheck(layer, (normal(2, 3, 5).requires_grad_(), normal(2, 3).requires_grad_()))
    names, values = zip(*layer.named_parameters(), strict=True)

    def of_parameters(*values):
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, named, (normal(2, 3, 5), normal(2, 3)))

    gradcheck(of_parameters, values)


def test_a_frozen_layer_stays_frozen():
    linear = nn.Linear(5, 4).requires_grad_(False)
    layer = mi.nn.HyperLoRA(linear, **FEATURES)
    before = copy.deepcopy(linear.state_dict())
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 7, 5), torch.randn(2, 3)).square().mean().backward()
        optimizer.step()
    assert layer.linear is linear and linear.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
    assert layer.up_weight.norm() > 0 and list(layer.state_dict())[:4] == [
        "down_weight",
        "down_weight_x",
        "up_weight",
        "up_weight_x",
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_bind(bias):
    layer, x, z = made(bias, 0.5).eval(), normal(7, 5), normal(3)
    bound = layer.bind(z)
    assert type(bound) is nn.Linear and not bound.training
    assert (bound.in_features, bound.out_features) == (5, 4) and (bound.bias is not None) == bias
    assert not any(p.requires_grad for p in bound.parameters())
    torch.testing.assert_close(bound(x), layer(x, z))
    assert bound.weight.data_ptr() != layer.linear.weight.data_ptr()
    many = layer.bind(normal(2, 3))
    assert type(many) is mi.nn.BoundLinear
    tokens = normal(2, 7, 5)
    torch.testing.assert_close(many(tokens), layer(tokens, normal(2, 3)))
    before = bound.weight.clone()
    with torch.no_grad():
        layer.linear.weight.zero_()
    assert torch.equal(bound.weight, before)


def test_bind_of_16_bits_rounds_once():
    layer, z = made(scale=0.5), normal(3)
    low = copy.deepcopy(layer).bfloat16()
    exact = copy.deepcopy(low).double()
    down, up = low._factors(z.bfloat16())
    expected = exact.linear.weight + 0.5 * up.double() @ down.double()
    assert torch.equal(low.bind(z.bfloat16()).weight.double(), expected.float().bfloat16().double())
    single = copy.deepcopy(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert single.bind(z.float()).weight.dtype == torch.float32


def test_context_network():
    network = nn.Embedding(9, 3, dtype=torch.float64)
    layer = made(context_network=network)
    x, which = normal(2, 7, 5), torch.tensor([4, 1])
    torch.testing.assert_close(layer(x, which), made()(x, network(which)))
    torch.testing.assert_close(layer.bind(which[0])(x[0]), layer(x, which)[0])
    layer.context_network = nn.Embedding(9, 2)
    with pytest.raises(ValueError, match=r"^HyperLoRA: context_network: expected shape \[..., Z=3\], got"):
        layer(x, which)


def test_parameters_are_where_those_of_the_layer_are():
    layer = mi.nn.HyperLoRA(nn.Linear(5, 4, device="meta", dtype=torch.bfloat16), **FEATURES)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert repr(layer).startswith("HyperLoRA(\n  context_features=3, rank=2, scale=1.0")


@pytest.mark.compile
def test_compile(fresh_compiler):
    layer, x, z = made(), normal(2, 7, 5), normal(2, 3)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x, z), layer(x, z))


def test_autocast():
    layer, x, z = made().float(), normal(2, 7, 5).float(), normal(2, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, z)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, z), rtol=0.05, atol=0.1)


class Adapted(nn.Linear):
    """What packages of adapters put in the place of a layer."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def test_a_layer_that_computes_more_is_not_merged():
    """Its weight alone would leave something out."""
    layer = mi.nn.HyperLoRA(Adapted(4, 5), context_features=3, rank=2)
    with pytest.raises(TypeError, match="HyperLoRA: bind: linear: .*, got Adapted: merge its own adapter"):
        layer.bind(torch.randn(3))
    layer.linear = nn.Linear(4, 5)
    torch.nn.utils.parametrizations.weight_norm(layer.linear)
    x, z = torch.randn(6, 4), torch.randn(3)
    torch.testing.assert_close(layer.bind(z)(x), layer(x, z))
