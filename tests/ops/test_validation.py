"""Every argument broken in turn; the message names it, what was expected and what came."""

import re

import numpy as np
import pytest
import torch
from helpers import Spy

import mi_kernels as mi
from mi_kernels import backends

BACKENDS = [name for name in ("auto", "reference", "portable", "cpu") if backends.why_not(name) is None]
INTERACTION = {
    "x": (4, 5),
    "z": (4, 3),
    "weight": (2, 3, 5),
    "weight_z": (2, 3),
    "weight_x": (2, 5),
    "bias": (2,),
}
BILINEAR = {"input1": (4, 3), "input2": (4, 5), "weight": (2, 3, 5), "bias": (2,)}
# Names of the axes in messages: O, Z, X here, out, in1, in2 there.
AXES = {"interaction": ("O", "Z", "X"), "bilinear": ("out", "in1", "in2")}
OPERATIONS = {"interaction": INTERACTION, "bilinear": BILINEAR}
EVERY = [(op, name) for op, arguments in OPERATIONS.items() for name in arguments]
WEIGHTS = [(op, name) for op, name in EVERY if name.startswith(("weight", "bias"))]
INPUTS = [(op, name) for op, name in EVERY if (op, name) not in WEIGHTS]


def expect(op, broken, error, message, backend="auto"):
    """The call raises, with that message, and before any operation ran."""
    arguments = {name: torch.ones(sizes) for name, sizes in OPERATIONS[op].items()} | broken
    with mi.backend(backend), Spy() as spy, pytest.raises(error, match=message):
        getattr(mi, op)(**arguments)
    assert spy.names == []


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def first_argument(op):
    """The argument that dtypes and devices are compared with."""
    return "x" if op == "interaction" else "input2"


@pytest.mark.parametrize(
    "value", [[1.0, 2.0], np.ones((4, 5), np.float32), "x", 3.0], ids=["list", "numpy", "str", "float"]
)
@pytest.mark.parametrize(("op", "name"), EVERY)
def test_type(op, name, value, backend):
    message = f"^{op}: {name}: expected a torch.Tensor, got {type(value).__name__}$"
    expect(op, {name: value}, TypeError, message, backend)


@pytest.mark.parametrize(("op", "name"), INPUTS)
def test_missing_input(op, name, backend):
    expect(op, {name: None}, TypeError, f"^{op}: {name}: expected a torch.Tensor, got None", backend)


def test_bilinear_needs_its_weight(backend):
    expect("bilinear", {"weight": None}, (TypeError, ValueError), "^bilinear: .*weight.* got None", backend)


@pytest.mark.parametrize(("op", "name"), EVERY)
def test_sparse_layout(op, name, backend):
    sparse = torch.ones(OPERATIONS[op][name]).to_sparse()
    message = rf"^{op}: {name}: expected a dense \(strided\) tensor, got torch.sparse_coo$"
    expect(op, {name: sparse}, TypeError, message, backend)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize(("op", "name"), INPUTS)
def test_nested_layout(op, name, layout, backend):
    nested = torch.nested.nested_tensor([torch.ones(2, 5), torch.ones(3, 5)], layout=layout)
    # Where there are segment_ids, these are what to pass (test_hyper_messages.py).
    advice = "; for groups .*" if layout is torch.jagged and (op, name) == ("interaction", "x") else ""
    expect(op, {name: nested}, TypeError, f"^{op}: {name}: expected a dense .* got nested{advice}$", backend)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
def test_unsupported_dtype(op, dtype, backend):
    broken = {name: torch.ones(sizes).to(dtype) for name, sizes in OPERATIONS[op].items()}
    message = f"^{op}: {first_argument(op)}: expected a dtype of float64, .*, got {dtype}$"
    expect(op, broken, TypeError, message, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in EVERY if name != first_argument(op)])
def test_dtypes_that_differ(op, name, dtype, backend):
    message = rf"^{op}: {name}: expected torch.float32 \(the dtype of {first_argument(op)}\), got {dtype}$"
    expect(op, {name: torch.ones(OPERATIONS[op][name], dtype=dtype)}, TypeError, message, backend)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in EVERY if name != first_argument(op)])
def test_devices_that_differ(op, name, backend):
    message = rf"^{op}: {name}: expected device cpu \(that of {first_argument(op)}\), got meta$"
    expect(op, {name: torch.ones(OPERATIONS[op][name], device="meta")}, ValueError, message, backend)


