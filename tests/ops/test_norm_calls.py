"""Calls of the adaptive-norm block: dtypes, autocast, messages, explain, torch.compile."""

import re
from functools import partial

import pytest
import torch
from helpers import COMPILE, Spy
from torch.autograd import gradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops import activations
from mi_kernels.ops.norm import reference
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.norm_samples import (
    MAPS,
    MODULATED,
    RMS,
    TOKENS,
)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes_are_promoted_as_in_pytorch(dtypes, place):
    x, _, _, scale, shift, *_ = MODULATED.arguments(torch.float64, place.device)
    given = [t.to(dtype).requires_grad_() for t, dtype in zip((x, scale, shift), dtypes, strict=True)]
    wide = (given[0] * given[1] + given[2]).dtype
    y, expected = mi.norm_modulate(*given), reference.norm_modulate(*(t.to(wide) for t in given))
    assert y.dtype == wide
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.sum(), given)
    assert tuple(grad.dtype for grad in grads) == dtypes
    assert "cast to" in mi.explain(mi.norm_modulate, *given).why
    number = torch.tensor(0.3, device=place.device)  # a number without dimensions does not widen
    x = x.bfloat16()
    found = mi.norm_modulate(x, number)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, mi.norm_modulate(x, (1 + number).bfloat16(), scale_offset=0.0))


@pytest.mark.parametrize("name", ["auto", "reference", "portable"])
def test_autocast_casts_nothing(name):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = TOKENS.arguments(dtype)
        with torch.autocast("cpu", torch.bfloat16), mi.backend(name):
            found = TOKENS.call(mi, *tensors)
        assert found.dtype == dtype
        exact = TOKENS.call(reference, *(t.double() for t in tensors))
        # As without autocast; a float16 or bfloat16 step inside would cost a hundred times as much.
        allowed = max(2 * relative_error(TOKENS.call(reference, *tensors), exact), torch.finfo(dtype).eps)
        assert relative_error(found, exact) <= allowed


def broken(error, message, function, *arguments, **options):
    with Spy() as spy, pytest.raises(error, match=message):
        function(*arguments, **options)
    assert spy.names == []


X, C = torch.ones(4, 5, 6), torch.ones(6)


@pytest.mark.parametrize("function", [mi.norm_modulate, mi.gated_residual_norm_modulate])
def test_messages(function):
    op, residual = function.__name__, function is not mi.norm_modulate

    def call(error, message, x=X, scale=C, shift=None, h=X, gate=C, **options):
        arguments = (x, h, gate, scale, shift) if residual else (x, scale, shift)
        broken(error, f"^{op}: {message}", function, *arguments, **options)

    call(TypeError, "x: expected a torch.Tensor, got list$", x=[1.0])
    call(TypeError, "scale: expected a torch.Tensor, got float$", scale=1.0)
    call(TypeError, r"shift: expected a dense \(strided\)", shift=C.to_sparse())
    call(TypeError, "weight: expected a torch.Tensor, got int$", weight=1)
    call(TypeError, "bias: expected a dtype of .*, got torch.bool$", bias=C.bool())
    call(TypeError, "x: expected a dtype of float64", **dict.fromkeys(("x", "h"), X.long()), scale=C.long())
    call(ValueError, r"scale: expected device cpu \(that of x\), got meta$", scale=C.to("meta"))
    call(ValueError, r"x: expected at least 1 dimension\(s\)", **dict.fromkeys(("x", "h"), C.sum()))
    for name in ("scale", "shift", *(("gate",) if residual else ())):
        of_x = re.escape("[4, 5, 6]")
        call(
            ValueError,
            rf"{name}: expected a shape that broadcasts to that of x {of_x}, got \[5\]$",
            **{name: C[:5]},
        )
        call(ValueError, rf"{name}: .*, got \[2, 1, 1, 6\]$", **{name: torch.ones(2, 1, 1, 6)})
    call(ValueError, r"weight: expected shape \[C=6\], got \[5\]$", weight=C[:5])
    call(ValueError, r"bias: expected shape \[C=6\], got \[1, 6\]$", bias=C[None])
    call(ValueError, "norm: expected one of layer, rms, group, got 'batch'$", norm="batch")
    call(ValueError, "norm: expected one of layer, rms, group, got None$", norm=None)
    call(ValueError, "groups: expected None, as norm is 'rms', got 2$", norm="rms", groups=2)
    call(ValueError, "groups: expected the number of groups, as norm is 'group', got None$", norm="group")
    call(ValueError, "groups: expected a positive divisor of C=5, got 2$", norm="group", groups=2)
    call(ValueError, "groups: expected a positive divisor of C=5, got 0$", norm="group", groups=0)
    call(TypeError, "groups: expected an int, got float$", norm="group", groups=5.0)
    call(TypeError, "groups: expected an int, got bool$", norm="group", groups=True)
    message = r"x: expected at least 2 dimension\(s\), got shape \[6\]$"
    call(ValueError, message, x=C, h=C, norm="group", groups=2)
    call(TypeError, "eps: expected a float, got str$", eps="1e-5")
    call(TypeError, "eps: expected a float, got NoneType$", eps=None)
    call(ValueError, "eps: expected a number that is not negative, got -1e-05$", eps=-1e-5)
    call(ValueError, "eps: expected a number that is not negative, got nan$", eps=float("nan"))
    call(TypeError, "scale_offset: expected a float, got Tensor$", scale_offset=C)
    names = ", ".join(activations.NAMES)
    call(ValueError, f"activation: expected one of {names}, got 'swish'$", activation="swish")
    if residual:
        call(TypeError, "h: expected a torch.Tensor, got NoneType$", h=None)
        call(ValueError, r"h: expected shape \[4, 5, 6\] \(that of x\), got \[1, 5, 6\]$", h=X[:1])


