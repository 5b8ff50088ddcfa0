"""Generated weights of low rank: values and derivatives, memory, transforms, plans, messages."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import Spy
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels.testing.checks import check_gradients, check_second_order, check_values
from mi_kernels.testing.low_rank_weight_samples import (
    GROUPS,
    SAMPLES,
    SHARED,
    TINY,
    TINY_GROUPS,
    Factors,
    factors,
)
from mi_kernels.testing.memory import peak_memory

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sample", list(factors()), ids=str, scope="module")
def test_error_rule(sample, dtype, place):
    y = sample.call(*sample.arguments(dtype, place.device))
    assert y.shape == sample.shape and y.dtype == dtype and y.is_contiguous()
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("sample", (SHARED, SAMPLES, GROUPS), ids=str)
def test_second_order_obeys_the_error_rule(sample, place):
    check_second_order(sample, torch.float32, place.device)


@pytest.mark.parametrize("sample", (TINY, TINY_GROUPS, replace(TINY, of_down=(), base=(2, 1))), ids=str)
def test_derivatives(sample, place):
    leaves = sample.arguments(torch.float64, place.device, requires_grad=True)
    gradcheck(
        sample.call, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    gradgradcheck(sample.call, leaves)


@pytest.mark.parametrize("dtype", (torch.int64, torch.int8), ids=str)
def test_integers(dtype):
    x, down, up = (
        torch.randint(-2, 3, size, dtype=dtype) for size in ((2, 7, 5), (2, 1, 3, 5), (2, 1, 4, 3))
    )
    base = torch.ones(4, dtype=dtype)
    expected = 1 + 2 * (x @ down.squeeze(1).mT) @ up.squeeze(1).mT
    assert torch.equal(mi.apply_low_rank(x, down, up, base, scale=2), expected.to(dtype))


@pytest.mark.parametrize("sample", (SHARED, SAMPLES, GROUPS), ids=str)
def test_the_arguments_are_left_as_they_are(sample, place):
    for grad in (False, True):
        tensors = sample.arguments(torch.float32, place.device, requires_grad=grad)
        before = [t.detach().clone() for t in tensors]
        y = sample.call(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        assert all(y.data_ptr() != t.data_ptr() for t in tensors)


@pytest.mark.parametrize("leaf", range(4))
@pytest.mark.parametrize("sample", (SHARED, SAMPLES, GROUPS), ids=str)
def test_a_gradient_alone_is_that_of_all(leaf, sample, place):
    leaves = sample.arguments(torch.float64, place.device, requires_grad=True)
    grad = sample.cotangent(torch.float64, place.device)
    every = torch.autograd.grad(sample.call(*leaves), leaves, grad)
    only = [t.detach().requires_grad_(number == leaf) for number, t in enumerate(leaves)]
    (found,) = torch.autograd.grad(sample.call(*only), only[leaf], grad)
    torch.testing.assert_close(found, every[leaf])


@pytest.mark.parametrize("number", range(4))
def test_vmap_over_one_argument(number):
    tensors = list(TINY.arguments(torch.float64))
    expected = []
    stack = torch.stack([tensors[number], tensors[number] * 2 + 1])
    for one in stack:
        expected.append(TINY.call(*tensors[:number], one, *tensors[number + 1 :]))
    dims = tuple(0 if place == number else None for place in range(4))
    found = torch.vmap(TINY.call, in_dims=dims)(*tensors[:number], stack, *tensors[number + 1 :])
    torch.testing.assert_close(found, torch.stack(expected))


def test_vmap_over_the_groups_of_rows():
    x, down, up, base = TINY_GROUPS.arguments(torch.float64)
    ids = torch.tensor([[0, 1, 2, 3, 0], [3, 3, 3, 0, 1]])
    call = partial(mi.apply_low_rank, x, down, up, base, scale=0.5)
    found = torch.vmap(lambda one: call(segment_ids=one))(ids)
    torch.testing.assert_close(found, torch.stack([call(segment_ids=one) for one in ids]))


@pytest.mark.compile
@pytest.mark.parametrize("sample", (SHARED, SAMPLES, GROUPS), ids=str)
def test_compile(sample, fresh_compiler):
    leaves = sample.arguments(torch.float32, requires_grad=True)
    ids = sample.segment_ids()

    def function(*tensors):
        return mi.apply_low_rank(*tensors, scale=sample.scale, segment_ids=ids)

    y, expected = torch.compile(function, fullgraph=True)(*leaves), function(*leaves)
    torch.testing.assert_close(y, expected)
    grad = torch.ones_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_autocast_is_that_of_a_product(place):
    tensors = SAMPLES.arguments(torch.float32, place.device)
    with torch.autocast(place.device, torch.bfloat16):
        y = SAMPLES.call(*tensors)
    assert torch.equal(y, SAMPLES.call(*(t.bfloat16() for t in tensors)))


def repeated(x, down, up, base, scale, ids):
    """As text-to-LoRA and doc-to-LoRA do: the factors of each token."""
    features = torch.einsum("nrj,nj->nr", down[ids], x)
    return base + scale * torch.einsum("nor,nr->no", up[ids], features)


def test_the_published_form():
    tensors = GROUPS.arguments(torch.float64)
    expected = repeated(*tensors, GROUPS.scale, GROUPS.segment_ids())
    torch.testing.assert_close(GROUPS.call(*tensors), expected)


def lora(x, layer, down, up, alpha):
    """A linear layer with LoRA, as PEFT computes it."""
    return layer(x) + torch.nn.functional.linear(torch.nn.functional.linear(x, down), up) * (
        alpha / down.shape[0]
    )


def test_lora_of_a_linear_layer():
    layer = torch.nn.Linear(19, 13, dtype=torch.float64)
    x, down, up, _ = SHARED.arguments(torch.float64)
    torch.testing.assert_close(
        mi.apply_low_rank(x, down, up, layer(x), scale=16 / 3), lora(x, layer, down, up, 16)
    )


@pytest.mark.parametrize("lengths", (None, (512,) * 3 + (500, 12)), ids=["equal", "unequal"])
def test_memory_is_that_of_the_results(lengths, place):
    """No factor is there once for each of its rows, nor is there a second y."""
    if place.backend != "cpu":
        pytest.skip("what the compiled kernels allocate on the CPU")
    rows, width, rank = 512, 256, 8
    lead = (4, rows) if lengths is None else (4 * rows,)
    own = (4, 1) if lengths is None else (len(lengths),)
    sample = Factors("memory", lead, own, own, width, rank, width, lead, 2.0, lengths=lengths)
    tensors, ids = sample.arguments(torch.float32), sample.segment_ids()
    result = tensors[3].nbytes

    def call():
        return mi.apply_low_rank(*tensors, scale=2.0, segment_ids=ids)

    call()
    assert peak_memory(call) <= result + (1 << 20) < result + tensors[1].nbytes * rows
    for tensor in tensors:
        tensor.requires_grad_()
    grad = sample.cotangent(torch.float32)

    def train():
        return torch.autograd.grad(call(), tensors, grad)

    train()
    assert peak_memory(train) <= 2 * result + (1 << 20)  # y and dx; d base is grad


def test_a_factor_is_not_expanded():
    with Spy() as spy:
        SAMPLES.call(*SAMPLES.arguments(torch.float32))
    for _, given in spy.calls:
        for tensor in given:
            if isinstance(tensor, torch.Tensor):
                assert tensor.numel() <= 3 * 11 * 19


@pytest.mark.parametrize("sample", (SHARED, SAMPLES, GROUPS), ids=str)
def test_explain(sample):
    leaves = sample.arguments(torch.float32, requires_grad=True)
    plan = mi.explain(mi.apply_low_rank, *leaves, scale=sample.scale, segment_ids=sample.segment_ids())
    rows = sample.shape.numel() // sample.out
    products = 2 * rows * sample.rank * (sample.width + sample.out)
    assert plan.operations == products + rows * sample.out
    assert [one.op for one in plan.backward] == ["input_grads", "weight_grads"]
    assert sum(one.operations for one in plan.backward) == 2 * products
    assert "no factor is repeated" in plan.why
    with torch.no_grad():
        assert mi.explain("apply_low_rank", *leaves[:3], segment_ids=sample.segment_ids()).backward == ()


GOOD = {"x": torch.ones(2, 7, 5), "down": torch.ones(2, 1, 3, 5), "up": torch.ones(2, 1, 4, 3)}
IDS = torch.tensor([0, 1, 1, 0])
RAGGED = {"x": torch.ones(4, 5), "down": torch.ones(2, 3, 5), "up": torch.ones(2, 4, 3), "segment_ids": IDS}
WRONG = [
    ({"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    ({"down": [1.0]}, TypeError, "down: expected a torch.Tensor, got list"),
    ({"up": torch.ones(2, 1, 4, 3).double()}, TypeError, "up: expected torch.float32 .*, got torch.float64"),
    ({"base": torch.ones(4).to_sparse()}, TypeError, "base: expected a dense"),
    ({"scale": "2"}, TypeError, "scale: expected a float, got str"),
    ({"scale": True}, TypeError, "scale: expected a float, got bool"),
    ({"x": torch.ones(())}, ValueError, "x: expected at least 1 dim"),
    ({"down": torch.ones(5)}, ValueError, r"down: expected at least 2 dimension\(s\), got shape \[5\]"),
    ({"up": torch.ones(3)}, ValueError, r"up: expected at least 2 dimension\(s\), got shape \[3\]"),
    ({"down": torch.ones(3, 6)}, ValueError, r"down: expected shape \[R, X=5\], got \[3, 6\]"),
    (
        {"down": torch.ones(2, 1, 3, 6)},
        ValueError,
        r"down: expected shape \[..., R, X=5\], got \[2, 1, 3, 6\]",
    ),
    ({"up": torch.ones(2, 1, 4, 2)}, ValueError, r"up: expected shape \[..., O, R=3\], got \[2, 1, 4, 2\]"),
    ({"down": torch.ones(2, 3, 5)}, ValueError, r"down: expected leading dimensions that .*, got \[2\]"),
    ({"up": torch.ones(3, 1, 4, 3)}, ValueError, r"up: expected leading dimensions that .*, got \[3, 1\]"),
    (
        {"base": torch.ones(2, 7, 3)},
        ValueError,
        r"base: expected a shape that .* \[2, 7, 4\], got \[2, 7, 3\]",
    ),
    ({"base": torch.ones(9, 2, 7, 4)}, ValueError, r"base: expected a shape that broadcasts .*, got \[9, "),
    ({"base": torch.ones(4, device="meta")}, ValueError, "base: expected device cpu"),
    (RAGGED | {"x": torch.ones(2, 2, 5)}, ValueError, r"x: expected shape \[N, X\], got \[2, 2, 5\]"),
    (RAGGED | {"down": torch.ones(3, 5)}, ValueError, r"down: expected shape \[G, R, X\], got \[3, 5\]"),
    (RAGGED | {"up": torch.ones(3, 4, 3)}, ValueError, r"up: expected shape \[G=2, O, R\], got \[3, 4, 3\]"),
    (RAGGED | {"segment_ids": IDS.int()}, TypeError, "segment_ids: expected torch.int64, got torch.int32"),
    (
        RAGGED | {"segment_ids": IDS + 1},
        ValueError,
        "segment_ids: expected numbers from 0 to G - 1 = 1, got 2",
    ),
    (RAGGED | {"segment_ids": IDS[:3]}, ValueError, r"segment_ids: expected shape \[N=4\], got \[3\]"),
    (RAGGED | {"base": torch.ones(3, 4)}, ValueError, r"base: expected a shape that .*, got \[3, 4\]"),
]


@pytest.mark.parametrize(
    ("wrong", "error", "message"), WRONG, ids=lambda v: None if isinstance(v, dict) else ""
)
def test_a_wrong_argument_is_named(wrong, error, message):
    for call in (mi.apply_low_rank, partial(mi.explain, mi.apply_low_rank)):
        with pytest.raises(error, match=f"^apply_low_rank: {message}"):
            call(**GOOD | wrong)


def test_integers_take_an_integer_scale():
    tensors = [t.long() for t in GOOD.values()]
    with pytest.raises(TypeError, match=r"^apply_low_rank: scale: expected an int for torch.int64, got 0.5"):
        mi.apply_low_rank(*tensors, scale=0.5)


@pytest.mark.parametrize("segments", [False, True])
def test_a_scale_does_not_leave_the_range_of_16_bits(segments, place):
    """Features of 256 times 512 would be infinite in float16, y is 262."""
    x, down = torch.full((4, 64), 2.0), torch.full((2, 64), 2.0)
    up = torch.full((8, 2), 1e-3)
    x, down, up = (t.half().to(place.device) for t in (x, down, up))
    expected = 512.0 * ((x @ down.mT) @ up.mT)
    ids = torch.zeros(4, dtype=torch.int64, device=place.device) if segments else None
    factors = (down[None], up[None]) if segments else (down, up)
    for base in (None, torch.ones(4, 8, dtype=torch.float16, device=place.device)):
        y = mi.apply_low_rank(x, *factors, base, scale=512.0, segment_ids=ids)
        torch.testing.assert_close(y, expected if base is None else expected + base, rtol=2e-3, atol=0)
