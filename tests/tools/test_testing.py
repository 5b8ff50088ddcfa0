"""The tests' own tools: the error rule finds errors, the counts count."""

import pytest
import torch

from mi_kernels.ops import counts
from mi_kernels.ops.interaction import reference
from mi_kernels.testing import checks, errors
from mi_kernels.testing.errors import REPEATED, check_errors, relative_error
from mi_kernels.testing.lru_cache import LRUCache
from mi_kernels.testing.samples import (
    GATE_TERMS,
    LAYOUTS,
    MIDDLE,
    NAMES,
    THREADED,
    WEIGHT_ONLY,
    GateSample,
    Modulation,
    Sample,
    Shape,
    gates,
    lay_out,
    modulations,
    samples,
)
from mi_kernels.testing.shared_samples import RAGGED, shared_samples

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def oracle(*arguments):
    return [reference.interaction(*arguments)]


def zeros(*arguments):
    return [torch.zeros_like(reference.interaction(*arguments))]


def stale(*arguments):
    return [torch.full_like(reference.interaction(*arguments), torch.nan)]


def without_bias(x, z, w, u, v, c):
    return oracle(x, z, w, u, v)


def without_last_feature(x, z, w, u, v, c):
    return oracle(x, torch.cat([z[..., :-1], torch.zeros_like(z[..., -1:])], -1), w, u, v, c)


def one_bad_element(*arguments):
    y = reference.interaction(*arguments)
    y.view(-1)[7] += 0.05 * y.abs().max()
    return [y]


def noisy(*arguments):
    """Off in the last digits, everywhere."""
    y = reference.interaction(*arguments)
    return [y * (1 + 4 * torch.finfo(y.dtype).eps)] if y.dtype != torch.float64 else [y * (1 + 1e-11)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [zeros, stale, without_bias, without_last_feature, one_bad_element, noisy])
def test_the_error_rule_finds(wrong, dtype):
    def draw(seed):
        return Sample(MIDDLE).arguments(dtype, seed=seed)

    check_errors(oracle, oracle, draw)
    with pytest.raises(AssertionError):
        check_errors(wrong, oracle, draw)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [MIDDLE, Shape("small", (2,), 3, 4, 5)], ids=lambda shape: shape.name)
def test_the_error_rule_allows_twice_the_error_of_the_reference(shape, dtype):
    def off_by(factor):
        def result(*arguments):
            y, exact = (
                reference.interaction(*arguments),
                reference.interaction(*(t.double() for t in arguments)),
            )
            return [exact + factor * (y - exact)]  # in float64: in the dtype it would be rounded once more

        return result

    def draw(seed):
        return Sample(shape).arguments(dtype, seed=seed)

    def compare(factor):
        return check_errors(off_by(factor), oracle, draw)

    # What comes back is the larger of the norm's share of its limit and of an element's.
    assert compare(1.95) == pytest.approx(1.95 / 2)
    assert compare(1.0) == pytest.approx(1 / 2)
    with pytest.raises(AssertionError):
        compare(2.05)


def test_the_error_rule_finds_lost_accumulation():
    """Sums carried in bfloat16 instead of float32."""

    def careless(x, z, w, *_):
        y = 0
        for i in range(z.shape[-1]):
            y = y + z[:, i : i + 1] * (x @ w[:, i].mT)
        return [y]

    sample = Sample(Shape("long", (10,), 500, 4, 20), WEIGHT_ONLY)
    with pytest.raises(AssertionError):
        check_errors(careless, oracle, lambda seed: sample.arguments(torch.bfloat16, seed=seed))


def test_a_named_oracle_is_asked_once_for_the_same_arguments(monkeypatch):
    asked = []

    def counted(*arguments):
        asked.append(arguments)
        return oracle(*arguments)

    def times(function=oracle, name="here", dtype=torch.float32, layout="gaps", seeds=0):
        asked.clear()
        sample = Sample(MIDDLE, layout=layout)
        check_errors(
            function, counted, lambda seed: sample.arguments(dtype, seed=seed + seeds), most=1, oracle=name
        )
        return len(asked)

    assert [times(), times(), times(name="there"), times(name=None), times(), times()] == [3, 0, 3, 3, 0, 0]
    assert [times(seeds=1), times(layout="offset"), times(dtype=torch.bfloat16)] == [3, 3, 3]
    assert [times(dtype=torch.float64), times(dtype=torch.float64)] == [1, 0]
    times()
    with pytest.raises(AssertionError):
        times(noisy)
    monkeypatch.setattr(errors, "_known", LRUCache(1000))  # too few bytes for one of them
    assert [times(), times()] == [3, 3]


