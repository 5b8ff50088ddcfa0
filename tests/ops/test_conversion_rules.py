"""The ready rules of mi.convert: layers of other packages compute and train as before.

pykeen, supar and MultiBench are not in the test extra (heavy, or no package): stand-ins with their attributes
and formulas always run, the packages themselves where they can be imported. Over 400 lines: the checks of a
converted layer are the same for all packages.
"""

import builtins
import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import stand_ins
import torch
from helpers import Spy
from torch import nn

import mi_kernels as mi


def leaves(inputs):
    floating = [t for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return [t.requires_grad_() for t in floating]


def derivatives(layer, inputs, call):
    """Value, gradients for inputs and parameters, and the gradients of their sum of squares."""
    inputs = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in inputs]
    wanted = [*leaves(inputs), *layer.parameters()]
    torch.manual_seed(7)  # of dropout
    y = call(layer, *inputs)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    first = torch.autograd.grad((y * weights).sum(), wanted, create_graph=True, allow_unused=True)
    square = sum((g.square().sum() for g in first if g is not None), torch.zeros((), requires_grad=True))
    second = torch.autograd.grad(square, wanted, allow_unused=True)
    return y, [g for g in first if g is not None], [g for g in second if g is not None]


def check(layer, rules, *inputs, call=lambda layer, *inputs: layer(*inputs)):
    """Converted in place, in float64: same objects, keys, values, gradients and second derivatives."""
    layer = layer.double()
    before = copy.deepcopy(layer)
    parameters, keys, kind = dict(layer.named_parameters()), list(layer.state_dict()), type(layer)
    assert [entry.status for entry in mi.conversion_report(layer, rules)] == ["convertible"]
    assert type(layer) is kind
    assert mi.convert(layer, rules=rules) is layer
    assert isinstance(layer, kind) and type(layer) is not kind
    assert list(layer.state_dict()) == keys and layer.training == before.training
    assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
    expected, found = derivatives(before, inputs, call), derivatives(layer, inputs, call)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        layer.state_dict(), before.state_dict(), rtol=1e-9, atol=1e-11
    )  # running means
    (entry,) = mi.conversion_report(layer)
    assert (entry.before, entry.status) == (kind.__name__, "converted")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mi.convert(layer, rules=rules)
        mi.convert(layer)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    torch.manual_seed(7)
    expected = call(layer, *inputs)
    for other in copies:
        assert mi.conversion_report(other)[0].status == "converted" and type(other) is type(layer)
        other.load_state_dict(before.state_dict())
        torch.manual_seed(7)
        assert torch.equal(call(other, *inputs), expected)
    return layer


def check_left(layer, rules, reason):
    """Left alone with a warning, and the report knows before and after."""
    kind = type(layer)
    for _ in range(2):
        (entry,) = mi.conversion_report(layer, rules)
        assert entry.status == "left" and reason in entry.reason
        with pytest.warns(UserWarning, match=f"convert: {kind.__name__} is left alone: ") as caught:
            assert mi.convert(layer, rules=rules) is layer
        assert reason in str(caught[0].message) and type(layer) is kind


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# torch_geometric

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


def test_rgcn_conv_between_two_kinds_of_nodes(pyg, edges):
    inputs = draw(6, 4), draw(4, 3), edges, KINDS
    layer = pyg.RGCNConv((4, 3), 5, 4)
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


def test_film_conv_between_two_kinds_of_nodes(pyg, edges):
    inputs = draw(6, 4), draw(4, 3), edges, KINDS
    layer = pyg.FiLMConv((4, 3), 5, 4)
    check(layer, rules(pyg), *inputs, call=lambda m, x, y, *others: m((x, y), *others))


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


# pykeen, supar, MultiBench: stand-ins, and the packages where they are installed

PLACES = {
    "pykeen": ("pykeen.nn.modules", "pykeen is not installed: too heavy for continuous integration"),
    "supar": ("supar.modules.affine", "supar is not installed: it needs nltk, stanza, transformers"),
    "multibench": ("fusions.common_fusions", "MultiBench is a repository, not a package"),
}


def package(name):
    @pytest.fixture(params=["stand-in", "real"])
    def found(request):
        module, reason = PLACES[name]
        if request.param == "real":
            yield pytest.importorskip(module, reason=reason, exc_type=ImportError)
        else:
            with stand_ins.installed(name):
                yield pytest.importorskip(module)

    return found


pykeen, supar, multibench = package("pykeen"), package("supar"), package("multibench")


def tucker(module, size, relation, dropouts=(0.0, 0.0, 0.0), norm=True):
    if module.TuckERInteraction is stand_ins.TuckERInteraction:
        return module.TuckERInteraction(size, relation, dropouts, norm)
    return module.TuckERInteraction(size, relation, *dropouts, apply_batch_normalization=norm)


