"""Every argument of every module's constructor, given as something else, is named when the module is made."""

import inspect
import re

import pytest
import torch
from torch import nn

import mi_kernels as mi

MODULES = {
    mi.nn.GLU: {"in_features": 2, "out_features": 3},
    mi.nn.GatedMLP: {"features": 2, "hidden_features": 3},
    mi.nn.LowRankInteraction: {"in_features": 2, "context_features": 3, "out_features": 4, "rank": 5},
    mi.nn.Biaffine: {"in1_features": 2, "in2_features": 3, "out_features": 4},
    mi.nn.Bilinear: {"in1_features": 2, "in2_features": 3, "out_features": 4},
    mi.nn.MultiplicativeInteraction: {"in_features": 2, "context_features": 3, "out_features": 4},
    mi.nn.DiagonalInteraction: {"features": 2, "context_features": 3},
    mi.nn.GatedInteraction: {"features": 2, "context_features": 3},
    mi.nn.FiLM: {"features": 2, "context_features": 3},
    mi.nn.HyperLinear: {"in_features": 2, "out_features": 3, "context_features": 4},
    mi.nn.HyperMLP: {"sizes": [2, 3], "context_features": 4},
    mi.nn.HyperLoRA: {"linear": nn.Linear(2, 3), "context_features": 4, "rank": 2},
    mi.nn.BoundLinear: {"weight": torch.ones(2, 3)},
    mi.nn.AdaLayerNorm: {"features": 4, "context_features": 3},
    mi.nn.AdaRMSNorm: {"features": 4, "context_features": 3},
    mi.nn.AdaGroupNorm: {"features": 4, "context_features": 3, "groups": 2},
    mi.nn.AdaLNZeroBlock: {"attn": nn.Identity(), "mlp": None, "features": 4, "context_features": 3},
    mi.nn.MultiplicativeLSTM: {"input_size": 2, "hidden_size": 3},
    mi.nn.MultiplicativeRNN: {"input_size": 2, "hidden_size": 3},
    mi.nn.MultiplicativeIntegrationRNN: {"input_size": 2, "hidden_size": 3},
    mi.nn.MultiplicativeIntegrationLSTM: {"input_size": 2, "hidden_size": 3},
    mi.nn.MultiplicativeIntegrationGRU: {"input_size": 2, "hidden_size": 3},
    mi.nn.SecondOrderRNN: {"input_size": 2, "hidden_size": 3},
    mi.nn.MultiplicativeLSTMCell: {"input_size": 2, "hidden_size": 3},
    mi.nn.MultiplicativeRNNCell: {"input_size": 2, "hidden_size": 3},
    mi.nn.MultiplicativeIntegrationRNNCell: {"input_size": 2, "hidden_size": 3},
    mi.nn.MultiplicativeIntegrationLSTMCell: {"input_size": 2, "hidden_size": 3},
    mi.nn.MultiplicativeIntegrationGRUCell: {"input_size": 2, "hidden_size": 3},
    mi.nn.SecondOrderRNNCell: {"input_size": 2, "hidden_size": 3},
}


def function(t):
    return t


WRONG = {
    "sizes": [2.5, "3", "23", None, torch.tensor([2, 3]), [2, 3.5], [2, "3"]],
    "features": [2.5, "3", None, True, nn.Linear],
    "GatedMLP out_features": [2.5, "3", True, nn.Linear],
    "dropout": ["no", None, [0.1], 1.5, -0.1],
    "LowRankInteraction rank": [2.5, "3", None, True, (2, 3, 4), nn.Linear],
    "core": ["CP", None, 3, ["tucker"]],
    "blocks": [2.5, "3", None, True, 0, 2],
    "flags": ["no", None, 1.5, [True], torch.ones(3), nn.Embedding(2, 3)],
    "device": [1.5, [0], True, torch.float32, "gpu nought"],
    "dtype": ["float32", "torch.float32", float, torch.int64, torch.complex64, 7],
    "activation": [torch.relu, nn.ReLU, nn.ReLU(), None, "swish", ["relu"]],
    "HyperMLP activation": ["relu", nn.ReLU, None, 3],
    "scale_offset": ["1", None, torch.tensor(1.0), [1.0]],
    "linear": [
        nn.Linear,
        nn.Identity(),
        None,
        torch.ones(3, 2),
        nn.LazyLinear(3),
        nn.Linear(2, 3, dtype=torch.cfloat),
    ],
    "rank": [2.5, "3", None, True, -1],
    "optional size": [2.5, "3", True, -1, (2, 3), nn.Linear],  # None is the default
    "size": [2.5, "3", None, True, -1, torch.tensor(2), nn.Linear],
    "num_layers": [2.5, "3", None, True, 0, -1],
    "proj_size": [2.5, "3", None, True, -1, 4],
    "memory": [None, "little", True, ["low"]],
    "scale": ["1", None, torch.tensor(1.0), [1.0], True],
    "gain": ["1", None, torch.tensor(1.0), [1.0]],
    "ones": ["no", None, True, (True,), (True, "no"), (None, False), torch.ones(2, 2)],
    "init": ["one", None, 1, ["unit"], nn.init],
    "channel_dim": ["1", None, 0, 2, True],
    "context_network": [nn.Embedding, function, lambda z: z, [nn.Identity()], "network", nn.Identity.forward],
    "weight": [[[1.0]], None, torch.ones(3), torch.ones(2, 3).to_sparse()],
    "bias": [[1.0], 3.0],
    "attn": [nn.Identity, function, None, "attn", [nn.Identity()]],
    "mlp": [nn.Identity, function, "mlp", [nn.Identity()]],
    "norm": ["group", "LayerNorm", None, nn.LayerNorm, ["layer"]],
    "groups": [2.5, "2", None, True, 0, 3, nn.GroupNorm],
    "eps": ["1e-5", None, torch.tensor(1.0), [1.0], True, -1.0],
}