def test_arguments_of_a_named_oracle_are_not_changed():
    def careless(x, *others):
        return [reference.interaction(x, *others), x.zero_()][:1]

    with pytest.raises(AssertionError, match="changed in place"):
        check_errors(careless, oracle, lambda seed: Sample(MIDDLE).arguments(torch.float32, seed=seed))


def test_what_was_used_last_is_remembered():
    remembered = LRUCache(100)
    for name in "abc":
        remembered.keep(name, name.upper(), 40)
    assert [remembered.get(name) for name in "abc"] == [None, "B", "C"]
    remembered.get("b")
    remembered.keep("d", "D", 60)
    assert [remembered.get(name) for name in "bcd"] == ["B", None, "D"]
    remembered.keep("b", "again", 30)
    assert (remembered.bytes, remembered.get("b")) == (90, "again")
    remembered.keep("e", "E", 101)
    assert remembered.bytes == 0 and remembered.get("e") is None


def stackable():
    """Small samples of every form, which are drawn often."""
    small = Shape("small", (2,), 3, 4, 5)
    yield from (Sample(small), Sample(small, WEIGHT_ONLY, "gaps"), Sample(small, (False, True, False, True)))
    yield Sample(small, layout="expanded")
    square = Shape("square", (2,), 3, 4, 4)
    for op, terms in GATE_TERMS.items():
        yield GateSample(op, square, terms, activation="softmax")
        yield GateSample(op, square, terms[:2], activation="gelu")
    yield Modulation("small", (3, 2, 4), (3, 1, 4), (4,))
    yield Modulation("small", (3, 2, 4), (1,), activation="softmax")


@pytest.mark.parametrize("sample", list(stackable()), ids=str)
def test_draws_are_judged_together_as_they_are_one_by_one(sample, monkeypatch):
    found = []
    for elements in (errors.STACKED_ELEMENTS, 0, 400):  # all at once, none, and some
        monkeypatch.setattr(errors, "STACKED_ELEMENTS", elements)
        monkeypatch.setattr(errors, "_known", LRUCache(1 << 20))
        checks.check_values(sample, torch.float32)
        checks.check_gradients(sample, torch.float32)
        (expected, _), (of_gradients, _) = errors._known._found.values()
        assert len(expected.draws) > 10
        found.append([*expected.bounds, *of_gradients.bounds])
    for together, alone, some in zip(*found, strict=True):
        for bound in (together, some):
            torch.testing.assert_close(bound.truth, alone.truth, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(bound.scale, alone.scale, rtol=1e-12, atol=1e-13)
            assert bound.limit == pytest.approx(alone.limit, rel=1e-6)
            assert bound.allowed == pytest.approx(alone.allowed, rel=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "expanded"])
def test_expanded_arguments_are_drawn_often(layout):
    """They make one number of all results, so that a single draw would be a matter of luck."""
    seeds = set()

    def draw(seed):
        seeds.add(seed)
        return Sample(THREADED, layout=layout).arguments(torch.bfloat16, seed=seed)

    check_errors(oracle, oracle, draw)
    assert len(seeds) == (REPEATED if layout == "expanded" else 1)


