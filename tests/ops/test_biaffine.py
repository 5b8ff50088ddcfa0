"""The biaffine form: values and derivatives, published layers, memory, messages."""

from dataclasses import replace
from functools import partial
from itertools import permutations, product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.testing.biaffine_samples import ARC, LABEL, Pairs, pairs
from mi_kernels.testing.checks import check_gradients, check_second_order, check_values
from mi_kernels.testing.memory import peak_memory

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ONES = tuple(product((False, True), repeat=2))
MIB = 1 << 20


# float16 is read as bfloat16 is without instructions for it, and multiplied as float32.
CASES = [
    pytest.param(sample, dtype, id=f"{sample}-{dtype}")
    for number, sample in enumerate(pairs())
    for dtype in FLOATS
    if dtype is not torch.float16 or number % 3 == 0
]


@pytest.mark.parametrize(("sample", "dtype"), CASES, scope="module")
def test_error_rule(sample, dtype, place):
    y = mi.biaffine(*sample.arguments(dtype, place.device), **sample.options)
    assert y.shape == sample.shape and y.dtype == dtype and y.is_contiguous()
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("sample", (ARC, LABEL), ids=str)
def test_second_order_obeys_the_error_rule(sample, channels_first, place):
    check_second_order(replace(sample, channels_first=channels_first), torch.float32, place.device)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("out", [1, 2])
