"""Which context a module gives to which input: the rule in the docstring of mi_kernels.nn.

Over 400 lines: one table of modules and cases serves them all.
"""

import copy
import inspect
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim

import mi_kernels as mi

X, Z, OUT = 5, 3, 4
F64 = {"dtype": torch.float64}
MAKERS = {
    "interaction": lambda **kw: mi.nn.MultiplicativeInteraction(
        X, context_features=Z, out_features=OUT, **kw
    ),
    "diagonal": lambda **kw: mi.nn.DiagonalInteraction(X, context_features=Z, activation="tanh", **kw),
    "diagonal-x": lambda **kw: mi.nn.DiagonalInteraction(X, context_features=Z, weight_x=True, **kw),
    "gated": lambda **kw: mi.nn.GatedInteraction(X, context_features=Z, **kw),
    "hyper": lambda **kw: mi.nn.HyperLinear(X, out_features=OUT, context_features=Z, **kw),
    "hyper-network": lambda **kw: mi.nn.HyperLinear(
        X, out_features=OUT, context_features=Z, context_network=nn.Linear(Z, Z, **kw), **kw
    ),
    "hyper-mlp": lambda **kw: mi.nn.HyperMLP([X, 6, OUT], context_features=Z, **kw),
    "head": lambda **kw: mi.nn.HyperLinear.from_linear(nn.Linear(Z, OUT * X + OUT, **kw), X, OUT),
    "film": lambda **kw: mi.nn.FiLM(X, context_features=Z, channel_dim=-1, **kw),
    "film-maps": lambda **kw: mi.nn.FiLM(X, context_features=Z, **kw),
}
# Leading dimensions of x and z, and those of z in full.
SHAPES = {
    "per sample": ((4, 6), (4,), (4, 1)),
    "per sample, more positions": ((4, 2, 6), (4,), (4, 1, 1)),
    "per two": ((4, 2, 6), (4, 2), (4, 2, 1)),
    "per first and third": ((4, 2, 6), (4, 1, 6), (4, 1, 6)),
    "per second": ((4, 2, 6), (1, 2), (1, 2, 1)),
    "per position": ((4, 6), (4, 6), (4, 6)),
    "full": ((4, 6), (4, 1), (4, 1)),
    "one per position": ((4, 6), (1, 6), (1, 6)),
    "one": ((4, 6), (), (1, 1)),
    "one, with dimensions": ((4, 6), (1,), (1, 1)),
    "one position": ((4, 1), (4,), (4, 1)),
    "one sample of one": ((1, 1), (1,), (1, 1)),
    "one sample": ((1, 6), (1,), (1, 1)),
    "no sample": ((0, 6), (0,), (0, 1)),
    "no sample, no position": ((0, 0), (0,), (0, 1)),
}


@pytest.fixture(params=MAKERS)
def name(request):
    return request.param


