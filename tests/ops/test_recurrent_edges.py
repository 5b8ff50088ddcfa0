"""Multiplicative RNNs where something is absent, empty, NaN, changed in place, or called by many threads."""

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

import mi_kernels as mi
from mi_kernels.ops.recurrent.forms import KINDS, LSTM
from mi_kernels.testing.checks import check_gradients, check_values
from mi_kernels.testing.recurrent_samples import DENSE_RNN, MI_GRU, MI_LSTM, MLSTM, every_kind

LAYERS = {
    "mlstm": mi.nn.MultiplicativeLSTM,
    "mi_gru": mi.nn.MultiplicativeIntegrationGRU,
    "second_order": mi.nn.SecondOrderRNN,
}
EMPTY = {
    "no-factors": replace(MLSTM, factors=0),
    "rank-0": replace(DENSE_RNN, low_rank=True, factors=0),
    "no-input-dense": replace(DENSE_RNN, width=0),
    "no-input": replace(MI_LSTM, width=0),
    "one-unit": replace(MI_GRU, units=1),
}


@pytest.mark.parametrize("sample", EMPTY.values(), ids=EMPTY)
def test_sizes_of_zero_and_one(sample, place):
    """With NaN in new memory: what no product fills has to be filled all the same."""
    check_values(sample, torch.float64, place.device)
    check_gradients(sample, torch.float64, place.device)


@pytest.mark.parametrize("kind", ["mlstm", "mi_lstm"])
def test_a_projection_without_features_leaves_the_cell(kind, place):
    sample = replace(MLSTM if kind == "mlstm" else MI_LSTM, projected=0)
    tensors = [t if t is None else t.detach() for t in sample.arguments(torch.float64, place.device)]
    along = [t if t is None else torch.randn_like(t) for t in tensors]
    present = [t for t in tensors if t is not None]

    def cell(backend, *given):
        left = iter(given)
        with mi.backend(backend):
            results = sample.results(
                mi.multiplicative_rnn, *(None if t is None else next(left) for t in tensors)
            )
        return results[2]

    found, expected = (
        (
            torch.func.grad(lambda *g, b=backend: cell(b, *g).sin().sum(), tuple(range(len(present))))(
                *present
            ),
            torch.func.jvp(partial(cell, backend), tuple(present), tuple(t for t in along if t is not None)),
        )
        for backend in (place.backend, "portable")
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found[0][2].abs().sum() > 0


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sample", list(every_kind()), ids=str)
def test_the_state_of_a_row_without_steps_is_in_no_gradient_of_weights(sample, reverse, place):
    sample = replace(sample, rows=3, lengths=(4, 0, 2), reverse=reverse)
    tensors = sample.arguments(torch.float32, place.device, requires_grad=True)
    for state in tensors[1:3]:
        if state is not None:
            with torch.no_grad():
                state[1] = float("nan")
    output, *_ = sample.results(mi.multiplicative_rnn, *tensors)
    output.sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors[3:] if t is not None)


@pytest.mark.parametrize("sample", [MLSTM, MI_LSTM, MI_GRU], ids=str)
def test_jacobians_by_one_weight(sample, place):
    """A weight alone: the coefficients have no gradients then."""
    sample = replace(sample, steps=3, rows=2, units=3, factors=2)
    tensors = [t if t is None else t.detach() for t in sample.arguments(torch.float64, place.device)]
    for index in (3, 4):

        def of_one(weight, index=index):
            given = list(tensors)
            given[index] = weight
            return sample.results(mi.multiplicative_rnn, *given)[0]

        reverse, forward = (d(of_one)(tensors[index]) for d in (torch.func.jacrev, torch.func.jacfwd))
        torch.testing.assert_close(reverse, forward, rtol=1e-12, atol=1e-12)
        assert forward.abs().sum() > 0


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_parameter_changed_before_the_backward_pass_is_noticed(kind, memory):
    layer = LAYERS[kind](5, 7, memory=memory)
    output, _ = layer(torch.randn(20, 3, 5))
    with torch.no_grad():
        next(layer.parameters()).add_(1)
        (layer.weight_l0 if kind == "second_order" else layer.weight_hh_l0).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_low_memory_under_forward_mode():
    layer, x = mi.nn.MultiplicativeLSTM(5, 7, memory="low"), torch.randn(9, 3, 5)
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, tangent))[0]
        found = torch.autograd.forward_ad.unpack_dual(dual).tangent
    layer.memory = "fast"
    expected = torch.func.jvp(lambda x: layer(x)[0], (x,), (tangent,))[1]
    torch.testing.assert_close(found, expected)


def test_the_reset_gate_of_a_gru_does_not_depend_on_threads():
    """PyTorch's sigmoid does: where a thread's part ends within a vector."""
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            layer = mi.nn.MultiplicativeIntegrationGRU(33, 300)
            layer(torch.randn(20, 9, 33))[0].sin().sum().backward()
            found.append([p.grad for p in layer.parameters()])
    finally:
        torch.set_num_threads(before)
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key("mi_kernels::recurrent", "CPU")
    if not compiled:
        pytest.skip("the order of PyTorch's sums depends on its threads")
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_calls_of_several_python_threads():
    """More threads of Python than cores, each call with threads of its own that meet after each product."""
    sample = replace(MI_LSTM, steps=12, rows=40, units=150)
    tensors = sample.arguments(torch.float32)
    expected = sample.call(mi.multiplicative_rnn, *tensors)
    found, before = {}, torch.get_num_threads()

    def work(index):
        torch.set_num_threads(3)
        for _ in range(3):
            found[index] = sample.call(mi.multiplicative_rnn, *tensors)

    try:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key("mi_kernels::recurrent", "CPU")
    assert len(found) == 4
    for value in found.values():
        torch.testing.assert_close(value, expected, **({"rtol": 0, "atol": 0} if compiled else {}))


@pytest.mark.parametrize("sample", list(every_kind()), ids=str)
def test_a_result_is_no_argument(sample, place):
    """Without steps the state is a copy of the given one."""
    sample = replace(sample, steps=0)
    tensors = [t if t is None else t.detach() for t in sample.arguments(torch.float32, place.device)]
    _, *states = sample.results(mi.multiplicative_rnn, *tensors)
    for state, given in zip(states, tensors[1:3], strict=False):
        assert torch.equal(state, given) and state.data_ptr() != given.data_ptr()
    assert len(states) == 1 + (KINDS[sample.kind].cell == LSTM)
