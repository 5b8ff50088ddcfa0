"""Normalisation with modulation and a gated residual: values, gradients of every order, transforms."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import Spy
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops import activations
from mi_kernels.ops.norm import reference
from mi_kernels.testing.checks import check_gradients, check_second_order, check_values, gradients_of
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.norm_samples import (
    LARGE_MEAN,
    MAPS,
    MODULATED,
    RMS,
    TOKENS,
    Normalization,
    normalizations,
)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ALL = {"residual": True, "affine": "wb", "activation": "tanh"}
CONTEXT = ((2, 1, 4),) * 3
TINY = (
    Normalization("tokens", (2, 3, 4), *CONTEXT, **ALL),
    Normalization("tokens", (2, 3, 4), *CONTEXT, **ALL, norm="rms"),
    Normalization("maps", (2, 4, 3), *((2, 4, 1),) * 3, **ALL, norm="group", groups=2),
    Normalization("modulated", (3, 4), None, (3, 4), (4,), activation="softmax"),
    Normalization("residual", (2, 3), residual=True, affine="w", norm="rms"),
    Normalization("pixels", (1, 4, 2), (2,), (4, 2), (1, 1, 2), **ALL, norm="group", groups=2),
)
# Finite differences take a time that is quadratic in the number of elements.
SMALLEST = (
    Normalization("tokens", (1, 2, 3), *((1, 1, 3),) * 3, **ALL),
    Normalization("tokens", (2, 3), *((3,),) * 3, **ALL, norm="rms"),
    Normalization("maps", (1, 4, 2), *((4, 1),) * 3, **ALL, norm="group", groups=2),
    *(TINY[4], replace(TINY[3], x=(2, 3), scale=(2, 3), shift=(3,))),
    Normalization("pixels", (1, 2, 2), (2,), (2, 2), (1, 1, 2), residual=True, norm="group", groups=1),
)
# Many channels: of few the errors of sums over all else differ by luck.
MANY_MAPS = Normalization("maps", (2, 48, 5, 7), *((2, 48, 1, 1),) * 3, True, "wb", "group", 4)
# Enough elements for several tasks and threads, whose sums are added up.
SPLIT = (
    Normalization("tokens", (4, 700, 130), *((4, 1, 130),) * 3, True, "wb"),
    Normalization("features", (3000, 96), *((96,),) * 3, True, "wb", "rms"),
    Normalization("maps", (4, 16, 90, 50), *((4, 16, 1, 1),) * 3, True, "wb", "group", 4),
)


def ours(sample):
    return partial(sample.call, mi)


def theirs(sample):
    return partial(sample.call, reference)


def plainly(sample):
    """The formula in operations all of whose derivatives PyTorch has right, in float64."""

    def function(x, h, gate, scale, shift, weight, bias):
        channel = sample.channel - len(sample.x)
        over = (-1, *(1,) * (-1 - channel))
        if h is not None:
            x = x + (h if gate is None else gate * h)
        groups = sample.groups or 1
        sets = x.unflatten(channel, (groups, x.shape[channel] // groups))
        axes = tuple(range(channel, 0))
        if sample.norm != "rms":
            sets = sets - sets.mean(axes, keepdim=True)
        y = (sets * (sets.square().mean(axes, keepdim=True) + 1e-5).rsqrt()).reshape(x.shape)
        y = y if weight is None else y * weight.view(over)
        y = y if bias is None else y + bias.view(over)
        if scale is not None:
            y = y * (activations.value(sample.activation, scale) + sample.scale_offset)
        y = y if shift is None else y + shift
        return y if h is None else torch.stack([x, y])

    return function


def present(sample, function, tensors):
    """The function of the tensors that there are, and these."""
    there = [t is not None for t in tensors]

    def called(*given):
        left = iter(given)
        return function(*(next(left) if t else None for t in there))

    return called, [t for t in tensors if t is not None]


# The scope puts the backends of a sample side by side: they are judged by one oracle.
@pytest.mark.parametrize("dtype", FLOATS, ids=str, scope="module")
@pytest.mark.parametrize("sample", list(normalizations()), ids=str, scope="module")
def test_error_rule(sample, dtype, place):
    y = ours(sample)(*sample.arguments(dtype, place.device))
    assert y.dtype == dtype and y.shape == sample.shape
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("sample", SPLIT[:2], ids=str)
def test_error_rule_of_split_sums(sample, dtype, place):
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("name", activations.NAMES)
def test_error_rule_of_activations(name, place):
    for dtype in (torch.float32, torch.bfloat16):
        sample = Normalization("tokens", (3, 19, 40), None, (3, 1, 40), (3, 1, 40), activation=name)
        check_values(sample, dtype, place.device)
        check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("sample", [*TINY, LARGE_MEAN], ids=str)
def test_float64_is_the_formula(sample, place):
    tensors = sample.arguments(torch.float64, place.device)
    expected = plainly(sample)(*tensors)
    error = (ours(sample)(*tensors) - expected).norm()
    # Of x itself: a mean of 1000 takes its digits from any order of sums.
    assert error <= 1e-12 * torch.cat([expected.flatten(), tensors[0].flatten()]).norm()


@pytest.mark.parametrize("sample", SMALLEST, ids=str)
def test_gradcheck(sample, place):
    tensors = sample.arguments(torch.float64, place.device, requires_grad=True)
    function, inputs = present(sample, ours(sample), tensors)
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(function, inputs, check_forward_ad=True, check_undefined_grad=True, **batched)
    assert gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("sample", [TOKENS, RMS, MANY_MAPS, MODULATED], ids=str)
def test_second_order_is_as_exact_as_pytorch(sample, dtype, place):
    check_second_order(sample, dtype, place.device)


@pytest.mark.parametrize("sample", TINY[:3], ids=str)
def test_third_order(sample, place):
    def third(function):
        tensors = sample.arguments(torch.float64, place.device, requires_grad=True)
        value = function(*tensors).pow(3).sum()
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(
                (g * torch.randn(g.shape, generator=generator, dtype=g.dtype).to(g.device)).sum()
                for g in grads
            )
        return value

    torch.testing.assert_close(third(ours(sample)), third(plainly(sample)), rtol=1e-10, atol=0)


IN_DIMS = (
    (0, None, None, None, None, None, None),
    (None, 1, None, None, None, None, None),
    (None, None, 2, None, 0, None, None),
    (None, None, None, 1, None, None, None),
    (None, None, None, None, None, 0, None),
    (1, 0, None, None, None, None, 1),
    (0, 1, 2, 0, 1, 0, 1),
)


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("sample", TINY[:3], ids=str)
def test_vmap_and_derivatives_in_it(in_dims, sample, place):
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for tensor, dim in zip(sample.arguments(torch.float64), in_dims, strict=True):
        size = list(tensor.shape)
        if dim is not None:
            size.insert(dim, 3)
        tensors.append(torch.randn(size, generator=generator, dtype=torch.float64).to(place.device))

    def loss(function):
        return lambda *t: function(*t).pow(2).sum()

    every = tuple(range(7))
    for transform in (
        lambda f: f,
        lambda f: torch.func.grad(loss(f), every),
        lambda f: torch.func.jacrev(torch.func.grad(loss(f), (0, 1, 3)), 1),
    ):
        found = torch.func.vmap(transform(ours(sample)), in_dims)(*tensors)
        expected = torch.func.vmap(transform(plainly(sample)), in_dims)(*tensors)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sample", TINY[:3], ids=str)
def test_nested_transforms(sample, place):
    tensors = sample.arguments(torch.float64, place.device)
    tangents = tuple(torch.randn_like(t) for t in tensors)

    def all_of(function):
        def loss(*t):
            return function(*t).sin().sum()

        yield torch.func.jvp(function, tuple(tensors), tangents)
        yield torch.func.jacfwd(torch.func.jacrev(loss, (0, 3, 5)), (0, 2))(*tensors)
        yield torch.func.jacfwd(torch.func.jacfwd(loss, (0, 5)), (0, 3))(*tensors)
        yield torch.func.jacrev(torch.func.jacrev(loss, 1), (0, 6))(*tensors)
        yield torch.func.jacfwd(torch.func.jacrev(torch.func.jacrev(loss, 0), 0), 0)(*tensors)

    for found, expected in zip(all_of(ours(sample)), all_of(plainly(sample)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_a_batch_of_cotangents(place):
    """is_grads_batched, the older vmap."""
    sample = TINY[0]
    tensors = sample.arguments(torch.float64, place.device, requires_grad=True)
    grads = torch.randn(5, *sample.shape, dtype=torch.float64, device=place.device)
    found = torch.autograd.grad(ours(sample)(*tensors), tensors, grads, is_grads_batched=True)
    for index, grad in enumerate(grads):
        expected = torch.autograd.grad(ours(sample)(*tensors), tensors, grad)
        torch.testing.assert_close([t[index] for t in found], list(expected), rtol=1e-12, atol=1e-12)


NEEDS = ["x", "h", "g", "s", "t", "w", "b", "xs", "hg", "tw", "xhgstwb"]


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("sample", [TOKENS, RMS, MAPS], ids=str)
def test_one_pass_for_what_is_asked_for(sample, needs, place):
    tensors = sample.arguments(torch.float64, place.device)
    for letter, tensor in zip("xhgstwb", tensors, strict=True):
        tensor.requires_grad_(letter in needs)
    with Spy() as spy:
        y = ours(sample)(*tensors)
    assert spy.names == ["norm_modulate"]
    grad = sample.cotangent(torch.float64, place.device)
    with Spy() as spy:
        y.backward(grad)
    assert spy.names == ["norm_modulate_grads"]
    assert spy.calls[0][1][-7:] == tuple(letter in needs for letter in "xhgstwb")
    expected = gradients_of(plainly(sample))(grad, *tensors)
    for letter, tensor, truth in zip("xhgstwb", tensors, expected, strict=True):
        assert (tensor.grad is not None) == (letter in needs)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("needs", ["x", "h", "gate", "scale"])
def test_the_sum_requires_grad_if_what_is_added_does(needs, place):
    names = ("x", "h", "gate", "scale", "shift", "weight", "bias")
    tensors = TOKENS.arguments(torch.float64, place.device)
    for name, tensor in zip(names, tensors, strict=True):
        tensor.requires_grad_(name == needs)
    results = mi.gated_residual_norm_modulate(*tensors[:5], weight=tensors[5], bias=tensors[6])
    assert [t.requires_grad for t in results] == [needs != "scale", True]
    (found,) = torch.autograd.grad(results[1].sin().sum(), tensors[names.index(needs)])
    assert found.any()


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("which", [0, 1], ids=["x_new", "y"])
def test_gradients_of_one_result_alone(which, gate, place):
    tensors = TOKENS.arguments(torch.float64, place.device, requires_grad=True)
    x, h, g, scale, shift, weight, bias = tensors
    arguments = (x, h, g if gate else None, scale, shift)
    results = mi.gated_residual_norm_modulate(*arguments, weight=weight, bias=bias)
    expected = reference.gated_residual_norm_modulate(*arguments, weight=weight, bias=bias)
    with Spy() as spy:
        found = torch.autograd.grad(results[which].sin().sum(), tensors, allow_unused=True)
    assert ("norm_modulate_grads" in spy.names) == (which == 1)
    truth = torch.autograd.grad(expected[which].sin().sum(), tensors, allow_unused=True)
    for one, other in zip(found, truth, strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_they_are_the_functions_of_torch(norm, place):
    x, weight, bias = (torch.randn(s, dtype=torch.float64, device=place.device) for s in ((3, 7, 24), 24, 24))
    if norm == "layer":
        expected = F.layer_norm(x, (24,), weight, bias, 1e-3)
    else:
        expected = F.rms_norm(x, (24,), weight, 1e-3) + bias
    found = mi.norm_modulate(x, None, norm=norm, weight=weight, bias=bias, eps=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    maps = x.mT.contiguous()
    found = mi.norm_modulate(maps, None, norm="group", groups=6, weight=weight, bias=bias, eps=1e-3)
    torch.testing.assert_close(found, F.group_norm(maps, 6, weight, bias, 1e-3), rtol=1e-12, atol=1e-12)


def test_pixels_without_a_group_of_their_own(place):
    """No pixels, no sums: PyTorch's group_norm has NaN for the gradients of its weights."""
    x, weight = (
        torch.zeros(2, 6, 0, 3, device=place.device),
        torch.ones(6, device=place.device).requires_grad_(),
    )
    y = mi.norm_modulate(x.requires_grad_(), None, norm="group", groups=2, weight=weight)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape and torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("size", [(4, 12, 5, 5), (4, 64, 32, 32)], ids=str)
