"""mi.explain of modules: the plans of the calls that they make, without making them."""

import threading

import pytest
import torch
from helpers import Spy
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import mi_kernels as mi

ROWS, Z, X = 6, 3, 4


def ones(*sizes, **options):
    return torch.ones(sizes, **options)


# Module, what it is called with, and the function with the arguments that it stands for.
MODULES = {
    "GLU": (mi.nn.GLU(X, out_features=5, activation="gelu"), (ones(2, ROWS, X),)),
    "GatedMLP": (mi.nn.GatedMLP(X, hidden_features=5), (ones(2, ROWS, X),)),
    "LowRankInteraction": (
        mi.nn.LowRankInteraction(X, context_features=Z, out_features=5, rank=7, activation_z="tanh"),
        (ones(ROWS, X), ones(ROWS, Z)),
    ),
    "Biaffine": (mi.nn.Biaffine(Z, X, 5), (ones(2, ROWS, Z), ones(2, 7, X))),
    "Bilinear": (mi.nn.Bilinear(Z, X, 5), (ones(ROWS, Z), ones(ROWS, X))),
    "MultiplicativeInteraction": (
        mi.nn.MultiplicativeInteraction(X, context_features=Z, out_features=5),
        (ones(ROWS, X), ones(ROWS, Z)),
    ),
    "DiagonalInteraction": (
        mi.nn.DiagonalInteraction(X, context_features=Z, activation="tanh"),
        (ones(ROWS, X), ones(ROWS, Z)),
    ),
    "GatedInteraction": (mi.nn.GatedInteraction(X, context_features=Z), (ones(ROWS, X), ones(ROWS, Z))),
    "FiLM": (mi.nn.FiLM(X, context_features=Z), (ones(ROWS, X, 2, 2), ones(ROWS, Z))),
    "HyperLinear": (
        mi.nn.HyperLinear(X, out_features=5, context_features=Z),
        (ones(ROWS, 7, X), ones(ROWS, 1, Z)),
    ),
    "AdaLayerNorm": (
        mi.nn.AdaLayerNorm(X, context_features=Z, affine=True),
        (ones(2, ROWS, X), ones(2, Z)),
    ),
    "AdaRMSNorm": (mi.nn.AdaRMSNorm(X, context_features=Z), (ones(ROWS, X), ones(ROWS, Z))),
    "AdaGroupNorm": (
        mi.nn.AdaGroupNorm(X, context_features=Z, groups=2),
        (ones(ROWS, X, 2, 2), ones(ROWS, Z)),
    ),
    "MultiplicativeLSTM": (mi.nn.MultiplicativeLSTM(X, 5, num_factors=2, proj_size=3), (ones(7, ROWS, X),)),
    "MultiplicativeRNN": (mi.nn.MultiplicativeRNN(X, 5, nonlinearity="relu"), (ones(7, ROWS, X),)),
    "MultiplicativeIntegrationRNN": (mi.nn.MultiplicativeIntegrationRNN(X, 5), (ones(7, X),)),
    "MultiplicativeIntegrationLSTM": (mi.nn.MultiplicativeIntegrationLSTM(X, 5), (ones(7, ROWS, X),)),
    "MultiplicativeIntegrationGRU": (mi.nn.MultiplicativeIntegrationGRU(X, 5), (ones(7, ROWS, X),)),
    "SecondOrderRNN": (mi.nn.SecondOrderRNN(X, 5), (ones(7, ROWS, X),)),
    "MultiplicativeLSTMCell": (mi.nn.MultiplicativeLSTMCell(X, 5), (ones(ROWS, X),)),
    "MultiplicativeRNNCell": (mi.nn.MultiplicativeRNNCell(X, 5), (ones(X),)),
    "MultiplicativeIntegrationRNNCell": (mi.nn.MultiplicativeIntegrationRNNCell(X, 5), (ones(ROWS, X),)),
    "MultiplicativeIntegrationLSTMCell": (mi.nn.MultiplicativeIntegrationLSTMCell(X, 5), (ones(ROWS, X),)),
    "MultiplicativeIntegrationGRUCell": (mi.nn.MultiplicativeIntegrationGRUCell(X, 5), (ones(ROWS, X),)),
    "SecondOrderRNNCell": (mi.nn.SecondOrderRNNCell(X, 5, rank=2), (ones(ROWS, X),)),
    "BoundLinear": (mi.nn.BoundLinear(ones(ROWS, 5, X), ones(ROWS, 5)), (ones(ROWS, X),)),
}


def computed(spy):
    """The operations of this package that ran on tensors with data."""
    calls = ((name, [a for a in given if isinstance(a, torch.Tensor)]) for name, given in spy.calls)
    return [name for name, tensors in calls if tensors and not isinstance(tensors[0], FakeTensor)]


def parameters(layer, *names):
    return [getattr(layer, name) for name in names]


