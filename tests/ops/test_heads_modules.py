"""HyperLinear.from_linear: parameters, state dict, what is refused; values are in test_heads.py."""

import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from published_weights import HEADS, linear, list_of_shapes
from torch import nn
from torch.nn.utils import parametrizations, prune

import mi_kernels as mi
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.memory import peak_memory

F64 = {"dtype": torch.float64}
B, Z, X, O = 6, 3, 5, 4  # noqa: E741


@pytest.fixture(params=HEADS)
def form(request):
    return HEADS[request.param]


@pytest.fixture(params=[True, False], ids=["", "no-bias"])
def head(request, form):
    return linear(Z, O * X + (O if form[1]["bias"] else 0), request.param)


@pytest.fixture
def layer(form, head):
    return mi.nn.HyperLinear.from_linear(head, X, O, **form[1])


def test_the_parameters_are_those_of_the_head(form, head):
    layer = mi.nn.HyperLinear.from_linear(head, X, O, **form[1])
    assert isinstance(layer, mi.nn.HyperLinear)
    assert peak_memory(lambda: mi.nn.HyperLinear.from_linear(head, X, O, **form[1])) == 0
    assert layer.weight is head.weight and layer.bias is head.bias
    assert list(layer.state_dict()) == list(head.state_dict())
    assert dict(layer.named_parameters()) == dict(head.named_parameters())
    own = {t.untyped_storage().data_ptr() for t in head.parameters()}
    weights = [t for t in layer.weights() if t is not None]
    assert {t.untyped_storage().data_ptr() for t in weights} == own
    assert peak_memory(layer.weights) == 0
    weight, bias = mi.generate(torch.eye(Z, **F64), *layer.weights())
    assert weight.shape == (Z, O, X) and (bias is None) == (form[1]["bias"] is None)


def test_a_model_keeps_its_state_dict():
    """In the place of the head, with checkpoints of before and after."""
    model = nn.Sequential(linear(2, Z), nn.Tanh(), linear(Z, O * X + O))
    before = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    head = model[2]
    model[2] = mi.nn.HyperLinear.from_linear(head, X, O)
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(
        one is other for one, other in zip([*head.parameters()], [*model[2].parameters()], strict=True)
    )
    x, edges = torch.randn(B, X, **F64), torch.randn(B, 2, **F64)
    for _ in range(3):
        optimizer.zero_grad()
        model[2](x, model[:2](edges)).pow(2).sum().backward()
        optimizer.step()
    trained = list_of_shapes(head(model[:2](edges)), x)
    assert relative_error(model[2](x, model[:2](edges)), trained) < 1e-12
    assert not torch.equal(head.weight, before[2].weight)
    before.load_state_dict(model.state_dict())
    assert torch.equal(before(edges), head(model[:2](edges)))
    fresh = nn.Sequential(linear(2, Z), nn.Tanh(), linear(Z, O * X + O))
    model.load_state_dict(fresh.state_dict())
    assert torch.equal(head.weight, fresh[2].weight)
    with torch.no_grad():
        fresh[2].weight.zero_()
    model.load_state_dict(fresh.state_dict(), assign=True)
    assert model[2].weight.data_ptr() == fresh[2].weight.data_ptr() and not model[2].weights()[0].any()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(layer, way):
    other = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x, z = torch.randn(B, X, **F64), torch.randn(B, Z, **F64)
    assert torch.equal(other(x, z), layer(x, z)) and repr(other) == repr(layer)
    with torch.no_grad():
        other.weight.zero_()
    assert layer.weight.any() and not other.weights()[0].any()


def test_a_copy_of_head_and_layer_keeps_them_together(form, head):
    both = nn.ModuleList([head, mi.nn.HyperLinear.from_linear(head, X, O, **form[1])])
    one, other = copy.deepcopy(both)
    assert one.weight is other.weight is not head.weight


def test_dtype_and_device(layer, head):
    expected = layer(torch.ones(B, X, **F64), torch.ones(B, Z, **F64))
    layer.to(torch.float32)
    assert head.weight.dtype == torch.float32 and layer.weight is head.weight
    y = layer(torch.ones(B, X), torch.ones(B, Z))
    torch.testing.assert_close(y, expected.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(B, X), torch.ones(B, Z)).dtype == torch.bfloat16
    layer.to("meta")
    assert layer(torch.ones(B, X, device="meta"), torch.ones(B, Z, device="meta")).shape == (B, O)
    frozen = linear(Z, O * X).requires_grad_(False).eval()
    made = mi.nn.HyperLinear.from_linear(frozen, X, O, bias=None)
    assert not made.training and not any(t.requires_grad for t in made.weights() if t is not None)


def test_repr():
    layer = mi.nn.HyperLinear.from_linear(nn.Linear(Z, O * X, bias=False), X, O, order="in,out", bias=None)
    expected = "in_features=5, out_features=4, context_features=3, order='in,out', bias=None, head_bias=False"
    assert repr(layer) == f"HyperLinearHead({expected})"