def test_messages_of_a_residual():
    def check(error, message, *arguments):
        broken(error, f"^gated_residual: {message}", mi.gated_residual, *arguments)

    check(TypeError, "x: expected a torch.Tensor, got int$", 1, X)
    check(TypeError, "h: expected a torch.Tensor, got NoneType$", X, None)
    check(TypeError, "gate: expected a torch.Tensor, got float$", X, X, 1.0)
    check(TypeError, "gate: expected a dtype of .*, got torch.bool$", X, X, C.bool())
    check(TypeError, "x: expected a dtype of .*, got torch.int64$", X.long(), X.long())
    check(ValueError, r"h: expected device cpu \(that of x\), got meta$", X, X.to("meta"))
    check(ValueError, r"gate: expected device cpu \(that of x\), got meta$", X, X, C.bfloat16().to("meta"))
    check(ValueError, r"h: expected shape \[4, 5, 6\] \(that of x\), got \[5, 6\]$", X, X[0])
    check(ValueError, r"gate: expected a shape that broadcasts to that of x .*, got \[5\]$", X, X, C[:5])
    check(ValueError, r"gate: expected a shape that broadcasts .*, got \[5\]$", X, X, C[:5].bfloat16())


@pytest.mark.parametrize("gated", [False, True])
def test_gated_residual(gated, place):
    x, h, gate, *_ = TOKENS.arguments(torch.float64, place.device, requires_grad=True)
    tensors = (x, h, gate) if gated else (x, h)
    y, expected = mi.gated_residual(*tensors), reference.gated_residual(*tensors)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y.sin().sum(), tensors)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sin().sum(), tensors))
    assert mi.gated_residual(x.bfloat16(), h.float()).dtype == torch.float32
    assert mi.gated_residual(x.bfloat16(), h.bfloat16(), gate.float()).dtype == torch.float32
    plan = mi.explain(mi.gated_residual, *tensors)
    assert plan.op == "gated_residual" and plan.bytes == 8 * (3 * x.numel() + gate.numel() * gated)
    assert gradcheck(mi.gated_residual, [t[:1, :2, :3].detach().requires_grad_() for t in tensors])