def test_a_large_mean_of_channels_last_is_rounded_once(size):
    """Half a unit in the last place of the mean, 2^-13 at 3000, and as much as 0 would have."""
    if backends.why_not("cpu") is not None or not has_kernel():
        pytest.skip("the compiled library is missing, or has no kernel of this operation")
    generator = torch.Generator().manual_seed(0)
    x = (3000 + torch.randn(size, generator=generator)).to(memory_format=torch.channels_last)
    with mi.backend("cpu"):
        y = mi.norm_modulate(x, None, norm="group", groups=size[1])
    exact = F.group_norm(x.double(), size[1])
    rstd = (x.double().var((2, 3), correction=0, keepdim=True) + 1e-5).rsqrt()
    assert ((y - exact).abs() <= rstd * 2**-13 + 8 * 2**-24 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_large_mean_costs_no_digits(norm, dtype, place):
    """A mean of 1000 in 16 bits: E[x^2] - E[x]^2 in float32 would have none of the variance right."""
    generator = torch.Generator().manual_seed(0)
    x = (1000 + torch.randn(6, 96, 8, generator=generator)).to(dtype).to(place.device)
    groups, exact = 4, x.double().view(6, 4, 24 * 8)
    if norm == "layer":
        x, groups = x.mT.contiguous(), None
        exact = x.double()
    y = mi.norm_modulate(x, None, norm=norm, groups=groups).double().view(exact.shape)
    rstd = (exact.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    expected = (exact - exact.mean(-1, keepdim=True)) * rstd
    # y is rounded, and the mean in float32.
    allowed = torch.finfo(dtype).eps * expected.abs() + torch.finfo(torch.float32).eps * 1000 * rstd
    assert bool(((y - expected).abs() <= allowed).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sample", [TOKENS, RMS, MAPS], ids=str)
def test_nan_and_inf_stay_in_their_set(sample, value, place):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = sample.arguments(dtype, place.device)
        clean = ours(sample)(*tensors)[1]
        tensors[0].view(-1)[5] = value
        y = ours(sample)(*tensors)[1]
        groups = sample.groups or 1
        sets = slice(0, sample.x[sample.channel] // groups)
        hit = torch.zeros_like(y, dtype=torch.bool)
        hit[(0, 0, sets) if sample.norm != "group" else (0, sets)] = True
        assert torch.equal(y[~hit], clean[~hit])
        if sample.norm == "rms" and value == value:  # the others are divided by infinity
            assert y[hit].isnan().sum() == 1
        else:
            assert y[hit].isnan().all()


@pytest.mark.parametrize("which", range(2, 5), ids=["gate", "scale", "shift"])
def test_nan_in_a_context_reaches_its_elements(which, place):
    tensors = TOKENS.arguments(torch.float32, place.device)
    tensors[which].view(-1)[3] = float("nan")
    x_new, y = ours(TOKENS)(*tensors)
    assert x_new.isnan().sum() == (19 if which == 2 else 0)
    assert y.isnan().sum() == (19 * 40 if which == 2 else 19)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sample", SPLIT, ids=str)
def test_threads_change_no_bit(sample, dtype, place):
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads if place.backend == "cpu" else 1)
        leaves = sample.arguments(dtype, place.device, requires_grad=True)
        y = ours(sample)(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, sample.cotangent(dtype, place.device))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def saved(function, tensors):
    """The storages that a call keeps for its backward pass, and its results."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = function(*tensors)
    return kept, results


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("sample", [TOKENS, RMS, MAPS], ids=str)
def test_what_is_saved(sample, gates, place):
    """x_new, h only where the gate wants a gradient, the contexts and the statistics."""
    tensors = sample.arguments(torch.float32, place.device, requires_grad=True)
    x, h, gate, scale, shift, weight, bias = tensors
    gate.requires_grad_(gates)
    options = sample.options | {"weight": weight, "bias": bias}
    kept, (x_new, y) = saved(
        lambda *t: mi.gated_residual_norm_modulate(*t, **options), (x, h, gate, scale, shift)
    )
    large = {address for address, tensor in kept.items() if tensor.numel() >= x.numel()}
    expected = {x_new, h} if gates else {x_new}
    assert large == {tensor.untyped_storage().data_ptr() for tensor in expected}
    small = [tensor for address, tensor in kept.items() if address not in large]
    sets = x.numel() // (x.shape[-1] if sample.norm != "group" else x[0].numel() // sample.groups)
    statistics = sets * (1 if sample.norm == "rms" else 2)
    arguments = sum(t.numel() for t in (gate, scale, weight, bias))
    assert sum(tensor.numel() for tensor in small) == statistics + arguments
    assert y.untyped_storage().data_ptr() not in kept


def test_x_is_saved_without_a_residual(place):
    x, _, _, scale, shift, *_ = MODULATED.arguments(torch.float32, place.device, requires_grad=True)
    kept, _ = saved(lambda *t: mi.norm_modulate(*t), (x, scale, shift))
    large = [address for address, tensor in kept.items() if tensor.numel() >= x.numel()]
    assert large == [x.untyped_storage().data_ptr()]


def has_kernel() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("mi_kernels::norm_modulate", "CPU")


def test_results_are_the_only_memory():
    if backends.why_not("cpu") is not None or not has_kernel():
        pytest.skip("the compiled library is missing, or has no kernel of this operation")
    torch.utils.deterministic.fill_uninitialized_memory = False
    for sample in (
        Normalization("large", (4, 500, 256), *((4, 1, 256),) * 3, True, "wb"),
        Normalization("large", (4, 500, 256), *((4, 1, 256),) * 3, True, "wb", "rms", layout="transposed"),
        Normalization("large", (4, 64, 40, 40), *((4, 64, 1, 1),) * 3, True, "wb", "group", 8),
    ):
        x, h, gate, scale, shift, weight, bias = sample.arguments(torch.float32)
        options = sample.options | {"weight": weight, "bias": bias}

        def call(*t, options=options):
            return mi.gated_residual_norm_modulate(*t, **options)

        call(x, h, gate, scale, shift)
        sets = x.numel() // 256
        copies = 2 if sample.layout == "transposed" else 0  # of x and h, whose rows are not contiguous
        allowed = (2 + copies) * x.numel() * 4 + 2 * sets * 4 + (128 << 10)
        assert peak_memory(lambda t=(x, h, gate, scale, shift), f=call: f(*t)) <= allowed


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("sample", [MAPS, TINY[5]], ids=str)
def test_memory_format_is_kept(sample, every, place):
    """Also that of some samples of a batch."""
    x, h, *others = sample.arguments(torch.float32, place.device)
    batches = (t.repeat_interleave(every, 0).movedim(1, -1).contiguous() for t in (x, h))
    x, h = (t.movedim(-1, 1)[::every].requires_grad_() for t in batches)
    results = mi.gated_residual_norm_modulate(x, h, *others[:3], **sample.options)
    gradients = torch.autograd.grad(sum(t.sum() for t in results), (x, h))
    for tensor in (*results, *(gradients if sample is MAPS else ())):
        assert tensor.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("sample", [TOKENS, MAPS], ids=str)
def test_expanded_inputs_and_cotangents(sample, place):
    tensors = sample.arguments(torch.float64, place.device)
    base = tensors[0][:1].clone().requires_grad_()
    grad = sample.cotangent(torch.float64, place.device)[..., :1].expand(sample.shape)
    found, expected = (
        torch.autograd.grad(function(base.expand(sample.x), *tensors[1:]), base, grad)
        for function in (ours(sample), plainly(sample))
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_contexts_broadcast_as_in_pytorch(norm, place):
    """[B, C] beside tokens [B, T, C] is [T, C] if B = T, and an error otherwise."""
    x = torch.randn(4, 4, 6, device=place.device)
    context = torch.randn(4, 6, device=place.device)
    options = {"norm": norm, "groups": 2 if norm == "group" else None}
    expected = reference.norm_modulate(x, context, context, **options)
    torch.testing.assert_close(mi.norm_modulate(x, context, context, **options), expected)
    with pytest.raises(ValueError, match=r"scale: expected a shape that broadcasts to that of x \[3, 4, 6\]"):
        mi.norm_modulate(x[:3], context[:3], **options)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("sample", [TOKENS, RMS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(sample, dtype, portable):
    suffix = "_portable" if portable else ""
    x, h, *contexts, weight, bias = sample.arguments(dtype)
    others = (*contexts, weight[None, None], bias[None, None])
    form = (2, 1, sample.norm != "rms")
    op = getattr(torch.ops.mi_kernels, f"norm_modulate{suffix}").default
    torch.library.opcheck(op, (x, h, *others, *form, 1e-5, "sigmoid", 1.0))
    torch.library.opcheck(op, (x.mT.contiguous().mT, None, None, *others[1:], *form, 1e-5, "tanh", 0.0))
    _, x_new, mean, rstd = op(x, h, *others, *form, 1e-5, "sigmoid", 1.0)
    op = getattr(torch.ops.mi_kernels, f"norm_modulate_grads{suffix}").default
    grad_x, grad = sample.cotangent(dtype)
    statistics = (mean if form[2] else None, rstd)
    for want in ((True,) * 7, (True, *(False,) * 6), (False, False, True, False, True, True, False)):
        torch.library.opcheck(
            op, (grad, x_new, grad_x, h, *others, *statistics, *form, "sigmoid", 1.0, *want)
        )