def test_explain(layer):
    x, z = torch.randn(B, X, **F64), torch.randn(B, Z, **F64)
    plan = mi.explain(layer, x, z)
    assert plan == mi.explain(mi.interaction, x, z, *layer.weights()) and plan.backward
    assert not mi.explain(layer.requires_grad_(False), x, z).backward


def test_bind(layer, form, head):
    x, z = torch.randn(B, X, **F64), torch.randn(B, Z, **F64)
    one, several = layer.bind(z[0]), layer.bind(z)
    assert type(one) is nn.Linear and type(several) is mi.nn.BoundLinear
    assert (one.bias is None) == (form[1]["bias"] is None)
    expected = form[0](head(z), x)
    assert relative_error(several(x), expected) < 1e-12 and relative_error(one(x[0]), expected[0]) < 1e-12
    with torch.no_grad():
        head.weight.zero_()
    assert relative_error(several(x), expected) < 1e-12


def test_segments_and_shared_contexts(form, layer, head):
    x, z = torch.randn(9, X, **F64), torch.randn(4, Z, **F64)
    ids = torch.tensor([3, 0, 0, 2, 2, 2, 0, 3, 0])
    expected = form[0](head(z[ids]), x)
    assert relative_error(layer(x, z, segment_ids=ids), expected) < 1e-12
    tokens = torch.randn(4, 7, X, **F64)
    rows = form[0](head(z.repeat_interleave(7, 0)), tokens.flatten(0, 1))
    assert relative_error(layer(tokens, z.unsqueeze(1)).flatten(0, 1), rows) < 1e-12


def test_parameters_drawn_anew(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    layer.reset_parameters()
    weight, weight_z, weight_x, bias = layer.weights()
    assert weight.isfinite().all() and weight.any()
    assert weight_z is None or (weight_z.isfinite().all() and weight_z.any())
    assert all(t is None or not t.any() for t in (weight_x, bias))


def test_a_layer_of_a_generated_network():
    """Among the layers of a HyperMLP, with its context network and bind."""
    network = mi.nn.HyperMLP([X, 7, O], context_features=Z, context_network=nn.Linear(2, Z, **F64), **F64)
    network.layers[0] = mi.nn.HyperLinear.from_linear(linear(Z, 7 * X + 7), X, 7)
    x, edges = torch.randn(B, X, **F64), torch.randn(B, 2, **F64)
    assert relative_error(network.bind(edges)(x), network(x, edges)) < 1e-12
    layer = network.layers[0]
    layer.context_network = network.context_network
    assert (
        relative_error(
            layer(x, edges),
            list_of_shapes(F.linear(network.context_network(edges), layer.weight, layer.bias), x),
        )
        < 1e-12
    )


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(layer, dynamic, fresh_compiler):
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (5, 8):
        x, z = torch.randn(rows, X, **F64), torch.randn(rows, Z, **F64)
        found, expected = compiled(x, z), layer(x, z)
        torch.testing.assert_close(found, expected)
        leaves = list(layer.parameters())
        for one, other in zip(
            *(torch.autograd.grad(y.sum(), leaves) for y in (found, expected)), strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.compile
def test_exported(layer):
    x, z = torch.randn(B, X, **F64), torch.randn(B, Z, **F64)
    program = torch.export.export(layer, (x, z))
    torch.testing.assert_close(program.module()(x, z), layer(x, z))
    assert set(program.state_dict) == set(layer.state_dict())


def test_functional_call(layer, form, head):
    x, z = torch.randn(B, X, **F64), torch.randn(B, Z, **F64)
    state = {name: torch.randn_like(t) for name, t in head.named_parameters()}
    found = torch.func.functional_call(layer, state, (x, z))
    assert relative_error(found, form[0](torch.func.functional_call(head, state, (z,)), x)) < 1e-12


def test_a_call_copies_nothing(place):
    """But what the plan says, which packs W where the kernels do not read it as it lies."""
    if place.backend != "cpu":
        pytest.skip("no compiled kernels")
    layer = mi.nn.HyperLinear.from_linear(nn.Linear(16, 64 * 64 + 64), 64, 64)
    x, z = torch.randn(512, 64), torch.randn(512, 16)
    y = layer(x, z)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x, z)) == mi.explain(layer, x, z).scratch + y.nbytes


# What is refused.


class Adapted(nn.Linear):
    def forward(self, z):
        return super().forward(z) + z.sum()


def hooked(register):
    def make():
        head = nn.Linear(Z, O * X + O)
        getattr(head, register)(lambda *a: None)
        return head

    return make


def replaced():
    head = nn.Linear(Z, O * X + O)
    head.forward = lambda z: z
    return head