@pytest.mark.parametrize(("op", "name"), INPUTS)
def test_rank_of_inputs(op, name, backend):
    message = rf"^{op}: {name}: expected at least 1 dimension\(s\), got shape \[\]$"
    expect(op, {name: torch.tensor(1.0)}, ValueError, message, backend)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize(("op", "name"), WEIGHTS)
def test_rank_of_weights(op, name, change, backend):
    sizes = OPERATIONS[op][name]
    if name == "bias":  # a scalar and a row are a bias
        sizes = (2, *sizes) if change < 0 else (1, 1, *sizes)
    else:
        sizes = sizes[1:] if change < 0 else (1, *sizes)
    if op == "interaction" and len(sizes) > len(OPERATIONS[op][name]):
        pytest.skip("leading dimensions of weights broadcast: test_batched_weights.py")
    message = rf"^{op}: {name}: expected shape \[.*\], got {re.escape(str(list(sizes)))}$"
    expect(op, {name: torch.ones(sizes)}, ValueError, message, backend)


def axes_of(op, name):
    o, i, j = AXES[op]
    return {"weight": (o, i, j), "weight_z": (o, i), "weight_x": (o, j), "bias": (o,)}[name]


SIZES = [
    (op, name, axis)
    for op, name in WEIGHTS
    for axis in range(len(OPERATIONS[op][name]))
    if (name, axis) != ("weight", 0)
]


@pytest.mark.parametrize("delta", [-1, 1])
@pytest.mark.parametrize(("op", "name", "axis"), SIZES)
def test_each_size_of_weights(op, name, axis, delta, backend):
    right = OPERATIONS[op][name]
    if name == "bias" and delta < 0:
        delta = 2  # one element is a bias for all outputs
    wrong = [size + delta * (index == axis) for index, size in enumerate(right)]
    wanted = re.escape(f"{axes_of(op, name)[axis]}={right[axis]}")
    message = rf"^{op}: {name}: expected shape \[.*{wanted}.*\], got {re.escape(str(wrong))}$"
    expect(op, {name: torch.ones(wrong)}, ValueError, message, backend)


@pytest.mark.parametrize("delta", [-1, 1])
@pytest.mark.parametrize("op", OPERATIONS)
def test_output_size_of_weight_disagrees_with_the_others(op, delta, backend):
    expect(
        op, {"weight": torch.ones(2 + delta, 3, 5)}, ValueError, f"^{op}: (weight_z|bias): expected", backend
    )


@pytest.mark.parametrize("delta", [-1, 1])
@pytest.mark.parametrize(("op", "name"), INPUTS)
def test_features_of_inputs(op, name, delta, backend):
    """The size of an input is what weights are held to, so the message is about the weight."""
    rows, features = OPERATIONS[op][name]
    axis = AXES[op][1 if name in ("z", "input1") else 2]
    message = rf"^{op}: weight: expected shape \[.*{axis}={features + delta}.*\], got \[2, 3, 5\]$"
    expect(op, {name: torch.ones(rows, features + delta)}, ValueError, message, backend)


@pytest.mark.parametrize("wrong", [(3, 3), (2, 4, 2, 3), (4, 2, 3)], ids=str)
def test_leading_dimensions(wrong, backend):
    got = re.escape(str(list(wrong[:-1])))
    message = (
        rf"^interaction: z: expected leading dimensions that broadcast with those of x \[4\], got {got}$"
    )
    expect("interaction", {"z": torch.ones(wrong)}, ValueError, message, backend)


def test_leading_dimensions_of_bilinear(backend):
    message = r"^bilinear: input1: expected leading dimensions .* those of input2 \[4\], got \[3\]$"
    expect("bilinear", {"input1": torch.ones(3, 3)}, ValueError, message, backend)


def test_no_weight_at_all(backend):
    x, z = torch.ones(4, 5), torch.ones(4, 3)
    message = "^interaction: expected at least one of weight, weight_z, weight_x, bias, got None for all$"
    with mi.backend(backend), pytest.raises(ValueError, match=message):
        mi.interaction(x, z, None)


def test_what_is_right_passes(backend):
    """The arguments that the tests above break are accepted as they are."""
    for op, arguments in OPERATIONS.items():
        with mi.backend(backend):
            y = getattr(mi, op)(**{name: torch.ones(sizes) for name, sizes in arguments.items()})
        assert y.shape == (4, 2)
        assert y.eq(15 + 3 + 5 + 1 if op == "interaction" else 15 + 1).all()
