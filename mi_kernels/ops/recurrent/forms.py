"""The kinds of multiplicative RNNs: how a step depends on the state, and what cell it feeds."""

from typing import NamedTuple

from torch import Tensor

FACTORED, INTEGRATED, DENSE = "factored", "integrated", "dense"
PLAIN, LSTM, GRU = "plain", "lstm", "gru"
# Activations of plain cells: those whose derivative follows from their value.
ACTIVATIONS = ("tanh", "relu", "sigmoid", "identity")
GATES = {PLAIN: 1, LSTM: 4, GRU: 3}


class Form(NamedTuple):
    """``structure``: how x and h meet; ``cell``: what the gates do."""

    structure: str
    cell: str

    @property
    def gates(self) -> int:
        return GATES[self.cell]


KINDS = {
    "mlstm": Form(FACTORED, LSTM),
    "mrnn": Form(FACTORED, PLAIN),
    "mi_rnn": Form(INTEGRATED, PLAIN),
    "mi_lstm": Form(INTEGRATED, LSTM),
    "mi_gru": Form(INTEGRATED, GRU),
    "second_order": Form(DENSE, PLAIN),  # with factors of W instead of W: factored
}


def form_of(kind: str, weight_hm: Tensor | None) -> Form:
    form = KINDS[kind]
    return Form(FACTORED, form.cell) if form.structure == DENSE and weight_hm is not None else form