SHAPES = {
    "triples": ((6, 4), (6, 3), (6, 4)),
    "tails": ((6, 1, 4), (6, 1, 3), (1, 5, 4)),
    "heads": ((1, 5, 4), (6, 1, 3), (6, 1, 4)),
    "negatives": ((6, 1, 4), (6, 1, 3), (6, 5, 4)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("dropouts", "norm"), [((0.0, 0.0, 0.0), True), ((0.3, 0.0, 0.0), False), ((0.3, 0.4, 0.5), True)]
)
def test_tucker(pykeen, shapes, dropouts, norm):
    """Also with dropout of the relations: then everything is drawn as before, in the same layouts."""
    layer = tucker(pykeen, 4, 3, dropouts, norm)
    check(layer, mi.nn.rules.pykeen(), *(draw(*shape) for shape in shapes))


def test_tucker_is_one_call_without_dropout_of_the_relations(pykeen):
    inputs = [torch.randn(shape) for shape in SHAPES["tails"]]
    layer = mi.convert(tucker(pykeen, 4, 3, (0.3, 0.4, 0.5)), rules=mi.nn.rules.pykeen())
    hooks = mi.convert(tucker(pykeen, 4, 3), rules=mi.nn.rules.pykeen())
    hooks.relation_dropout.register_forward_hook(lambda *_: None)
    for module, names in ((layer, []), (layer.eval(), ["interaction"]), (hooks, [])):
        training = module.training
        with Spy() as spy:
            module.train(names == []) if module is layer else module
            module(*inputs)
        module.train(training)
        assert spy.names == names


def test_complex_tucker_is_left(pykeen):
    layer = tucker(pykeen, 4, 3, norm=False).to(torch.complex64)
    check_left(layer, mi.nn.rules.pykeen(), "its parameters are complex")


@pytest.mark.parametrize("n_out", [1, 3])
@pytest.mark.parametrize("scale", [0, 0.5])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_biaffine(supar, n_out, scale, biases):
    layer = supar.Biaffine(4, n_out, scale, *biases)
    nn.init.normal_(layer.weight)
    check(layer, mi.nn.rules.supar(), draw(2, 3, 4), draw(2, 5, 4))


def test_biaffine_of_another_version_is_left(supar):
    layer = supar.Biaffine(4)
    layer.mlp_x = nn.Linear(4, 4)
    check_left(layer, mi.nn.rules.supar(), "more parts than a weight")
    layer = supar.Biaffine(4)
    layer.weight = nn.Parameter(torch.zeros(1, 4))
    check_left(layer, mi.nn.rules.supar(), "its weight is not [n_out, 5, 5]")
    check_left(supar.Biaffine(4).to(torch.complex64), mi.nn.rules.supar(), "complex")


def multiplicative(module, *arguments, **options):
    layer = module.MultiplicativeInteractions2Modal(*arguments, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize(
    "options", [{}, {"flip": True}, {"clip": (-0.5, 0.5)}, {"flip": True, "clip": (-0.1, 2.0)}], ids=str
)
@pytest.mark.parametrize(("output", "size"), [("matrix", 5), ("matrix3D", (2, 3))])
def test_multiplicative_interactions(multibench, output, size, options):
    inputs = [draw(6, 3), draw(6, 4)]
    layer = multiplicative(multibench, (3, 4), size, output, **options)
    inputs = inputs[::-1] if options.get("flip") else inputs
    layer = check(layer, mi.nn.rules.multibench(), *inputs, call=lambda m, *pair: m(list(pair)))
    with Spy() as spy:
        layer(inputs)
    assert spy.names == ["interaction"]
    assert layer(inputs[:1]) is inputs[0]
    with pytest.raises(AssertionError):
        layer([*inputs, inputs[0]])


def test_multiplicative_interactions_of_flattened_modalities(multibench):
    layer = multiplicative(multibench, (6, 8), 5, "matrix", flatten=True)
    inputs = draw(6, 3, 2), draw(6, 2, 4)
    check(layer, mi.nn.rules.multibench(), *inputs, call=lambda m, *pair: m(list(pair)))


def test_clipped_gradients(multibench):
    """A hook of the parameters, which pickle does not take."""
    layer = multiplicative(multibench, (3, 4), 5, "matrix", grad_clip=(-1e-3, 1e-3)).double()
    mi.convert(layer, rules=mi.nn.rules.multibench())
    layer([draw(6, 3), draw(6, 4)]).square().sum().backward()
    assert all(parameter.grad.abs().max() == 1e-3 for parameter in layer.parameters())


@pytest.mark.parametrize("output", ["vector", "scalar"])
def test_other_multiplicative_interactions_are_left(multibench, output):
    layer = multiplicative(multibench, (3, 4), 4, output)
    check_left(layer, mi.nn.rules.multibench(), f"its output is {output!r}, where no weight is generated")


def test_complex_multiplicative_interactions_are_left(multibench):
    layer = multiplicative(multibench, (3, 4), 5, "matrix").to(torch.complex64)
    check_left(layer, mi.nn.rules.multibench(), "complex")


@pytest.mark.parametrize(
    ("name", "module", "advice"),
    [
        ("torch_geometric", "torch_geometric", "pip install torch_geometric"),
        ("pykeen", "pykeen", "pip install pykeen"),
        ("supar", "supar", "pip install supar"),
        ("multibench", "fusions.common_fusions", "put a clone of https://github.com/pliang279/MultiBench on"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, name, module, advice):
    original = builtins.__import__

    def missing(wanted, *arguments):
        if wanted.split(".")[0] == module.split(".")[0]:
            raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)
        return original(wanted, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, f"mi_kernels.nn.rules._{name}", raising=False)
    monkeypatch.delattr(mi.nn.rules, f"_{name}", raising=False)
    message = rf"^mi\.nn\.rules\.{name}: cannot import {module} \(No module named .*\): {advice}"
    with pytest.raises(ImportError, match=message):
        getattr(mi.nn.rules, name)()


@pytest.mark.subprocess
def test_nothing_is_imported_before_a_rule_is_asked_for():
    names = ("torch_geometric", "pykeen", "supar", "fusions")
    program = f"import sys, mi_kernels; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
