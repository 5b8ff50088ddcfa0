"""Mixtures of two tensors by a gate: values, gradients of every order, layouts, transforms, determinism."""

import re

import pytest
import torch
from helpers import Spy
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops import activations
from mi_kernels.ops.modulate import reference, small
from mi_kernels.testing.checks import check_gradients, check_second_order, check_values, gradients_of
from mi_kernels.testing.mix_samples import FULL, MAPS, TOKENS, Mixing, mixings

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TINY = (
    Mixing("tokens", (2, 3, 4), (2, 3, 4), (2, 1, 4)),
    Mixing("maps", (2, 3, 2, 2), (2, 3, 2, 2), (2, 3, 1, 1)),
    Mixing("full", (3, 4), (3, 4), (3, 4)),
    Mixing("broadcast", (3, 4), (4,), (3, 1)),
)
# Enough elements for several tasks and threads, whose sums are added up.
SPLIT = (
    Mixing("tokens", (4, 700, 130), (4, 700, 130), (4, 1, 130)),
    Mixing("maps", (4, 16, 90, 50), (4, 16, 90, 50), (4, 16, 1, 1)),
    Mixing("features", (3000, 96), (3000, 96), (96,)),
    Mixing("rows", (3, 90000), (3, 90000), (3, 1)),
)


def ours(sample):
    return lambda *arguments: mi.mix(*arguments, **sample.options)


def theirs(sample):
    return lambda *arguments: reference.mix(*arguments, **sample.options)


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("sample", list(mixings()), ids=str, scope="module")
def test_error_rule(sample, dtype, place):
    y = mi.mix(*sample.arguments(dtype, place.device), **sample.options)
    assert y.dtype == dtype and y.shape == sample.shape
    check_values(sample, dtype, place.device)
    if sample.a == sample.b == sample.shape:  # else the gradients of the expansions are PyTorch's
        check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("sample", SPLIT[:3], ids=str)
def test_error_rule_of_split_sums(sample, dtype, place):
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", activations.NAMES)
@pytest.mark.parametrize("shape", [TOKENS, FULL], ids=str)
def test_error_rule_of_activations(shape, name, dtype, place):
    sample = Mixing(shape.name, shape.a, shape.b, shape.gate, activation=name)
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "hardsigmoid", "softmax"])
@pytest.mark.parametrize("sample", TINY, ids=str)
def test_gradcheck(sample, name, place):
    inputs = sample.arguments(torch.float64, place.device, requires_grad=True)

    def function(*arguments):
        return mi.mix(*arguments, activation=name)

    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(function, inputs, check_forward_ad=True, check_undefined_grad=True, **batched)
    assert gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("name", ["identity", "sigmoid", "softmax"])
@pytest.mark.parametrize("sample", [TOKENS, MAPS], ids=str)
def test_second_order_is_as_exact_as_pytorch(sample, name, dtype, place):
    check_second_order(
        Mixing(sample.name, sample.a, sample.b, sample.gate, activation=name), dtype, place.device
    )


def test_third_order(place):
    def third(function):
        tensors = TINY[0].arguments(torch.float64, place.device, requires_grad=True)
        value = function(*tensors, activation="sigmoid").pow(3).sum()
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(
                (g * torch.randn(g.shape, generator=generator, dtype=g.dtype).to(g.device)).sum()
                for g in grads
            )
        return value

    torch.testing.assert_close(third(mi.mix), third(reference.mix), rtol=1e-10, atol=0)


@pytest.mark.parametrize("needs", ["a", "b", "g", "ab", "ag", "bg", "abg"])
@pytest.mark.parametrize("sample", [TOKENS, MAPS, FULL], ids=str)
def test_one_pass_for_what_is_asked_for(sample, needs, place):
    tensors = sample.arguments(torch.float64, place.device)
    for letter, tensor in zip("abg", tensors, strict=True):
        tensor.requires_grad_(letter in needs)
    y = mi.mix(*tensors)
    grad = sample.cotangent(torch.float64, place.device)
    with Spy() as spy:
        y.backward(grad)
    assert spy.names == ["mix_grads"]
    assert spy.calls[0][1][5:8] == tuple(letter in needs for letter in "abg")
    expected = gradients_of(theirs(sample))(grad, *tensors)
    for letter, tensor, truth in zip("abg", tensors, expected, strict=True):
        assert (tensor.grad is not None) == (letter in needs)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "gaps", "expanded"])
