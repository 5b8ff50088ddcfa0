"""A bias that is a scalar or a row, as F.linear takes it: values, and gradients of its shape."""

import pytest
import torch
from helpers import COMPILE

import mi_kernels as mi

ROWS, Z, X, O = 4, 3, 5, 5  # noqa: E741
SHAPES = [(), (1,), (1, 1), (1, O)]


def tensor(*sizes, **options):
    return torch.linspace(-1, 1, max(torch.Size(sizes).numel(), 1)).reshape(sizes).to(**options)


def operations(options):
    """Name -> (the operation by its bias, what it expects of a bias)."""
    x, z, w = (tensor(*sizes, **options) for sizes in ((ROWS, X), (ROWS, Z), (O, Z, X)))
    u, groups = tensor(X, Z, **options), torch.tensor([1, 0, 1, 1], device=x.device)
    layers = w.sum(1).expand(ROWS, O, X)
    module = mi.nn.MultiplicativeInteraction(X, context_features=Z, out_features=O, **options)
    film = mi.nn.FiLM(O // 2, context_features=Z, **options)

    def with_bias(layer, *arguments):
        return lambda bias: torch.func.functional_call(layer, {"bias": bias}, arguments)

    return {
        "interaction": lambda bias: mi.interaction(x, z, w, u, None, bias),
        "interaction without W": lambda bias: mi.interaction(x, z, None, u, None, bias),
        "segments": lambda bias: mi.interaction(x, z[:2], w, None, None, bias, segment_ids=groups),
        "shared": lambda bias: mi.interaction(x.expand(3, ROWS, X), z[:3, None], w, None, None, bias),
        "bilinear": lambda bias: mi.bilinear(z, x, w, bias),
        "generate": lambda bias: mi.generate(z, w, u, None, bias)[1],
        "generate without U": lambda bias: mi.generate(z, w, None, None, bias)[1],
        "apply_generated, segments": lambda bias: mi.apply_generated(x, layers[:2], bias, segment_ids=groups),
        "apply_generated": lambda bias: mi.apply_generated(x, layers, bias),
        "gated_interaction": lambda bias: mi.gated_interaction(x, z, w, None, None, bias),
        "diagonal": lambda bias: mi.diagonal(x, z, u, bias, activation="tanh"),
        "diagonal's shift": lambda bias: mi.diagonal(x, z, u, None, u, bias),
        "diagonal, shared": lambda bias: mi.diagonal(x, z[0], u, bias, u, bias),
        "MultiplicativeInteraction": with_bias(module, x, z),
        "FiLM": with_bias(film, x[:, : O // 2], z),
    }


NAMES = list(operations({}))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_bias_that_it_broadcasts_to(name, shape, place):
    options = {"dtype": torch.float64, "device": place.device}
    function = operations(options)[name]
    out = 2 * (O // 2) if name == "FiLM" else O
    shape = tuple(out if size == O else size for size in shape)
    found, expected = (tensor(*shape, **options).requires_grad_() for _ in range(2))
    y, wanted = function(found), function(expected.expand(1, out)[0])
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    for value in (y, wanted):
        value.pow(2).sum().backward()
    assert found.grad.shape == shape
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.compile
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transformed_compiled_and_under_autocast(shape, fresh_compiler):
    x, z, w, bias = tensor(ROWS, X), tensor(ROWS, Z), tensor(O, Z, X), tensor(*shape)

    def function(bias):
        return mi.interaction(x, z, w, None, None, bias)

    full = function(bias.expand(1, O)[0])
    torch.testing.assert_close(torch.compile(function, **COMPILE, backend="aot_eager")(bias), full)
    many = torch.stack([bias, bias + 1])
    torch.testing.assert_close(torch.vmap(function)(many), torch.stack([full, full + 1]))
    _, tangent = torch.func.jvp(function, (bias,), (torch.ones_like(bias),))
    torch.testing.assert_close(tangent, torch.ones(ROWS, O))
    with torch.autocast("cpu", torch.bfloat16):
        y = function(bias.requires_grad_())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and bias.grad.shape == bias.shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_explained_and_of_integers(shape):
    x, z, w, u = tensor(ROWS, X), tensor(ROWS, Z), tensor(O, Z, X), tensor(X, Z)
    bias = torch.ones(shape, requires_grad=True)
    assert mi.explain(mi.interaction, x, z, w, None, None, bias).backward
    assert mi.explain(mi.generate, z, w, u, None, bias).backward
    assert mi.explain(mi.gated_interaction, x, z, w, None, None, bias).backward
    assert mi.explain(mi.diagonal, x, z, u, bias, None, bias).backward
    assert mi.explain(mi.apply_generated, x, tensor(ROWS, O, X), bias).backward
    y = mi.interaction(x.long(), z.long(), w.long(), None, None, bias.long())
    assert y.eq(mi.interaction(x.long(), z.long(), w.long()) + 1).all()


@pytest.mark.parametrize("shape", [(2,), (4,), (2, O), (ROWS, O), (1, 2), (1, 1, O), (O, 1)], ids=str)
@pytest.mark.parametrize("op", ["interaction", "generate", "gated_interaction", "diagonal"])
def test_other_shapes_are_refused(op, shape):
    arguments = {"x": tensor(ROWS, X), "z": tensor(ROWS, Z), "weight": tensor(O, Z, X)}
    arguments = {"z": arguments["z"], "weight": arguments["weight"]} if op == "generate" else arguments
    arguments |= {"weight": tensor(X, Z)} if op == "diagonal" else {}
    expected = r"shape \[[OX]=5\], got"
    if op == "interaction" and len(shape) > 1:  # a bias of each sample
        if shape in ((ROWS, O), (1, 1, O)):
            pytest.skip("these broadcast")
        expected = r"(shape \[\.\.\., O=5\]|leading dimensions that broadcast with .*), got"
    with pytest.raises(ValueError, match=rf"^{op}: bias: expected {expected}"):
        getattr(mi, op)(**arguments, bias=torch.ones(shape))
