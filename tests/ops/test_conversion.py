"""mi.convert: which layers change, and that nothing else does."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import mi_kernels as mi


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 4)
        self.compare = nn.Bilinear(4, 4, 3)
        self.inner = nn.ModuleDict({"deep": nn.Sequential(nn.Identity(), nn.Bilinear(3, 3, 2, bias=False))})
        self.missing = None

    def forward(self, a, b):
        y = self.compare(self.encode(a), self.encode(b))
        return self.inner["deep"][1](y, y)


class Doubled(nn.Bilinear):
    def forward(self, input1, input2):
        return 2 * super().forward(input1, input2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, dtype=torch.float64, generator=generator) for _ in range(2)]


def pair(size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(5, size, dtype=dtype, generator=generator) for _ in range(2)]


def test_every_layer_is_replaced_and_computes_the_same(model, batch):
    expected = model(*batch)
    assert mi.convert(model) is model
    assert type(model.compare) is type(model.inner["deep"][1]) is mi.nn.Bilinear
    assert type(model.encode) is nn.Linear
    torch.testing.assert_close(model(*batch), expected, rtol=1e-12, atol=1e-12)


def test_a_layer_alone_is_converted():
    layer = nn.Bilinear(4, 3, 2)
    assert mi.convert(layer) is layer
    assert type(layer) is mi.nn.Bilinear
    assert isinstance(layer, nn.Bilinear)


def test_state_is_the_same_objects(model):
    model.compare.weight.requires_grad_(False)
    model.compare.register_buffer("count", torch.tensor(3))
    model.compare.note = "kept"
    model.compare.eval()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    modules = list(model.modules())
    keys = list(model.state_dict())
    mi.convert(model)
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert all(old is new for old, new in zip(modules, model.modules(), strict=True))
    assert list(model.state_dict()) == keys
    assert model.training and not model.compare.training and model.compare.note == "kept"
    assert not model.compare.weight.requires_grad and model.compare.bias.requires_grad


def test_dtype_and_device_are_kept():
    layer = mi.convert(nn.Bilinear(4, 3, 2, device="meta", dtype=torch.bfloat16))
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16


def test_converting_twice_changes_nothing(model):
    mi.convert(model)
    types = [type(module) for module in model.modules()]
    assert mi.convert(model) is model
    assert [type(module) for module in model.modules()] == types


def test_a_shared_layer_stays_one_layer():
    layer = nn.Bilinear(4, 4, 4)
    model = mi.convert(nn.ModuleList([layer, nn.ModuleList([layer])]))
    assert model[0] is model[1][0] is layer
    assert type(layer) is mi.nn.Bilinear


def test_tied_weights_stay_tied():
    first, second = nn.Bilinear(4, 4, 4), nn.Bilinear(4, 4, 4)
    second.weight = first.weight
    mi.convert(nn.ModuleList([first, second]))
    assert first.weight is second.weight


def test_hooks_go_on_running():
    calls = []
    layer = nn.Bilinear(4, 4, 2)
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    handle = layer.register_forward_hook(lambda *_: calls.append("removed"))
    mi.convert(layer)
    handle.remove()
    a, b = pair()
    layer(a.requires_grad_(), b).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_an_optimizer_made_before_trains_the_converted_model(model, batch):
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (reference, model)]
    for step in range(4):
        if step == 2:
            mi.convert(model)
        for m, optimizer in zip((reference, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(*batch).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-9, atol=1e-9)


def test_subclasses_are_left_alone_without_a_warning():
    model = nn.Sequential(Doubled(4, 4, 2), nn.Bilinear(2, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mi.convert(model)
    assert type(model[0]) is Doubled


@pytest.mark.parametrize("module", [None, [nn.Bilinear(2, 2, 2)], nn.Bilinear], ids=["none", "list", "class"])
def test_only_modules_are_accepted(module):
    with pytest.raises(
        TypeError, match=f"convert: module: expected a torch.nn.Module, got {type(module).__name__}"
    ):
        mi.convert(module)


def test_parametrized_layers_are_converted():
    layer = nn.Bilinear(4, 4, 2)
    parametrizations.weight_norm(layer)
    twin = copy.deepcopy(layer)
    original = layer.parametrizations.weight.original1
    a, b = pair()
    expected = layer(a, b)
    mi.convert(layer)
    assert isinstance(layer, mi.nn.Bilinear) and parametrize.is_parametrized(layer)
    assert layer.parametrizations.weight.original1 is original
    torch.testing.assert_close(layer(a, b), expected)
    # deepcopy shares the class that parametrize made: the copy must not change with the original.
    assert not isinstance(twin, mi.nn.Bilinear)
    torch.testing.assert_close(twin(a, b), expected)

    converted = type(layer)
    mi.convert(layer)
    assert type(layer) is converted
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is mi.nn.Bilinear
    torch.testing.assert_close(layer(a, b), expected)


def test_spectral_norm_is_not_advanced_by_converting():
    layer = nn.Bilinear(4, 4, 2)
    parametrizations.spectral_norm(layer)
    before = copy.deepcopy(layer.state_dict())
    mi.convert(layer)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_a_parametrization_can_be_added_afterwards():
    layer = mi.convert(nn.Bilinear(4, 4, 2))
    parametrizations.weight_norm(layer)
    assert isinstance(layer, mi.nn.Bilinear)
    assert layer(*pair()).shape == (5, 2)


def test_parametrized_subclasses_are_left_alone():
    layer = Doubled(4, 4, 2)
    parametrizations.weight_norm(layer)
    with pytest.warns(UserWarning, match="found nothing to convert"):
        mi.convert(layer)
    assert isinstance(layer, Doubled) and not isinstance(layer, mi.nn.Bilinear)


def test_a_replaced_forward_is_left_alone_with_a_warning():
    model = nn.Sequential(nn.Bilinear(4, 4, 2))
    model[0].forward = lambda a, b: "replaced"
    with pytest.warns(UserWarning, match=r"convert: Sequential\.0 is left alone: its forward was replaced"):
        mi.convert(model)
    assert type(model[0]) is nn.Bilinear
    assert model[0](1, 2) == "replaced"


def test_complex_layers_are_left_alone_with_a_warning():
    layer = nn.Bilinear(4, 4, 2, dtype=torch.complex64)
    with pytest.warns(UserWarning, match="convert: Bilinear is left alone: its parameters are complex"):
        mi.convert(layer)
    assert type(layer) is nn.Bilinear


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_layers_are_left_alone_with_a_warning():
    model = nn.Sequential(torch.jit.script(nn.Bilinear(4, 4, 2)))
    a, b = pair()
    expected = model[0](a, b)
    with pytest.warns(UserWarning, match="TorchScript; convert the model first, and trace it$"):
        mi.convert(model)
    assert torch.equal(model[0](a, b), expected)
    converted = mi.convert(nn.Bilinear(4, 4, 2))
    assert torch.equal(torch.jit.trace(converted, (a, b))(a, b), converted(a, b))


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m]
)
def test_a_compiled_model_recompiles(model, batch, wrap):
    torch._dynamo.reset()
    compiled = wrap(model)
    expected = compiled(*batch)
    called = []
    original = mi.nn.Bilinear.forward
    mi.convert(compiled)
    assert type(model.compare) is mi.nn.Bilinear
    try:
        mi.nn.Bilinear.forward = lambda self, a, b: called.append(1) or original(self, a, b)
        result = compiled(*batch)
    finally:
        mi.nn.Bilinear.forward = original
    assert called
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_copies_of_a_converted_model(model, batch):
    expected = mi.convert(model)(*batch)
    file = io.BytesIO()
    torch.save(model, file)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(io.BytesIO(file.getvalue()), weights_only=False),
    ]
    for other in copies:
        assert type(other.compare) is mi.nn.Bilinear
        assert torch.equal(other(*batch), expected)


def test_a_state_dict_goes_both_ways(model):
    file = io.BytesIO()
    torch.save(mi.convert(copy.deepcopy(model)).state_dict(), file)
    model.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    mi.convert(Model().double()).load_state_dict(model.state_dict())


def test_there_and_back(model, batch):
    """Everything is as it was before: classes, objects, flags, keys, values, and what pickle needs."""
    calls = []
    model.compare.register_forward_hook(lambda *_: calls.append(1))
    model.compare.eval().weight.requires_grad_(False)
    types = [type(module) for module in model.modules()]
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    expected = model(*batch)
    converted = mi.convert(model)(*batch)
    assert mi.convert(model, to="torch") is model
    assert [type(module) for module in model.modules()] == types
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert list(model.state_dict()) == keys and not model.compare.training and model.training
    assert torch.equal(model(*batch), expected) and len(calls) == 3
    torch.testing.assert_close(converted, expected, rtol=1e-12, atol=1e-12)
    assert b"mi_kernels" not in pickle.dumps(model.inner)
    mi.convert(model, to="torch")
    assert [type(module) for module in model.modules()] == types


def test_parametrized_layers_go_back():
    layer = mi.nn.Bilinear(4, 4, 2)
    parametrizations.weight_norm(layer)
    twin, (a, b) = copy.deepcopy(layer), pair()
    expected = layer(a, b)
    mi.convert(layer, to="torch")
    assert type(layer).__bases__ == (nn.Bilinear,) and isinstance(twin, mi.nn.Bilinear)
    torch.testing.assert_close(layer(a, b), expected)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Bilinear


class Own(mi.nn.Bilinear):
    pass


class OwnGate(mi.nn.FiLM):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: mi.nn.FiLM(2, context_features=3), "torch.nn has no FiLM"),
        (lambda: OwnGate(2, 3), "torch.nn has no FiLM"),
        (lambda: mi.nn.BoundLinear(torch.ones(2, 3)), "torch.nn has no BoundLinear"),
        (lambda: Own(2, 3, 4), "it is a subclass of mi_kernels.nn.Bilinear"),
    ],
)
def test_what_cannot_go_back_is_left_and_named(make, reason):
    model = nn.Sequential(make(), mi.nn.Bilinear(2, 2, 2))
    kept = type(model[0])
    with pytest.warns(UserWarning, match=rf"^convert: Sequential\.0 is left alone: {re.escape(reason)}$"):
        mi.convert(model, to="torch")
    assert type(model[0]) is kept and type(model[1]) is nn.Bilinear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mi.convert(model)


def test_a_replaced_forward_does_not_go_back():
    layer = mi.nn.Bilinear(4, 4, 2)
    layer.forward = lambda a, b: "replaced"
    with pytest.warns(UserWarning, match="convert: Bilinear is left alone: its forward was replaced"):
        mi.convert(layer, to="torch")
    assert type(layer) is mi.nn.Bilinear


@pytest.mark.parametrize("to", ["jax", None, nn.Bilinear, ["torch"]], ids=str)
def test_directions(to):
    with pytest.raises(ValueError, match="^convert: to: expected one of mi_kernels, torch, got "):
        mi.convert(nn.Bilinear(2, 2, 2), to=to)