@pytest.mark.parametrize("sample", [TOKENS, MAPS, FULL], ids=str)
def test_gradient_and_b_in_other_layouts_than_a(sample, layout, place):
    a, b, gate = sample.arguments(torch.float64, place.device)
    other = Mixing(sample.name, sample.a, sample.b, sample.gate, layout)
    b, grad = other.arguments(torch.float64, place.device)[1], other.cotangent(torch.float64, place.device)
    if layout == "expanded":
        grad = grad[..., :1].expand(grad.shape)
    torch.testing.assert_close(ours(sample)(a, b, gate), theirs(sample)(a, b, gate))
    found, expected = (gradients_of(f(sample))(grad, a, b, gate) for f in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_memory_format_is_kept(place):
    a, b, gate = MAPS.arguments(torch.float32, place.device)
    a = a.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = mi.mix(a, b.requires_grad_(), gate)
    assert y.is_contiguous(memory_format=torch.channels_last)
    da, db = torch.autograd.grad(y, (a, b), torch.ones(a.shape, device=place.device))
    assert da.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(da + db, torch.ones_like(da))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_tensors_and_open_and_closed_gates(dtype, place):
    a, b, gate = TOKENS.arguments(dtype, place.device)
    for name in ("sigmoid", "gelu", "softmax"):
        assert torch.equal(mi.mix(a, a, gate, activation=name), a)
    closed, opened = torch.zeros_like(gate), torch.ones_like(gate)
    assert torch.equal(mi.mix(a, b, closed, activation="identity"), b)
    # b + (a - b), two roundings; torch.lerp has a.
    error = (mi.mix(a, b, opened, activation="identity") - torch.lerp(b, a, opened)).abs()
    assert (error <= torch.finfo(dtype).eps * (a.abs() + b.abs())).all()


@pytest.mark.parametrize("one", range(3), ids=["a", "b", "gate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [n for n in activations.ELEMENTWISE if not n.startswith("gelu")])
def test_nan_and_inf(name, value, one, place):
    """What is not finite comes out where PyTorch has it."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = TOKENS.arguments(dtype, place.device)
        tensors[one].view(-1)[5] = value
        expected = reference.mix(*(t.double() for t in tensors), activation=name)
        found = mi.mix(*tensors, activation=name)
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0), (0, None, None), (None, 1, None), (None, None, 2), (2, None, 0)]
)
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_vmap_and_per_sample_gradients(in_dims, name, place):
    tensors = []
    for shape, dim in zip(((2, 3, 4), (2, 3, 4), (2, 1, 4)), in_dims, strict=True):
        size = list(shape)
        if dim is not None:
            size.insert(dim, 5)
        tensors.append(torch.randn(size, dtype=torch.float64, device=place.device))

    def loss(*t):
        return mi.mix(*t, activation=name).pow(2).sum()

    def plain(*t):
        return reference.mix(*t, activation=name).pow(2).sum()

    for transform in (
        lambda f: f,
        lambda f: torch.func.grad(f, (0, 1, 2)),
        lambda f: torch.func.jacrev(torch.func.grad(f, (0, 1, 2)), 1),
        lambda f: torch.func.jacfwd(torch.func.jacfwd(f, 2), 1),
        lambda f: torch.func.hessian(f, 2),
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
        y = mi.mix(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, sample.cotangent(dtype, place.device))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("sample", [TOKENS, MAPS, FULL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(sample, dtype, portable):
    suffix = "_portable" if portable else ""
    a, b, gate = sample.arguments(dtype)
    op = getattr(torch.ops.mi_kernels, f"mix{suffix}").default
    torch.library.opcheck(op, (a, b, gate, "sigmoid"))
    torch.library.opcheck(op, (a.transpose(0, 1).contiguous().transpose(0, 1), b, gate, "tanh"))
    op = getattr(torch.ops.mi_kernels, f"mix_grads{suffix}").default
    grad = sample.cotangent(dtype)
    for want in ((True, True, True), (True, False, False), (False, True, True)):
        torch.library.opcheck(op, (grad, a, b, gate, "silu", *want))


def test_y_is_the_only_memory():
    from mi_kernels.testing.memory import peak_memory

    if backends.why_not("cpu") is not None:
        pytest.skip(backends.why_not("cpu"))
    torch.utils.deterministic.fill_uninitialized_memory = False
    for sizes, gates in (
        ((4, 500, 256), (4, 1, 256)),
        ((4, 64, 40, 40), (4, 64, 1, 1)),
        ((500, 999), (500, 999)),
    ):
        for layout in ("contiguous", "channels_last", "transposed"):
            tensors = Mixing("large", sizes, sizes, gates, layout).arguments(torch.float32)
            mi.mix(*tensors)
            assert peak_memory(lambda t=tensors: mi.mix(*t)) <= tensors[0].numel() * 4 + (64 << 10)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes_are_promoted_as_in_pytorch(dtypes, place):
    tensors = TOKENS.arguments(torch.float64, place.device)
    given = [t.to(dtype).requires_grad_() for t, dtype in zip(tensors, dtypes, strict=True)]
    y, expected = mi.mix(*given), reference.mix(*given)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(y.sum(), given)
    assert tuple(grad.dtype for grad in grads) == dtypes
    plan = mi.explain(mi.mix, *given)
    assert "cast to" in plan.why
    number = torch.tensor(0.3, device=place.device)  # a number without dimensions does not widen
    a, b = (t.bfloat16() for t in tensors[:2])
    assert mi.mix(a, b, number).dtype == torch.bfloat16
    assert torch.equal(
        mi.mix(a, b, number), mi.mix(a, b, torch.sigmoid(number).bfloat16(), activation="identity")
    )


def broken(error, message, *arguments, **options):
    with Spy() as spy, pytest.raises(error, match=message):
        mi.mix(*arguments, **options)
    assert spy.names == []


def test_messages():
    a, gate = torch.ones(4, 5), torch.ones(5)
    broken(TypeError, "^mix: a: expected a torch.Tensor, got list$", [1.0], a, gate)
    broken(TypeError, "^mix: b: expected a torch.Tensor, got NoneType$", a, None, gate)
    broken(TypeError, "^mix: gate: expected a torch.Tensor, got float$", a, a, 1.0)
    broken(TypeError, r"^mix: gate: expected a dense \(strided\)", a, a, gate.to_sparse())
    broken(
        TypeError,
        "^mix: a: expected a dtype of float64.*, got torch.int64$",
        *(t.long() for t in (a, a, gate)),
    )
    broken(TypeError, "^mix: gate: expected a dtype of .*, got torch.bool$", a, a, gate.bool())
    broken(ValueError, r"^mix: b: expected device cpu \(that of a\), got meta$", a, a.to("meta"), gate)
    broken(ValueError, r"^mix: a: expected at least 1 dimension\(s\)", torch.tensor(1.0), a, gate)
    message = "mix: b: expected a shape that broadcasts with that of a [4, 5], got [4]"
    broken(ValueError, re.escape(message), a, torch.ones(4), gate)
    message = "mix: gate: expected a shape that broadcasts with that of a and b [4, 5], got [3, 1]"
    broken(ValueError, re.escape(message), a, a, torch.ones(3, 1))
    message = f"^mix: activation: expected one of {', '.join(activations.NAMES)}, got 'swish'$"
    broken(ValueError, message, a, a, gate, activation="swish")
    broken(ValueError, "^mix: activation: .*, got None$", a, a, gate.half(), activation=None)


def test_explain(place):
    a, b, gate = TOKENS.arguments(torch.float32, place.device, requires_grad=True)
    plan = mi.explain(mi.mix, a, b, gate, activation="tanh")
    assert (plan.op, plan.backend) == ("mix", place.backend)
    assert plan.bytes == 4 * (3 * a.numel() + gate.numel())
    assert [step.op for step in plan.backward] == ["mix_grads"]
    assert plan.backward[0].bytes == 4 * (5 * a.numel() + 2 * gate.numel())


def test_few_elements_are_mixed_by_pytorch():
    if backends.why_not("cpu") is not None:
        pytest.skip(backends.why_not("cpu"))
    for sample in (*TINY, Mixing("softmax", (3, 4), (3, 4), (3, 4), activation="softmax")):
        assert small.takes(*(sample.arguments(torch.float32)[i] for i in (0, 2, 1)), "sigmoid", 0.0)
        tensors = sample.arguments(torch.float64, requires_grad=True)
        with Spy() as spy:
            y = ours(sample)(*tensors)
            torch.autograd.grad(y.sum(), tensors)
        assert spy.names == []
        assert mi.explain(mi.mix, *tensors).algorithm == small.ALGORITHM
        check_values(sample, torch.float32)
        torch.testing.assert_close(y, theirs(sample)(*tensors))
    inf = torch.full((2,), float("inf"))
    assert torch.equal(mi.mix(inf, torch.zeros(2), torch.tensor([1.0, 0.7]), activation="identity"), inf)


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_it_is_plain_pytorch(place):
    tensors = TOKENS.arguments(torch.float32, place.device, requires_grad=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    y = torch.compile(mi.mix, backend=backend, fullgraph=True, dynamic=True)(*tensors)
    assert len(graphs) == 1 and "mi_kernels" not in graphs[0]
    found = torch.autograd.grad(y.sum(), tensors)
    torch.testing.assert_close(found, torch.autograd.grad(reference.mix(*tensors).sum(), tensors))
