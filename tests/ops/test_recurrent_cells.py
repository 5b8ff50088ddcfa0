"""Cells of multiplicative RNNs: the formulas of the papers, and nn.LSTMCell where nothing is multiplied."""

import pytest
import torch
from recurrent_modules import LAYERS, LSTMS, H, X, cell_of, draw, drawn, equal, without_products
from torch import nn

import mi_kernels as mi

B = 3
ACT = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda p: p}


def lstm(gates, c):
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def bias(cell):
    return 0 if cell.bias_ih is None else cell.bias_ih + cell.bias_hh


def multiplicative_lstm(cell, x, state):
    """Krause et al., 2016, with the gates in the order of nn.LSTM."""
    h, c = state
    m = (x @ cell.weight_mx.T) * (h @ cell.weight_mh.T)
    return lstm(x @ cell.weight_ih.T + m @ cell.weight_hh.T + bias(cell), c)


def multiplicative_rnn(cell, x, h):
    """Sutskever et al., 2011, with factors of their number."""
    f = torch.diag_embed(x @ cell.weight_mx.T) @ cell.weight_mh @ h[..., None]
    return ACT[cell.nonlinearity](x @ cell.weight_ih.T + (cell.weight_hh @ f)[..., 0] + bias(cell))


def integrated(cell, x, h, rows=slice(None)):
    """Wu et al., 2016, of some rows of the parameters."""
    wx, uh = x @ cell.weight_ih[rows].T, h @ cell.weight_hh[rows].T
    terms = cell.alpha[rows] * wx * uh + cell.beta_h[rows] * uh + cell.beta_x[rows] * wx
    return terms + (0 if cell.bias_ih is None else (cell.bias_ih + cell.bias_hh)[rows])


def integration_rnn(cell, x, h):
    return ACT[cell.nonlinearity](integrated(cell, x, h))


def integration_lstm(cell, x, state):
    h, c = state
    return lstm(integrated(cell, x, h), c)


def integration_gru(cell, x, h):
    r, z = integrated(cell, x, h, slice(0, 2 * H)).sigmoid().chunk(2, -1)
    n = integrated(cell, x, r * h, slice(2 * H, 3 * H)).tanh()
    return (1 - z) * n + z * h


def second_order(cell, x, h):
    if cell.rank is None:
        weight = cell.weight
    else:
        weight = torch.einsum("or,ri,rj->oij", cell.weight_hm, cell.weight_mh, cell.weight_mx)
    p = torch.einsum("...i,oij,...j->...o", h, weight, x) + h @ cell.weight_hh.T + x @ cell.weight_ih.T
    return ACT[cell.nonlinearity](p + bias(cell))


FORMULAS = {
    "MultiplicativeLSTMCell": multiplicative_lstm,
    "MultiplicativeRNNCell": multiplicative_rnn,
    "MultiplicativeIntegrationRNNCell": integration_rnn,
    "MultiplicativeIntegrationLSTMCell": integration_lstm,
    "MultiplicativeIntegrationGRUCell": integration_gru,
    "SecondOrderRNNCell": second_order,
}
TORCHS = {
    "lstm": (nn.LSTMCell, mi.nn.MultiplicativeIntegrationLSTMCell, {}),
    "tanh": (nn.RNNCell, mi.nn.MultiplicativeIntegrationRNNCell, {"nonlinearity": "tanh"}),
    "relu": (nn.RNNCell, mi.nn.MultiplicativeIntegrationRNNCell, {"nonlinearity": "relu"}),
}


def made(name):
    layer = drawn(LAYERS[name]())
    return cell_of(layer, "_l0"), type(layer).__name__ in LSTMS


def state_of(lstm, *lead):
    return (draw(*lead, H), draw(*lead, H)) if lstm else draw(*lead, H)


def formula(cell):
    return FORMULAS[type(cell).__name__]


def test_every_cell_is_here():
    assert set(FORMULAS) == {name for name in mi.nn.__all__ if name.endswith("Cell")}
    assert set(FORMULAS) == {type(made(name)[0]).__name__ for name in LAYERS}


