"""The short ways of small calls: few elements by PyTorch; rows and contexts alike, past the long checks."""

import pytest
import torch
from helpers import Spy, with_gradients

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.functional import gates, hyper, interaction, mix
from mi_kernels.ops.activations import NAMES
from mi_kernels.ops.modulate import small
from mi_kernels.testing import checks
from mi_kernels.testing.samples import Modulation

pytestmark = pytest.mark.skipif(backends.why_not("cpu") is not None, reason="no compiled kernels")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    ("alike", (5, 6), (5, 6), (5, 6)),
    ("tokens", (3, 4, 6), (3, 1, 6), (6,)),
    ("maps", (2, 3, 4, 5), (2, 3, 1, 1), (2, 3, 1, 1)),
    ("no-shift", (4, 7), (7,), None),
    ("one", (1,), (1,), (1,)),
    ("scalar", (16,), (), ()),
)
# PyTorch cannot differentiate hardsigmoid twice, and gives NaN for gelu of infinity.
NAMED = [name for name in NAMES if not name.startswith(("hard", "gelu"))]
ACTIVATED = [Modulation(*shape, activation=name) for shape in SHAPES[:2] for name in NAMED]
MODULATIONS = [*ACTIVATED, *(Modulation(*shape) for shape in SHAPES[2:])]


def operations(function, *tensors, **options):
    """This package's operations that a call runs."""
    with Spy() as spy:
        function(*tensors, **options)
    return spy.names


def takes(sample, dtype=torch.float32):
    return small.takes(*sample.arguments(dtype), sample.activation, sample.scale_offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sample", MODULATIONS, ids=str)
def test_small_modulations_obey_the_error_rule(sample, dtype):
    assert takes(sample, dtype)
    checks.check_values(sample, dtype)
    checks.check_gradients(sample, dtype)


@pytest.mark.parametrize("sample", ACTIVATED, ids=str)
def test_second_order_of_small_modulations(sample):
    checks.check_second_order(sample, torch.float32)


@pytest.mark.parametrize("sample", MODULATIONS, ids=str)
def test_derivatives_of_small_modulations(sample):
    arguments = sample.arguments(torch.float64, requires_grad=True)
    tensors = [t for t in arguments if t is not None]

    def function(*given):
        return mi.modulate(*given, **sample.options)

    assert operations(function, *tensors) == []
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_transforms_of_small_modulations_take_the_kernel():
    x, scale, shift = torch.randn(3, 4, 5), torch.randn(4, 5), torch.randn(5)
    mapped = torch.vmap(mi.modulate, in_dims=(0, None, None))
    assert operations(mapped, x, scale, shift) == ["modulate"]
    torch.testing.assert_close(mapped(x, scale, shift), scale * x + shift)
    tangent = torch.func.jvp(lambda x: mi.modulate(x, scale, shift), (x[0],), (x[1],))[1]
    torch.testing.assert_close(tangent, scale * x[1])


BIG = small.MAX_ELEMENTS


@pytest.mark.parametrize(
    ("x", "scale", "options"),
    [
        (torch.ones(BIG + 1), torch.ones(1), {}),
        (torch.ones(0, 4), torch.ones(4), {}),
        (torch.ones(3, 4), torch.ones(4), {"activation": "hardsigmoid"}),
        (torch.ones(3, 4), torch.ones(4), {"activation": "gelu"}),
        (torch.ones(3, 4).bfloat16(), torch.ones(4).bfloat16(), {}),
        (torch.ones(3, 4).half(), torch.ones(4).half(), {}),
        (torch.ones(4, 3).t(), torch.ones(4), {}),
        (torch.ones(3, 4), torch.ones(4, 3).t(), {}),
        (torch.ones(1, 4), torch.ones(3, 4), {}),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.ones(2, 3, 1, 1), {}),
    ],
    ids=[
        "large",
        "empty",
        "hardsigmoid",
        "gelu",
        "bfloat16",
        "float16",
        "strided",
        "strided-scale",
        "expanded",
        "channels-last",
    ],
)
def test_other_modulations_take_the_kernel(x, scale, options):
    assert operations(mi.modulate, x, scale, **options) == ["modulate"]
    assert mi.explain(mi.modulate, x, scale, **options).algorithm == "one pass"


