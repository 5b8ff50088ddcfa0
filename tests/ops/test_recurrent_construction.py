"""Modules of multiplicative RNNs: parameters, initialisation, copies, and what is refused."""

import copy
import math
import pickle
import re

import pytest
import torch
from recurrent_modules import LSTMS, SIZES, H, X, draw, drawn, equal
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import mi_kernels as mi

B, T = 3, 6
CELLS = {
    "mlstm": lambda **kw: mi.nn.MultiplicativeLSTMCell(X, H, **kw),
    "mrnn": lambda **kw: mi.nn.MultiplicativeRNNCell(X, H, num_factors=3, **kw),
    "mi_rnn": lambda **kw: mi.nn.MultiplicativeIntegrationRNNCell(X, H, nonlinearity="relu", **kw),
    "mi_lstm": lambda **kw: mi.nn.MultiplicativeIntegrationLSTMCell(X, H, **kw),
    "mi_gru": lambda **kw: mi.nn.MultiplicativeIntegrationGRUCell(X, H, **kw),
    "second_order": lambda **kw: mi.nn.SecondOrderRNNCell(X, H, **kw),
    "second_order-rank": lambda **kw: mi.nn.SecondOrderRNNCell(X, H, rank=2, **kw),
}
ALL = SIZES | {f"{name} cell": make for name, make in CELLS.items()}
VECTORS = ["alpha", "beta_h", "beta_x"]
FIRST = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
NAMES = {
    "mlstm": {"weight_mx": (H, X), "weight_mh": (H, H)},
    "mlstm-projected": {"weight_hr": (1, H), "weight_mx": (3, X), "weight_mh": (3, 1)},
    "mrnn": {"weight_mx": (7, X), "weight_mh": (7, H)},
    "mi_rnn": dict.fromkeys(VECTORS, (H,)),
    "mi_lstm": dict.fromkeys(VECTORS, (4 * H,)),
    "mi_gru": dict.fromkeys(VECTORS, (3 * H,)),
    "second_order": {"weight": (H, H, X)},
    "second_order-rank": {"weight_mx": (2, X), "weight_mh": (2, H), "weight_hm": (H, 2)},
}
GATES = {"mlstm": 4, "mi_lstm": 4, "mi_gru": 3}