@pytest.mark.parametrize("ones", ONES, ids=str)
def test_derivatives(ones, out, channels_first, place):
    sample = Pairs("tiny", (2, 3, 2), (2, 2, 3), out, ones, (out,), channels_first)
    leaves = sample.arguments(torch.float64, place.device, requires_grad=True)
    function = partial(mi.biaffine, **sample.options)
    gradcheck(
        function, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    gradgradcheck(function, leaves)


@pytest.mark.parametrize("leaf", range(4))
def test_a_gradient_alone_is_that_of_all(leaf, place):
    for ones in ONES:
        sample = replace(LABEL, ones=ones, bias=(5,))
        leaves = sample.arguments(torch.float64, place.device, requires_grad=True)
        grad = sample.cotangent(torch.float64, place.device)
        every = torch.autograd.grad(mi.biaffine(*leaves, **sample.options), leaves, grad)
        only = [t.detach().requires_grad_(number == leaf) for number, t in enumerate(leaves)]
        (found,) = torch.autograd.grad(mi.biaffine(*only, **sample.options), only[leaf], grad)
        torch.testing.assert_close(found, every[leaf])


def padded(x):
    return torch.cat((x, x.new_ones(*x.shape[:-1], 1)), -1)


def supar(x, y, weight, ones):
    """Biaffine of supar with n_out > 1, and of its scores of arcs with n_out = 1 and scale = 0."""
    x, y = (padded(t) if one else t for t, one in zip((x, y), ones, strict=True))
    return torch.einsum("bxi,oij,byj->boxy", x, weight, y)


def stanza(x, y, weight):
    """PairwiseBiaffineScorer of stanza: weight [I1 + 1, I2 + 1, O], scores [B, L1, L2, O]."""
    x, y = padded(x), padded(y)
    rows = (x.flatten(0, 1) @ weight.flatten(1)).view(*x.shape[:2], *weight.shape[1:])
    return torch.einsum("bxjo,byj->bxyo", rows, y)


def allennlp(x, y, weight, bias, input_biases):
    """BilinearMatrixAttention of AllenNLP without activation: weight [O, I1 (+ 1), I2 (+ 1)], bias [1]."""
    if input_biases:
        x, y = padded(x), padded(y)
    return x.unsqueeze(1) @ weight @ y.unsqueeze(1).mT + bias


def drawn(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def same(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("out", [1, 6])
@pytest.mark.parametrize("ones", ONES, ids=str)
def test_supar(ones, out):
    x, y, weight = leaves = drawn((3, 7, 10), (3, 9, 12), (out, 10 + ones[0], 12 + ones[1]))
    same(mi.biaffine(x, y, weight, ones=ones, channels_first=True), supar(x, y, weight, ones), leaves)


def test_stanza():
    x, y, weight = leaves = drawn((3, 7, 10), (3, 9, 12), (11, 13, 6))
    same(mi.biaffine(x, y, weight.permute(2, 0, 1), ones=(True, True)), stanza(x, y, weight), leaves)


@pytest.mark.parametrize("input_biases", [False, True])
@pytest.mark.parametrize("out", [1, 6])
def test_allennlp(out, input_biases):
    more = int(input_biases)
    x, y, weight, bias = leaves = drawn((3, 7, 10), (3, 9, 12), (out, 10 + more, 12 + more), (1,))
    ours = mi.biaffine(x, y, weight, bias, ones=(input_biases, input_biases), channels_first=True)
    same(ours, allennlp(x, y, weight, bias, input_biases), leaves)


@pytest.mark.parametrize("ones", ONES, ids=str)
def test_module(ones):
    torch.manual_seed(0)
    layer = mi.nn.Biaffine(10, 12, 6, ones=ones, dtype=torch.float64)
    # What supar's layer has, so that its state dict can be loaded.
    assert {name: list(t.shape) for name, t in layer.state_dict().items()} == {
        "weight": [6, 10 + ones[0], 12 + ones[1]]
    }
    x, y = drawn((3, 7, 10), (3, 9, 12))
    torch.testing.assert_close(layer(x, y), supar(x, y, layer.weight, ones).permute(0, 2, 3, 1))
    first = mi.nn.Biaffine(10, 12, 6, ones, bias=True, channels_first=True, dtype=torch.float64)
    first.load_state_dict(layer.state_dict() | {"bias": torch.ones(6)})
    torch.testing.assert_close(first(x, y), supar(x, y, layer.weight, ones) + 1)
    assert "ones=" + str(ones) in repr(layer)
    assert mi.explain(layer, x, y).op == "forward"


def test_initial_scores_have_variance_1():
    torch.manual_seed(0)
    y = mi.nn.Biaffine(100, 80, 64)(torch.randn(4, 50, 100), torch.randn(4, 50, 80))
    assert abs(y.std().item() - 1) < 0.03
    layer = mi.nn.Biaffine(3, 4, 2)
    assert layer.weight[:, 3].eq(0).all() and layer.weight[:, :, 4].eq(0).all()


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("out", [1, 8])
@pytest.mark.parametrize("ones", ONES, ids=str)
def test_memory(ones, out, channels_first, place):
    """At most the result and the layers of one side; inputs are not copied, nor is the result."""
    sample = Pairs("memory", (24, 64, 96), (24, 64, 96), out, ones, None, channels_first)
    x, y, weight = sample.arguments(torch.float32, place.device)[:3]
    result, layers = 24 * 64 * 64 * out * 4, 24 * 64 * (96 + 1) * out * 4
    with torch.no_grad():
        used = peak_memory(partial(mi.biaffine, x, y, weight, **sample.options), place.device)
    if place.backend == "cpu":
        assert used <= result + min(layers, 5 * MIB) + 2 * MIB  # layers of some samples, and scratch
        return
    # The portable backend adds up terms beside their sum; for channels first the order of layers is changed.
    copies = 3 if channels_first and out > 1 else 2
    assert used <= result + copies * layers + 2 * weight.nbytes + 2 * MIB


@pytest.mark.parametrize("order", permutations(range(3)), ids=str)
@pytest.mark.parametrize("out", [1, 2, 40])
@pytest.mark.parametrize("features", [0, 1, 2])
def test_orders_of_weights_with_axes_of_size_1(features, out, order, place):
    """Whose strides may be anything."""
    for ones in ONES:
        sample = Pairs("narrow", (3, 5, features), (3, 7, 2), out, ones, (out,))
        x, y, weight, bias = sample.arguments(torch.float64, place.device)
        back = [order.index(axis) for axis in range(3)]
        moved = weight.permute(order).contiguous().permute(back)
        scores = supar(x, y, weight, ones).permute(0, 2, 3, 1) + bias
        torch.testing.assert_close(mi.biaffine(x, y, moved, bias, **sample.options), scores)


# Layers of more than 2 MiB, which the CPU's kernels take in three blocks of samples, the last one smaller.
BLOCKS = (
    Pairs("several-blocks", (40, 60, 33), (40, 50, 70), 24),
    Pairs("several-blocks", (40, 60, 33), (40, 50, 70), 24, (False, False), (24,), True),
    Pairs("several-blocks-of-first", (130, 60, 180), (130, 50, 200), 1, (True, False)),
)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("sample", BLOCKS, ids=str)
def test_several_blocks_of_samples(sample, layout, place):
    """By the error rule, and the same bits as where the layers are kept for a backward pass."""
    sample = replace(sample, layout=layout)
    check_values(sample, torch.float32, place.device)
    check_gradients(sample, torch.float32, place.device)
    x, y, weight, bias = sample.arguments(torch.float32, place.device)
    with torch.no_grad():
        free = mi.biaffine(x, y, weight, bias, **sample.options)
    assert torch.equal(free, mi.biaffine(x.requires_grad_(), y, weight, bias, **sample.options))


@pytest.mark.parametrize("sample", (ARC, LABEL, *BLOCKS), ids=str)
def test_the_same_bits_for_any_number_of_threads(sample):
    leaves = [t for t in sample.arguments(torch.float32, requires_grad=True) if t is not None]
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        y = mi.biaffine(*leaves, **sample.options)
        found.append([y, *torch.autograd.grad(y, leaves, sample.cotangent(torch.float32))])
    if backends.choose(leaves[0]) != "cpu":
        pytest.skip("no compiled kernels: PyTorch's products depend on the number of threads")
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("channels_first", [False, True])
def test_nan_stays_where_it_belongs(channels_first, place):
    sample = replace(LABEL, channels_first=channels_first)
    x, y, weight, _ = sample.arguments(torch.float32, place.device)
    x[1, 3], y[0, 2] = float("nan"), float("inf")
    found = mi.biaffine(x, y, weight, **sample.options)
    found = found.permute(0, 2, 3, 1) if channels_first else found
    bad = torch.zeros(found.shape[:3], dtype=torch.bool, device=found.device)
    bad[1, 3], bad[0, :, 2] = True, True
    assert torch.equal(~found.isfinite().all(-1), bad)


MESSAGES = {
    "weight: expected shape [O, I1 + 1=18, I2 + 1=19], got [5, 17, 18]": {"weight": torch.ones(5, 17, 18)},
    "input2: expected leading dimensions that broadcast with those of input1 [2], got [3]": {
        "input2": torch.ones(3, 4, 18)
    },
    "input1: expected at least 2 dimension(s), got shape [17]": {"input1": torch.ones(17)},
    "bias: expected shape [O=5], [1] or [], got [4]": {"bias": torch.ones(4)},
    "input2: expected torch.float32 (the dtype of input1), got torch.float64": {
        "input2": torch.ones(2, 4, 18).double()
    },
    "ones: expected a pair of bools, got True": {"ones": True},
    "ones: expected a bool, got int": {"ones": (1, 0)},
    "channels_first: expected a bool, got str": {"channels_first": "yes"},
    "weight: expected a torch.Tensor, got NoneType": {"weight": None},
}


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("call", [mi.biaffine, partial(mi.explain, "biaffine")], ids=["call", "explain"])
def test_messages(message, call):
    input1, input2, weight, _ = LABEL.arguments(torch.float32)
    good = {"input1": input1, "input2": input2, "weight": weight, "bias": None, "ones": (True, True)}
    with pytest.raises((TypeError, ValueError)) as raised:
        call(**(good | MESSAGES[message]))
    assert str(raised.value) == f"biaffine: {message}"


def test_explain_says_which_side_has_the_layers():
    """That whose layers cost least; with several outputs the second one, or where only the CPU's kernels may
    write them first, the first one."""
    input1, input2, weight, _ = LABEL.arguments(torch.float32)
    of_second, of_first = 2 * 2 * 23 * 5 * 18 * (19 + 19), 2 * 2 * 19 * 5 * 19 * (18 + 23)
    for backend, channels_first, algorithm, operations in (
        ("portable", False, "per_input2", of_second),
        ("portable", True, "per_input1", of_first),
        *((("cpu", True, "per_input2", of_second),) if backends.why_not("cpu") is None else ()),
    ):
        with mi.backend(backend):
            plan = mi.explain(
                mi.biaffine, input1, input2, weight, ones=(True, True), channels_first=channels_first
            )
        assert plan.algorithm == algorithm and plan.operations == operations
    short, long = torch.ones(2, 2, 30), torch.ones(2, 70, 30)
    for first, second, algorithm in ((short, long, "per_input1"), (long, short, "per_input2")):
        for one in (False, True):
            plan = mi.explain(mi.biaffine, first, second, torch.ones(1, 30, 30 + one), ones=(False, one))
            assert plan.algorithm == algorithm
    even = torch.ones(2, 9, 30)
    assert mi.explain(mi.biaffine, even, even, torch.ones(1, 30, 30)).algorithm == "per_input1"
    assert (
        mi.explain(mi.biaffine, even, even, torch.ones(1, 30, 31), ones=(False, True)).algorithm
        == "per_input2"
    )