def test_the_reference_rounds_the_same_with_and_without_opt_einsum():
    pytest.importorskip("opt_einsum")
    arguments = Sample(MIDDLE).arguments(torch.float32, requires_grad=True)
    found = []
    for enabled in (True, False):
        with torch.backends.opt_einsum.flags(enabled=enabled):
            y = reference.interaction(*arguments)
            found.append([y, *torch.autograd.grad(y.pow(2).sum(), arguments)])
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_the_error_rule_finds_a_wrong_shape():
    def flat(*arguments):
        return [reference.interaction(*arguments).flatten()]

    with pytest.raises(AssertionError, match="expected shape"):
        check_errors(flat, oracle, lambda seed: Sample(MIDDLE).arguments(torch.float32, seed=seed))


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(34**-0.5)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_layouts_keep_shape_and_values(layout, dtype):
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    found = lay_out(tensor, layout, expand_dim=1)
    assert found.shape == tensor.shape
    expected = tensor[:, :1].expand(2, 3, 4) if layout == "expanded" else tensor
    assert torch.equal(found, expected)
    assert layout in ("contiguous", "offset") or not found.is_contiguous()
    assert layout != "offset" or found.storage_offset() == 1


EVERY_SAMPLE = {
    "dense": lambda: samples(),
    "shared": lambda: shared_samples(),
    "ragged": lambda: RAGGED,
    "modulation": lambda: modulations(),
    **{op: lambda op=op: gates(op) for op in GATE_TERMS},
}


@pytest.mark.parametrize("kind", EVERY_SAMPLE)
def test_layouts_are_the_same_on_every_device(kind):
    """A tensor that is laid out and then moved loses its gaps, its offset and its expansion."""

    def places(sample, device):
        tensors = [*sample.arguments(torch.float32, device), sample.cotangent(torch.float32, device)]
        if kind == "dense":
            tensors += [sample.cotangent(torch.float32, device, layout=layout) for layout in LAYOUTS]
        assert all(t.device.type == device for t in tensors if t is not None)
        return [t if t is None else (t.shape, t.stride(), t.storage_offset()) for t in tensors]

    listed = list(EVERY_SAMPLE[kind]())
    assert kind == "ragged" or {sample.layout for sample in listed} >= {*LAYOUTS}
    for sample in listed:
        assert places(sample, "meta") == places(sample, "cpu"), str(sample)


def test_samples_are_reproducible_and_distinct():
    listed = list(samples())
    assert len({str(sample) for sample in listed}) == len(listed)
    for sample in listed[:4]:
        once, again, other = (sample.arguments(torch.float32, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(once[0], again[0])
        assert not torch.equal(once[0], other[0])
    present = Sample(MIDDLE, WEIGHT_ONLY).arguments(torch.float32)
    for one, other, name in zip(present, Sample(MIDDLE).arguments(torch.float32), NAMES, strict=True):
        assert one is None or torch.equal(one, other), f"{name} depends on the terms"


def test_counts():
    shape, dtype = Shape("count", (2,), 3, 5, 7), torch.float32
    gemm, linear, bias = 2 * 2 * 3 * 5 * 7, 2 * 2 * 7 * (3 + 5), 2 * 7
    inputs, weights, out = 2 * (3 + 5), 7 * (15 + 3 + 5), 2 * 7
    assert counts.forward(shape, dtype) == counts.Count(
        gemm + linear + bias, 4 * (inputs + weights + 7 + out)
    )
    assert counts.input_grads(shape, dtype) == counts.Count(gemm + linear, 4 * (2 * inputs + weights + out))
    assert counts.weight_grads(shape, dtype) == counts.forward(shape, dtype)
    double = counts.double_backward(shape, dtype)
    assert double == counts.Count(7 * gemm + 4 * linear + bias, 4 * (3 * inputs + 3 * weights + 7 + 2 * out))
    few = Shape("few", (64,), 64, 32, 128)  # two products of the double backward with Q are four without
    products = counts.double_backward(few, dtype, WEIGHT_ONLY).operations
    assert products == 5 * counts.forward(few, dtype, WEIGHT_ONLY).operations
    bare = counts.forward(shape, torch.bfloat16, WEIGHT_ONLY)
    assert bare == counts.Count(gemm, 2 * (inputs + 7 * 15 + out))


def test_counts_of_a_shared_context():
    """Operations are counted for every row, bytes for what is stored."""
    shape = Shape("shared", (4, 6), 3, 5, 7, context_batch=(4, 1))
    count = counts.forward(shape, torch.float32, WEIGHT_ONLY)
    assert count.operations == 2 * 24 * 3 * 5 * 7
    assert count.bytes == 4 * (24 * 5 + 4 * 3 + 7 * 15 + 24 * 7)