def kind(module, name):
    if module is mi.nn.BoundLinear:
        return name
    if f"{module.__name__} {name}" in WRONG:
        return f"{module.__name__} {name}"
    flags = ("bias", "shift", "weight_z", "weight_x", "channels_first", "gate_first")
    flags += ("affine", "gate", "scale_first", "silu", "zero_init", "batch_first", "bidirectional")
    if name in ("activation_x", "activation_z", "nonlinearity"):
        return "activation"
    if name == "num_factors" or (
        name == "rank" and module in (mi.nn.SecondOrderRNN, mi.nn.SecondOrderRNNCell)
    ):
        return "optional size"
    if name in ("input_size", "hidden_size"):
        return "size"
    return "flags" if name in flags else "features" if name.endswith("features") else name


CASES = [
    (module, name, value)
    for module in MODULES
    for name in inspect.signature(module).parameters
    for value in WRONG[kind(module, name)]
]


def test_every_argument_is_here():
    assert set(MODULES) == {getattr(mi.nn, name) for name in mi.nn.__all__}
    assert len({(module, name) for module, name, _ in CASES}) == sum(
        len(inspect.signature(module).parameters) for module in MODULES
    )


@pytest.mark.parametrize(
    ("module", "name", "value"), CASES, ids=lambda value: getattr(value, "__name__", None) or repr(value)[:20]
)
def test_a_wrong_argument_is_named(module, name, value):
    message = rf"^{module.__name__}: {name}(\[\d\])?: expected .+, got .+"
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        module(**MODULES[module] | {name: value})
    expected, got = str(caught.value).split(", got ")
    assert got not in expected, "what came is no more than what was expected"


@pytest.mark.parametrize("module", MODULES)
def test_right_arguments_are_taken(module):
    module(**MODULES[module])
    if module not in (mi.nn.BoundLinear, mi.nn.HyperLoRA):  # they have no such options
        for options in (
            {"bias": 0},
            {"device": torch.device("cpu")},
            {"device": "meta", "dtype": torch.float16},
        ):
            module(**MODULES[module], **options)


@pytest.mark.parametrize("network", [lambda z: z, nn.Identity, "network"], ids=["lambda", "class", "str"])
@pytest.mark.parametrize("module", [mi.nn.HyperLinear, mi.nn.HyperMLP, mi.nn.HyperLoRA])
def test_a_context_network_that_is_set_later_is_named(module, network):
    layer = module(**MODULES[module])
    layer.context_network = network
    message = f"^{module.__name__}: context_network: expected a torch.nn.Module or None, got "
    for call in (layer, lambda x, z: layer.bind(z)):
        with pytest.raises(TypeError, match=message):
            call(torch.ones(2, 2), torch.ones(2, 4))


def test_the_messages_in_full():
    with pytest.raises(
        TypeError, match=re.escape("expected a torch.nn.Module or None, got the class Embedding")
    ):
        mi.nn.HyperLinear(2, out_features=3, context_features=4, context_network=nn.Embedding)
    expected = (
        "dtype: expected one of torch.float64, torch.float32, torch.bfloat16, torch.float16, got 'float32'"
    )
    with pytest.raises(TypeError, match=re.escape(expected)):
        mi.nn.HyperLinear(2, out_features=3, context_features=4, dtype="float32")
    with pytest.raises(TypeError, match="HyperMLP: activation: expected a function, got the class ReLU"):
        mi.nn.HyperMLP([2, 3], context_features=4, activation=nn.ReLU)