def called(layer, seed=0):
    """The results for a fixed input."""
    generator = torch.Generator().manual_seed(seed)
    lead = (B,) if type(layer).__name__.endswith("Cell") else (T, B)
    return layer(torch.randn(*lead, X, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_dict_is_named_as_that_of_nn_lstm(name):
    layer = SIZES[name](num_layers=2, bidirectional=True)
    first = FIRST if layer.bias else FIRST[:2]
    suffixes = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    names = [*first, *NAMES[name]]
    assert list(layer.state_dict()) == [f"{one}{suffix}" for suffix in suffixes for one in names]
    rows, features = GATES.get(name.partition("-")[0], 1) * H, layer.proj_size or H
    factors = layer.num_factors if "mlstm" in name or name == "mrnn" else features
    assert layer.weight_ih_l0.shape == (rows, X) and layer.weight_ih_l1.shape == (rows, 2 * features)
    assert layer.weight_hh_l1.shape == (rows, factors)
    for one, shape in NAMES[name].items():
        assert getattr(layer, f"{one}_l0").shape == shape
        wide = [2 * features if size == X else size for size in shape]
        assert list(getattr(layer, f"{one}_l1_reverse").shape) == wide
    if layer.bias:
        assert layer.bias_ih_l0.shape == layer.bias_hh_l1_reverse.shape == (rows,)
    found = [[id(one) for one in weights] for weights in layer.all_weights]
    assert found == [[id(getattr(layer, f"{one}{suffix}")) for one in names] for suffix in suffixes]
    assert layer.flatten_parameters() is None


@pytest.mark.parametrize("name", CELLS)
def test_the_state_dict_of_a_cell_has_no_layers(name):
    cell = CELLS[name]()
    extra = NAMES[name] | ({"weight_mx": (3, X), "weight_mh": (3, H)} if name == "mrnn" else {})
    assert list(cell.state_dict()) == [*FIRST, *extra]
    assert {one: getattr(cell, one).shape for one in extra} == extra
    assert list(CELLS[name](bias=False).state_dict()) == [*FIRST[:2], *extra]


@pytest.mark.parametrize("name", ALL)
def test_copies_and_factory_arguments(name):
    layer = drawn(ALL[name]())
    expected = called(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        equal(called(other), expected)
    on_meta = ALL[name](device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype == torch.float16 for p in on_meta.parameters())
    filled = on_meta.to_empty(device="cpu").double()
    filled.load_state_dict(layer.state_dict())
    equal(called(filled), expected)


SHOWN = {
    "MultiplicativeLSTM(4, 5)": lambda: mi.nn.MultiplicativeLSTM(4, 5, num_factors=5),
    "MultiplicativeLSTM(4, 5, proj_size=2, num_layers=2, dropout=0.5, memory='low', num_factors=3)": lambda: (
        mi.nn.MultiplicativeLSTM(4, 5, 2, dropout=0.5, proj_size=2, num_factors=3, memory="low")
    ),
    "MultiplicativeRNN(4, 5, bias=False, batch_first=True, nonlinearity='relu')": lambda: (
        mi.nn.MultiplicativeRNN(4, 5, bias=False, batch_first=True, nonlinearity="relu")
    ),
    "SecondOrderRNN(4, 5, bidirectional=True, rank=2)": lambda: mi.nn.SecondOrderRNN(
        4, 5, bidirectional=True, rank=2
    ),
    "SecondOrderRNNCell(4, 5, bias=False, nonlinearity='identity', rank=5)": lambda: mi.nn.SecondOrderRNNCell(
        4, 5, bias=False, nonlinearity="identity", rank=5
    ),
    "MultiplicativeIntegrationGRUCell(4, 5)": lambda: mi.nn.MultiplicativeIntegrationGRUCell(4, 5),
}


@pytest.mark.parametrize("shown", SHOWN)
def test_repr_shows_what_is_not_the_default(shown):
    assert repr(SHOWN[shown]()) == shown


TORCHS = {
    "rnn": (nn.RNN, mi.nn.MultiplicativeIntegrationRNN, {"num_layers": 2}),
    "lstm": (nn.LSTM, mi.nn.MultiplicativeIntegrationLSTM, {"proj_size": 2, "bidirectional": True}),
    "gru": (nn.GRU, mi.nn.MultiplicativeIntegrationGRU, {"bias": False, "num_layers": 2}),
    "rnn cell": (nn.RNNCell, mi.nn.MultiplicativeIntegrationRNNCell, {}),
    "lstm cell": (nn.LSTMCell, mi.nn.MultiplicativeIntegrationLSTMCell, {"bias": False}),
    "gru cell": (nn.GRUCell, mi.nn.MultiplicativeIntegrationGRUCell, {}),
}


@pytest.mark.parametrize("name", TORCHS)
def test_of_integration_the_weights_are_drawn_as_those_of_torch(name):
    """Of the same seed, the others are those of the paper; reset draws them anew."""
    theirs, ours, options = TORCHS[name]
    torch.manual_seed(1)
    theirs = theirs(X, H, **options).state_dict()
    ours = ours(X, H, **options)
    for _ in range(2):
        torch.manual_seed(1)
        ours.reset_parameters()
        for key, tensor in ours.state_dict().items():
            if key in theirs:
                assert torch.equal(tensor, theirs[key])
            else:
                assert torch.equal(tensor, torch.full_like(tensor, 1.0 if "alpha" in key else 0.5))
        assert set(theirs) < set(ours.state_dict())
        for parameter in ours.parameters():
            nn.init.zeros_(parameter)


# By module, sizes for which no two of X, H, M, P and R are equal, and the bounds of its weights.
UNITS, INPUTS, FACTORS, PROJECTION, RANK = 96, 40, 64, 24, 32
PLAIN = 1 / math.sqrt(UNITS)
BOUNDS = {
    "mlstm": (
        mi.nn.MultiplicativeLSTM(INPUTS, UNITS, num_factors=FACTORS, proj_size=PROJECTION),
        {
            "weight_mx": math.sqrt(3 / INPUTS),
            "weight_mh": math.sqrt(3 / PROJECTION),
            "weight_hh": 1 / math.sqrt(FACTORS),
            "weight_hr": PLAIN,
        },
    ),
    "mrnn": (
        mi.nn.MultiplicativeRNN(INPUTS, UNITS),
        {"weight_mx": math.sqrt(3 / INPUTS), "weight_mh": math.sqrt(3 / UNITS), "weight_hh": PLAIN},
    ),
    "second_order": (
        mi.nn.SecondOrderRNN(INPUTS, UNITS),
        {"weight": math.sqrt(2 / (UNITS * INPUTS)), "weight_hh": PLAIN},
    ),
    "second_order-rank": (
        mi.nn.SecondOrderRNN(INPUTS, UNITS, rank=RANK),
        {
            "weight_mx": math.sqrt(3 / INPUTS),
            "weight_mh": math.sqrt(3 / UNITS),
            "weight_hm": math.sqrt(2 / RANK),
            "weight_hh": PLAIN,
        },
    ),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_weights_are_uniform_on_their_bounds(name):
    """w / b is uniform on (-1, 1): w^2 / b^2 has the mean 1/3 and the variance 4/45, so that the mean of N
    of them is within 6 sqrt(4 / (45 N)) of 1/3, but for one draw in 10^8."""
    layer, bounds = BOUNDS[name]
    torch.manual_seed(0)
    layer.reset_parameters()
    bounds = dict.fromkeys(("weight_ih", "bias_ih", "bias_hh"), PLAIN) | bounds
    assert {f"{one}_l0" for one in bounds} == set(layer.state_dict())
    for one, bound in bounds.items():
        weight = getattr(layer, f"{one}_l0").detach().double()
        assert weight.abs().max() <= bound * (1 + 1e-6)
        found = (weight / bound).square().mean().item()
        assert abs(found - 1 / 3) <= 6 * math.sqrt(4 / (45 * weight.numel()))


SEEDS, ROWS = 8, 512


GAINS = {
    "mrnn": (
        lambda: mi.nn.MultiplicativeRNNCell(UNITS, ROWS, num_factors=1024, nonlinearity="identity"),
        1 / 3,
    ),
    "second_order": (lambda: mi.nn.SecondOrderRNNCell(8, ROWS, nonlinearity="identity"), 1.0),
    "second_order-rank": (
        lambda: mi.nn.SecondOrderRNNCell(UNITS, ROWS, rank=1024, nonlinearity="identity"),
        1.0,
    ),
}


@pytest.mark.parametrize("name", GAINS)
def test_what_a_step_makes_of_a_change_of_the_state(name):
    """Its mean square, over the parameters and unit-variance inputs, is that of the change, or a third of it.

    For x and dh with |x|^2 = X and |dh|^2 = H the mean is exact. The units y of a layer are equally
    distributed and uncorrelated in their squares but for the mean square s of m, a mean of M products a b of
    independent sums of independent uniform variables: kurtosis at most 3 each, at most 9 of a b. With R units
    and S draws the mean of y^2 / E y^2 then deviates by at most sqrt((2/R + 8/M (1 + 2/R)) / S) (dense W:
    without M), of which six are allowed.
    """
    make, gain = GAINS[name]
    found = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        cell = make().double()
        x, change = draw(cell.input_size).sign(), draw(ROWS).sign()
        h = draw(ROWS)
        found.append((cell(x, h + change) - cell(x, h)).square().mean().item())
    factors = 0 if name == "second_order" else 1024
    variance = 2 / ROWS + (8 / factors * (1 + 2 / ROWS) if factors else 0)
    assert abs(sum(found) / SEEDS / gain - 1) <= 6 * math.sqrt(variance / SEEDS)


def test_of_a_multiplicative_lstm_m_has_the_variance_of_h():
    """As above, with m in the place of the new state: kurtosis at most 9."""
    size, found = 1024, []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        cell = mi.nn.MultiplicativeLSTMCell(UNITS, 8, num_factors=size).double()
        x, h = draw(UNITS).sign(), draw(8).sign()
        m = (cell.weight_mx @ x) * (cell.weight_mh @ h)
        found.append(m.square().mean().item())
    assert abs(sum(found) / SEEDS - 1) <= 6 * math.sqrt(8 / size / SEEDS)


MESSAGES = {
    "no batch": (
        {},
        (torch.ones(X),),
        ValueError,
        "input: expected shape [T, B, X=4] or [T, X=4], got [4]",
    ),
    "features": (
        {"batch_first": True},
        (torch.ones(2, 3, 5),),
        ValueError,
        "input: expected shape [B, T, X=4] or [T, X=4], got [2, 3, 5]",
    ),
    "no tensor": ({}, ([1.0],), TypeError, "input: expected a torch.Tensor, got list"),
    "packed": (
        {},
        (pack_sequence([torch.ones(2, 3)]),),
        ValueError,
        "input: expected shape [N, X=4], got [2, 3]",
    ),
    "lengths of a packed one": (
        {},
        (pack_sequence([torch.ones(2, X)]), None, [2]),
        ValueError,
        "lengths: expected None with a PackedSequence, which has its own, got a list",
    ),
    "lengths without a batch": (
        {},
        (torch.ones(2, X), None, [2]),
        ValueError,
        "lengths: expected None for an input without a batch, got a list",
    ),
}


@pytest.mark.parametrize("wrong", MESSAGES)
@pytest.mark.parametrize("name", SIZES)
def test_wrong_inputs_are_named(name, wrong):
    options, given, error, message = MESSAGES[wrong]
    layer = SIZES[name](**options)
    with pytest.raises(error, match=re.escape(f"{type(layer).__name__}: {message}")):
        layer(*given)


@pytest.mark.parametrize("wrong", [[7, 1, 1], [-1, 1, 1], [1, 1], [1.0, 1, 1], "111", torch.ones(3), 3])
def test_wrong_lengths_are_named(wrong):
    layer = mi.nn.SecondOrderRNN(X, H)
    with pytest.raises((TypeError, ValueError), match="lengths: expected .*, got"):
        layer(torch.ones(T, B, X), None, wrong)


STATES = {
    "layers": ((2, B, "P"), "[L=4, B=3, {}], got [2, 3, {}]"),
    "batch": ((4, 2, "P"), "[L=4, B=3, {}], got [4, 2, {}]"),
    "without one": ((4, "P"), "[L=4, B=3, {}], got [4, {}]"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("wrong", STATES)
@pytest.mark.parametrize("name", SIZES)
def test_wrong_states_are_named(name, wrong, packed):
    layer = SIZES[name](num_layers=2, bidirectional=True)
    op, lstm = type(layer).__name__, type(layer).__name__ in LSTMS
    sizes, message = STATES[wrong]
    x = pack_sequence([torch.ones(T, X)] * B) if packed else torch.ones(T, B, X)
    widths = {"hx[0]": ("P", layer.proj_size) if layer.proj_size else ("H", H), "hx[1]": ("H", H)}
    right = [torch.ones(4, B, width) for _, width in widths.values()]
    for index, (argument, (letter, width)) in enumerate(widths.items()):
        state = torch.ones([width if size == "P" else size for size in sizes])
        argument = argument if lstm else "hx"
        expected = f"{op}: {argument}: expected shape {message.format(f'{letter}={width}', width)}"
        pair = tuple(state if index == one else right[one] for one in range(2))
        with pytest.raises(ValueError, match=re.escape(expected)):
            layer(x, pair if lstm else state)
    with pytest.raises(TypeError, match=f"{op}: hx: expected a (pair|torch.Tensor)"):
        layer(x, right[0] if lstm else tuple(right))


def test_an_unbatched_state_has_no_batch():
    layer = mi.nn.MultiplicativeRNN(X, H)
    with pytest.raises(ValueError, match=re.escape("hx: expected shape [L=1, H=5], got [1, 1, 5]")):
        layer(torch.ones(T, X), torch.ones(1, 1, H))


def test_dropout_of_one_layer_warns():
    with pytest.warns(
        UserWarning, match="dropout: it comes between layers: 0.5 has no effect on num_layers=1"
    ) as seen:
        mi.nn.MultiplicativeLSTM(X, H, dropout=0.5)
    assert seen[0].filename == __file__


@pytest.mark.parametrize("name", ["mlstm", "mi_gru", "second_order"])
@pytest.mark.parametrize("sizes", [(0, H), (X, 0)], ids=["X", "H"])
def test_sizes_of_zero(name, sizes):
    layer = SIZES[name](*sizes, num_layers=2)
    output, _ = layer(torch.ones(T, B, sizes[0]))
    assert output.shape == (T, B, sizes[1]) and output.isfinite().all()
    assert layer(torch.ones(0, B, sizes[0]))[0].shape == (0, B, sizes[1])
