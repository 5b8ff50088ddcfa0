"""torch.compile, torch.export and torch.library.opcheck.

Over 400 lines, of which the last hundred are the list of samples that opcheck runs each operation on.
"""

import copy
import subprocess
import sys

import pytest
import torch
from helpers import COMPILE, plain, with_gradients
from recorder import Recorder
from torch._dynamo.testing import CompileCounter

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.testing import direct
from mi_kernels.testing.recurrent_samples import recurrent_calls
from mi_kernels.testing.samples import (
    ALL_TERMS,
    EMPTY,
    GATE_ODD,
    MIDDLE,
    ODD,
    TOKENS,
    WEIGHT_ONLY,
    GateSample,
    Sample,
    Shape,
)
from mi_kernels.testing.shared_samples import TINY_RAGGED

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("fresh_compiler")]


def between_neighbours(x, z, *weights):
    """With elementwise work on both sides, as in a model."""
    return torch.relu(mi.interaction(torch.sin(x), z * 2, *weights)) + 1


@pytest.mark.parametrize("terms", [ALL_TERMS, WEIGHT_ONLY], ids=["all", "W"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_equals_eager(dtype, terms, place):
    arguments = Sample(MIDDLE, terms).arguments(dtype, place.device)
    compiled = torch.compile(mi.interaction, **COMPILE)
    torch.testing.assert_close(
        with_gradients(compiled, arguments), with_gradients(mi.interaction, arguments), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_between_neighbours(dtype, place):
    arguments = Sample(MIDDLE).arguments(dtype, place.device)
    found = with_gradients(torch.compile(between_neighbours, **COMPILE), arguments)
    # Inductor keeps float32 between elementwise operations where eager rounds to 16 bits.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip(found, with_gradients(between_neighbours, arguments), strict=True):
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


@pytest.mark.parametrize("terms", [ALL_TERMS, (False, True, True, True)], ids=["all", "UVc"])
@pytest.mark.parametrize("shape", [*EMPTY, Shape("1d", (), 4, 6, 5)], ids=lambda shape: shape.name)
def test_compiled_shapes(shape, terms, place):
    arguments = Sample(shape, terms).arguments(torch.float32, place.device)
    compiled = torch.compile(mi.interaction, backend="aot_eager", **COMPILE)
    torch.testing.assert_close(
        with_gradients(compiled, arguments), with_gradients(mi.interaction, arguments), rtol=0, atol=0
    )


def test_batch_size_does_not_recompile(place):
    """One graph serves all batch sizes from 2 on; sizes 0 and 1 may take one more each."""
    counter = CompileCounter()
    compiled = torch.compile(mi.interaction, backend=counter, **COMPILE)
    for batch in (7, 2, 64, 33):
        arguments = Sample(Shape("batch", (batch,), 3, 5, 4)).arguments(torch.float32, place.device)
        torch.testing.assert_close(compiled(*arguments), mi.interaction(*arguments), rtol=0, atol=0)
    assert counter.frame_count == 1
    for batch in (1, 0):
        arguments = Sample(Shape("batch", (batch,), 3, 5, 4)).arguments(torch.float32, place.device)
        assert compiled(*arguments).shape == (batch, 4)
    assert counter.frame_count <= 3


def suffixed(names, place):
    # Compiled libraries, of the CPU and of CUDA, are called by the plain name.
    twin = place.backend in ("portable", "triton")
    return [f"{name}_{place.backend}" if twin else name for name in names]


def test_compiled_calls_the_operations(place):
    """Each operation stays one call in the graph, forward and backward; nothing falls back to einsum."""
    arguments = Sample(ODD).arguments(torch.float32, place.device, requires_grad=True)
    recorder = Recorder()
    torch.compile(mi.interaction, backend=recorder.backend, **COMPILE)(*arguments).sum().backward()
    forward, backward = recorder.names
    assert forward == suffixed(["interaction"], place)
    assert backward == suffixed(["interaction_input_grads", "interaction_weight_grads"], place)


def test_partial_gradients_stay_partial(place):
    arguments = Sample(ODD).arguments(torch.float32, place.device)
    arguments[0].requires_grad_()
    recorder = Recorder()
    torch.compile(mi.interaction, backend=recorder.backend, **COMPILE)(*arguments).sum().backward()
    (call,) = recorder.graphs[1]
    assert recorder.names[1] == suffixed(["interaction_input_grads"], place)
    assert call.args[6:8] == (True, False)


def test_compile_around_a_functional_gradient(place):
    arguments = Sample(ODD).arguments(torch.float64, place.device)

    def gradient(*tensors):
        return torch.func.grad(lambda *t: mi.interaction(*t).pow(2).sum(), (0, 1, 2))(*tensors)

    compiled = torch.compile(gradient, backend="aot_eager", **COMPILE)
    torch.testing.assert_close(compiled(*arguments), gradient(*arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outer", ["jacfwd", "jacrev"])
@pytest.mark.parametrize("inner", ["jacfwd", "jacrev"])
def test_compile_around_second_derivatives(inner, outer, place):
    x, z, weight, *_ = Sample(ODD).arguments(torch.float64, place.device)

    def loss(x):
        return mi.interaction(x, z, weight).sin().sum()

    def hessian(x):
        return getattr(torch.func, outer)(getattr(torch.func, inner)(loss))(x)

    torch.testing.assert_close(torch.compile(hessian, fullgraph=True)(x), hessian(x))


def test_compiled_function_inside_a_functional_gradient(place):
    """PyTorch runs such a function eagerly (it refuses fullgraph); the result is the same."""
    arguments = Sample(ODD).arguments(torch.float64, place.device)
    compiled = torch.compile(mi.interaction, backend="aot_eager")

    def gradient(function):
        return torch.func.grad(lambda *t: function(*t).pow(2).sum(), (0, 1, 2))(*arguments)

    torch.testing.assert_close(gradient(compiled), gradient(mi.interaction), rtol=1e-12, atol=1e-12)


def test_double_backward_through_a_compiled_gradient(place):
    """A gradient penalty whose inner gradient is compiled along with the rest."""
    arguments = Sample(ODD).arguments(torch.float64, place.device)

    def penalty(x, *others):
        slope = torch.func.grad(lambda x: mi.interaction(x, *others).pow(2).sum())(x)
        return slope.pow(2).sum()

    compiled = torch.compile(torch.func.grad(penalty, (0, 1, 2)), backend="aot_eager", **COMPILE)
    torch.testing.assert_close(
        compiled(*arguments), torch.func.grad(penalty, (0, 1, 2))(*arguments), rtol=1e-12, atol=1e-12
    )


def test_compiled_vmap(place):
    x, z, w, u, v, c = Sample(ODD).arguments(torch.float64, place.device)
    stack = torch.stack([w, -w])
    function = torch.vmap(mi.interaction, (None, None, 0, None, None, None))
    compiled = torch.compile(function, backend="aot_eager", **COMPILE)
    torch.testing.assert_close(
        compiled(x, z, stack, u, v, c), function(x, z, stack, u, v, c), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_inside_compile(low, place):
    arguments = Sample(MIDDLE).arguments(torch.float32, place.device)

    def cast(*tensors):
        with torch.autocast(place.device, low):
            return mi.interaction(*tensors)

    compiled = torch.compile(cast, backend="aot_eager", **COMPILE)
    found, expected = with_gradients(compiled, arguments), with_gradients(cast, arguments)
    assert found[0].dtype == low
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_compile(low, place):
    """A function compiled outside autocast is compiled again inside, and back outside it is the first one."""
    arguments = Sample(MIDDLE).arguments(torch.float32, place.device)
    counter = CompileCounter()
    compiled = torch.compile(mi.interaction, backend=counter, **COMPILE)
    for enabled, graphs in ((False, 1), (True, 2), (False, 2)):
        with torch.autocast(place.device, low, enabled=enabled):
            found, expected = compiled(*arguments), mi.interaction(*arguments)
        assert found.dtype == (low if enabled else torch.float32)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert counter.frame_count == graphs


def test_devices_without_autocast_compile():
    meta = [t.to("meta") for t in Sample(ODD).arguments(torch.float32)]
    assert torch.compile(mi.interaction, backend="eager", **COMPILE)(*meta).shape == (5, 11)


def test_backend_chosen_inside_compile():
    def portable(*tensors):
        with mi.backend("portable"):
            return mi.interaction(*tensors)

    recorder = Recorder()
    torch.compile(portable, backend=recorder.backend, **COMPILE)(*Sample(ODD).arguments(torch.float32))
    assert recorder.names == [["interaction_portable"]]


BACKENDS_INSIDE = """
import torch
import mi_kernels as mi

def function(x, z, w):
    with mi.backend("portable"):
        return mi.interaction(x, z, w)

def names(function, *tensors):
    with torch.profiler.profile() as recorded:
        function(*tensors).sum().backward()
    return {event.name for event in recorded.events() if event.name.startswith("mi_kernels::interaction")}

compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
every = torch.compile(lambda *tensors: mi.interaction(*tensors), backend="aot_eager", fullgraph=True)
for rows in (5, 5, 7, 5):
    tensors = [torch.randn(s, requires_grad=True) for s in ((rows, 3), (rows, 4), (6, 4, 3))]
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert all(name.endswith("_portable") for name in names(compiled, *tensors)), names(compiled, *tensors)
    torch.testing.assert_close(every(*tensors), mi.interaction(*tensors))
    assert names(every, *tensors) == names(mi.interaction, *tensors)
"""


def test_backend_chosen_inside_compile_again_and_again():
    """In a process that has chosen none before: the second call and other functions run as the first did."""
    subprocess.run([sys.executable, "-c", BACKENDS_INSIDE], check=True, timeout=300)


def test_backend_chosen_outside_compile():
    """A compiled function follows the choice at each call, although its graph was made under another one."""
    recorder = Recorder()
    compiled = torch.compile(mi.interaction, backend=recorder.backend, **COMPILE)
    arguments = Sample(ODD).arguments(torch.float32)
    for name in ("portable", "reference", "portable", "auto"):
        with mi.backend(name):
            compiled(*arguments)
    automatic = "interaction" if backends.why_not("cpu") is None else "interaction_portable"
    assert recorder.names == [["interaction_portable"], [], [automatic]]


def test_backend_chosen_for_the_first_time_after_compiling(monkeypatch):
    """In a thread that has chosen no backend before, as after the import."""
    monkeypatch.setattr(backends, "_selected", backends._Selected())
    recorder = Recorder()
    compiled = torch.compile(mi.interaction, backend=recorder.backend, **COMPILE)
    arguments = Sample(ODD).arguments(torch.float32)
    compiled(*arguments)
    with mi.backend("reference"):
        compiled(*arguments)
    assert [len(graph) for graph in recorder.graphs] == [1, 0]


def test_errors_inside_compile_are_those_of_eager():
    x, z, w, *_ = Sample(ODD).arguments(torch.float32)
    compiled = torch.compile(mi.interaction, backend="eager")
    with pytest.raises(Exception, match="interaction: weight: expected shape"):
        compiled(x, z, w[:, :1])


def test_compiled_training_step(place):
    torch.manual_seed(0)
    eager = mi.nn.MultiplicativeInteraction(7, context_features=3, out_features=11, device=place.device)
    twin = copy.deepcopy(eager)
    x, z, *_ = Sample(ODD).arguments(torch.float32, place.device)
    for layer, run in ((eager, eager), (twin, torch.compile(twin, **COMPILE))):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            run(x, z).pow(2).mean().backward()
            optimizer.step()
    torch.testing.assert_close(
        dict(twin.named_parameters()), dict(eager.named_parameters()), rtol=1e-5, atol=1e-6
    )


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3, 5))
        self.bias = torch.nn.Parameter(torch.randn(4))

    def forward(self, x, z):
        return mi.interaction(x, z, self.weight, bias=self.bias).relu()


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_dynamic_batch(strict, place):
    model = Model().to(place.device)
    batch = torch.export.Dim("batch", min=2)

    def inputs(rows):
        return torch.randn(rows, 5, device=place.device), torch.randn(rows, 3, device=place.device)

    program = torch.export.export(model, inputs(6), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)

    def names(program):
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        ours = [t for t in targets if getattr(t, "namespace", "").startswith("mi_kernels")]
        return [t.__name__.removesuffix(".default") for t in ours]

    assert names(program) == ["differentiable_interaction"]
    assert names(program.run_decompositions()) == suffixed(["interaction"], place)
    for rows in (2, 9, 300):
        arguments = inputs(rows)
        torch.testing.assert_close(program.module()(*arguments), model(*arguments), rtol=0, atol=0)


# What torch.library.opcheck runs each operation on. A new operation without an entry fails below; those of
# the gates and norms have theirs in test_gates.py, test_modulate.py and test_norm_calls.py.
ELSEWHERE = {"diagonal", "gated_interaction", "modulate", "modulate_grads", "norm_modulate_grads"}


def _forward_samples(dtype):
    for terms in (ALL_TERMS, WEIGHT_ONLY, (False, True, True, True)):
        yield Sample(ODD, terms).arguments(dtype)
    yield Sample(ODD, layout="transposed").arguments(dtype)
    yield tuple(torch.stack([t, t]) for t in Sample(ODD).arguments(dtype))


def _packed_samples(dtype):
    x, z, weight, *others = Sample(Shape("long-context", (24,), 30, 5, 7)).arguments(dtype)
    yield x, z, weight, mi.pack(weight).packed(), *others


def _input_grads_samples(dtype):
    grad = Sample(ODD).cotangent(dtype)
    for wants in ((True, True), (True, False), (False, True)):
        yield grad, *Sample(ODD).arguments(dtype)[:5], *wants
    grouped = [torch.stack([t, t]) for t in (grad, *Sample(ODD).arguments(dtype)[:5])]
    yield *grouped, True, True


def _weight_grads_samples(dtype):
    x, z, *_ = Sample(ODD).arguments(dtype)
    grad = Sample(ODD).cotangent(dtype)
    for wants in (
        (True,) * 4,
        (True, False, False, False),
        (False, True, True, False),
        (False, False, False, True),
    ):
        yield grad, x, z, *wants
    yield *(torch.stack([t, t]) for t in (grad, x, z)), True, True, True, True


def _differentiable_samples(dtype):
    yield "portable", *Sample(ODD).arguments(dtype, requires_grad=True), None, None, None, None
    tokens = Sample(Shape("tokens", (3, 4), 5, 6, 6, context_batch=(3, 1)))
    yield "portable", *tokens.arguments(dtype, requires_grad=True), None, None, None, None
    ragged = TINY_RAGGED.arguments(dtype, requires_grad=True)
    yield "portable", *ragged, TINY_RAGGED.segment_ids(), None, None, None


def _differentiable_rows_samples(dtype):
    yield "portable", *Sample(ODD).arguments(dtype, requires_grad=True), None


def _differentiable_gate_samples(dtype):
    x, z, w, *others = GateSample("gated_interaction", GATE_ODD, "WUVc").arguments(dtype, requires_grad=True)
    yield "portable", "tanh", 0.0, x, z, w, *others, None, None


def _differentiable_modulate_samples(dtype):
    yield "portable", *TOKENS.arguments(dtype, requires_grad=True), "silu", 0.5


def _good(name):
    return lambda dtype: (
        tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)
        for arguments in direct.GOOD[name]()
    )


SAMPLES = {
    "differentiable_interaction": _differentiable_samples,
    "differentiable_interaction_rows": _differentiable_rows_samples,
    "differentiable_gate": _differentiable_gate_samples,
    "differentiable_modulate": _differentiable_modulate_samples,
    "interaction": _forward_samples,
    "interaction_packed": _packed_samples,
    "interaction_input_grads": _input_grads_samples,
    "interaction_weight_grads": _weight_grads_samples,
}
SAMPLES |= {
    name: _good(name)
    for name in (
        "interaction_by_segment",
        "interaction_by_segment_input_grads",
        "interaction_by_segment_weight_grads",
        "differentiable_interaction_by_segment",
        "segment_order",
        "cpu_linear",
        "cpu_linear_add",
        "cpu_linear_grads",
        "cpu_biaffine",
        "differentiable_biaffine",
        "dual_linear",
        "dual_linear_grads",
        "differentiable_dual_linear",
        "mix",
        "mix_grads",
        "differentiable_mix",
        "norm_modulate",
        "differentiable_norm_modulate",
        "recurrent",
        "differentiable_recurrent",
        "differentiable_third_order",
    )
}

# c is kept in the accumulation dtype.
SAMPLES["recurrent_grads"] = lambda dtype: (grads for _, grads, _ in recurrent_calls(dtype))
SAMPLES["recurrent_tangents"] = lambda dtype: (tangents for *_, tangents in recurrent_calls(dtype))


def registered_operations():
    """Names of this package's operations with tensors as results, read from the dispatcher."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("mi_kernels::")]
    on_tensors = [s for s in schemas if any("Tensor" in str(result.type) for result in s.returns)]
    names = {s.name.removeprefix("mi_kernels::") for s in on_tensors}
    # Without a GPU Triton's twins run under its interpreter alone, in a process of their own.
    runnable = {name for name in names if backends.why_not("triton") is None or not name.endswith("_triton")}
    return sorted(name for name in runnable if plain(name) not in ELSEWHERE)


def test_operations_are_found():
    assert set(SAMPLES) <= set(registered_operations())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", registered_operations())
def test_opcheck(name, dtype):
    operation = getattr(torch.ops.mi_kernels, name).default
    for arguments in SAMPLES[plain(name)](dtype):
        assert set(torch.library.opcheck(operation, arguments).values()) == {"SUCCESS"}
