"""split_head and HyperLinear.from_linear against the published forms of generated layers."""

import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import mi_kernels as mi
from mi_kernels.testing.checks import check_gradients, check_values
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import ALL_TERMS, MIDDLE, ODD, WEIGHT_ONLY, Sample, Shape

F64 = {"dtype": torch.float64}
B, Z, X, O = 6, 3, 5, 4  # noqa: E741


def linear(z, out, bias=True, **options):
    """A head whose bias is as large as its weight."""
    head = nn.Linear(z, out, bias, **F64 | options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


# Of each published form: (generated, x) -> y, and how its head is laid out.
def nn_conv(generated, x):
    """The message of torch_geometric's NNConv."""
    weight = generated.view(-1, x.shape[-1], generated.shape[-1] // x.shape[-1])
    return torch.matmul(x.unsqueeze(1), weight).squeeze(1)


def apg(generated, x):
    """FuxiCTR's APG_Linear with a generated bias."""
    out = generated.shape[-1] // (x.shape[-1] + 1)
    bias, weight = generated[:, :out], generated[:, out:].reshape(-1, x.shape[-1], out)
    return torch.bmm(x.unsqueeze(1), weight).squeeze(1) + bias


def list_of_shapes(generated, x):
    """A layer of hypnettorch, hyper-nn or hyperlight, whose targets are [O, X] and [O]."""
    out = generated.shape[-1] // (x.shape[-1] + 1)
    weight = generated[:, : -out or None].view(-1, out, x.shape[-1])
    return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1) + generated[:, generated.shape[-1] - out :]


def bias_first(generated, x):
    out = generated.shape[-1] // (x.shape[-1] + 1)
    return torch.einsum("boj,bj->bo", generated[:, out:].view(-1, out, x.shape[-1]), x) + generated[:, :out]


FORMS = {
    "NNConv": (nn_conv, {"order": "in,out", "bias": None}),
    "APG": (apg, {"order": "in,out", "bias": "first"}),
    "shapes": (list_of_shapes, {"order": "out,in", "bias": "last"}),
    "bias first": (bias_first, {"order": "out,in", "bias": "first"}),
}


def shapes_of(order, bias):
    matrix = (O, X) if order == "out,in" else (X, O)
    return {"last": [matrix, (O,)], "first": [(O,), matrix], None: [matrix]}[bias]


def by_split(head, x, z, order, bias):
    parts = mi.split_head(head.weight, head.bias, shapes_of(order, bias), order=order)
    if bias is None:
        return mi.interaction(x, z, parts[0].weight, None, parts[0].bias)
    (w, v), (u, c) = parts if bias == "last" else parts[::-1]
    return mi.interaction(x, z, w, u, v, c)


def by_module(head, x, z, order, bias):
    return mi.nn.HyperLinear.from_linear(head, X, O, order=order, bias=bias)(x, z)


def derivatives(y, leaves):
    """y, its gradients, and theirs."""
    weights = torch.linspace(0.5, 1.5, y.numel(), **F64).view_as(y)
    first = torch.autograd.grad(y.pow(2), leaves, weights, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
    return [y, *first, *second]


def agree(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and relative_error(one, other) < 1e-12


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture(params=[True, False], ids=["", "no-bias"])
def head(request, form):
    return linear(Z, O * X + (O if form[1]["bias"] else 0), request.param)


@pytest.mark.parametrize("ours", [by_split, by_module])
def test_published_forms(form, head, ours, place):
    published, layout = form
    x, z = torch.randn(B, X, **F64, requires_grad=True), torch.randn(B, Z, **F64, requires_grad=True)
    leaves = [x, z, *head.parameters()]
    agree(derivatives(ours(head, x, z, **layout), leaves), derivatives(published(head(z), x), leaves))


def test_edge_networks_of_several_layers_and_self_wise_conditions():
    """The head is the last layer; APG's self-wise condition is the input itself."""
    edges, x = torch.randn(B, 2, **F64), torch.randn(B, X, **F64, requires_grad=True)
    network = nn.Sequential(linear(2, Z), nn.ReLU(), linear(Z, X * O))
    leaves = [x, *network.parameters()]
    expected = derivatives(nn_conv(network(edges), x), leaves)
    layer = mi.nn.HyperLinear.from_linear(network[2], X, O, order="in,out", bias=None)
    agree(derivatives(layer(x, network[:2](edges)), leaves), expected)
    head = linear(X, X * O + O)
    leaves = [x, *head.parameters()]
    layer = mi.nn.HyperLinear.from_linear(head, X, O, order="in,out", bias="first")
    agree(derivatives(layer(x, x), leaves), derivatives(apg(head(x), x), leaves))


def test_low_rank_apg():
    """Its generated bias has another size than its generated matrix, which split_head does not mind."""
    k, head, x, z = 2, linear(Z, O + 2 * 2), torch.randn(B, X, **F64), torch.randn(B, Z, **F64)
    left, right = torch.randn(X, k, **F64), torch.randn(k, O, **F64)
    generated = head(z)
    core = torch.bmm((x @ left).unsqueeze(1), generated[:, O:].reshape(-1, k, k)).squeeze(1)
    (u, c), (w, v) = mi.split_head(head.weight, head.bias, [(O,), (k, k)], order="in,out")
    y = mi.interaction(x @ left, z, w, None, v) @ right + F.linear(z, u, c)
    assert relative_error(y, core @ right + generated[:, :O]) < 1e-12


@pytest.mark.parametrize("lead", [(), (1,), (B,)], ids=str)
def test_a_network_from_one_head(lead, place):
    """hypertab: an MLP of each sample; hypnettorch: one of a task, for all rows."""
    template = nn.Sequential(nn.Linear(X, 7), nn.ReLU(), nn.Linear(7, O))
    shapes = [p.shape for p in template.parameters()]
    head = linear(Z, sum(map(math.prod, shapes)))
    x, z = torch.randn(B, X, **F64, requires_grad=True), torch.randn(*lead, Z, **F64, requires_grad=True)
    pieces = head(z.expand(B, Z)).split([math.prod(shape) for shape in shapes], -1)
    w1, b1, w2, b2 = (piece.view(B, *shape) for piece, shape in zip(pieces, shapes, strict=True))
    hidden = torch.relu(torch.bmm(w1, x.unsqueeze(-1)).squeeze(-1) + b1)
    expected = torch.bmm(w2, hidden.unsqueeze(-1)).squeeze(-1) + b2
    (w1, v1), (u1, c1), (w2, v2), (u2, c2) = mi.split_head(head.weight, head.bias, shapes)
    y = mi.interaction(torch.relu(mi.interaction(x, z, w1, u1, v1, c1)), z, w2, u2, v2, c2)
    leaves = [x, z, *head.parameters()]
    agree(derivatives(y, leaves), derivatives(expected, leaves))
    weight, bias = mi.generate(z.detach(), w1, u1, v1, c1)
    generated = head(z.detach())
    assert relative_error(weight.flatten(-2), generated[..., : X * 7]) < 1e-12
    assert relative_error(bias, generated[..., X * 7 : X * 7 + 7]) < 1e-12


def test_a_kernel_of_a_convolution():
    """More than two dimensions count as X: patches are what unfold makes of an image."""
    shape, image, z = (O, 2, 3, 3), torch.randn(B, 2, 6, 5, **F64), torch.randn(B, Z, **F64)
    head = linear(Z, math.prod(shape) + O)
    (w, v), (u, c) = mi.split_head(head.weight, head.bias, [shape, (O,)])
    patches = F.unfold(image, 3).mT
    y = mi.interaction(patches, z.unsqueeze(1), w, u, v, c)
    generated = head(z)
    for number in range(B):
        kernel, bias = generated[number, :-O].view(shape), generated[number, -O:]
        assert relative_error(y[number].mT, F.conv2d(image[number], kernel, bias).flatten(1)) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["out,in", "in,out"])
def test_parts_are_views(order, bias):
    head = linear(Z, O * X + O, bias)
    shapes = shapes_of(order, "last")
    assert peak_memory(lambda: mi.split_head(head.weight, head.bias, shapes, order=order)) == 0
    (w, v), (u, c) = parts = mi.split_head(head.weight, head.bias, shapes, order=order)
    assert w.shape == (O, Z, X) and w.stride(1) == 1 and u.shape == (O, Z)
    size = head.weight.element_size()
    assert w.data_ptr() == head.weight.data_ptr() and u.data_ptr() == head.weight[O * X :].data_ptr()
    assert all(isinstance(part, mi.HeadPart) and part.weight is part[0] for part in parts)
    if not bias:
        assert v is None and c is None
        return
    assert v.shape == (O, X) and c.shape == (O,) and v.data_ptr() == head.bias.data_ptr()
    assert c.data_ptr() == head.bias.data_ptr() + size * O * X
    generated, z = head(torch.eye(Z, **F64)) - head.bias, torch.eye(Z, **F64)
    matrix = generated[:, : O * X].view(Z, O, X) if order == "out,in" else generated[:, :-O].view(Z, X, O).mT
    torch.testing.assert_close(torch.einsum("bi,oij->boj", z, w), matrix)


def from_pieces(layout, x, z, weight, weight_z, weight_x, bias):
    """The interaction by a head that is put together from its weights."""
    matrix = (lambda t: t) if layout["order"] == "out,in" else (lambda t: t.transpose(0, -1))
    out, context, width = weight.shape
    rows = weight.transpose(1, 2) if layout["order"] == "out,in" else weight.permute(2, 0, 1)
    rows, offsets = [rows.reshape(out * width, context)], [None if weight_x is None else weight_x]
    shapes = [(out, width) if layout["order"] == "out,in" else (width, out)]
    if weight_x is not None:
        offsets = [matrix(weight_x).reshape(out * width)]
    if layout["bias"] is not None and weight_z is not None:
        rows, offsets, shapes = [*rows, weight_z], [*offsets, bias], [*shapes, (out,)]
        if layout["bias"] == "first":
            rows, offsets, shapes = rows[::-1], offsets[::-1], shapes[::-1]
    offset = None if weight_x is None else torch.cat(offsets)
    parts = mi.split_head(torch.cat(rows), offset, shapes, order=layout["order"])
    if len(parts) == 1:
        return mi.interaction(x, z, parts[0].weight, None, parts[0].bias)
    (w, v), (u, c) = parts if layout["bias"] == "last" else parts[::-1]
    return mi.interaction(x, z, w, u, v, c)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", [ALL_TERMS, WEIGHT_ONLY], ids=["WUVc", "W"])
@pytest.mark.parametrize(
    "shape",
    [
        ODD,
        MIDDLE,
        Shape("shared-context", (3, 8), 5, 6, 4, context_batch=(3, 1)),
        Shape("one-row", (1,), 20, 33, 40),
        Shape("no-rows", (0,), 3, 4, 5),
        Shape("no-input", (4,), 3, 0, 5),
        Shape("no-output", (4,), 3, 5, 0),
        Shape("no-context", (4,), 0, 3, 5),
    ],
    ids=lambda shape: shape.name,
)
def test_the_error_rule(shape, terms, dtype, form, place):
    def function(*tensors):
        return from_pieces(form[1], *tensors)

    sample = Sample(shape, (True, False, True, False) if form[1]["bias"] is None and all(terms) else terms)
    check_values(sample, dtype, place.device, function)
    check_gradients(sample, dtype, place.device, function)


def test_derivatives_of_any_order():
    weight, bias = torch.randn(O * X + O, 2, **F64), torch.randn(O * X + O, **F64)
    tensors = [t.requires_grad_() for t in (weight, bias)]
    for order in ("out,in", "in,out"):

        def function(weight, bias, order=order):
            parts = mi.split_head(weight, bias, shapes_of(order, "first"), order=order)
            return tuple(t.sin() for part in parts for t in part)

        assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, tensors)


def test_transforms():
    """Ensembles of heads (vmap), and gradients by torch.func."""
    weights, biases = torch.randn(2, O * X + O, Z, **F64), torch.randn(2, O * X + O, **F64)
    x, z = torch.randn(B, X, **F64), torch.randn(B, Z, **F64)

    def loss(weight, bias):
        (w, v), (u, c) = mi.split_head(weight, bias, [(O, X), (O,)])
        return mi.interaction(x, z, w, u, v, c).pow(2).sum()

    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(weights, biases)
    for number, pair in enumerate(zip(weights, biases, strict=True)):
        leaves = [t.clone().requires_grad_() for t in pair]
        expected = torch.autograd.grad(list_of_shapes(F.linear(z, *leaves), x).pow(2).sum(), leaves)
        agree([t[number] for t in found], expected)


# The module.


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
    network = mi.nn.HyperMLP([X, 7, O], Z, context_network=nn.Linear(2, Z, **F64), **F64)
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


WEIGHT, BIAS = torch.ones(24, 3), torch.ones(24)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, BIAS, [(4, 6)]), TypeError, "weight: expected a torch.Tensor, got NoneType"),
        ((nn.Linear(3, 24), BIAS, [(4, 6)]), TypeError, "weight: expected a torch.Tensor, got Linear"),
        ((WEIGHT, BIAS.double(), [(4, 6)]), TypeError, "bias: expected torch.float32 (the dtype of weight)"),
        ((WEIGHT.to_sparse(), None, [(4, 6)]), TypeError, "weight: expected a dense (strided) tensor"),
        ((WEIGHT.cfloat(), None, [(4, 6)]), TypeError, "weight: expected a dtype of float64"),
        ((WEIGHT, None, [(4, 5)]), ValueError, "weight: expected shape [P=20, Z], got [24, 3]"),
        ((WEIGHT, None, [(4, 5), (5,)]), ValueError, "weight: expected shape [P=25, Z], got [24, 3]"),
        ((BIAS, None, [(4, 6)]), ValueError, "weight: expected shape [P=24, Z], got [24]"),
        ((WEIGHT, BIAS[:20], [(4, 6)]), ValueError, "bias: expected shape [P=24], got [20]"),
        ((WEIGHT, BIAS, 24), TypeError, "shapes: expected a sequence of shapes, got int"),
        ((WEIGHT, BIAS, "24"), TypeError, "shapes: expected a sequence of shapes, got str"),
        ((WEIGHT, BIAS, (4, 6)), TypeError, "shapes[0]: expected a sequence of int, got int"),
        ((WEIGHT, BIAS, [(4, 5), "4"]), TypeError, "shapes[1]: expected a sequence of int, got str"),
        ((WEIGHT, BIAS, [(4, 6.0)]), TypeError, "shapes[0][1]: expected an int, got float"),
        ((WEIGHT, BIAS, [(4, True)]), TypeError, "shapes[0][1]: expected an int, got bool"),
        ((WEIGHT, BIAS, [(-4, -6)]), ValueError, "shapes[0][0]: expected >= 0, got -4"),
        ((WEIGHT, BIAS, [(4, 6), ()]), ValueError, "shapes[1]: expected at least one dimension, got []"),
        ((WEIGHT, BIAS, []), ValueError, "weight: expected shape [P=0, Z], got [24, 3]"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_messages_of_split_head(arguments, error, message):
    with pytest.raises(error, match="^" + re.escape(f"split_head: {message}")):
        mi.split_head(*arguments)


def test_messages_about_the_order():
    message = r"^split_head: order: expected one of 'out,in', 'in,out', got 'oi'$"
    with pytest.raises(ValueError, match=message):
        mi.split_head(WEIGHT, BIAS, [(4, 6)], order="oi")
    message = (
        r"^split_head: shapes\[0\]: expected one or two dimensions with order='in,out', got \[2, 3, 2, 2\]$"
    )
    with pytest.raises(ValueError, match=message):
        mi.split_head(WEIGHT, BIAS, [(2, 3, 2, 2)], order="in,out")
