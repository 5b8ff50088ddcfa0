"""The CUDA kernels of the family norm on the emulator (tests/emulated): all sizes, terms and splits."""

from dataclasses import replace

import pytest
import torch
from emulated import backend
from norm_cases import (
    CASES,
    LARGE,
    LONG,
    MAPS,
    PER_TOKEN,
    TOKENS,
    Case,
    backward,
    check,
    draws,
    forward,
    results,
    statistics_of,
)

from mi_kernels.ops import activations
from mi_kernels.ops.norm import portable
from mi_kernels.testing.errors import FLOAT64_LIMIT, relative_error

pytestmark = pytest.mark.skipif(backend.COMPILER is None, reason="no C++ compiler")
ROUNDED = ("rms", "one-channel", "wide", "groups-of-rows", "maps-last-shared", "large-maps-last", "many-rows")


@pytest.fixture(scope="module")
def emulated():
    operations = backend.load()
    before = operations.emulated_processors(4)
    yield operations
    operations.emulated_processors(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_float64(case, emulated):
    check(emulated, case, torch.float64)
    operands = case.operands(torch.float64)
    statistics = statistics_of(case, operands)
    for call, *more in ((forward,), (backward, statistics)):
        found = (call(module, case, operands, *more) for module in (emulated, portable))
        for ours, theirs in zip(*found, strict=True):
            assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("case", [TOKENS, MAPS, LARGE], ids=str)
def test_errors(case, mean, dtype, emulated):
    """Also where the mean is much larger than the spread."""
    check(emulated, replace(case, mean=mean), dtype, draws(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [PER_TOKEN, LONG, *(c for c in CASES if c.name in ROUNDED)], ids=str)
def test_errors_of_other_sizes(case, dtype, emulated):
    check(emulated, case, dtype, draws(case))


@pytest.mark.parametrize("processors", [1, 100])
@pytest.mark.parametrize("case", [TOKENS, LARGE, Case("rows", (1500, 8), (1, 8), 1)], ids=str)
def test_every_split_of_the_sums(case, processors, emulated):
    emulated.emulated_processors(processors)
    check(emulated, case, torch.float64)
    emulated.emulated_processors(4)


ALIGNED = (
    Case("rows", (3, 19, 64), (3, 1, 64), 2),
    Case("maps", (3, 8, 8, 8), (3, 8, 1, 1), 1, 2),
    Case("maps-last", (3, 32, 3, 5), (3, 32, 1, 1), 1, 2, order=(0, 2, 3, 1)),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_sixteen_bytes_at_a_time(case, dtype, emulated):
    """The same bits from operands that begin on other addresses, which are read by element."""
    operands = case.operands(dtype)
    statistics = statistics_of(case, operands)

    def moved(tensor):
        if tensor is None:
            return None
        memory = torch.empty(tensor.numel() + 1, dtype=dtype)
        return memory[1:].as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)

    others = {name: moved(t) for name, t in operands.items()}
    for call, *more in ((forward,), (backward, statistics)):
        found = (call(emulated, case, one, *more) for one in (operands, others))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("activation", activations.ELEMENTWISE)
@pytest.mark.parametrize("case", [TOKENS, MAPS], ids=str)
def test_activations(case, activation, emulated):
    check(emulated, replace(case, activation=activation), torch.float64)


@pytest.mark.parametrize("case", [TOKENS, PER_TOKEN, MAPS, LARGE, LONG], ids=str)
def test_only_what_is_asked_for(case, emulated):
    operands = case.operands(torch.float64)
    statistics = statistics_of(case, operands)
    expected = backward(portable, case, operands, statistics)
    for bits in range(128):
        want = [bool(bits >> index & 1) for index in range(7)]
        found = backward(emulated, case, operands, statistics, want)
        for ours, truth, wanted in zip(found, expected, want, strict=True):
            assert ours.numel() == 0 if not wanted else relative_error(ours, truth) <= FLOAT64_LIMIT


@pytest.mark.parametrize("case", [TOKENS, MAPS, LONG], ids=str)
def test_y_is_that_of_the_stored_x_new(case, emulated):
    """To the bit: the gradients are taken at what is stored."""
    operands = case.operands(torch.float16)
    y, x_new, *statistics = forward(emulated, case, operands)
    again, _, *others = forward(emulated, case, operands | {"x": x_new, "h": None, "gate": None})
    for one, other in zip((y, *statistics), (again, *others), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", [TOKENS, MAPS, LONG], ids=str)
def test_views_and_expanded_operands(case, emulated):
    operands = case.operands(torch.float64)
    channels = case.context[case.dim]
    parts = torch.randn(3 * channels, dtype=torch.float64).chunk(3)
    for name, part in zip(("gate", "scale", "shift"), parts, strict=True):
        behind = (1,) * (len(case.x) - case.dim - 1)
        operands[name] = part.view(channels, *behind).expand(case.context)
    operands["grad"] = torch.ones((), dtype=torch.float64).expand(case.x)
    statistics = statistics_of(case, operands)
    for call, *more in ((forward,), (backward, statistics)):
        found = (call(module, case, operands, *more) for module in (emulated, portable))
        for ours, theirs in zip(*found, strict=True):
            assert relative_error(ours, theirs) <= FLOAT64_LIMIT


@pytest.mark.parametrize("case", [TOKENS, LARGE], ids=str)
def test_the_same_bits_twice(case, emulated):
    first, again = (results(emulated, case, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("size", [(0, 3, 5), (3, 0, 5), (3, 4, 0)])
def test_nothing(size, emulated):
    case = Case("", size, (size[0], 1, size[2]), 2)
    operands = case.operands(torch.float32)
    found = forward(emulated, case, operands)
    torch.testing.assert_close(found, forward(portable, case, operands), rtol=0, atol=0, equal_nan=True)
    *_, mean, rstd = found
    assert mean.isnan().all() and rstd.isnan().all()
    found = backward(emulated, case, operands, (mean, rstd))
    assert [t.shape for t in found[:4]] == [size, size, case.context, case.context]
    assert not any(t.any() for t in found)


def test_what_the_library_refuses(emulated):
    """What the kernels would read out of bounds, in direct calls."""
    operands = TOKENS.operands(torch.float32)
    mean, rstd = statistics_of(TOKENS, operands)
    for name, tensor in operands.items():
        if tensor is None:
            continue
        for wrong in (tensor.double(), tensor.unsqueeze(0), tensor[..., :-1]):
            changed = operands | {name: wrong}
            if name not in ("grad", "grad_x"):
                with pytest.raises(RuntimeError, match="expected"):
                    forward(emulated, TOKENS, changed)
            with pytest.raises(RuntimeError, match="expected"):
                backward(emulated, TOKENS, changed, (mean, rstd))
    for statistics in ((mean.double(), rstd), (mean, rstd[:1]), (mean[0], rstd), (None, rstd)):
        with pytest.raises(RuntimeError, match="expected"):
            backward(emulated, TOKENS, operands, statistics)
    tensors = [operands[name] for name in ("x", "h", "gate", "scale", "shift", "weight", "bias")]
    for dim, groups in ((2, 2), (2, 0), (3, 1), (-1, 1)):
        with pytest.raises(RuntimeError, match="expected"):
            emulated.norm_modulate(*tensors, dim, groups, True, 1e-5, "identity", 1.0)