@pytest.mark.parametrize("unbatched", [False, True], ids=["", "unbatched"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_the_formula_of_the_paper(name, unbatched, place):
    cell, lstm = made(name)
    cell = cell.to(place.device)
    lead = () if unbatched else (B,)
    x, state = draw(*lead, X).to(place.device), state_of(lstm, *lead)
    state = torch.utils._pytree.tree_map(lambda t: t.to(place.device), state)
    found = cell(x, state)
    equal(found, formula(cell)(cell, x, state))
    zeros = torch.utils._pytree.tree_map(torch.zeros_like, state)
    equal(cell(x), formula(cell)(cell, x, zeros))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_a_plain_loop_of_the_formula(name):
    """Values, and gradients of the input, the state and the parameters."""
    layer, steps = drawn(LAYERS[name]()), 7
    cell, lstm = made(name)
    x, state = draw(steps, B, X).requires_grad_(), state_of(lstm, 1, B)
    inputs = [x, *(t.requires_grad_() for t in (state if lstm else (state,)))]
    output, final = layer(x, state)
    own = (state[0][0], state[1][0]) if lstm else state[0]
    found = []
    for t in range(steps):
        own = formula(cell)(cell, x[t], own)
        found.append(own[0] if lstm else own)
    expected = torch.stack(found)
    equal(output, expected)
    equal(final, tuple(t[None] for t in own) if lstm else own[None])
    grad = draw(*expected.shape)
    keys = [key for key, _ in cell.named_parameters()]
    ours = [*inputs, *(getattr(layer, f"{key}_l0") for key in keys)]
    theirs = [*inputs, *cell.parameters()]
    last = (final[1], own[1]) if lstm else (final, own)
    equal(
        torch.autograd.grad((output * grad).sum() + last[0].sum(), ours),
        torch.autograd.grad((expected * grad).sum() + last[1].sum(), theirs),
    )


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["", "no bias"])
@pytest.mark.parametrize("name", TORCHS)
def test_without_products_it_is_the_cell_of_torch(name, options):
    theirs, ours, own = TORCHS[name]
    theirs, ours = (one(X, H, **options, **own, dtype=torch.float64) for one in (theirs, ours))
    without_products(ours, theirs)
    for lead in ((B,), ()):
        x, state = draw(*lead, X), state_of(name == "lstm", *lead)
        equal(ours(x), theirs(x))
        equal(ours(x, state), theirs(x, state))


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name):
    cell, lstm = made(name)
    keys = [key for key, _ in cell.named_parameters()]
    count = 2 if lstm else 1

    def function(x, *others):
        hx = others[:count] if lstm else others[0]
        return torch.func.functional_call(cell, dict(zip(keys, others[count:], strict=True)), (x, hx))

    state = state_of(lstm, 2)
    tensors = [draw(2, X), *(state if lstm else (state,)), *(p.detach() for p in cell.parameters())]
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in tensors], fast_mode=True)


WRONG = {
    "rank": (
        (torch.ones(2, 3, X),),
        ValueError,
        r"input: expected shape \[B, X=4\] or \[X=4\], got \[2, 3, 4\]",
    ),
    "size": ((torch.ones(2, 5),), ValueError, r"input: expected shape \[B, X=4\] or \[X=4\], got \[2, 5\]"),
    "no tensor": (([1.0],), TypeError, "input: expected a torch.Tensor, got list"),
    "integers": ((torch.ones(2, X).long(),), TypeError, "input: expected a dtype of .*, got torch.int64"),
}
WRONG_STATES = {
    "batch": (torch.ones(3, H), ValueError, r": expected shape \[B=2, H=5\], got \[3, 5\]"),
    "units": (torch.ones(2, X), ValueError, r": expected shape \[B=2, H=5\], got \[2, 4\]"),
    "rank": (torch.ones(H), ValueError, r": expected shape \[B=2, H=5\], got \[5\]"),
    "no tensor": ([1.0], TypeError, ": expected a torch.Tensor, got list"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", LAYERS)
def test_wrong_inputs_are_named(name, wrong):
    cell, _ = made(name)
    given, error, message = WRONG[wrong]
    with pytest.raises(error, match=f"^{type(cell).__name__}: {message}"):
        cell(*given)


@pytest.mark.parametrize("wrong", WRONG_STATES)
@pytest.mark.parametrize("name", LAYERS)
def test_wrong_states_are_named(name, wrong):
    cell, lstm = made(name)
    state, error, message = WRONG_STATES[wrong]
    right, op = torch.ones(2, H), type(cell).__name__
    if not lstm:
        with pytest.raises(error, match=f"^{op}: hx{message}"):
            cell(torch.ones(2, X), state)
        with pytest.raises(TypeError, match=f"^{op}: hx: expected a torch.Tensor, got tuple"):
            cell(torch.ones(2, X), (right, right))
        return
    for index, pair in enumerate([(state, right), (right, state)]):
        with pytest.raises(error, match=rf"^{op}: hx\[{index}\]{message}"):
            cell(torch.ones(2, X), pair)
    with pytest.raises(TypeError, match=rf"^{op}: hx: expected a pair \(h, c\), got Tensor"):
        cell(torch.ones(2, X), torch.ones(2, 2, H))
    with pytest.raises(ValueError, match=rf"^{op}: hx: expected a pair \(h, c\), got 3 elements"):
        cell(torch.ones(2, X), (right, right, right))
