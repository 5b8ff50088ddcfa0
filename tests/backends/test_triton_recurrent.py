"""The family recurrent in Triton: values, gradients and tangents in the interpreter, in a process of its own.

TRITON_INTERPRET is read when the kernels are made, so the tests below `INTERPRETED` run in a second pytest on
this file. The judge is the portable implementation: in float64 to 1e-12, in other dtypes by its own error
(not in bfloat16, which the interpreter cannot). Both forms of the kernels are tested at sizes for which a
call would take one of them.
"""

from dataclasses import replace

import pytest
import torch
from helpers import assert_passes_interpreted
from recurrent_cases import (
    INPUTS,
    STATES,
    WEIGHTS,
    Case,
    backward,
    check,
    forward,
    given,
    results,
    saved_of,
    tangents,
)

from mi_kernels import backends
from mi_kernels.ops.library import DEFINED
from mi_kernels.ops.recurrent import portable, schema
from mi_kernels.ops.recurrent.forms import ACTIVATIONS, FACTORED, KINDS, LSTM
from mi_kernels.testing.errors import FLOAT64_LIMIT, relative_error

pytest.importorskip("triton")
from mi_kernels.ops.triton import recurrent, recurrent_tiling
from mi_kernels.ops.triton.launch import recording

INTERPRETED = pytest.mark.skipif(not backends.interpreting(), reason="part of test_in_the_interpreter")
FORMS = ("whole", "steps")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Every call in one form."""
    if request.param == "steps":
        monkeypatch.setattr(recurrent_tiling, "whole", lambda *arguments: None)
    else:
        for name in ("HELD_BYTES", "HELD_BYTES_WITHOUT_TENSOR_CORES", "HELD_GATES", "HELD_PRODUCTS"):
            monkeypatch.setattr(recurrent_tiling, name, 1 << 24)
    return request.param


@pytest.mark.subprocess
@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter")
def test_in_the_interpreter():
    assert_passes_interpreted(__file__)


SOME = tuple(Case(kind, T=2, B=2) for kind in ("mlstm", "mi_gru", "second_order"))
CASES = (
    *SOME,
    *(Case(kind, T=3, H=5, lengths=(2, 0, 3)) for kind in KINDS),
    *(Case(kind, T=2, H=5, lengths=(1, 0, 2), reverse=True) for kind in KINDS),
    *(Case(kind, T=1, B=17, H=1, factors=1) for kind in ("mlstm", "mi_gru", "second_order")),
    *(Case(kind, T=7, B=1, H=33, factors=3, reverse=True) for kind in ("mrnn", "mi_rnn")),
    *(Case(kind, T=2, B=2, state=7, hh=kind == "mlstm") for kind in ("mlstm", "mi_lstm")),
    *(Case(kind, T=2, state=20, H=9, lengths=(2, 0, 1), reverse=True) for kind in ("mlstm", "mi_lstm")),
    Case("second_order", T=2, low=True, hh=True, reverse=True),
    Case("second_order", H=5, factors=33, B=3, T=2, hh=True),
    Case("mrnn", T=2, B=70, H=3, factors=40, hh=True),
)


@INTERPRETED
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_float64(case, form):
    check(recurrent, case, torch.float64)


@INTERPRETED
@pytest.mark.parametrize("case", SOME, ids=str)
def test_shapes(case, form):
    ours, theirs = (results(module, case, torch.float16) for module in (recurrent, portable))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*SOME, Case("mi_lstm", state=7)], ids=str)
def test_errors(case, dtype, form):
    check(recurrent, replace(case, T=2, B=16), dtype)


@INTERPRETED
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, form):
    check(recurrent, Case("mrnn", T=2, B=1, H=3, activation=activation), torch.float64)


@INTERPRETED
@pytest.mark.parametrize("case", [replace(case, B=3, lengths=(1, 0, 2)) for case in SOME], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_of_padding_reaches_nothing(case, reverse, form):
    case = replace(case, reverse=reverse, H=5)
    padding = (torch.arange(case.T)[:, None] >= torch.tensor(case.lengths))[..., None]
    clean = results(recurrent, case, torch.float32)
    operands = case.operands(torch.float32)
    saved = saved_of(case, operands)

    def spoilt(name):
        def call(*arguments):
            fit = (
                isinstance(t, torch.Tensor) and t.shape[:2] == padding.shape[:2] and t.dim() == 3
                for t in arguments
            )
            arguments = [
                t.masked_fill(padding, float("nan")) if f else t for f, t in zip(fit, arguments, strict=True)
            ]
            return getattr(recurrent, name)(*arguments)

        return staticmethod(call)

    names = ("recurrent", "recurrent_grads", "recurrent_tangents")
    module = type("Spoilt", (), {name: spoilt(name) for name in names})
    found = (
        *forward(module, case, operands),
        *backward(module, case, operands, saved),
        *tangents(module, case, operands, saved),
    )
    for one, other in zip(clean, found, strict=True):
        assert torch.equal(one, other)


@INTERPRETED
@pytest.mark.parametrize("case", SOME, ids=str)
def test_nan_stays_in_its_row(case, form):
    operands = case.operands(torch.float32)
    clean = forward(recurrent, case, operands)
    for name in ("gates_x", "factors_x"):
        if operands[name] is not None:
            operands[name][1, 0, 0] = float("inf")
            operands[name][1, 0, 1] = float("nan")
    for ours, one in zip(forward(recurrent, case, operands), clean, strict=True):
        rows = 1 if ours.dim() == 3 else 0
        if ours.numel():
            assert torch.equal(ours.select(rows, 1), one.select(rows, 1))


def apart(tensor):
    """The same numbers, in every other element of memory along the last dimension, and in reverse order of
    dimensions."""
    if tensor is None:
        return None
    order = list(reversed(range(tensor.dim())))
    made = tensor.new_full([2 * tensor.shape[-1], *(tensor.shape[d] for d in order[1:])], float("nan"))[::2]
    return made.permute(order).copy_(tensor)


@INTERPRETED
@pytest.mark.parametrize("case", [*SOME, Case("mi_lstm", T=2, state=7, lengths=(2, 1, 0))], ids=str)
def test_strides(case, form):
    operands = case.operands(torch.float32)
    saved = saved_of(case, operands)
    views = [{name: apart(t) for name, t in one.items()} for one in (operands, saved)]
    for call, *more in ((forward,), (backward, saved), (tangents, saved)):
        first = call(recurrent, case, operands, *more)
        again = call(recurrent, case, views[0], *([views[1]] if more else []))
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)


@INTERPRETED
@pytest.mark.parametrize("case", SOME, ids=str)
def test_gradients_that_are_absent_or_expanded(case, form):
    operands = case.operands(torch.float64)
    saved = saved_of(case, operands)
    rest = given(operands | saved, *INPUTS, *saved, *WEIGHTS)
    ones = torch.ones((), dtype=torch.float64).expand_as(saved["out"])
    for grads in ((ones, None, None), (None, operands["h0"], None), (None, None, operands["c0"])):
        found = (module.recurrent_grads(*grads, *rest, *case.rule) for module in (recurrent, portable))
        for ours, theirs in zip(*found, strict=True):
            assert relative_error(ours, theirs) <= FLOAT64_LIMIT


@INTERPRETED
@pytest.mark.parametrize("kind", ["mlstm", "mi_gru", "second_order"])
def test_tangents_of_the_states_alone(kind, form):
    case = Case(kind, T=2, B=2, H=3)
    operands = case.operands(torch.float64)
    saved = saved_of(case, operands)
    zeros, rest = torch.zeros_like(operands["gates_x"]), given(operands | saved, *INPUTS, *saved, *WEIGHTS)
    given_t = zeros, None, None, None, operands["h0"], operands["c0"]
    found = (module.recurrent_tangents(*given_t, *rest, *case.rule) for module in (recurrent, portable))
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) <= FLOAT64_LIMIT


NOTHING = [{"T": 0}, {"B": 0}, {"H": 0}, {"factors": 0}]


@INTERPRETED
@pytest.mark.parametrize(
    "case", [replace(case, **({"H": 3} | sizes)) for case in SOME[::2] for sizes in NOTHING], ids=str
)
def test_nothing(case, form):
    for ours, theirs in zip(*(results(m, case, torch.float64) for m in (recurrent, portable)), strict=True):
        assert ours.shape == theirs.shape and relative_error(ours, theirs) <= FLOAT64_LIMIT


@INTERPRETED
@pytest.mark.parametrize("case", [Case("mi_rnn", B=70, T=2, H=3), Case("mi_gru", T=2)], ids=str)
def test_the_same_bits_twice(case, form):
    first, again = (results(recurrent, case, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@INTERPRETED
def test_rows_far_apart(form):
    """The second step begins beyond 2^31 elements; untouched memory costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    case = Case("mlstm", T=2, B=2, H=4)
    operands = case.operands(torch.float16)
    stride = (1 << 31) + 16
    far = torch.empty(stride + 32, dtype=torch.float16).as_strided((2, 2, 16), (stride, 16, 1))
    views = operands | {"gates_x": far.copy_(operands["gates_x"])}
    found = (forward(recurrent, case, one) for one in (operands, views))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@INTERPRETED
