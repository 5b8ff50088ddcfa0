"""Multiplicative RNNs: values, gradients of every order, lengths, transforms."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import COMPILE, Spy, with_gradients
from torch.autograd import gradcheck, gradgradcheck

import mi_kernels as mi
from mi_kernels.ops.recurrent import reference
from mi_kernels.ops.recurrent.forms import KINDS, LSTM
from mi_kernels.testing.checks import check_gradients, check_second_order, check_values, gradients_of
from mi_kernels.testing.errors import FLOAT64_LIMIT, relative_error
from mi_kernels.testing.memory import peak_memory
from mi_kernels.testing.recurrent_samples import (
    DENSE_RNN,
    LENGTHS,
    MI_GRU,
    MI_LSTM,
    MLSTM,
    NAMES,
    Recurrence,
    every_kind,
    recurrences,
)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = {"steps": 2, "rows": 2, "width": 2, "units": 2, "factors": 2}
# Finite differences take a time that is quadratic in the number of elements.
TINY = [
    replace(sample, **SIZES, projected=sample.projected and 1, name="tiny", lengths=lengths, reverse=reverse)
    for sample in every_kind()
    for lengths, reverse in ((None, False), ((1, 2), True))
]
FEW = (MLSTM, MI_LSTM, MI_GRU, DENSE_RNN)


def ours(sample):
    return partial(sample.call, mi.multiplicative_rnn)


def theirs(sample):
    return partial(sample.call, reference.multiplicative_rnn)


def of_present(function, tensors):
    """The function of the tensors that are there, and these."""
    there = [t is not None for t in tensors]

    def called(*given):
        left = iter(given)
        return function(*(next(left) if t else None for t in there))

    return called, [t.detach().requires_grad_() for t in tensors if t is not None]


def cases(first):
    """Each form in every dtype; each of the other patterns in one: they take turns, from ``first`` on."""
    forms = list(every_kind())
    for index, sample in enumerate(recurrences(), first):
        for dtype in FLOATS if sample in forms else FLOATS[index % len(FLOATS) :][:1]:
            yield sample, dtype


def lengths_of(kind):
    """The longest one of each structure."""
    return (1, 33, 512) if kind in ("mlstm", "mi_gru", "second_order") else (1, 33)


@pytest.mark.parametrize(("sample", "dtype"), cases(0), ids=str)
def test_values(sample, dtype, place):
    check_values(sample, dtype, place.device)


@pytest.mark.parametrize(("sample", "dtype"), cases(2), ids=str)
def test_gradients(sample, dtype, place):
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize(("kind", "steps"), [(kind, n) for kind in KINDS for n in lengths_of(kind)])
def test_short_and_long_sequences(kind, steps, place):
    sample = Recurrence("steps", kind, steps=steps, rows=3, lengths=(steps, 0, (steps + 1) // 2))
    check_values(sample, torch.float64, place.device)
    check_gradients(sample, torch.float64, place.device)


@pytest.mark.parametrize("sample", TINY, ids=str)
def test_first_derivatives(sample, place):
    function, tensors = of_present(ours(sample), _finite(sample, place))
    gradcheck(
        function, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("sample", TINY, ids=str)
def test_second_derivatives(sample, place):
    function, tensors = of_present(ours(sample), _finite(sample, place))
    gradgradcheck(function, tensors, check_fwd_over_rev=True, check_rev_over_rev=True)


def _finite(sample, place):
    """Arguments whose padding is finite, as finite differences need it."""
    tensors = replace(sample, lengths=None).arguments(torch.float64, place.device)
    return [t if t is None else t.detach() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sample", [replace(s, rows=12) for s in FEW], ids=str)
def test_second_order(sample, dtype, place):
    check_second_order(sample, dtype, place.device)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sample", every_kind(), ids=str)
def test_padding_reaches_nothing(sample, reverse, place):
    """The same bits whatever x holds there, all gradients finite, those of the padding zero."""
    sample = replace(sample, lengths=LENGTHS, reverse=reverse)
    tensors = sample.arguments(torch.float32, place.device)
    padding = sample.padding(tensors[0])
    grad = sample.cotangent(torch.float32, place.device)
    found = []
    for value in (float("nan"), float("inf"), 0.0):
        tensors[0] = tensors[0].masked_fill(padding, value)
        found.append(gradients_of(ours(sample), values=True)(grad, *tensors))
    for other in found[:2]:
        for one, zero in zip(other, found[2], strict=True):
            assert one.isfinite().all() and torch.equal(one, zero)
    assert (found[0][1] * padding == 0).all()
    output, *_ = sample.results(mi.multiplicative_rnn, *tensors)
    assert (output * padding == 0).all() and output.abs().sum() > 0


@pytest.mark.parametrize("sample", FEW, ids=str)
def test_the_state_of_a_row_without_steps_is_the_given_one(sample, place):
    sample = replace(sample, lengths=LENGTHS)
    tensors = sample.arguments(torch.bfloat16, place.device)
    _, *states = sample.results(mi.multiplicative_rnn, *tensors)
    for state, given in zip(states, tensors[1:], strict=False):
        assert torch.equal(state[1], given[1]) and not torch.equal(state[0], given[0])


@pytest.mark.parametrize("sample", FEW, ids=str)
def test_a_row_does_not_depend_on_the_others(sample, place):
    """A row of a padded batch is the same sequence by itself."""
    sample = replace(sample, lengths=LENGTHS, reverse=True)
    tensors = sample.arguments(torch.float64, place.device)
    output, *states = sample.results(mi.multiplicative_rnn, *tensors)
    for row, length in enumerate(LENGTHS):
        x, h, c, *weights = tensors
        own = [x[:length, row], h[row], None if c is None else c[row]]
        alone = replace(sample, rows=None, lengths=None, steps=length)
        single, *ends = alone.results(mi.multiplicative_rnn, *own, *weights)
        torch.testing.assert_close([output[:length, row], *(s[row] for s in states)], [single, *ends])


@pytest.mark.parametrize("used", ["output", "h", "c"])
@pytest.mark.parametrize("sample", [s for s in every_kind() if KINDS[s.kind].cell == LSTM], ids=str)
def test_gradients_of_one_result(sample, used, place):
    """That of the other results is None, not zero."""

    def of_one(function):
        function, tensors = of_present(function, sample.arguments(torch.float64, place.device))
        return torch.autograd.grad(function(*tensors).sin().sum(), tensors, materialize_grads=True)

    index = ("output", "h", "c").index(used)
    found, expected = (
        of_one(lambda *a, f=f: sample.results(f, *a)[index])
        for f in (mi.multiplicative_rnn, reference.multiplicative_rnn)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sample", [*FEW, replace(DENSE_RNN, low_rank=True)], ids=str)
def test_gradients_of_single_arguments(sample, place):
    function, tensors = of_present(ours(sample), sample.arguments(torch.float64, place.device))
    every = torch.autograd.grad(function(*tensors).sin().sum(), tensors)
    for index, tensor in enumerate(tensors):
        leaves = [t.detach() for t in tensors]
        leaves[index] = tensor.detach().requires_grad_()
        (found,) = torch.autograd.grad(function(*leaves).sin().sum(), leaves[index])
        torch.testing.assert_close(found, every[index], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("asked", ["h", "weight_hh", "weight_mh"])
def test_only_what_is_asked_for_is_computed(asked, place):
    """Of the products over all steps: the weights that need none have none."""
    tensors = MLSTM.arguments(torch.float32, place.device)
    tensors[NAMES.index(asked)].requires_grad_()
    y = MLSTM.call(mi.multiplicative_rnn, *tensors)
    with Spy() as spy:
        y.sum().backward()
    products = [name for name in spy.names if name != "recurrent_grads"]
    assert spy.names.count("recurrent_grads") == 1
    assert len(products) == (0 if asked == "h" else 1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sample", every_kind(), ids=str)
def test_low_memory_is_the_same(sample, reverse, place):
    """But for rounding: its products are of the rows of a chunk."""
    sample = replace(sample, steps=11, lengths=(11, 0, 4, 7, *(9,) * 8), reverse=reverse)
    grad, tensors = (made(torch.float64, place.device) for made in (sample.cotangent, sample.arguments))
    fast, low = (
        gradients_of(ours(replace(sample, memory=memory)), values=True)(grad, *tensors)
        for memory in ("fast", "low")
    )
    for one, other in zip(fast, low, strict=True):
        assert relative_error(other, one) <= FLOAT64_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sample", FEW, ids=str)
def test_low_memory_rounds_no_worse(sample, dtype, place):
    sample = replace(sample, steps=11, lengths=(11, 0, 4, 7, *(9,) * 8), memory="low")
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)


@pytest.mark.parametrize("kind", ["mlstm", "mi_lstm", "mi_gru"])
def test_low_memory_keeps_less(kind, place):
    """x, the output and its gradient: 132 numbers a step. Fast keeps 512 and more, and their gradients."""
    sample = Recurrence("long", kind, steps=256, rows=8, width=4, units=64, factors=64)

    def train(memory):
        tensors = sample.arguments(torch.float32, place.device, requires_grad=True)
        return lambda: ours(replace(sample, memory=memory))(*tensors).sum().backward()

    fast, low = (peak_memory(train(memory), place.device) for memory in ("fast", "low"))
    assert low < fast / 4


@pytest.mark.parametrize("sample", FEW, ids=str)
def test_the_number_of_threads_does_not_matter(sample, place):
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key("mi_kernels::recurrent", "CPU")
    if place.backend != "cpu" or not compiled:
        pytest.skip("the order of PyTorch's sums depends on its threads")
    sample = replace(sample, rows=67, units=40, width=33)
    found, before = [], torch.get_num_threads()
    grad, tensors = sample.cotangent(torch.float32), sample.arguments(torch.float32)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients_of(ours(sample), values=True)(grad, *tensors))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", ["mi_lstm", "mi_rnn"])
def test_without_multiplication_it_is_pytorchs(kind, place):
    sample = Recurrence("torch", kind, units=5, rows=4)
    x, h, c, weight_ih, weight_hh, bias, *_ = sample.arguments(torch.float64, place.device)
    module = (torch.nn.LSTM if c is not None else torch.nn.RNN)(sample.width, 5, dtype=torch.float64)
    module.to(place.device)
    zeros, ones = torch.zeros_like(bias), torch.ones_like(bias)
    parameters = {
        "weight_ih_l0": weight_ih,
        "weight_hh_l0": weight_hh,
        "bias_ih_l0": bias,
        "bias_hh_l0": zeros,
    }
    module.load_state_dict(parameters)
    state = h if c is None else (h, c)
    terms = {"alpha": zeros, "beta_h": ones, "beta_x": ones}
    output, end = mi.multiplicative_rnn(kind, x, state, weight_ih, weight_hh, bias, **terms)
    expected, last = module(x, h[None] if c is None else (h[None], c[None]))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(end, last[0] if c is None else tuple(t[0] for t in last))


def _loss(function):
    return lambda *tensors: function(*tensors).square().sum()


@pytest.mark.parametrize("sample", [replace(s, steps=3, rows=2, units=3, factors=2) for s in FEW], ids=str)
def test_transforms(sample, place):
    """vmap over data and over weights, per-sample gradients, jacobians and hessians of both modes."""
    tensors = sample.arguments(torch.float64, place.device)
    (f, tensors), (g, _) = (of_present(one(sample), tensors) for one in (ours, theirs))
    tensors = [t.detach() for t in tensors]
    many = [torch.stack([t, t.flip(-1), -t]) for t in tensors]
    every, last = tuple(range(len(tensors))), len(tensors) - 1
    only_x = (0, *(None,) * last)

    def all_of(function):
        loss = _loss(function)
        yield torch.vmap(function, only_x)(many[0], *tensors[1:])
        yield torch.vmap(function)(*many)
        yield torch.vmap(torch.func.grad(loss, every), only_x)(many[0], *tensors[1:])
        yield torch.vmap(torch.func.grad(loss, every))(*many)
        yield torch.func.jacrev(function, every)(*tensors)
        yield torch.func.jacfwd(function, every)(*tensors)
        yield torch.func.hessian(loss, last)(*tensors)
        yield torch.func.jacrev(torch.func.jacfwd(loss, last), 0)(*tensors)
        yield torch.func.jacfwd(torch.func.jacfwd(loss, 0), last)(*tensors)

    for found, expected in zip(all_of(f), all_of(g), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_per_sample_gradients_are_one_pass_through_time(place):
    sample = replace(MLSTM, rows=1)
    function, tensors = of_present(ours(sample), sample.arguments(torch.float32, place.device))
    tensors = [t.detach() for t in tensors]
    xs = torch.stack([tensors[0]] * 5)
    with Spy() as spy:
        gradient = torch.func.grad(_loss(function), tuple(range(len(tensors))))
        torch.vmap(gradient, (0, *(None,) * (len(tensors) - 1)))(xs, *tensors[1:])
    assert spy.names.count("recurrent") == spy.names.count("recurrent_grads") == 1


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("sample", [*FEW, replace(MLSTM, lengths=LENGTHS)], ids=str)
def test_compiled_without_graph_breaks(sample, place):
    compiled = torch.compile(partial(_flat, sample), **COMPILE)
    sizes = [(4, 12)] if sample.lengths else [(4, 12), (7, 5), (5, 12)]
    for steps, rows in sizes:
        tensors = replace(sample, steps=steps, rows=rows).arguments(torch.float32, place.device)
        found, expected = (with_gradients(f, tensors) for f in (compiled, partial(_flat, sample)))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def _flat(sample, *tensors):
    """All results, of whatever size."""
    return torch.cat([t.flatten() for t in sample.results(mi.multiplicative_rnn, *tensors)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, place):
    tensors = MLSTM.arguments(torch.float32, place.device)
    with torch.autocast(place.device, dtype):
        found = MLSTM.call(mi.multiplicative_rnn, *tensors)
    cast = [None if t is None else t.to(dtype) for t in tensors]
    assert found.dtype == dtype and torch.equal(found, MLSTM.call(mi.multiplicative_rnn, *cast))
