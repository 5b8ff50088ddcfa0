"""Modulation: values, gradients of every order, layouts, transforms, determinism."""

import re
from dataclasses import replace

import pytest
import torch
from helpers import Spy
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels.ops import activations
from mi_kernels.ops.modulate import reference
from mi_kernels.testing import squares
from mi_kernels.testing.checks import (
    check_gradients,
    check_second_order,
    check_values,
    gradients_of,
    values_of,
)
from mi_kernels.testing.errors import check_errors
from mi_kernels.testing.samples import LAYOUTS, MAPS, TOKENS, Modulation, modulations

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TINY = (
    Modulation("tokens", (2, 3, 4), (2, 1, 4), (2, 1, 4)),
    Modulation("maps", (2, 3, 2, 2), (2, 3, 1, 1), (3, 1, 1)),
    Modulation("full", (3, 4), (3, 4), (4,)),
    Modulation("no-shift", (3, 4), (3, 1)),
)
# Enough elements for several tasks and threads, whose sums are added up.
SPLIT = (
    Modulation("tokens", (4, 700, 130), (4, 1, 130), (4, 1, 130)),
    Modulation("maps", (4, 16, 90, 50), (4, 16, 1, 1), (4, 16, 1, 1)),
    Modulation("features", (3000, 96), (96,), (96,)),
    Modulation("rows", (3, 90000), (3, 1), (3, 1)),
)


def ours(sample):
    return lambda *arguments: mi.modulate(*arguments, **sample.options)


def theirs(sample):
    return lambda *arguments: reference.modulate(*arguments, **sample.options)


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("sample", list(modulations()), ids=str, scope="module")
def test_error_rule(sample, dtype, place):
    def draw(seed):
        return sample.arguments(dtype, place.device, seed)

    y = mi.modulate(*draw(0), **sample.options)
    assert y.dtype == dtype and y.shape == sample.shape
    check_values(sample, dtype, place.device)
    if sample.x == sample.shape:  # else the gradient of the expansion is PyTorch's
        check_gradients(sample, dtype, place.device)


# Three sums alone would have to be drawn a hundred times in float32.
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("sample", SPLIT[:3], ids=str)
def test_error_rule_of_split_sums(sample, dtype, place):
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("sample", [TOKENS, MAPS, TINY[2]], ids=lambda s: s.name)
def test_gradient_layouts(sample, layout, place):
    """The incoming gradient in another layout than x: axes that are one for x are two for it."""
    tensors = sample.arguments(torch.float64, place.device)
    grad = replace(sample, layout=layout).cotangent(torch.float64, place.device)
    if layout == "expanded":
        grad = grad[..., :1].expand(grad.shape)
    found, expected = (gradients_of(f(sample))(grad, *tensors) for f in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", activations.NAMES)
@pytest.mark.parametrize(
    "sample", [TOKENS, Modulation("full", (40, 50), (40, 50), (50,))], ids=lambda s: s.name
)
def test_error_rule_of_activations(sample, name, dtype, place):
    sample = Modulation(sample.name, sample.x, sample.scale, sample.shift, activation=name, scale_offset=-0.3)

    def draw(seed):
        x, scale, shift = sample.arguments(dtype, place.device, seed)
        return x, scale * 3, shift  # to where activations saturate

    check_errors(
        values_of(ours(sample)),
        values_of(theirs(sample)),
        draw,
        squares=lambda *a: squares.modulate(name, -0.3, *a),
    )
    check_errors(
        gradients_of(ours(sample)),
        gradients_of(theirs(sample)),
        lambda seed: (sample.cotangent(dtype, place.device, seed + 1000), *draw(seed)),
        squares=lambda *a: squares.modulate_grads(name, -0.3, *a),
    )


@pytest.mark.parametrize("name", activations.NAMES)
@pytest.mark.parametrize("sample", TINY, ids=str)
def test_gradcheck(sample, name, place):
    inputs = [t for t in sample.arguments(torch.float64, place.device, requires_grad=True) if t is not None]

    def function(*arguments):
        return mi.modulate(*arguments, activation=name, scale_offset=0.5)

    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(function, inputs, check_forward_ad=True, check_undefined_grad=True, **batched)
    assert gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("name", ["identity", "sigmoid", "softmax"])
@pytest.mark.parametrize("sample", [TOKENS, MAPS], ids=str)
def test_second_order_is_as_exact_as_pytorch(sample, name, dtype, place):
    """Without a shift, on which no gradient depends."""
    sample = Modulation(sample.name, sample.x, sample.scale, activation=name, scale_offset=0.5)

    check_second_order(sample, dtype, place.device)


@pytest.mark.parametrize("name", ["sigmoid", "gelu_tanh", "softmax"])
def test_third_order(name, place):
    sample = TINY[0]

    def third(function, seed=3):
        tensors = sample.arguments(torch.float64, place.device, requires_grad=True)
        value = function(*tensors, activation=name, scale_offset=0.5).pow(3).sum()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(
                (g * torch.randn(g.shape, generator=generator, dtype=g.dtype).to(g.device)).sum()
                for g in grads
            )
        return value

    torch.testing.assert_close(third(mi.modulate), third(reference.modulate), rtol=1e-10, atol=0)


@pytest.mark.parametrize("needs", ["x", "s", "t", "xs", "xt", "st", "xst"])
@pytest.mark.parametrize("sample", [TOKENS, TINY[1], TINY[2]], ids=lambda s: s.name)
def test_only_what_is_asked_for(sample, needs, place):
    tensors = sample.arguments(torch.float64, place.device)
    for letter, tensor in zip("xst", tensors, strict=True):
        tensor.requires_grad_(letter in needs)
    y = mi.modulate(*tensors, **sample.options)
    grad = sample.cotangent(torch.float64, place.device)
    with Spy() as spy:
        y.backward(grad)
    assert [name for name in spy.names if name != "modulate_grads"] == []
    for _, arguments in spy.calls:
        assert arguments[6:9] == tuple(letter in needs for letter in "xst")
    expected = gradients_of(theirs(sample))(grad, *tensors)
    for letter, tensor, truth in zip("xst", tensors, expected, strict=True):
        assert (tensor.grad is not None) == (letter in needs)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, truth, rtol=1e-12, atol=1e-12)