def made(name, **options):
    torch.manual_seed(0)
    module = MAKERS[name](**options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def inputs(name, x_lead, z_lead, **options):
    """x and z; the channels of feature maps are in dimension 1."""
    x, z = torch.randn(*x_lead, X, **options), torch.randn(*z_lead, Z, **options)
    return (x.movedim(-1, 1) if name == "film-maps" else x), z


def explicit(name, module, x, z):
    """The same from the function, for z with all dimensions of x."""
    if name == "film-maps":
        return explicit("film", module, x.movedim(1, -1), z).movedim(-1, 1)
    if name == "film":
        scale, shift = nn.functional.linear(z, module.weight, module.bias).chunk(2, -1)
        return mi.modulate(x, scale, shift, scale_offset=1.0)
    if name.startswith("diagonal"):
        return mi.diagonal(
            x,
            z,
            module.weight,
            module.bias,
            module.shift_weight,
            module.shift_bias,
            weight_x=module.weight_x,
            activation=module.activation,
        )
    if name == "gated":
        weights = module.weight, module.weight_z, module.weight_x, module.bias
        return mi.gated_interaction(x, z, *weights)
    if name == "hyper-mlp":
        first, second = module.layers
        x = module.activation(mi.interaction(x, z, *first.weights()))
        return mi.interaction(x, z, *second.weights())
    if name == "interaction":
        return mi.interaction(x, z, module.weight, module.weight_z, module.weight_x, module.bias)
    z = z if module.context_network is None else module.context_network(z)
    return mi.interaction(x, z, *module.weights())


@pytest.mark.parametrize("case", SHAPES)
def test_the_shape_in_full_gives_the_same(name, case, place):
    """Value and all gradients, also of the context with fewer dimensions."""
    x_lead, z_lead, full = SHAPES[case]
    module = made(name, device=place.device, **F64)
    x, z = inputs(name, x_lead, z_lead, device=place.device, **F64)
    leaves = [x.requires_grad_(), z.requires_grad_(), *module.parameters()]
    y, expected = module(x, z), explicit(name, module, x, z.reshape(*full, Z))
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(t, leaves, cotangent) for t in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_broadcasting_that_enlarges_x_is_explicit(name):
    module = made(name)
    x, z = inputs(name, (1, 6), (4, 1))
    assert module(x, z).numel() == 4 * module(*inputs(name, (1, 6), (1,))).numel()
    with pytest.raises(ValueError, match="z: expected shape|context_network: expected shape"):
        module(x, z[:, 0])


AMBIGUOUS = {
    "samples and positions": (
        (4, 4),
        (4,),
        "z.unsqueeze(1) of shape [4, 1, 3]",
        "z.unsqueeze(0) of shape [1, 4, 3]",
    ),
    "three": (
        (4, 2, 4),
        (4,),
        "z[:, None, None] of shape [4, 1, 1, 3]",
        "z[None, None] of shape [1, 1, 4, 3]",
    ),
    "two of three": (
        (4, 4, 4),
        (4, 4),
        "z.unsqueeze(2) of shape [4, 4, 1, 3]",
        "z.unsqueeze(0) of shape [1, 4, 4, 3]",
    ),
    "one of two": (
        (2, 4, 4),
        (1, 4),
        "z.unsqueeze(2) of shape [1, 4, 1, 3]",
        "z.unsqueeze(0) of shape [1, 1, 4, 3]",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_fits_in_two_ways_is_refused(name, case):
    x_lead, z_lead, sample, position = AMBIGUOUS[case]
    module = made(name)
    x, z = inputs(name, x_lead, z_lead)
    if name == "film-maps":  # no broadcasting of PyTorch would pair z with the last dimensions
        full = (*z_lead, *(1,) * (len(x_lead) - len(z_lead)))
        torch.testing.assert_close(module(x, z), explicit(name, module, x, z.view(*full, Z)))
        return
    argument, verb = ("context_network", "return ") if name == "hyper-network" else ("z", "pass ")
    op = type(module).__name__
    expected = (
        f"{op}: {argument}: expected contexts of samples or of positions of x, got {[*z_lead, Z]}, which fits"
        f" both the first and the last of its leading dimensions {list(x_lead)}: {verb}{sample} for one"
        f" context per sample, {position} for one per position"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        module(x, z)
    for way in (sample, position):  # the advice is taken
        expression, shape = way.split(" of shape ")
        given = eval(expression, {"z": z, "None": None})
        assert str(list(given.shape)) == shape
        torch.testing.assert_close(module(x, given), explicit(name, module, x, given))


def test_positions_alone_are_refused(name):
    """What the functions would broadcast; feature maps have no such reading."""
    module = made(name)
    x, z = inputs(name, (2, 6), (6,))
    argument, verb = ("context_network", "return ") if name == "hyper-network" else ("z", "pass ")
    expected = (
        f"{type(module).__name__}: {argument}: expected shape [Z], [2, Z] or [2, 6, Z] (sizes of x, or 1),"
        f" got [6, 3]"
    )
    if name != "film-maps":
        expected += f"; {verb}z.unsqueeze(0) of shape [1, 6, 3] for one context per position"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        module(x, z)
    assert module(x, z.unsqueeze(0)).isfinite().all()
    x, z = inputs(name, (2, 6), (5,))
    with pytest.raises(ValueError, match=re.escape("(sizes of x, or 1), got [5, 3]") + "$"):
        module(x, z)


def test_segments_are_as_they_were():
    layer, ids = made("hyper"), torch.tensor([0, 1, 1, 0])
    x, z = torch.randn(4, X), torch.randn(2, Z)
    torch.testing.assert_close(layer(x, z, segment_ids=ids), layer(x, z[ids]))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("name", ["HyperLinear", "HyperMLP"])
@pytest.mark.parametrize("lead, of_z", [((2, 6), (2,)), ((2, 6), (1,)), ((2, 4, 6), (2, 4)), ((1, 1), (1,))])
def test_bound_layers_belong_to_samples(name, bias, lead, of_z, place):
    options = {"context_features": Z, "bias": bias, "device": place.device, **F64}
    if name == "HyperLinear":
        layer = mi.nn.HyperLinear(X, out_features=3, **options)
    else:
        layer = mi.nn.HyperMLP([X, 8, 3], **options)
    x = torch.randn(*lead, X, device=place.device, **F64)
    z = torch.randn(*of_z, Z, device=place.device, **F64)
    expected = layer(x, z)
    torch.testing.assert_close(layer.bind(z)(x), expected, rtol=1e-11, atol=1e-11)
    in_full = z[(..., *[None] * (len(lead) - len(of_z)), slice(None))]
    torch.testing.assert_close(layer.bind(in_full)(x), expected, rtol=1e-11, atol=1e-11)


def test_bound_layers_that_fit_in_two_ways_are_refused():
    layer = mi.nn.HyperLinear(X, out_features=3, context_features=Z)
    z = torch.randn(4, Z)
    expected = (
        f"BoundLinear: weight: expected layers of samples or of positions of x, got [4, 3, {X}], which fits"
        f" both the first and the last of its leading dimensions [4, 4]: bind z.unsqueeze(1) (weight of shape"
        f" [4, 1, 3, {X}]) for one layer per sample, z.unsqueeze(0) (weight of shape [1, 4, 3, {X}]) for one"
        " per position"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        layer.bind(z)(torch.randn(4, 4, X))
    for explicit in (z.unsqueeze(0), z.unsqueeze(1)):
        x = torch.randn(4, 4, X)
        torch.testing.assert_close(layer.bind(explicit)(x), layer(x, explicit))
    expected = (
        f"BoundLinear: weight: expected shape [O, X], [2, O, X] or [2, 4, O, X] (sizes of x, or 1), got"
        f" [4, 3, {X}]; bind z.unsqueeze(0) (weight of shape [1, 4, 3, {X}]) for one layer per position"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        layer.bind(z)(torch.randn(2, 4, X))


def test_vmap_of_the_contexts_of_samples(name, place):
    module = made(name, device=place.device, **F64)
    per_sample = () if name == "film-maps" else (2,)  # a sample of feature maps has one context
    x, z = inputs(name, (4, 2, 6), (4, *per_sample), device=place.device, **F64)
    torch.testing.assert_close(torch.vmap(module)(x, z), module(x, z), rtol=1e-12, atol=1e-12)
    parameters = dict(module.named_parameters())

    def loss(parameters, x, z):
        return torch.func.functional_call(module, parameters, (x, z)).pow(2).sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, z)
    expected = torch.func.grad(loss)(parameters, x, z)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].sum(0), value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_film_of_single_samples(channel_dim, place):
    """[C, H, W] with [Z], as vmap sees it, and one context of all."""
    layer = mi.nn.FiLM(X, context_features=Z, channel_dim=channel_dim, device=place.device, **F64)
    nn.init.normal_(layer.weight)
    for sizes in ((), (6,), (6, 7)):
        x = torch.randn(2, X, *sizes, device=place.device, **F64)
        x = x if channel_dim == 1 else x.movedim(1, -1)
        z = torch.randn(2, Z, device=place.device, **F64)
        y = layer(x, z)
        for one in range(2):
            torch.testing.assert_close(layer(x[one], z[one]), y[one], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.vmap(layer)(x, z), y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(x, z[0]), layer(x, z[:1].expand(2, Z)), rtol=1e-12, atol=1e-12)


def test_film_asks_which_dimension_has_the_channels():
    layer, z = mi.nn.FiLM(4, context_features=Z), torch.randn(Z)
    nn.init.normal_(layer.weight)
    x = torch.randn(4, 4, 6)
    message = (
        "FiLM: x: expected size 4, that of the channels, in dimension 0 .* or in dimension 1, got [4, 4, 6]"
    )
    with pytest.raises(ValueError, match=message.replace("[", r"\[") + ".*x.unsqueeze.0. .*z.unsqueeze.0. "):
        layer(x, z)
    single, all_of_them = layer(x.unsqueeze(0), z).squeeze(0), layer(x, z.unsqueeze(0))
    torch.testing.assert_close(single, layer(x.unsqueeze(0), z.unsqueeze(0)).squeeze(0))
    torch.testing.assert_close(all_of_them, layer(x, z.expand(4, Z)))
    assert not torch.equal(single, all_of_them)
    one = mi.nn.FiLM(1, context_features=Z)
    assert one(torch.ones(1, 1, 6), z).shape == (1, 1, 6)  # no matter which
    for bad in (torch.ones(6, 3, 4), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="FiLM: x: expected size 4 in dimension 1"):
            layer(bad, z)


@pytest.mark.parametrize("case", ["per sample", "per two", "one"])
def test_the_plan_is_that_of_the_shape_in_full(name, case):
    x_lead, z_lead, full = SHAPES[case]
    module = made(name)
    x, z = inputs(name, x_lead, z_lead)
    if case == "one" or name == "hyper-network":
        assert mi.explain(module, x, z).operations > 0
    else:
        assert mi.explain(module, x, z) == mi.explain(module, x, z.view(*full, Z))


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_for_any_size(name):
    """One graph for other sizes; where these become ambiguous, the error comes."""
    module = made(name, **F64)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, positions in ((4, 6), (3, 7), (5, 2)):
        x, z = inputs(name, (batch, positions), (batch,), **F64)
        found, expected = compiled(x, z), module(x, z)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad(y.sin().sum(), list(module.parameters())) for y in (found, expected)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    if name != "film-maps":
        with pytest.raises(ValueError, match="for one context per sample"):
            torch.compile(module, backend="aot_eager", dynamic=True)(*inputs(name, (6, 6), (6,), **F64))


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("network", ["interaction", "diagonal", "gated", "hyper-mlp", "film", "film-maps"])
def test_exported_for_any_size(network, strict):
    """A program reads contexts per sample, even where B = T."""
    module = made(network, **F64)
    axis = 2 if network == "film-maps" else 1
    dims = {0: Dim("samples", min=2, max=512), axis: Dim("positions", min=2, max=512)}
    given = inputs(network, (4, 6), (4,), **F64)
    program = torch.export.export(module, given, strict=strict, dynamic_shapes=(dims, {0: dims[0]})).module()
    for batch, positions in ((3, 7), (5, 2), (6, 6)):
        x, z = inputs(network, (batch, positions), (batch,), **F64)
        torch.testing.assert_close(program(x, z), module(x, z.unsqueeze(1)), rtol=1e-10, atol=1e-10)


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_exported_film_of_one_context_for_any_batch():
    layer = made("film-maps")
    x, z = torch.randn(4, X, 6), torch.randn(Z)
    program = torch.export.export(layer, (x, z), dynamic_shapes=({0: Dim("samples", min=2, max=64)}, None))
    for batch in (2, X, 9):
        x = torch.randn(batch, X, 6)
        torch.testing.assert_close(program.module()(x, z), layer(x, z.unsqueeze(0)))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced(name):
    module = made(name, **F64)
    given = inputs(name, (4, 6), (4,), **F64)
    traced = torch.jit.trace(module, given)
    other = inputs(name, (8, 6), (8,), **F64)
    torch.testing.assert_close(traced(*other), module(*other), rtol=1e-10, atol=1e-10)


# As they were called before the arguments after the first were keywords.
OLD = {
    mi.nn.MultiplicativeInteraction: (
        (X, Z, OUT, True, False),
        "context_features=, out_features=, bias=, weight_z=",
    ),
    mi.nn.HyperLinear: ((X, OUT, Z), "out_features=, context_features="),
    mi.nn.HyperMLP: (([X, 6, OUT], Z, torch.tanh), "context_features=, activation="),
    mi.nn.DiagonalInteraction: ((X, Z, True, False), "context_features=, bias=, shift="),
    mi.nn.GatedInteraction: ((X, Z), "context_features="),
    mi.nn.FiLM: ((X, Z, False, "tanh"), "context_features=, bias=, activation="),
}


def first_of(module):
    return next(iter(inspect.signature(module).parameters))


@pytest.mark.parametrize("module", OLD)
def test_positions_still_mean_what_they_did_with_a_warning(module):
    values, names = OLD[module]
    message = f"{module.__name__}: arguments after {first_of(module)} will be keyword-only: write {names}"
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        old = module(*values)
    assert [(one.category, str(one.message), one.filename) for one in caught] == [
        (FutureWarning, message, __file__)
    ]
    torch.manual_seed(0)
    keywords = dict(zip([name.rstrip("=") for name in names.split(", ")], values[1:], strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = module(values[0], **keywords)
        assert repr(module(**{first_of(module): values[0]}, **keywords)) == repr(new)
        copies = copy.deepcopy(new), pickle.loads(pickle.dumps(new))
    assert repr(old) == repr(new)
    for other in (old, *copies):
        torch.testing.assert_close(dict(other.state_dict()), dict(new.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("module", OLD)
def test_signatures_say_keywords(module):
    kinds = [one.kind for one in inspect.signature(module).parameters.values()]
    assert kinds[0] is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds[1:]) == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(
        TypeError, match=f"^{module.__name__}: expected at most {len(kinds)} arguments, got 20$"
    ):
        module(*range(20))
    values, _ = OLD[module]
    second = list(inspect.signature(module).parameters)[1]
    message = f"^{module.__name__}: {second}: expected one value, got one by position and one by name$"
    with pytest.raises(TypeError, match=message):
        module(*values, **{second: values[1]})


def test_subclasses_pass_positions_on():
    class Own(mi.nn.FiLM):
        def __init__(self, features):
            super().__init__(features, Z, False)

    with pytest.warns(FutureWarning, match="^FiLM: .*: write context_features=, bias=$") as caught:
        layer = Own(X)
    assert caught[0].filename == __file__ and layer.bias is None
    assert layer(torch.ones(2, X), torch.ones(2, Z)).shape == (2, X)
