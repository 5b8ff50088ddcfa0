"""What PyTorch's engine asks of the rules: its own vmap, gradients of some arguments, compiled autograd."""

from functools import partial

import pytest
import torch
from calls import CALLS
from helpers import Spy
from torch._dynamo import compiled_autograd
from torch.autograd.functional import hessian, jacobian

import mi_kernels as mi
from mi_kernels.ops import rules
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.samples import ODD, Sample, Shape


@pytest.fixture(autouse=True)
def _always_asks(monkeypatch):
    monkeypatch.setattr(rules, "MIN_QUERY_WORK", 0)


every_call = pytest.mark.parametrize("name", CALLS)


def alike(function, *arguments):
    """What a function makes of the call on this backend and of the same on the reference."""
    found = function(*arguments)
    with mi.backend("reference"):
        expected = function(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert any(tensor.abs().sum() > 0 for tensor in found)


@every_call
def test_vectorized_jacobians_keep_their_graph(name, place):
    call = CALLS[name]
    x, *others = call.arguments(torch.float64, place.device)

    def gradients_through():
        y = jacobian(lambda x: call(x, *others).sin(), x, vectorize=True, create_graph=True)
        assert y.requires_grad
        loss = y.pow(2).sum() + call(x, *others).sum()
        return torch.autograd.grad(loss, [x, *others], materialize_grads=True)

    alike(gradients_through)


@every_call
def test_batched_gradients(name, place):
    call = CALLS[name]
    tensors = call.arguments(torch.float64, place.device)
    shape = call(*tensors).shape
    cotangents = torch.randn(3, *shape, dtype=torch.float64, device=place.device)

    def batched(create_graph):
        y = call(*tensors)
        first = torch.autograd.grad(y, tensors, cotangents, is_grads_batched=True, create_graph=create_graph)
        if not create_graph:
            return first
        loss = sum(gradient.pow(2).sum() for gradient in first)
        return torch.autograd.grad(loss, tensors, materialize_grads=True)

    alike(batched, False)
    alike(batched, True)


@every_call
def test_vectorized_hessians(name, place):
    call = CALLS[name]
    x, *others = call.arguments(torch.float64, place.device)
    alike(lambda: (hessian(lambda x: call(x, *others).sin().sum(), x.detach(), vectorize=True),))


@every_call
def test_vectorized_jacobians_in_forward_mode(name, place):
    """By every argument: tangents are mapped over, and so is what the rules make of them."""
    tensors = [tensor.detach() for tensor in CALLS[name].arguments(torch.float64, place.device)]

    def jacobians():
        def by(index):
            def function(tensor):
                return CALLS[name](*tensors[:index], tensor, *tensors[index + 1 :]).sin()

            return jacobian(function, tensors[index], vectorize=True, strategy="forward-mode")

        return [by(index) for index in range(len(tensors))]

    alike(jacobians)


def test_nested_vmaps(place):
    """Of one function: on others PyTorch crashes without this package too."""
    call = CALLS["interaction"]
    x, *others = call.arguments(torch.float64, place.device)

    def slopes(x):
        return jacobian(lambda x: call(x, *others).sin().sum(0), x, vectorize=True, create_graph=True).sum(0)

    alike(lambda: (jacobian(slopes, x.detach(), vectorize=True),))


def test_vmap_in_vmap_over_one_backward_pass(place):
    tensors = CALLS["interaction"].arguments(torch.float64, place.device)
    y = mi.interaction(*tensors)
    cotangents = torch.randn(2, 3, *y.shape, dtype=torch.float64, device=place.device)

    def gradients(cotangent):
        return torch.autograd.grad(y, tensors, cotangent, retain_graph=True)

    found = torch._vmap_internals._vmap(torch._vmap_internals._vmap(gradients))(cotangents)
    one = torch._vmap_internals._vmap(gradients)
    expected = [torch.stack(pair) for pair in zip(one(cotangents[0]), one(cotangents[1]), strict=True)]
    torch.testing.assert_close(list(found), expected)


def test_batched_gradients_are_one_call(place):
    """Rows of one product instead of a loop over the cotangents."""
    tensors = CALLS["interaction"].arguments(torch.float32, place.device)
    y = mi.interaction(*tensors)
    with Spy() as spy:
        torch.autograd.grad(y, tensors, torch.randn(9, *y.shape, device=place.device), is_grads_batched=True)
    assert spy.names == ["interaction_input_grads", "interaction_weight_grads"]


@pytest.mark.parametrize("asked", ["x", "z", "weight", "bias"])
@pytest.mark.parametrize("ask", ["grad", "backward"])
@pytest.mark.parametrize("parts", [False, True], ids=["leaves", "computed"])
def test_only_what_is_asked_for_is_computed(parts, ask, asked, place):
    names = ("x", "z", "weight", "weight_z", "weight_x", "bias")
    leaves = Sample(ODD).arguments(torch.float32, place.device, requires_grad=True)
    tensors = [leaf * 1 for leaf in leaves] if parts else leaves
    y = mi.interaction(*tensors)
    leaf = leaves[names.index(asked)]
    with Spy() as spy:
        if ask == "grad":
            torch.autograd.grad(y.sum(), leaf)
        else:
            y.sum().backward(inputs=[leaf])
    expected = {"x": [True, False], "z": [False, True], "weight": [True, False, False, False]}
    expected["bias"] = [False, False, False, True]
    ((name, arguments),) = spy.calls
    assert name == f"interaction_{'input' if asked in 'xz' else 'weight'}_grads"
    assert [value for value in arguments if isinstance(value, bool)] == expected.get(
        asked, [False, False, False, True]
    )


def test_small_calls_do_not_ask(monkeypatch, place):
    """The engine's answer would take longer than their gradients."""
    asked = []
    monkeypatch.undo()
    monkeypatch.setattr(rules, "_is_executed", lambda node: asked.append(node) or True)
    for rows in (5, 5000):
        tensors = Sample(Shape("rows", (rows,), 20, 20, 20)).arguments(torch.float32, place.device)
        x = tensors[0].requires_grad_()
        torch.autograd.grad(mi.interaction(*tensors).sum(), x)
        assert bool(asked) == (rows == 5000)


@every_call
def test_gradients_of_x_alone_cost_no_weight_gradients(name, place):
    call = CALLS[name]
    tensors = call.arguments(torch.float32, place.device)
    y = call(*tensors).sin().sum()
    with Spy() as spy:
        (dx,) = torch.autograd.grad(y, tensors[0], create_graph=True)
        (ddx,) = torch.autograd.grad(dx.sum(), tensors[0], allow_unused=True)
    assert "interaction_weight_grads" not in spy.names
    with mi.backend("reference"):
        (expected,) = torch.autograd.grad(call(*tensors).sin().sum(), tensors[0])
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_edge_can_be_asked_for(place):
    leaves = Sample(ODD).arguments(torch.float64, place.device, requires_grad=True)
    y = mi.interaction(*leaves)
    edge = torch.autograd.graph.get_gradient_edge(leaves[2])
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), [edge], retain_graph=True)[0],
        torch.autograd.grad(y.sum(), leaves[2], retain_graph=True)[0],
    )