def of_a_sequence(layer, x):
    """The plan of the one call that a layer of a recurrent network, or its cell, makes."""
    found = {name.removesuffix("_l0"): one for name, one in layer.named_parameters()}
    bias = found.pop("bias_ih") + found.pop("bias_hh")
    x = x.unsqueeze(0) if type(layer).__name__.endswith("Cell") else x
    options = {"activation": layer.nonlinearity, **found}
    return mi.explain(mi.multiplicative_rnn, layer.kind, x, None, bias=bias, **options)


def expected(layer, *given):
    dense = ("weight", "weight_z", "weight_x", "bias")
    match layer:
        case mi.nn.GLU():
            return mi.explain(mi.glu, *given, layer.weight, layer.bias, activation="gelu")
        case mi.nn.GatedMLP():
            return mi.explain(mi.glu, *given, layer.glu.weight)
        case mi.nn.LowRankInteraction():
            names = ("factor_x", "factor_z", "factor_out", "weight_z", "weight_x", "bias")
            return mi.explain(mi.low_rank, *given, *parameters(layer, *names), activation_z="tanh")
        case mi.nn.Biaffine():
            return mi.explain(mi.biaffine, *given, layer.weight, ones=(True, True))
        case mi.nn.Bilinear():
            return mi.explain(mi.bilinear, *given, layer.weight, layer.bias)
        case mi.nn.MultiplicativeInteraction() | mi.nn.HyperLinear():
            return mi.explain(mi.interaction, *given, *parameters(layer, *dense))
        case mi.nn.GatedInteraction():
            return mi.explain(mi.gated_interaction, *given, *parameters(layer, *dense))
        case mi.nn.DiagonalInteraction():
            names = ("weight", "bias", "shift_weight", "shift_bias")
            return mi.explain(mi.diagonal, *given, *parameters(layer, *names), activation="tanh")
        case mi.nn.FiLM():
            both = nn.functional.linear(given[1], layer.weight)  # under autocast of its dtype
            scale, shift = both.new_zeros(2, ROWS, X, 1, 1).requires_grad_()
            return mi.explain(mi.modulate, given[0], scale, shift, scale_offset=1.0)
        case mi.nn.AdaLayerNorm() | mi.nn.AdaRMSNorm():
            x, z = given
            chunks = nn.functional.linear(z, layer.linear.weight).unflatten(-1, (-1, X)).unbind(-2)
            parts = {
                name: t.view(-1, *[1] * (x.dim() - 2), X) for name, t in zip(layer.parts, chunks, strict=True)
            }
            norm, bias = ("layer", layer.norm.bias) if "shift" in parts else ("rms", None)
            options = {"norm": norm, "weight": layer.norm.weight, "bias": bias, "eps": layer.norm.eps}
            return mi.explain(mi.norm_modulate, x, parts["scale"], parts.get("shift"), **options)
        case mi.nn.AdaGroupNorm():
            x, z = given
            scale, shift = nn.functional.linear(z, layer.linear.weight)[..., None, None].chunk(2, 1)
            return mi.explain(mi.norm_modulate, x, scale, shift, norm="group", groups=2)
        case _ if hasattr(layer, "kind"):
            return of_a_sequence(layer, *given)
        case mi.nn.BoundLinear():
            return mi.explain(mi.apply_generated, *given, layer.weight, layer.bias)


def test_every_module_is_here():
    assert set(MODULES) | {"HyperMLP", "HyperLoRA", "AdaLNZeroBlock"} == set(mi.nn.__all__)