def test_explain(place):
    x, h, gate, scale, shift, weight, bias = TOKENS.arguments(torch.float32, place.device, requires_grad=True)
    plan = mi.explain(mi.gated_residual_norm_modulate, x, h, gate, scale, shift, weight=weight, bias=bias)
    assert (plan.op, plan.backend) == ("gated_residual_norm_modulate", place.backend)
    small = 3 * gate.numel() + 2 * weight.numel()
    assert plan.bytes == 4 * (4 * x.numel() + small) and plan.operations == 11 * x.numel()
    assert [step.op for step in plan.backward] == ["norm_modulate_grads"]
    assert plan.backward[0].bytes == 4 * (6 * x.numel() + 2 * small)
    plan = mi.explain("norm_modulate", x.detach(), None, norm="rms")
    assert plan.bytes == 8 * x.numel() and plan.operations == 3 * x.numel() and not plan.backward
    maps = torch.ones(2, 4, 3, 3, device=place.device)
    whole = mi.explain(mi.norm_modulate, maps, maps[:, :1], norm="group", groups=2)
    alone = mi.explain(mi.norm_modulate, maps, None, norm="group", groups=2)
    assert "modulation of its own" in whole.why and whole.bytes > alone.bytes


def graphs_of(function, tensors):
    """y of the compiled function, and the operations of this package in its graphs, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def keep(graph, inputs):
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        kept = [str(t) for t in targets if isinstance(t, torch._ops.OpOverload)]
        seen.append([name.split(".")[1] if name.startswith("mi_kernels") else "" for name in kept])
        return graph.forward

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    return torch.compile(function, backend=compiler, **COMPILE)(*tensors), seen


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("sample", [TOKENS, RMS, MAPS], ids=str)
def test_compiled_it_is_one_operation_where_there_are_kernels(sample, place):
    from helpers import plain

    tensors = sample.arguments(torch.float64, place.device, requires_grad=True)
    y, seen = graphs_of(partial(sample.call, mi), tensors)
    expected = partial(sample.call, mi)(*tensors)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = sample.cotangent(torch.float64, place.device)
    found = torch.autograd.grad(y, tensors, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, grad), rtol=1e-11, atol=1e-11)
    operations = [[plain(name) for name in names if name] for names in seen]
    fused = backends.get(place.backend).fused
    assert operations == ([["norm_modulate"], ["norm_modulate_grads"]] if fused else [[], []])


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_sizes_are_dynamic(place):
    compiled = torch.compile(mi.gated_residual_norm_modulate, backend="aot_eager", **COMPILE)
    for rows, tokens in ((2, 5), (3, 7), (9, 4)):
        x, h = torch.randn(2, rows, tokens, 24, dtype=torch.float64, device=place.device)
        context = torch.randn(rows, 1, 3 * 24, dtype=torch.float64, device=place.device).chunk(3, -1)
        torch.testing.assert_close(
            compiled(x, h, *context), mi.gated_residual_norm_modulate(x, h, *context), rtol=1e-12, atol=1e-12
        )


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_kernels_of_a_compiled_block():
    """Inductor makes no kernel around the operation: of chunks it takes views, and neighbours fuse."""
    from torch._inductor import metrics

    def block(x, h, gate, scale, shift):
        x_new, y = mi.gated_residual_norm_modulate(x, h, gate, scale, shift)
        return x_new, y

    if backends.choose(X, "norm") != "cpu":
        pytest.skip("without compiled kernels it is the formula")
    x, h = torch.randn(2, 4, 16, 24)
    contexts = torch.randn(4, 1, 72).chunk(3, -1)
    metrics.reset()
    torch.compile(block, fullgraph=True)(x, h, *contexts)
    assert metrics.generated_kernel_count == 0
    metrics.reset()
    torch.compile(lambda *t: block(torch.relu(t[0]), *t[1:]), fullgraph=True)(x, h, *contexts)
    assert metrics.generated_kernel_count == 1


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_residual_is_plain_pytorch(place):
    x, h, gate, *_ = TOKENS.arguments(torch.float32, place.device, requires_grad=True)
    y, seen = graphs_of(mi.gated_residual, (x, h, gate))
    y.sum().backward()
    assert seen and not any(any(names) for names in seen)
    torch.testing.assert_close(y, reference.gated_residual(x, h, gate))