def test_numbers_as_tensors(place):
    """scale and shift without dimensions broadcast, also those that vmap makes of a vector."""
    x, numbers = torch.randn(3, 4, device=place.device), torch.randn(3, device=place.device)
    scale, shift = numbers[0].clone().requires_grad_(), numbers[1].clone().requires_grad_()
    y = mi.modulate(x, scale, shift, activation="tanh")
    torch.testing.assert_close(y, torch.tanh(scale) * x + shift)
    grads = torch.autograd.grad(y.sum(), (scale, shift))
    torch.testing.assert_close(grads, ((1 - torch.tanh(scale) ** 2) * x.sum(), torch.tensor(12.0).to(x)))
    mapped = torch.vmap(mi.modulate)(x, numbers, numbers)
    torch.testing.assert_close(mapped, numbers[:, None] * x + numbers[:, None])


def test_memory_format_is_kept(place):
    x, scale, shift = MAPS.arguments(torch.float32, place.device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = mi.modulate(x, scale, shift)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, torch.ones(x.shape, device=place.device))
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_film_and_adaln_need_no_memory_but_y():
    from mi_kernels import backends
    from mi_kernels.testing.memory import peak_memory

    if backends.why_not("cpu") is not None:
        pytest.skip(backends.why_not("cpu"))
    torch.utils.deterministic.fill_uninitialized_memory = False
    for sample in (
        Modulation("tokens", (4, 500, 256), (4, 1, 256), (4, 1, 256)),
        Modulation("maps", (4, 64, 40, 40), (4, 64, 1, 1), (4, 64, 1, 1)),
        Modulation("full", (2000, 256), (2000, 256), (2000, 256)),
    ):
        for layout in ("contiguous", "channels_last", "transposed"):
            x, scale, shift = Modulation(*list(vars(sample).values())[:4], layout).arguments(torch.float32)
            mi.modulate(x, scale, shift, activation="sigmoid")
            extra = peak_memory(lambda t=(x, scale, shift): mi.modulate(*t, activation="sigmoid"))
            assert extra <= x.numel() * 4 + (64 << 10)


