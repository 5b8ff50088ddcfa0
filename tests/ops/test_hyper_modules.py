"""HyperLinear and HyperMLP: parameters, start, bound layers; the arithmetic is tested with the functions."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers import Spy
from torch import nn

import mi_kernels as mi

F64 = {"dtype": torch.float64}
MAKERS = {
    "linear": lambda **kw: mi.nn.HyperLinear(5, out_features=4, context_features=3, **kw),
    "linear-no-bias": lambda **kw: mi.nn.HyperLinear(5, out_features=4, context_features=3, bias=False, **kw),
    "linear-network": lambda **kw: mi.nn.HyperLinear(
        5, out_features=4, context_features=3, context_network=nn.Linear(3, 3, dtype=kw.get("dtype")), **kw
    ),
    "mlp": lambda **kw: mi.nn.HyperMLP([5, 8, 6, 4], context_features=3, **kw),
    "mlp-network": lambda **kw: mi.nn.HyperMLP(
        (5, 4),
        context_features=3,
        activation=nn.Tanh(),
        context_network=nn.Linear(3, 3, dtype=kw.get("dtype")),
        **kw,
    ),
}


@pytest.fixture(params=MAKERS)
def module(request):
    module = MAKERS[request.param](**F64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def plain(module, x, z):
    """The network by the formula, with einsum."""
    z = z if module.context_network is None else module.context_network(z)
    layers = module.layers if isinstance(module, mi.nn.HyperMLP) else [module]
    for number, layer in enumerate(layers):
        x = module.activation(x) if number else x
        weight = torch.einsum("...i,oij->...oj", z, layer.weight) + layer.weight_x
        x = torch.einsum("...oj,...j->...o", weight, x)
        if layer.bias is not None:
            x = x + z @ layer.weight_z.T + layer.bias
    return x


@pytest.mark.parametrize(
    ("x", "z"),
    [((), ()), ((6,), ()), ((6,), (6,)), ((2, 6), (2, 1)), ((1, 6), (7, 1)), ((0,), (0,))],
    ids=str,
)
def test_forward_bind_and_gradients(module, x, z):
    x, z = torch.randn(*x, 5, **F64), torch.randn(*z, 3, **F64, requires_grad=True)
    y, expected = module(x, z), plain(module, x, z)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    leaves = (z, *module.parameters())
    for one, other in zip(*(torch.autograd.grad(r.pow(2).sum(), leaves) for r in (y, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    bound = module.bind(z)
    torch.testing.assert_close(bound(x), y.detach(), rtol=1e-11, atol=1e-11)
    assert not any(parameter.requires_grad for parameter in bound.parameters())


def test_ragged_groups(module):
    x, z, ids = torch.randn(9, 5, **F64), torch.randn(4, 3, **F64), torch.tensor([3, 0, 0, 2, 2, 2, 0, 3, 0])
    torch.testing.assert_close(
        module(x, z, segment_ids=ids), plain(module, x, z[ids]), rtol=1e-11, atol=1e-11
    )


def test_a_single_context_binds_to_plain_layers(module):
    bound = module.bind(torch.randn(3, **F64))
    layers = [layer for layer in bound.modules() if list(layer.parameters(recurse=False))]
    assert layers and all(type(layer) is nn.Linear for layer in layers)
    exported = torch.export.export(bound, (torch.randn(6, 5, **F64),))
    assert "mi_kernels" not in str(exported.graph)


def test_bound_layers_keep_their_weights(module):
    z, x = torch.randn(2, 3, **F64), torch.randn(2, 5, **F64)
    bound = module.bind(z)
    before = bound(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(bound(x), before)
    clone = copy.deepcopy(bound)
    clone.load_state_dict(bound.state_dict())
    assert torch.equal(clone(x), before)


def test_state_dict_and_repr(module):
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    other = copy.deepcopy(module)
    if hasattr(other, "reset_parameters"):
        other.reset_parameters()
    other.load_state_dict(torch.load(stream))
    x, z = torch.randn(2, 5, **F64), torch.randn(2, 3, **F64)
    assert torch.equal(other(x, z), module(x, z))
    assert "in_features=5" in repr(module)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(75, 32, 20), (32, 75, 100), (125, 50, 2)], ids=str)
def test_the_generated_layer_keeps_the_variance(sizes, bias):
    """Hyperfan-in. y of one context sums over X Z weights and U over Z: E y^2 = 1 over the draws of all.

    One draw of a layer and a context spreads by at most sqrt(2 / Z) (|z|^2 / Z) and sqrt(2 / O) or so, below
    1.5 together for Z = 2; the mean of 400 draws by 1 / 20 of that. The tolerance is three times as much.
    """
    width, out, context = sizes
    squares, weights = [], []
    for seed in range(400):
        torch.manual_seed(seed)
        layer = mi.nn.HyperLinear(width, out_features=out, context_features=context, bias=bias)
        z, x = torch.randn(context), torch.randn(8, width)
        weight, _ = mi.generate(z, layer.weight)
        weights.append(width * weight.square().mean())
        squares.append(layer(x, z).square().mean())
        assert not layer.weight_x.any() and (layer.bias is None or not layer.bias.any())
    spread = (2 / context + 2 / out) ** 0.5
    assert torch.stack(squares).mean().item() == pytest.approx(1, abs=3 * spread / 20)
    assert torch.stack(weights).mean().item() == pytest.approx(0.5 if bias else 1, abs=3 * spread / 20)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh, nn.GELU()], ids=["relu", "tanh", "gelu"])
def test_a_deep_network_keeps_the_variance(activation):
    """Five layers: without the gains relu would lose a factor of 2 at each."""
    squares = []
    for seed in range(60):
        torch.manual_seed(seed)
        network = mi.nn.HyperMLP([128] * 6, context_features=64, activation=activation)
        squares.append(network(torch.randn(32, 128), torch.randn(32, 64)).square().mean())
    assert torch.stack(squares).mean().item() == pytest.approx(1, abs=0.15)


def test_every_layer_is_one_set_of_products():
    """No loop over samples: the number of operations does not depend on the batch."""
    network, counts = mi.nn.HyperMLP([16, 32, 8], context_features=4), []
    for batch in (2, 64):
        with Spy() as spy:
            network(torch.randn(batch, 16), torch.randn(batch, 4))
        counts.append(len(spy.names))
    assert counts == [2, 2]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: mi.nn.HyperLinear(1.5, out_features=2, context_features=3),
            TypeError,
            "HyperLinear: in_features: expected an int, got float",
        ),
        (
            lambda: mi.nn.HyperLinear(1, out_features=2, context_features=-3),
            ValueError,
            "HyperLinear: context_features: expected >= 0, got -3",
        ),
        (
            lambda: mi.nn.HyperLinear(1, out_features=2, context_features=3, dtype=torch.int8),
            TypeError,
            "HyperLinear: dtype: expected one of",
        ),
        (
            lambda: mi.nn.HyperMLP([3], context_features=2),
            ValueError,
            r"HyperMLP: sizes: expected at least 2, got \[3\]",
        ),
        (
            lambda: mi.nn.HyperMLP([3, 2], context_features=2, activation="relu"),
            TypeError,
            "HyperMLP: activation: expected a function, got str",
        ),
        (
            lambda: mi.nn.HyperMLP(3, context_features=2),
            TypeError,
            "HyperMLP: sizes: expected a sequence of int, got int",
        ),
        (
            lambda: mi.nn.HyperLinear(1, out_features=2, context_features=3, gain="2"),
            TypeError,
            "HyperLinear: gain: expected a float, got str",
        ),
        (
            lambda: mi.nn.HyperLinear(4, out_features=2, context_features=3)(
                torch.ones(5, 4), torch.ones(5, 2)
            ),
            ValueError,
            r"HyperLinear: z: expected shape \[..., Z=3\], got \[5, 2\]",
        ),
        (
            lambda: mi.nn.HyperLinear(4, out_features=2, context_features=3).bind(torch.ones(2)),
            ValueError,
            r"HyperLinear: z: expected shape \[..., Z=3\], got \[2\]",
        ),
        (
            lambda: mi.nn.HyperMLP([4, 2], context_features=3, context_network=nn.Linear(5, 7))(
                torch.ones(6, 4), torch.ones(6, 5)
            ),
            ValueError,
            r"HyperMLP: context_network: expected shape \[..., Z=3\], got \[6, 7\]",
        ),
        (
            lambda: mi.nn.HyperLinear(4, out_features=2, context_features=3, context_network=nn.LSTM(5, 3))(
                torch.ones(6, 4), torch.ones(6, 5)
            ),
            TypeError,
            "HyperLinear: context_network: expected a torch.Tensor, got tuple",
        ),
    ],
)
def test_messages(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_activation_with_parameters_is_copied_into_the_bound_network():
    module = mi.nn.HyperMLP([5, 8, 4], context_features=3, activation=nn.PReLU(init=0.5))
    assert module.layers[1].gain == pytest.approx((2 / 1.25) ** 0.5, rel=1e-3)
    bound, x = module.bind(torch.randn(2, 3)), torch.randn(2, 5)
    before = bound(x)
    with torch.no_grad():
        module.activation.weight.fill_(9.0)
    assert torch.equal(bound(x), before)
    assert not any(parameter.requires_grad for parameter in bound.parameters())
    assert module.activation.weight.requires_grad


def test_the_default_device_does_not_matter_to_the_gain():
    expected = mi.nn.HyperMLP([5, 8, 4], context_features=3).layers[1].gain
    with torch.device("meta"):
        module = mi.nn.HyperMLP([5, 8, 4], context_features=3)
        assert mi.nn.HyperMLP([5, 8, 4], context_features=3, activation=nn.PReLU()).layers[1].gain == 1
    assert module.layers[1].gain == expected and module.layers[1].weight.is_meta


@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
def test_bound_under_autocast(lead):
    """The weights keep the dtype of the module, so that the layer runs without autocast, too."""
    module, z, x = mi.nn.HyperMLP([5, 8, 4], context_features=3), torch.randn(*lead, 3), torch.randn(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        bound = module.bind(z)
    assert all(parameter.dtype == torch.float32 for parameter in bound.parameters())
    torch.testing.assert_close(bound(x), module(x, z), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("sizes", [(0, 4, 2), (5, 0, 2), (5, 4, 0)], ids=str)
def test_zero_sizes(sizes):
    width, out, context = sizes
    module = mi.nn.HyperLinear(width, out_features=out, context_features=context)
    for lead in ((), (3,)):
        z, x = torch.randn(*lead, context), torch.randn(3, width)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bound = module.bind(z)
        assert bound(x).shape == (3, out)
        torch.testing.assert_close(bound(x), module(x, z))


def test_bound_layers_take_the_mode_and_leave_the_random_stream():
    for training in (True, False):
        module = mi.nn.HyperMLP([5, 8, 4], context_features=3, activation=nn.Dropout()).train(training)
        for z in (torch.randn(3), torch.randn(2, 3)):
            before = torch.get_rng_state()
            assert all(part.training == training for part in module.bind(z).modules())
            assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("form", ["pickle", "export"])
def test_bound_layers_of_several_contexts_can_be_saved(form, module):
    bound, x = module.bind(torch.randn(2, 1, 3, **F64)), torch.randn(2, 7, 5, **F64)
    if form == "pickle":
        other = pickle.loads(pickle.dumps(bound))
    else:
        shapes = ({1: torch.export.Dim("tokens", min=2)},)
        other = torch.export.export(bound, (x,), dynamic_shapes=shapes).module()
    for tokens in (7, 30):
        x = torch.randn(2, tokens, 5, **F64)
        torch.testing.assert_close(other(x), bound(x))


@pytest.mark.compile
def test_compiled():
    torch._dynamo.reset()
    network = mi.nn.HyperMLP([6, 8, 4], context_features=3, context_network=nn.Embedding(9, 3))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, rows in ((3, 7), (5, 4)):
        x, ids = torch.randn(batch, rows, 6), torch.arange(batch).unsqueeze(1)
        found, expected = compiled(x, ids), network(x, ids)
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(y.sum(), list(network.parameters())) for y in (found, expected))
        torch.testing.assert_close(next(grads), next(grads))
    torch._dynamo.reset()
