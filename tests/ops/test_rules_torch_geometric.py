"""The ready rules of mi.convert for PyTorch Geometric: layers compute and train as before."""

import copy

import pytest
import torch
from converted import check, check_left, draw
from helpers import Spy
from torch import nn

import mi_kernels as mi

REASON = "torch_geometric is not installed (pip install torch_geometric, or mi_kernels[test])"


@pytest.fixture(scope="module")
def pyg():
    return pytest.importorskip("torch_geometric.nn", reason=REASON)


@pytest.fixture
def edges():
    return torch.tensor([[0, 1, 2, 3, 3, 0, 5], [1, 0, 0, 2, 1, 3, 1]])


def network(context, size, bias=True):
    return nn.Sequential(nn.Linear(3, context), nn.ReLU(), nn.Linear(context, size, bias))


@pytest.mark.parametrize(
    "options", [{}, {"aggr": "mean"}, {"aggr": "max"}, {"root_weight": False, "bias": False}]
)
@pytest.mark.parametrize("kind", ["sequential", "linear", "no bias"])
def test_nn_conv(pyg, edges, options, kind):
    net = nn.Linear(3, 20) if kind == "linear" else network(6, 20, bias=kind != "no bias")
    layer = check(pyg.NNConv(4, 5, net, **options), rules(pyg), draw(6, 4), edges, draw(7, 3))
    with Spy() as spy:
        layer(draw(6, 4), edges, draw(7, 3))
    assert spy.names == ["interaction"]


def rules(_):
    return mi.nn.rules.torch_geometric()


def test_nn_conv_between_two_kinds_of_nodes(pyg, edges):
    layer = pyg.NNConv((4, 2), 5, network(6, 20))
    check(
        layer, rules(pyg), draw(6, 4), draw(4, 2), edges, draw(7, 3), call=lambda m, x, y, *r: m((x, y), *r)
    )


def test_nn_conv_makes_no_weight_of_each_edge(pyg):
    """The largest tensor is smaller than E x in x out."""
    layer = mi.convert(pyg.NNConv(16, 16, network(4, 256)), rules=rules(pyg))
    edges = torch.randint(0, 50, (2, 400))
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(torch.randn(50, 16), edges, torch.randn(400, 3)).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 400 * 16 * 16 * 4


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda pyg: nn.Sequential(nn.Linear(3, 20), nn.ReLU()), "neither an nn.Linear nor an nn.Sequential"),
        (lambda pyg: nn.Sequential(), "neither an nn.Linear nor an nn.Sequential"),
        (lambda pyg: pyg.MLP([3, 8, 20]), "neither an nn.Linear nor an nn.Sequential"),
        (lambda pyg: nn.utils.parametrizations.weight_norm(nn.Linear(3, 20)), "neither an nn.Linear"),
        (lambda pyg: nn.Linear(3, 21), "its nn: HyperLinear.from_linear: head.weight: expected shape"),
        (lambda pyg: hooked(nn.Linear(3, 20)), "has hooks"),
        (lambda pyg: hooked(network(6, 20)), "has hooks"),
        (lambda pyg: network(6, 20).to(torch.complex64), "complex64"),
    ],
)
def test_nn_conv_is_left_where_its_network_ends_otherwise(pyg, make, reason):
    check_left(pyg.NNConv(4, 5, make(pyg)), rules(pyg), reason)


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    "change",
    [
        lambda net: hooked(net[2]),
        lambda net: hooked(net),
        lambda net: net.append(nn.Tanh()),
        lambda net: nn.utils.parametrizations.weight_norm(net[2]),
    ],
    ids=["hook", "hook of the network", "another layer", "parametrized"],
)
def test_nn_conv_computes_a_network_that_changed_later_as_before(pyg, edges, change):
    called = []
    layer = mi.convert(pyg.NNConv(4, 5, network(6, 20)).double(), rules=rules(pyg))
    change(layer.nn)
    layer.nn[2].register_forward_hook(lambda *_: called.append(1))
    inputs = draw(6, 4), edges, draw(7, 3)
    found = layer(*inputs)
    assert called == [1]
    layer.__class__ = pyg.NNConv
    torch.testing.assert_close(found, layer(*inputs), rtol=1e-12, atol=1e-12)