@pytest.mark.parametrize("low", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("name", MODULES)
def test_the_plan_is_that_of_the_function(name, grad, low, place):
    layer, given = MODULES[name]
    layer, given = layer.to(place.device), [t.to(place.device) for t in given]
    with torch.set_grad_enabled(grad), torch.autocast(place.device, torch.bfloat16, enabled=low):
        with Spy() as spy:
            found = mi.explain(layer, *given)
        assert computed(spy) == []
        assert found == expected(layer, *given)
    assert bool(found.backward) == (grad and name != "BoundLinear")


@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("activation", [torch.tanh, nn.ReLU(inplace=True)], ids=["tanh", "in place"])
def test_of_several_calls_each_has_its_plan(activation, segments):
    network = mi.nn.HyperMLP(
        [X, 8, 5], context_features=Z, activation=activation, context_network=nn.Embedding(9, Z)
    )
    x, z = ones(ROWS, X), torch.arange(ROWS)
    options = {"segment_ids": torch.tensor([5, 5, 0, 0, 0, 1])} if segments else {}
    with Spy() as spy:
        plan = mi.explain(network, x, z, **options)
    assert computed(spy) == []
    contexts = network.context_network(z)
    hidden = ones(ROWS, 8, requires_grad=True)
    each = tuple(
        mi.explain(one, t, contexts, **options) for one, t in zip(network.layers, (x, hidden), strict=True)
    )
    assert plan.calls == each and plan.op == "HyperMLP" and plan.backend == each[0].backend
    assert plan.operations == sum(one.operations for one in each)
    assert plan.bytes == sum(one.bytes for one in each)
    assert plan.scratch == max(one.scratch for one in each)
    assert "HyperMLP: 2 calls" in str(plan) and all(str(one) in str(plan) for one in each)


def test_of_an_adapter_factors_and_product_have_their_plans():
    layer, x, z = mi.nn.HyperLoRA(nn.Linear(X, 5), context_features=Z, rank=2), ones(ROWS, X), ones(ROWS, Z)
    with Spy() as spy:
        plan = mi.explain(layer, x, z)
    assert computed(spy) == []
    down, up = (ones(ROWS, *size, requires_grad=True) for size in ((2, X), (5, 2)))
    base = ones(ROWS, 5, requires_grad=True)
    assert plan.op == "HyperLoRA" and plan.calls == (
        mi.explain(mi.generate, z, layer.down_weight, None, layer.down_weight_x),
        mi.explain(mi.generate, z, layer.up_weight, None, layer.up_weight_x),
        mi.explain(mi.apply_low_rank, x, down, up, base),
    )


def test_of_a_block_every_norm_and_residual_has_its_plan():
    attn, mlp = nn.Identity(), nn.Linear(X, X)
    layer = mi.nn.AdaLNZeroBlock(attn, mlp, features=X, context_features=Z)
    x, z = ones(2, ROWS, X), ones(2, Z)
    with Spy() as spy:
        plan = mi.explain(layer, x, z)
    assert computed(spy) == []
    parts = layer.adaLN_modulation(z)[:, None].chunk(6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
    h, eps = ones(2, ROWS, X, requires_grad=True), {"eps": 1e-6}
    assert plan.op == "AdaLNZeroBlock" and plan.calls == (
        mi.explain(mi.norm_modulate, x, scale, shift, **eps),
        mi.explain(mi.gated_residual_norm_modulate, x, h, gate, scale_mlp, shift_mlp, **eps),
        mi.explain(mi.gated_residual, h, h, gate_mlp),
    )


def test_of_layers_and_directions_each_has_its_plan():
    layer, x = mi.nn.MultiplicativeIntegrationGRU(X, 5, 2, bidirectional=True), ones(7, ROWS, X)
    with Spy() as spy:
        plan = mi.explain(layer, x, lengths=[7] * ROWS)
    assert computed(spy) == []
    assert plan.op == "MultiplicativeIntegrationGRU" and len(plan.calls) == 4
    assert {one.op for one in plan.calls} == {"multiplicative_rnn"}


def test_of_a_model_with_such_modules(fresh_compiler):
    model = nn.Sequential(
        nn.Linear(3, X), nn.ReLU(), mi.nn.BoundLinear(ones(5, X)), mi.nn.BoundLinear(ones(2, 5))
    )
    x = ones(ROWS, 3)
    plan = mi.explain(model, x)
    assert len(plan.calls) == 2
    compiled = torch.compile(model, backend="eager")
    for module in (compiled, compiled):
        assert mi.explain(module, x) == plan
        assert torch.equal(module(x), model(x))


def test_subclasses_and_threads():
    class Doubled(mi.nn.Bilinear):
        def forward(self, a, b):
            seen.append(threading.Thread(target=lambda: values.append(layer(*given))))
            seen[-1].start()
            seen[-1].join()
            return 2 * super().forward(a, b)

    layer, given = MODULES["Bilinear"]
    doubled, seen, values = Doubled(Z, X, 5), [], []
    doubled.load_state_dict(layer.state_dict())
    assert mi.explain(doubled, *given) == mi.explain(layer, *given)
    assert torch.equal(values[0], layer(*given)), "another thread computes"


def test_nothing_is_changed():
    """Neither statistics of layers around the calls nor random numbers."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.film = mi.nn.FiLM(4, context_features=3)
            self.after = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout())

        def forward(self, x, z):
            return self.after(self.film(x, z))

    model, x, z = Model().train(), torch.randn(6, 4), torch.randn(6, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.random.fork_rng():
        expected = torch.rand(3)
    mi.explain(model, x, z)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_errors_are_those_of_the_call_and_leave_nothing_behind():
    layer, given = MODULES["MultiplicativeInteraction"]
    with pytest.raises(ValueError, match="^interaction: weight: expected"):
        mi.explain(layer, ones(ROWS, X + 1), given[1])
    assert layer(*given).isfinite().all()


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (torch.nn.functional.bilinear, "got torch.nn.functional.bilinear, .*; pass mi.bilinear$"),
        (mi.nn.FiLM, "got the class FiLM; pass an instance$"),
        (nn.Bilinear(2, 2, 2), "a module that calls functions of this package, got Bilinear, .*mi.convert"),
        ("conv", "expected one of mi.interaction, mi.bilinear, .*, got 'conv'$"),
        (torch.relu, "got torch.relu$"),
        (3, "got int$"),
    ],
)
def test_what_cannot_be_explained(op, message):
    with pytest.raises(ValueError, match=f"^explain: op: .*{message}"):
        mi.explain(op, torch.ones(2, 2), torch.ones(2, 2))
