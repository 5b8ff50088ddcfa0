"""What every test of a ready rule asserts of a layer before and after mi.convert."""

import copy
import pickle
import warnings

import pytest
import torch

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