def test_nn_conv_in_a_model_trains_on(pyg, edges):
    """Shared layer, optimiser from before, hooks."""
    torch.manual_seed(0)
    conv = pyg.NNConv(4, 4, network(6, 16))
    model = nn.ModuleList([conv, nn.Bilinear(2, 2, 2), nn.ModuleList([conv])])
    calls = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    reference = copy.deepcopy(model)
    x, attributes = torch.randn(6, 4), torch.randn(7, 3)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (reference, model)]
    mi.convert(model, rules=rules(pyg))
    assert model[0] is model[2][0] is conv and type(model[1]) is mi.nn.Bilinear
    for _ in range(3):
        for m, optimizer in zip((reference, model), optimizers, strict=True):
            optimizer.zero_grad()
            m[2][0](m[0](x, edges, attributes), edges, attributes).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    assert len(calls) == 12  # of both models, whose hooks are one function


def test_nn_conv_is_explained(pyg, edges):
    layer = mi.convert(pyg.NNConv(4, 5, network(6, 20)), rules=rules(pyg))
    plan = mi.explain(layer, torch.randn(6, 4), edges, torch.randn(7, 3))
    assert plan.operations >= 2 * 7 * 4 * 5 * 6


def test_new_layers_of_the_package_are_not_changed(pyg, edges):
    mi.convert(pyg.NNConv(4, 5, network(6, 20)), rules=rules(pyg))
    other = pyg.NNConv(4, 5, network(6, 20))
    with Spy() as spy:
        other(torch.randn(6, 4), edges, torch.randn(7, 3))
    assert spy.names == []


@pytest.mark.parametrize(
    "options", [{}, {"aggr": "add"}, {"num_bases": 2}, {"root_weight": False, "bias": False}]
)
def test_fast_rgcn_conv(pyg, edges, options):
    check(pyg.FastRGCNConv(4, 5, 4, **options), rules(pyg), draw(6, 4), edges, KINDS)


@pytest.mark.parametrize("name", ["RGCNConv", "FastRGCNConv"])
def test_edges_and_their_types_of_32_bits(pyg, edges, name):
    layer, x = getattr(pyg, name)(4, 5, 4), torch.randn(6, 4)
    expected = layer(x, edges, KINDS)
    mi.convert(layer, rules=rules(pyg))
    torch.testing.assert_close(layer(x, edges, KINDS.int()), expected)
    torch.testing.assert_close(layer(x, edges.int(), KINDS.int()), expected)


def test_fast_rgcn_conv_of_node_numbers(pyg, edges):
    check(pyg.FastRGCNConv(6, 5, 4), rules(pyg), None, edges, KINDS)


def test_fast_rgcn_conv_with_blocks_is_left(pyg):
    check_left(pyg.FastRGCNConv(4, 6, 3, num_blocks=2), rules(pyg), "block-diagonal")

    check_left(pyg.RGCNConv(4, 6, 3, num_blocks=2), rules(pyg), "block-diagonal")
    check_left(pyg.RGCNConv(4, 6, 3, aggr="max"), rules(pyg), "not summed or averaged (aggr='max')")


KINDS = torch.tensor([0, 2, 1, 1, 0, 2, 2])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggr": "add"},
        {"num_bases": 2},
        {"root_weight": False, "bias": False},
        {"flow": "target_to_source"},
    ],
    ids=str,
)
def test_rgcn_conv(pyg, options):
    """An edge twice, and two relations between the same nodes, count in the means."""
    edges = torch.tensor([[0, 0, 2, 3, 3, 0, 5], [1, 1, 0, 2, 1, 1, 1]])
    layer = check(pyg.RGCNConv(4, 5, 4, **options), rules(pyg), draw(6, 4), edges, KINDS)
    with Spy() as spy:
        layer(draw(6, 4), edges, KINDS)
    assert spy.names == ["segment_order", "interaction_by_segment"]


@pytest.mark.parametrize("name", ["RGCNConv", "FiLMConv"])
def test_relations_between_two_kinds_of_nodes(pyg, edges, name):
    inputs = draw(6, 4), draw(4, 3), edges, KINDS
    layer = getattr(pyg, name)((4, 3), 5, 4)
    check(layer, rules(pyg), *inputs, call=lambda m, x, y, *others: m((x, y), *others))


