"""Multiplicative RNNs: every argument broken in turn, and the message."""

import re

import pytest
import torch

import mi_kernels as mi
from mi_kernels.testing.recurrent_samples import DENSE_RNN, MI_GRU, MI_LSTM, MLSTM, NAMES

ONE = torch.ones(1)
BROKEN = [
    (MLSTM, {"x": ONE}, ValueError, "x: expected shape [T, B, X] or [T, X], got [1]"),
    (MLSTM, {"x": "x"}, TypeError, "x: expected a torch.Tensor, got str"),
    (MLSTM, {"weight_ih": None}, TypeError, "weight_ih: expected a tensor for mlstm, got None"),
    (MLSTM, {"weight_ih": torch.ones(5, 7)}, ValueError, "weight_ih: expected a multiple of 4 rows"),
    (
        MLSTM,
        {"weight_hh": torch.ones(52, 13)},
        ValueError,
        "weight_hh: expected shape [N=52, M=11], got [52, 13]",
    ),
    (
        MLSTM,
        {"weight_mh": torch.ones(11, 7)},
        ValueError,
        "weight_mh: expected shape [M=11, P=13], got [11, 7]",
    ),
    (MLSTM, {"weight_mx": None}, TypeError, "weight_mx: expected a tensor for mlstm, got None"),
    (MLSTM, {"alpha": torch.ones(52)}, ValueError, "alpha: expected None for mlstm, got Tensor"),
    (MLSTM, {"weight": torch.ones(13, 13, 7)}, ValueError, "weight: expected None for mlstm, got Tensor"),
    (MLSTM, {"bias": torch.ones(7)}, ValueError, "bias: expected shape [N=52], got [7]"),
    (
        MLSTM,
        {"bias": torch.ones(52, dtype=torch.float64)},
        TypeError,
        "bias: expected torch.float32 (the dtype of x)",
    ),
    (MLSTM, {"h": torch.ones(12, 7)}, ValueError, "h: expected shape [B=12, P=13], got [12, 7]"),
    (MLSTM, {"c": torch.ones(7, 13)}, ValueError, "c: expected shape [B=12, H=13], got [7, 13]"),
    (MI_LSTM, {"weight_hr": torch.ones(5, 7)}, ValueError, "weight_hr: expected shape [P, H=13], got [5, 7]"),
    (
        MI_LSTM,
        {"weight_mx": torch.ones(11, 7)},
        ValueError,
        "weight_mx: expected None for mi_lstm, got Tensor",
    ),
    (MI_GRU, {"alpha": torch.ones(7)}, ValueError, "alpha: expected shape [N=39], got [7]"),
    (MI_GRU, {"weight_hr": torch.ones(5, 13)}, ValueError, "weight_hr: expected None for mi_gru, got Tensor"),
    (DENSE_RNN, {"weight": None}, TypeError, "weight: expected a tensor for second_order, got None"),
    (DENSE_RNN, {"weight": torch.ones(13, 13, 5)}, ValueError, "weight: expected shape [H=13, H=13, X=7]"),
    (
        DENSE_RNN,
        {"weight_mx": torch.ones(3, 7)},
        ValueError,
        "weight: expected None beside weight_mx, got a tensor",
    ),
]
OPTIONS = [
    (
        {"kind": "lstm"},
        ValueError,
        "kind: expected one of mlstm, mrnn, mi_rnn, mi_lstm, mi_gru, second_order, got",
    ),
    ({"activation": "relu"}, ValueError, "activation: expected tanh for mlstm, got 'relu'"),
    (
        {"activation": "silu"},
        ValueError,
        "activation: expected one of tanh, relu, sigmoid, identity, got 'silu'",
    ),
    ({"memory": "none"}, ValueError, "memory: expected one of fast, low, got 'none'"),
    ({"reverse": 1}, TypeError, "reverse: expected a bool, got int"),
    (
        {"state": torch.ones(12, 13)},
        TypeError,
        "state: expected a pair of tensors (h, c) for mlstm, got Tensor",
    ),
    (
        {"state": (torch.ones(12, 13),)},
        TypeError,
        "state: expected a pair of tensors (h, c) for mlstm, got 1 of",
    ),
    ({"lengths": [1, 2]}, ValueError, "lengths: expected shape [B=12], got [2]"),
    ({"lengths": [5] * 12}, ValueError, "lengths: expected numbers from 0 to T = 4, got 5"),
    ({"lengths": [-1] * 12}, ValueError, "lengths: expected numbers from 0 to T = 4, got -1"),
    ({"lengths": [1.0] * 12}, TypeError, "lengths: expected a torch.Tensor or a sequence of ints, got"),
    ({"lengths": torch.ones(12)}, TypeError, "lengths: expected torch.int64, got torch.float32"),
]


@pytest.mark.parametrize(
    ("sample", "changed", "error", "message"), BROKEN, ids=lambda v: v if type(v) is str else ""
)
def test_a_broken_tensor_is_named(sample, changed, error, message):
    tensors = dict(zip(NAMES, sample.arguments(torch.float32), strict=True)) | changed
    with pytest.raises(error, match="^" + re.escape(f"multiplicative_rnn: {message}")):
        sample.call(mi.multiplicative_rnn, *tensors.values())


@pytest.mark.parametrize(("changed", "error", "message"), OPTIONS, ids=lambda v: v if type(v) is str else "")
def test_a_broken_option_is_named(changed, error, message):
    given = dict(zip(NAMES, MLSTM.arguments(torch.float32), strict=True))
    state = given.pop("h"), given.pop("c")
    with pytest.raises(error, match="^" + re.escape(f"multiplicative_rnn: {message}")):
        mi.multiplicative_rnn(**({"kind": "mlstm", "state": state} | given | changed))


def test_lengths_need_a_batch():
    x, _, _, *weights = MI_GRU.arguments(torch.float32)
    given = dict(zip(NAMES[3:], weights, strict=True))
    with pytest.raises(ValueError, match="lengths: expected None for x without a dimension B"):
        mi.multiplicative_rnn("mi_gru", x[:, 0], None, **given, lengths=[3])