def test_a_backend_asked_for_by_name_runs_its_kernel(place):
    x = torch.ones(3, 4, device=place.device)
    assert operations(mi.modulate, x, x) == ["modulate"]
    assert mi.explain(mi.modulate, x, x).algorithm != small.ALGORITHM


def test_explain_names_small_modulations():
    x, scale = torch.ones(3, 4, requires_grad=True), torch.ones(4)
    plan = mi.explain(mi.modulate, x, scale)
    assert plan.algorithm == "torch" and [step.algorithm for step in plan.backward] == ["torch"]


def test_results_of_small_modulations_are_their_own():
    x, one = torch.randn(3, 4), torch.ones(4)
    for shift in (None, torch.zeros(4)):
        y = mi.modulate(x, one, shift)
        assert y.is_contiguous() and y.shape == x.shape
        assert y.data_ptr() not in (x.data_ptr(), one.data_ptr())


def test_small_modulations_have_the_same_bits_on_any_number_of_threads():
    sample = Modulation("rows", (BIG // 8, 8), (8,), (1, 8))
    assert takes(sample)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            with_gradients(lambda *t: mi.modulate(*t, **sample.options), sample.arguments(torch.float32))
        )
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


# Sizes that differ, and those of one row; what is left out comes as None.
B, Z, X, O = 5, 3, 7, 4  # noqa: E741
CALLS = {
    "interaction": (mi.interaction, (B, X), (B, Z), (O, Z, X), (O, Z), (O, X), (O,)),
    "one-row": (mi.interaction, (1, X), (1, Z), (O, Z, X), (O, Z), (O, X), (O,)),
    "vectors": (mi.interaction, (X,), (Z,), (O, Z, X), (O, Z), (O, X), (O,)),
    "no-weight": (mi.interaction, (B, X), (B, Z), None, (O, Z), None, (O,)),
    "bias-alone": (mi.interaction, (B, X), (B, Z), None, None, None, (O,)),
    "bilinear": (mi.bilinear, (B, Z), (B, X), (O, Z, X), (O,)),
    "generate": (mi.generate, (B, Z), (O, Z, X), (O, Z), (O, X), (O,)),
    "generate-weight": (mi.generate, (B, Z), (O, Z, X), None, (O, X), None),
    "generate-bias": (mi.generate, (B, Z), (O, Z, X), None, None, (O,)),
    "generate-vector": (mi.generate, (Z,), (O, Z, X), (O, Z), (O, X), (O,)),
    "apply-vector": (mi.apply_generated, (X,), (O, X), (O,)),
    "apply-tokens": (mi.apply_generated, (B, 6, X), (B, 1, O, X), (B, 1, O)),
    "apply-row": (mi.apply_generated, (1, X), (1, O, X), (1, O)),
    "apply-sample": (mi.apply_generated, (1, 6, X), (1, 1, O, X), None),
    "apply-pairs": (mi.apply_generated, (B, 1, X), (1, 6, O, X), None),
    "apply-one": (mi.apply_generated, (B, X), (O, X), (O,)),
    "apply": (mi.apply_generated, (B, X), (B, O, X), (B, O)),
    "apply-product": (mi.apply_generated, (B, X), (B, O, X), None),
    "apply-expanded-bias": (mi.apply_generated, (B, X), (B, O, X), (O,)),
    "diagonal": (mi.diagonal, (B, X), (B, Z), (X, Z), (X,), (X, Z), (X,)),
    "diagonal-gate": (mi.diagonal, (B, X), (B, Z), (X, Z)),
    "gated": (mi.gated_interaction, (B, X), (B, Z), (X, Z, X), (X, Z), (X, X), (X,)),
    "gated-linear": (mi.gated_interaction, (B, X), (B, Z), None, None, (X, X), None),
    "modulate": (mi.modulate, (B, X), (B, X), (B, X)),
    "modulate-rows": (mi.modulate, (B, X), (X,), (B, 1)),
    "mix": (mi.mix, (B, X), (B, X), (B, X)),
    "mix-rows": (mi.mix, (B, X), (X,), (B, 1)),
}
# Those that the checks with messages are spared.
SHORT = set(CALLS) - {"generate-bias", "apply-expanded-bias", "apply-pairs", "apply-sample"}


def made(name, dtype):
    function, *sizes = CALLS[name]
    return function, [
        None if size is None else torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes
    ]


def everything(function, tensors):
    """The results, alone and differentiated, with all gradients."""
    with torch.no_grad():
        alone = function(*tensors)

    def joined(*given):
        results = function(*given)
        return (
            torch.cat([y.flatten() for y in results if y is not None]) if type(results) is tuple else results
        )

    alone = alone if type(alone) is tuple else (alone,)
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    used = [t for t in leaves if t is not None]
    y = joined(*leaves)
    found = torch.autograd.grad(y.float().square().sum(), used, allow_unused=True)
    return [y if y is None else y.detach() for y in (*alone, y, *found)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_short_way_has_the_results_of_the_long_one(name, dtype, monkeypatch):
    function, tensors = made(name, dtype)
    with mi.backend("cpu"):
        short = everything(function, tensors)
        monkeypatch.setattr(backends, "eager_cpu", lambda *_: None)
        long = everything(function, tensors)
    for one, other in zip(short, long, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (torch.equal(one, other) and one.stride() == other.stride())


@pytest.mark.parametrize("name", CALLS)
def test_which_calls_go_the_short_way(name, monkeypatch):
    class LongError(Exception):
        pass

    def refuse(*_, **__):
        raise LongError

    for module, check in (
        (interaction, "autocast"),
        (hyper, "autocast"),
        (gates, "autocast"),
        (gates, "promoted_dtype"),
        (mix, "promoted_dtype"),
    ):
        monkeypatch.setattr(module, check, refuse)
    function, tensors = made(name, torch.float32)
    if name in SHORT:
        function(*tensors)
        return
    with pytest.raises(LongError):
        function(*tensors)


def test_what_casts_and_what_traces_goes_the_long_way():
    x = torch.ones(2, 3)
    assert backends.eager_cpu(x) == "cpu"
    assert backends.eager_cpu(x.to("meta")) is None
    assert backends.eager_cpu(x.long()) is None
    assert backends.eager_cpu([1.0]) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert backends.eager_cpu(x) is None
        assert mi.interaction(x, x, torch.ones(4, 3, 3)).dtype == torch.bfloat16
    for name in ("portable", "reference"):
        with mi.backend(name):
            assert backends.eager_cpu(x) is None


def test_biases_that_broadcast_still_do():
    x, weight = torch.randn(2, 3), torch.randn(3, 3, 3)
    for bias in (torch.randn(1, 3), torch.randn(1), torch.randn(())):
        y = mi.interaction(x, x, weight) + bias
        torch.testing.assert_close(mi.interaction(x, x, weight, bias=bias), y)
        gate = torch.sigmoid(mi.interaction(x, x, weight) + bias) * x
        torch.testing.assert_close(mi.gated_interaction(x, x, weight, bias=bias), gate)


LINEAR = [name for name in CALLS if name.startswith(("apply", "generate"))]


def as_list(results):
    return [y for y in (results if type(results) is tuple else (results,)) if y is not None]


@pytest.mark.parametrize("name", LINEAR)
def test_results_of_small_products_can_be_changed_in_place(name):
    """They are no views of what a Function has made, which PyTorch would not let change."""
    function, tensors = made(name, torch.float64)
    used = [t.requires_grad_() for t in tensors if t is not None]

    def changed(*given):
        given = iter(given)
        results = function(*(None if t is None else next(given) for t in tensors))
        return tuple(y.mul_(2).tanh_() for y in as_list(results))

    assert torch.autograd.gradcheck(changed, used)


@pytest.mark.parametrize("name", LINEAR)
def test_derivatives_of_small_products(name):
    function, tensors = made(name, torch.float64)
    used = [t.requires_grad_() for t in tensors if t is not None]

    def compact(*given):
        given = iter(given)
        return tuple(as_list(function(*(None if t is None else next(given) for t in tensors))))

    assert torch.autograd.gradcheck(compact, used, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(compact, used, check_batched_grad=True)


@pytest.mark.parametrize("missing", range(3))
@pytest.mark.parametrize("name", ["apply", "apply-one", "apply-vector"])
def test_gradients_of_some_arguments_alone(name, missing):
    function, tensors = made(name, torch.float64)
    expected = torch.autograd.grad(function(*(t.requires_grad_() for t in tensors)).sum(), tensors)
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index != missing)
    kept = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(function(*tensors).sum(), kept)
    assert all(
        torch.equal(a, b) for a, b in zip(found, expected[:missing] + expected[missing + 1 :], strict=True)
    )


@pytest.mark.parametrize("name", ["generate", "generate-vector", "apply", "apply-one", "apply-vector"])
def test_modes_see_the_primitives_of_small_products(name):
    """So that counters of operations, and all that records a graph, know what is computed."""
    function, tensors = made(name, torch.float32)
    with Spy() as spy:
        results = as_list(function(*(t.requires_grad_() for t in tensors)))
        sum(y.sum() for y in results).backward()
    primitives = {"interaction", "interaction_input_grads", "interaction_weight_grads"}
    assert set(spy.names) == primitives


@pytest.mark.parametrize("name", ["generate", "apply", "apply-one", "diagonal"])
def test_small_products_have_the_same_bits_on_any_number_of_threads(name):
    function = CALLS[name][0]
    sizes = [tuple({B: 64, Z: 48, X: 64, O: 64}[n] for n in size) for size in CALLS[name][1:]]
    tensors = [torch.randn(size) for size in sizes]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything(function, tensors))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_each_result_of_generate_requires_what_it_depends_on():
    z, weight, weight_z, weight_x = (
        torch.randn(5, 3),
        torch.randn(4, 3, 7),
        torch.randn(4, 3),
        torch.randn(4, 7),
    )
    for name, expected in (("z", (1, 1)), ("weight", (1, 0)), ("weight_z", (0, 1)), ("weight_x", (1, 0))):
        tensors = {"z": z, "weight": weight, "weight_z": weight_z, "weight_x": weight_x}
        tensors[name] = tensors[name].clone().requires_grad_()
        generated, offset = mi.generate(**tensors)
        assert (generated.requires_grad, offset.requires_grad) == expected
        sum(t.sum() for t in (generated, offset) if t.requires_grad).backward()
        assert tensors[name].grad is not None


def test_a_tensor_that_has_left_a_transform():
    left = []
    torch.vmap(lambda x: left.append(x) or x)(torch.randn(2, 7))
    with pytest.raises(RuntimeError, match="escaped"):
        mi.apply_generated(left[0], torch.randn(4, 7))


def test_the_plan_of_a_shift_has_one_product_for_the_context():
    x, z, weights = (
        torch.randn(5, 7),
        torch.randn(5, 3),
        [torch.randn(*s) for s in ((7, 3), (7,), (7, 3), (7,))],
    )
    tensors = [t.requires_grad_() for t in (x, z, *weights)]
    steps = mi.explain(mi.diagonal, *tensors).backward
    assert [step.op for step in steps] == ["gate_grads", "input_grads", "weight_grads"]
    with Spy() as spy:
        mi.diagonal(*tensors).sum().backward()
    assert "interaction" in spy.names and "interaction_input_grads" not in spy.names
