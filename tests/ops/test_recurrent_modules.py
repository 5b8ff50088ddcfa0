"""Sequence modules of multiplicative RNNs: nn.LSTM and nn.RNN where nothing is multiplied, else their cells.

Formulas are in test_recurrent_cells.py, arguments and copies in test_recurrent_construction.py.
"""

import pytest
import torch
from recurrent_modules import LAYERS, LSTMS, SIZES, X, cell_of, draw, drawn, equal, without_products
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import mi_kernels as mi
from mi_kernels.testing.errors import FLOAT64_LIMIT, relative_error

B, H, T = 3, 5, 6
LENGTHS = [4, 6, 2]
VARIANTS = {
    "one layer": {},
    "no bias": {"bias": False},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "both": {"num_layers": 2, "bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
}
PROJECTED = {
    "projected": {"proj_size": 2},
    "all": {"proj_size": 2, "num_layers": 2, "bidirectional": True, "bias": False},
}
TORCHS = {
    "lstm": (nn.LSTM, mi.nn.MultiplicativeIntegrationLSTM, {}),
    "tanh": (nn.RNN, mi.nn.MultiplicativeIntegrationRNN, {"nonlinearity": "tanh"}),
    "relu": (nn.RNN, mi.nn.MultiplicativeIntegrationRNN, {"nonlinearity": "relu"}),
}
PAIRS = [(name, variant) for name in TORCHS for variant in VARIANTS] + [("lstm", one) for one in PROJECTED]


def twins(name, **options):
    """A module of PyTorch, and ours with its state dict, in which nothing is multiplied."""
    theirs, ours, own = TORCHS[name]
    theirs, ours = (one(X, H, **options, **own, dtype=torch.float64) for one in (theirs, ours))
    return theirs, without_products(ours, theirs)


def batches(form):
    """What a module is called with, and whether it has to be ``batch_first``."""
    rows = [draw(length, X) for length in LENGTHS]
    match form:
        case "packed":
            return pack_sequence(sorted(rows, key=len, reverse=True))
        case "packed unsorted":
            return pack_sequence(rows, enforce_sorted=False)
        case "unbatched":
            return draw(T, X)
        case _:
            return draw(B, T, X)


def states(layer, unbatched=False):
    """An initial state: (h, c) of LSTMs, else h."""
    lead = [layer.num_layers * (1 + layer.bidirectional), *([] if unbatched else [B])]
    h = draw(*lead, layer.proj_size or layer.hidden_size)
    lstm = isinstance(layer, nn.LSTM) or type(layer).__name__ in LSTMS
    return (h, draw(*lead, layer.hidden_size)) if lstm else h


def leaves(*values):
    """Each tensor of arguments or results."""
    flat = torch.utils._pytree.tree_leaves(values)
    return [t for t in flat if isinstance(t, torch.Tensor) and t.dtype == torch.float64]


@pytest.mark.parametrize("form", ["time first", "batch first", "unbatched", "packed", "packed unsorted"])
@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_without_products_it_is_that_of_torch(name, variant, form):
    options = (VARIANTS | PROJECTED)[variant]
    theirs, ours = twins(name, batch_first=form == "batch first", **options)
    theirs.eval(), ours.eval()
    given = batches(form)
    if form == "time first":
        given = given.transpose(0, 1)
    equal(ours(given), theirs(given))
    hx = states(theirs, form == "unbatched")
    found, expected = ours(given, hx), theirs(given, hx)
    equal(found, expected)
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        assert one.shape == other.shape
    if isinstance(expected[0], PackedSequence):
        for one, other in zip(found[0], expected[0], strict=True):
            assert (one is None) == (other is None) and (one is None or one.shape == other.shape)


@pytest.mark.parametrize("form", ["batch first", "packed unsorted"])
@pytest.mark.parametrize("name", TORCHS)
def test_gradients_are_those_of_torch(name, form):
    """Of input, states and parameters, from output and states."""
    theirs, ours = twins(name, num_layers=2, bidirectional=True, batch_first=form == "batch first")
    given, hx = batches(form), states(theirs)
    data = given.data if isinstance(given, PackedSequence) else given
    arguments = [data.requires_grad_(), *(t.requires_grad_() for t in leaves(hx))]
    shared = [key for key, _ in theirs.named_parameters()]
    found = []
    for layer in (theirs, ours):
        results = leaves(layer(given, hx))
        torch.manual_seed(1)
        weights = [getattr(layer, key) for key in shared]
        found.append(torch.autograd.grad(results, [*arguments, *weights], [draw(*t.shape) for t in results]))
    equal(found[1], found[0])


@pytest.mark.parametrize("name", TORCHS)
def test_dropout_is_between_layers_while_training(name):
    """From the same seed the same elements are dropped as in PyTorch."""
    theirs, ours = twins(name, num_layers=3, dropout=0.5, bidirectional=True)
    x = draw(T, B, X)
    found = []
    for layer in (theirs, ours):
        torch.manual_seed(1)
        found.append(layer(x))
    equal(found[1], found[0])
    assert not torch.equal(found[1][0], ours.eval()(x)[0])


def test_all_is_dropped_with_certainty():
    layer = drawn(mi.nn.MultiplicativeLSTM(X, H, 2, dropout=1.0))
    only = drawn(mi.nn.MultiplicativeLSTM(H, H))
    only.load_state_dict({k.replace("_l1", "_l0"): t for k, t in layer.state_dict().items() if "_l1" in k})
    equal(layer(draw(T, B, X))[0], only(torch.zeros(T, B, H, dtype=torch.float64))[0])


def looped(layer, x, hx):
    """The layers of x [T, X] as loops over cells: output and states."""
    lstm, finals = type(layer).__name__ in LSTMS, []
    for index in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            number = len(finals)
            state = (hx[0][number], hx[1][number]) if lstm else hx[number]
            cell, found = cell_of(layer, f"_l{index}{suffix}"), {}
            for t in reversed(range(len(x))) if suffix else range(len(x)):
                state = cell(x[t], state)
                found[t] = state[0] if lstm else state
            finals.append(state)
            steps = [found[t] for t in range(len(x))]
            outputs.append(torch.stack(steps) if steps else x.new_empty(0, layer.hidden_size))
        x = torch.cat(outputs, -1)
    if not lstm:
        return x, torch.stack(finals)
    return x, tuple(torch.stack(each) for each in zip(*finals, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_each_row_is_a_loop_of_cells_over_its_steps(name):
    """Padded with lengths, packed, and each row by itself; with layers and directions."""
    layer = drawn(LAYERS[name](num_layers=2, bidirectional=True))
    lengths = [4, 6, 0]
    x, hx = draw(T, B, X), states(layer)
    output, state = layer(x, hx, lengths)
    for b, length in enumerate(lengths):
        own = tuple(t[:, b] for t in hx) if isinstance(hx, tuple) else hx[:, b]
        expected, last = looped(layer, x[:length, b], own)
        equal(output[:length, b], expected)
        assert not output[length:, b].any()
        equal(tuple(t[:, b] for t in leaves(state)), tuple(leaves(last)))
        if length > 0:
            equal(layer(x[:length, b], own), (expected, last))
    equal(layer(x, hx, torch.tensor(lengths)), (output, state))
    first = drawn(LAYERS[name](num_layers=2, bidirectional=True, batch_first=True))
    first.load_state_dict(layer.state_dict())
    equal(first(x.transpose(0, 1), hx, lengths), (output.transpose(0, 1), state))


@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_is_padded_with_lengths(name, enforce_sorted):
    layer = drawn(LAYERS[name](num_layers=2, bidirectional=True))
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    x, hx = draw(T, B, X).requires_grad_(), states(layer)
    inputs = [x, *(t.requires_grad_() for t in leaves(hx))]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    output, state = layer(packed, hx)
    assert isinstance(output, PackedSequence) and torch.equal(output.batch_sizes, packed.batch_sizes)
    padded, found = pad_packed_sequence(output)
    assert found.tolist() == lengths
    expected = layer(x, hx, lengths)
    equal((padded, state), expected)
    grads = [draw(*t.shape) for t in leaves(*expected)]
    equal(
        torch.autograd.grad(leaves(padded, state), inputs, grads),
        torch.autograd.grad(leaves(*expected), inputs, grads),
    )


@pytest.mark.parametrize("name", LAYERS)
def test_what_stands_in_the_padding_has_no_part(name):
    layer = drawn(LAYERS[name](num_layers=2, bidirectional=True))
    x, hx = draw(T, B, X), states(layer)
    found = []
    for padding in (0.0, float("nan")):
        given = x.clone()
        for b, length in enumerate(LENGTHS):
            given[length:, b] = padding
        given.requires_grad_()
        results = leaves(layer(given, hx, LENGTHS))
        gradients = torch.autograd.grad(
            results, [given, *layer.parameters()], [torch.ones_like(t) for t in results]
        )
        found.append((*results, *gradients))
        for b, length in enumerate(LENGTHS):
            assert not gradients[0][length:, b].any()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and other.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_little_memory_gives_the_same(name):
    """But for rounding: its products are of fewer rows."""
    x, found = draw(T, B, X).requires_grad_(), []
    for memory in ("fast", "low"):
        layer = drawn(LAYERS[name](num_layers=2, bidirectional=True, memory=memory))
        torch.manual_seed(1)
        hx = states(layer)
        inputs = [x, *(t.requires_grad_() for t in leaves(hx))]
        results = leaves(layer(x, hx, LENGTHS))
        weights = [draw(*t.shape) for t in results]
        found.append((*results, *torch.autograd.grad(results, [*inputs, *layer.parameters()], weights)))
    for one, other in zip(*found, strict=True):
        assert relative_error(other, one) <= FLOAT64_LIMIT


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("name", SIZES)
def test_every_layer_keeps_what_it_is_told_to(name, memory):
    """Of all steps, with little memory: no more than the input and the output of each layer."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    layer, steps = drawn(SIZES[name](num_layers=2, memory=memory)), 49
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(draw(steps, B, X))
    kept = {t.data_ptr(): t.numel() for t in saved if t.dim() == 3 and len(t) == steps}
    assert (len(kept) > 2) == (memory == "fast")


@pytest.mark.parametrize("name", SIZES)
def test_gradcheck_of_a_small_module(name):
    """In input, states and parameters, of output and states."""
    layer = SIZES[name](2, 2).double()
    keys = [key for key, _ in drawn(layer).named_parameters()]
    hx = states(layer, unbatched=True)
    lstm = isinstance(hx, tuple)

    def function(x, *others):
        count = 2 if lstm else 1
        hx = others[:count] if lstm else others[0]
        given = dict(zip(keys, others[count:], strict=True))
        return tuple(leaves(torch.func.functional_call(layer, given, (x, hx))))

    tensors = [draw(3, 2), *leaves(hx), *(p.detach() for p in layer.parameters())]
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in tensors])


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_of_a_functional_call_are_those_that_are_used(name):
    layer, other = drawn(LAYERS[name](num_layers=2)), drawn(LAYERS[name](num_layers=2), seed=3)
    x = draw(T, B, X)
    equal(torch.func.functional_call(layer, dict(other.named_parameters()), (x,)), other(x))


@pytest.mark.parametrize("name", LAYERS)
def test_compiled(name, fresh_compiler):
    layer = drawn(LAYERS[name](num_layers=2, bidirectional=True))
    x, hx = draw(T, B, X), states(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = layer(x, hx)
    found = compiled(x, hx)
    equal(found, expected)
    weights = list(layer.parameters())
    both = [torch.autograd.grad(sum(t.sin().sum() for t in leaves(r)), weights) for r in (found, expected)]
    equal(*both)