def with_state(kind):
    head = nn.Linear(Z, O * X + O)
    if kind == "buffer":
        head.register_buffer("scale", torch.ones(()))
    elif kind == "module":
        head.adapter = nn.Linear(Z, 2)
    else:
        head.gate = nn.Parameter(torch.ones(()))
    return head


class Linear(nn.Module):
    """As the adapters of some packages are called."""


class Quantised(torch.Tensor):
    pass


def quantised():
    head = nn.Linear(Z, O * X + O)
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Quantised))
    return head


REFUSED = {
    "subclass": (
        lambda: Adapted(Z, O * X + O),
        TypeError,
        "head: expected a torch.nn.Linear itself, got Adapted: it may",
    ),
    "of another package": (
        Linear,
        TypeError,
        r"head: expected a torch.nn.Linear, got test_heads_modules\.Linear$",
    ),
    "lazy": (
        lambda: nn.LazyLinear(O * X + O),
        TypeError,
        "head: expected a torch.nn.Linear itself, got LazyLinear",
    ),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(Z, O * X + O)),
        TypeError,
        "got ParametrizedLinear: a parametrization computes its weight",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(Z, O * X + O), "weight", 0.5),
        ValueError,
        "head: expected no hooks, .*, got forward_pre_hooks",
    ),
    "forward hook": (hooked("register_forward_hook"), ValueError, "got forward_hooks"),
    "backward hook": (hooked("register_full_backward_hook"), ValueError, "got backward_hooks"),
    "state dict hook": (hooked("register_state_dict_post_hook"), ValueError, "got state_dict_hooks"),
    "replaced forward": (replaced, ValueError, "head: expected the forward of torch.nn.Linear, got another"),
    "buffer": (
        lambda: with_state("buffer"),
        ValueError,
        "expected weight and bias alone, got bias, scale, weight",
    ),
    "parameter": (lambda: with_state("parameter"), ValueError, "alone, got bias, gate, weight"),
    "module": (lambda: with_state("module"), ValueError, "alone, got adapter, bias, weight"),
    "tensor subclass": (quantised, TypeError, "head.weight: expected a torch.nn.Parameter, got Quantised"),
    "scripted": (lambda: torch.jit.script(nn.Linear(Z, O * X + O)), TypeError, "got RecursiveScriptModule"),
    "sequential": (lambda: nn.Sequential(nn.Linear(Z, 3)), TypeError, "got Sequential: pass its last layer"),
    "class": (lambda: nn.Linear, TypeError, "expected a torch.nn.Linear, got the class Linear"),
    "tensor": (lambda: torch.ones(2, 3), TypeError, "expected a torch.nn.Linear, got Tensor"),
    "complex": (
        lambda: nn.Linear(Z, O * X + O, dtype=torch.complex64),
        TypeError,
        "head.weight: expected a dtype of float64, float32, bfloat16, float16, got torch.complex64",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_other_heads_are_refused(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^HyperLinear.from_linear: .*{message}"):
        mi.nn.HyperLinear.from_linear(make(), X, O)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_features": 2.5}, TypeError, "in_features: expected an int, got float"),
        ({"in_features": True}, TypeError, "in_features: expected an int, got bool"),
        ({"out_features": -1}, ValueError, "out_features: expected >= 0, got -1"),
        ({"in_features": 6}, ValueError, "head.weight: expected shape [O*X+O=28, Z], got [24, 3]"),
        ({"bias": None}, ValueError, "head.weight: expected shape [O*X=20, Z], got [24, 3]"),
        ({"order": "io"}, ValueError, "order: expected one of 'out,in', 'in,out', got 'io'"),
        ({"order": None}, ValueError, "order: expected one of 'out,in', 'in,out', got None"),
        ({"bias": True}, ValueError, "bias: expected one of 'last', 'first', None, got True"),
        ({"bias": "end"}, ValueError, "bias: expected one of 'last', 'first', None, got 'end'"),
        ({"bias": ["last"]}, ValueError, "bias: expected one of 'last', 'first', None, got ['last']"),
    ],
    ids=str,
)
def test_messages_of_from_linear(options, error, message):
    arguments = {"head": nn.Linear(Z, O * X + O), "in_features": X, "out_features": O} | options
    with pytest.raises(error, match="^" + re.escape(f"HyperLinear.from_linear: {message}") + "$"):
        mi.nn.HyperLinear.from_linear(**arguments)


def test_messages_of_a_call(layer):
    with pytest.raises(ValueError, match=r"^HyperLinearHead: z: expected shape \[..., Z=3\], got \[6, 2\]"):
        layer(torch.ones(B, X, **F64), torch.ones(B, 2, **F64))
    layer.context_network = lambda z: z
    message = "^HyperLinearHead: context_network: expected a torch.nn.Module or None, got function"
    with pytest.raises(TypeError, match=message):
        layer(torch.ones(B, X, **F64), torch.ones(B, Z, **F64))
