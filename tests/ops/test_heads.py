"""split_head against the published forms of generated layers."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from published_weights import HEADS, apg, linear, list_of_shapes, nn_conv
from torch import nn

import mi_kernels as mi
from mi_kernels.testing.checks import check_gradients, check_values
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import MIDDLE, ODD, WEIGHT_ONLY, Sample, Shape

F64 = {"dtype": torch.float64}
B, Z, X, O = 6, 3, 5, 4  # noqa: E741


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


@pytest.fixture(params=HEADS)
def form(request):
    return HEADS[request.param]


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
    out, context, width = weight.shape
    axes, shape = ((0, 2, 1), (out, width)) if layout["order"] == "out,in" else ((2, 0, 1), (width, out))
    rows, shapes = [weight.permute(axes).reshape(out * width, context)], [shape]
    offset = None
    if weight_x is not None:
        offset = [(weight_x if layout["order"] == "out,in" else weight_x.t()).reshape(out * width)]
    if weight_z is not None:
        rows, shapes, offset = [*rows, weight_z], [*shapes, (out,)], [*offset, bias]
    if layout["bias"] == "first":
        rows, shapes, offset = rows[::-1], shapes[::-1], offset and offset[::-1]
    offset = None if offset is None else torch.cat(offset)
    parts = mi.split_head(torch.cat(rows), offset, shapes, order=layout["order"])
    if layout["bias"] == "first":
        parts.reverse()
    (w, v), (u, c) = parts if weight_z is not None else [*parts, (None, None)]
    return mi.interaction(x, z, w, u, v, c)


SHAPES = (
    ODD,
    MIDDLE,
    Shape("shared-context", (3, 8), 5, 6, 4, context_batch=(3, 1)),
    Shape("one-row", (1,), 20, 33, 40),
    Shape("no-rows", (0,), 3, 4, 5),
    Shape("no-input", (4,), 3, 0, 5),
    Shape("no-output", (4,), 3, 5, 0),
    Shape("no-context", (4,), 0, 3, 5),
)


# The order of parameters and the scope keep what is judged by one oracle together.
@pytest.mark.parametrize(
    ("sample", "dtype"),
    [
        *((Sample(shape), torch.float32) for shape in SHAPES),
        (Sample(MIDDLE, WEIGHT_ONLY), torch.float32),
        (Sample(MIDDLE), torch.bfloat16),
    ],
    ids=str,
    scope="module",
)
def test_the_error_rule(sample, dtype, form, place):
    if form[1]["bias"] is None and sample.terms != WEIGHT_ONLY:
        sample = replace(sample, terms=(True, False, True, False))

    def function(*tensors):
        return from_pieces(form[1], *tensors)

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