def test_the_registered_operations_call_these_kernels():
    case, ops = Case("mlstm", T=1), torch.ops.mi_kernels
    names = tuple(name for name in DEFINED if DEFINED[name].module == "recurrent")
    assert len(names) == 3 and schema
    module = type("Registered", (), {name: getattr(ops, f"{name}_triton") for name in names})
    found = (results(module, case, torch.float32) for module in (recurrent, module))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def launched(case, dtype=torch.bfloat16):
    """The kernels of each pass on meta tensors, which have no data to wait for: a call can be captured in a
    CUDA graph."""
    operands = {name: None if t is None else t.to("meta") for name, t in case.operands(dtype).items()}
    lengths, *rule = case.rule
    rule = None if lengths is None else lengths.to("meta"), *rule
    found = []
    with recording((9, 0)) as launches:
        inputs, weights = given(operands, *INPUTS), given(operands, *WEIGHTS)
        out, h, c, *kept = recurrent.recurrent(*inputs, *weights, *rule, True)
        found.append(len(launches))
        kept = case.only(kept)
        c = None if case.form.cell != LSTM else c
        recurrent.recurrent_grads(out, h, c, *inputs, out, *kept, *weights, *rule)
        found.append(len(launches) - sum(found))
        factors_t = operands["factors_x"] if case.form.structure == FACTORED else None
        given_t = operands["gates_x"], factors_t, None, None, *given(operands, *STATES)
        recurrent.recurrent_tangents(*given_t, *inputs, out, *kept, *weights, *rule)
        found.append(len(launches) - sum(found))
    return found, {launch.arguments.get("ROLE", "whole") for launch in launches}