@pytest.mark.parametrize("one", range(3), ids=["x", "scale", "shift"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", activations.ELEMENTWISE)
def test_nan_and_inf(name, value, one, place):
    """What is not finite comes out where PyTorch has it."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = TOKENS.arguments(dtype, place.device)
        tensors[one].view(-1)[5] = value
        expected = reference.modulate(*(t.double() for t in tensors), activation=name)
        found = mi.modulate(*tensors, activation=name)
        if place.backend == "portable" and (name, value) == ("gelu", float("inf")):
            continue  # PyTorch's float32 loop makes NaN of gelu(inf), its float64 loop inf
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0), (0, None, None), (None, 1, None), (None, None, 2), (2, None, 0)]
)
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_vmap_and_per_sample_gradients(in_dims, name, place):
    shapes = ((2, 3, 4), (2, 1, 4), (2, 1, 4))
    tensors = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        size = list(shape)
        if dim is not None:
            size.insert(dim, 5)
        tensors.append(torch.randn(size, dtype=torch.float64, device=place.device))

    def loss(*t):
        return mi.modulate(*t, activation=name).pow(2).sum()

    def plain(*t):
        return reference.modulate(*t, activation=name).pow(2).sum()

    for transform in (
        lambda f: f,
        lambda f: torch.func.grad(f, (0, 1, 2)),
        lambda f: torch.func.jacrev(torch.func.grad(f, (0, 1, 2)), 1),
        lambda f: torch.func.jacfwd(torch.func.jacfwd(f, 1), 1),
        lambda f: torch.func.hessian(f, 1),
    ):
        found = torch.func.vmap(transform(loss), in_dims)(*tensors)
        expected = torch.func.vmap(transform(plain), in_dims)(*tensors)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sample", SPLIT, ids=str)
def test_threads_change_no_bit(sample, dtype, place):
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads if place.backend == "cpu" else 1)
        leaves = sample.arguments(dtype, place.device, requires_grad=True)
        y = mi.modulate(*leaves, **sample.options)
        results.append([y, *torch.autograd.grad(y, leaves, sample.cotangent(dtype, place.device))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("sample", [TOKENS, MAPS, TINY[2]], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(sample, dtype, portable):
    suffix = "_portable" if portable else ""
    x, scale, shift = (t[(None,) * (len(sample.x) - t.dim())] for t in sample.arguments(dtype))
    op = getattr(torch.ops.mi_kernels, f"modulate{suffix}").default
    torch.library.opcheck(op, (x, scale, shift, "sigmoid", 0.5))
    torch.library.opcheck(op, (x.transpose(0, 1).contiguous().transpose(0, 1), scale, None, "tanh", 0.0))
    op = getattr(torch.ops.mi_kernels, f"modulate_grads{suffix}").default
    grad = sample.cotangent(dtype)
    for want in ((True, True, True), (True, False, False), (False, True, True)):
        torch.library.opcheck(op, (grad, x, scale, list(shift.shape), "silu", 0.5, *want))


def broken(error, message, *arguments, **options):
    with Spy() as spy, pytest.raises(error, match=message):
        mi.modulate(*arguments, **options)
    assert spy.names == []


def test_messages():
    x, scale = torch.ones(4, 5), torch.ones(5)
    broken(TypeError, "^modulate: x: expected a torch.Tensor, got list$", [1.0], scale)
    broken(TypeError, "^modulate: scale: expected a torch.Tensor, got NoneType$", x, None)
    broken(TypeError, "^modulate: shift: expected a torch.Tensor, got float$", x, scale, 1.0)
    broken(TypeError, r"^modulate: scale: expected a dense \(strided\)", x, scale.to_sparse())
    broken(TypeError, "^modulate: x: expected a dtype of float64.*, got torch.int64$", x.long(), scale.long())
    broken(TypeError, "^modulate: scale: expected a dtype of .*, got torch.int64$", x, scale.long())
    broken(TypeError, "^modulate: x: expected a dtype of .*, got torch.complex64$", x.cfloat(), scale)
    broken(TypeError, "^modulate: shift: expected a dtype of .*, got torch.bool$", x, scale, scale.bool())
    message = r"^modulate: shift: expected device cpu \(that of x\), got meta$"
    broken(ValueError, message, x, scale, scale.to("meta"))
    broken(ValueError, r"^modulate: x: expected at least 1 dimension\(s\)", torch.tensor(1.0), scale)
    message = "^modulate: scale: expected a shape that broadcasts with that of x [4, 5], got [4]$"
    broken(ValueError, re.escape(message)[2:].replace(r"\^", "^")[:-2], x, torch.ones(4))
    message = re.escape("modulate: shift: expected a shape that broadcasts with that of x and scale [4, 5]")
    broken(ValueError, message, x, scale, torch.ones(3, 1))
    message = f"^modulate: activation: expected one of {', '.join(activations.NAMES)}, got 'swish'$"
    broken(ValueError, message, x, scale, activation="swish")
    broken(ValueError, "^modulate: activation: .*, got None$", x, scale, activation=None)
    message = "^modulate: scale_offset: expected a float, got str$"
    broken(TypeError, message, x, scale, scale_offset="1")
    broken(TypeError, "^modulate: scale_factor: expected a float, got NoneType$", x, scale, scale_factor=None)


@pytest.mark.parametrize("name", ["sigmoid", "relu", "softmax"])
@pytest.mark.parametrize("sample", TINY, ids=str)
def test_gradcheck_with_a_factor(sample, name, place):
    inputs = [t for t in sample.arguments(torch.float64, place.device, requires_grad=True) if t is not None]

    def function(*arguments):
        return mi.modulate(*arguments, activation=name, scale_offset=0.5, scale_factor=-1.5)

    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(function, inputs, check_forward_ad=True, **batched)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_a_gate_around_one(place):
    """PPNet's: 2 * sigmoid, as one pass."""
    x, gate, _ = TOKENS.arguments(torch.float32, place.device)
    with Spy() as spy:
        y = mi.modulate(x, gate, activation="sigmoid", scale_factor=2.0)
    assert spy.names == ["modulate"]
    torch.testing.assert_close(y, 2 * torch.sigmoid(gate) * x)
    assert torch.equal(mi.modulate(x, torch.zeros_like(gate), activation="sigmoid", scale_factor=2.0), x)


def test_calls_of_operations_without_a_factor(place):
    """As programs have them that were exported before there was one."""
    x, scale, shift = TOKENS.arguments(torch.float32, place.device)
    y = torch.ops.mi_kernels.modulate(x, scale, shift, "sigmoid", 0.5)
    torch.testing.assert_close(y, reference.modulate(x, scale, shift, activation="sigmoid", scale_offset=0.5))
    grads = torch.ops.mi_kernels.modulate_grads(x, x, scale, [3, 1, 40], "tanh", 0.0, True, True, True)
    assert torch.equal(grads[0], torch.ops.mi_kernels.modulate(x, scale, None, "tanh", 0.0))
    operation = torch.ops.mi_kernels.differentiable_modulate
    assert torch.equal(
        operation(place.backend, x, scale, shift, "sigmoid", 0.5),
        mi.modulate(x, scale, shift, activation="sigmoid", scale_offset=0.5),
    )


def test_autocast_takes_the_widest_dtype(place):
    """As torch.addcmul: a float32 norm next to bf16 projections, and no dtype error."""
    x, scale, shift = TOKENS.arguments(torch.float32, place.device)
    with torch.autocast(place.device, torch.bfloat16):
        y = mi.modulate(x, scale.bfloat16(), shift.bfloat16())
        assert y.dtype == torch.float32
        assert mi.modulate(x.bfloat16(), scale.bfloat16()).dtype == torch.bfloat16
    expected = mi.modulate(x, scale.bfloat16().float(), shift.bfloat16().float())
    assert torch.equal(y, expected)


def test_explain(place):
    x, scale, shift = TOKENS.arguments(torch.float32, place.device, requires_grad=True)
    plan = mi.explain(mi.modulate, x, scale, shift, activation="tanh")
    assert (plan.op, plan.backend) == ("modulate", place.backend)
    assert plan.bytes == 4 * (2 * x.numel() + scale.numel() + shift.numel())
    assert [step.op for step in plan.backward] == ["modulate_grads"]
    assert "modulate" in str(plan)
    with pytest.raises(TypeError, match="^explain: modulate: "):
        mi.explain("modulate", x)