@pytest.mark.parametrize("case", ["numbers", "none", "dense", "hook"])
def test_rgcn_conv_as_before(pyg, edges, case):
    layer = pyg.RGCNConv(6, 5, 3)
    calls = []
    if case == "hook":
        layer.register_message_forward_hook(lambda *_: calls.append(1))
    x = {"numbers": torch.tensor([3, 1, 0, 5, 2, 4]), "none": None}.get(case, torch.randn(6, 6))
    if case == "dense":
        edges = torch.randint(0, 6, (2, 10))
    kinds = torch.randint(0, 3, (edges.shape[1],))
    expected = layer(x, edges, kinds)
    mi.convert(layer, rules=rules(pyg))
    before = len(calls)
    with Spy() as spy:
        assert torch.equal(layer(x, edges, kinds), expected)
    assert spy.names == [] and len(calls) == 2 * before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggr": "add"},
        {"act": None},
        {"act": nn.ReLU(inplace=True)},
        {"nn": nn.Linear(4, 10)},
        {"flow": "target_to_source"},
    ],
    ids=str,
)
def test_film_conv(pyg, options):
    """As in test_rgcn_conv: an edge twice, two relations between the same nodes, one without edges."""
    edges = torch.tensor([[0, 0, 2, 3, 3, 0, 5], [1, 1, 0, 2, 1, 1, 1]])
    layer = check(pyg.FiLMConv(4, 5, 4, **options), rules(pyg), draw(6, 4), edges, KINDS)
    with Spy() as spy:
        layer(draw(6, 4), edges, KINDS)
    assert spy.names.count("interaction_by_segment") == 2
    none = edges[:, :0]
    expected = layer(draw(6, 4), none, KINDS[:0])
    assert expected.shape == (6, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_film_conv_of_numbers_of_32_bits_under_autocast(pyg, edges, dtype):
    layer, x = pyg.FiLMConv(4, 5, 4), torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        expected = layer(x, edges, KINDS)
        mi.convert(layer, rules=rules(pyg))
        found = layer(x, edges.int(), KINDS.int())
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", ["type unknown", "type below 0", "none", "dense", "hook", "hook of a layer"])
def test_film_conv_as_before(pyg, edges, case):
    layer, kinds = pyg.FiLMConv(4, 5, 4), KINDS.clone()
    calls = []
    if case.startswith("hook"):
        where = (
            layer.films[2].register_forward_hook if "layer" in case else layer.register_message_forward_hook
        )
    if case == "dense":
        edges, kinds = torch.randint(0, 6, (2, 20)), torch.randint(0, 4, (20,))
    if case.startswith("type"):
        kinds[3] = 4 if case == "type unknown" else -1
    x = torch.randn(6, 4)
    mi.convert(layer, rules=rules(pyg))
    if case.startswith("hook"):
        where(lambda *_: calls.append(1))
    given = (x, edges, None) if case == "none" else (x, edges, kinds)
    with Spy() as spy:
        if case == "none":
            with pytest.raises(AssertionError):
                layer(*given)
            return
        found = layer(*given)
    assert spy.names == [] and bool(calls) == case.startswith("hook")
    layer.__class__ = pyg.FiLMConv
    assert torch.equal(found, layer(*given))


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("node", [-1, 6])
def test_film_conv_of_nodes_that_are_not_there(pyg, edges, node, end):
    layer, edges = pyg.FiLMConv(4, 5, 4), edges.clone()
    edges[end, 2] = node
    mi.convert(layer, rules=rules(pyg))
    with pytest.raises((IndexError, RuntimeError), match="out of range|out of bounds"):
        layer(torch.randn(6, 4), edges, KINDS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_relations": 1}, "one relation"),
        ({"aggr": "max"}, "not summed or averaged (aggr='max')"),
        ({"act": nn.Dropout(0.5)}, "no activation of each element that is known here (Dropout)"),
        ({"nn": nn.Sequential(nn.Linear(4, 12))}, "no linear layer (Sequential)"),
        ({"nn": nn.Linear(4, 12, bias=False)}, "no bias"),
        ({"in_channels": -1}, "no sizes yet"),
    ],
    ids=str,
)
def test_film_conv_that_is_left(pyg, options, reason):
    layer = pyg.FiLMConv(**({"in_channels": 4, "out_channels": 6, "num_relations": 3} | options))
    check_left(layer, rules(pyg), reason)