@pytest.mark.parametrize("lengths", [None, (5, 0, 3)])
def test_launches(lengths):
    """One where the weights fit; else one a step, two of factors and of a GRU, one more with weight_hr; and
    one for the gradient of the first state."""
    for kind in KINDS:
        small = Case(kind, T=5, H=16, factors=16, lengths=lengths)
        assert launched(small) == ([1, 1, 1], {"whole"})
    counts = {"mlstm": 2, "mrnn": 2, "mi_rnn": 1, "mi_lstm": 1, "mi_gru": 2, "second_order": 1}
    for kind, each in counts.items():
        large = Case(kind, T=5, H=256, factors=256, lengths=lengths)
        found, roles = launched(large)
        assert found == [5 * each, 5 * each + 1, 5 * each] and "whole" not in roles
    for kind in ("mlstm", "mi_lstm"):
        each = counts[kind] + 1
        found, roles = launched(Case(kind, T=5, H=256, factors=256, state=64, lengths=lengths))
        assert found == [5 * each, 5 * each + 1, 5 * each] and "project" in roles


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_a_program_holds_fits(dtype):
    for units in (1, 16, 17, 32, 64, 100, 1024):
        for gates in (1, 3, 4):
            for dense in (False, True):
                sizes = recurrent_tiling.Sizes(3, 5, units, units, units, gates)
                cores = dtype == torch.bfloat16
                blocks = recurrent_tiling.whole(sizes, dtype, dense, not dense, dense, False, cores)
                if blocks is None:
                    assert units > 16 or dense or dtype == torch.float64
                    continue
                assert min(blocks.BU, blocks.BP, blocks.BK) >= units
                held = blocks.BU * blocks.BK * (blocks.BP if dense else 1) * dtype.itemsize
                assert held <= recurrent_tiling.HELD_BYTES