def by_compiled_autograd(loss):
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()


def check_compiled_autograd(functions, tensors):
    """Each argument has another use, so its gradient is a sum."""
    loss = sum(function().sin().sum() for function in functions) + sum(t.pow(2).sum() for t in tensors)
    expected = torch.autograd.grad(loss, tensors, retain_graph=True)
    by_compiled_autograd(loss)
    torch.testing.assert_close(tuple(tensor.grad for tensor in tensors), expected)


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_autograd_of_an_eager_forward(place):
    """Of forms with an operand that a product does without; as one graph, since compiling takes seconds."""
    calls = [CALLS[name] for name in ("generated", "diagonal-shared")]
    arguments = [call.arguments(torch.float64, place.device) for call in calls]
    functions = [partial(call, *tensors) for call, tensors in zip(calls, arguments, strict=True)]
    check_compiled_autograd(functions, [tensor for tensors in arguments for tensor in tensors])


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_arguments_that_no_term_takes(place):
    """They may be there for their leading dimensions; nothing flows into them."""
    sizes = ((5, 6), (5, 3), (6, 3), (6, 6))
    x, z, u, v = (torch.randn(s, dtype=torch.float64, device=place.device).requires_grad_() for s in sizes)
    functions = (
        lambda: mi.interaction(x, z, None, u),
        lambda: mi.interaction(x, z, None, None, v),
        lambda: mi.gated_interaction(x, z, None, None, v),
    )
    check_compiled_autograd(functions, [x, z, u, v])


def test_memory_of_a_gradient_of_x_alone(place):
    """dW, the largest tensor here, is not made."""
    shape = Shape("wide", (4,), 60, 70, 80)
    x, z, w, *others = Sample(shape).arguments(torch.float32, place.device, requires_grad=True)
    y = mi.interaction(x, z, w, *others).sum()
    assert peak_memory(lambda: torch.autograd.grad(y, x), place.device) < w.numel() * w.element_size() / 2
