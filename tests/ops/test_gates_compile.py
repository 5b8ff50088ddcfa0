"""Gates and modulation under torch.compile and torch.export."""

import pytest
import torch
import torch.nn.functional as F
from helpers import COMPILE, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import mi_kernels as mi
from mi_kernels.testing.samples import GATE_MIDDLE, GATE_TERMS, MAPS, TOKENS, GateSample, Modulation, Shape

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("fresh_compiler")]


def close(found, expected, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "gelu_tanh", "softmax"])
@pytest.mark.parametrize("sample", [TOKENS, MAPS], ids=str)
def test_compiled_modulation(sample, name, dtype, place):
    def function(x, scale, shift):
        return mi.modulate(torch.sin(x), scale, shift, activation=name, scale_offset=1.0) * 2

    arguments = sample.arguments(dtype, place.device)
    compiled = torch.compile(function, backend="aot_eager" if name == "softmax" else "inductor", **COMPILE)
    close(with_gradients(compiled, arguments), with_gradients(function, arguments), dtype)


@pytest.mark.parametrize("op", GATE_TERMS)
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_compiled_gates(op, name, place):
    sample = GateSample(op, GATE_MIDDLE, GATE_TERMS[op], activation=name)

    def function(x, z, *weights):
        if op == "diagonal":
            *weights, g = weights
            return mi.diagonal(torch.sin(x), z, *weights, weight_x=g, activation=name)
        return mi.gated_interaction(torch.sin(x), z, *weights, activation=name)

    arguments = sample.arguments(torch.float64, place.device)
    compiled = torch.compile(function, backend="aot_eager" if name == "softmax" else "inductor", **COMPILE)
    close(with_gradients(compiled, arguments), with_gradients(function, arguments), torch.float64)


@pytest.mark.parametrize("op", [*GATE_TERMS, "modulate"])
def test_batch_size_does_not_recompile(op, place):
    """One graph serves all batch sizes from 2 on, with the gradients."""
    counter = CompileCounterWithBackend("aot_eager")
    function = getattr(mi, op)
    compiled = torch.compile(function, backend=counter, **COMPILE)
    frames = []
    for batch in (7, 2, 16, 33):
        if op == "modulate":
            sample = Modulation("", (batch, 5, 4), (batch, 1, 4), (4,))
        else:
            sample = GateSample(op, Shape("", (batch,), 3, 5, 5), GATE_TERMS[op])
        arguments = sample.arguments(torch.float64, place.device)[:6]  # weight_x has no position
        close(with_gradients(compiled, arguments), with_gradients(function, arguments), torch.float64)
        frames.append(counter.frame_count)
    # scale_offset, a number, makes Dynamo start anew once, before there is a first graph.
    assert frames[-1] == frames[0] <= 2


def test_shared_contexts_decompose(place):
    """One context per sequence: PyTorch's products and elementwise code, none of our operations."""
    x, z = torch.randn(4, 6, 5, device=place.device), torch.randn(4, 1, 3, device=place.device)
    weights = [torch.randn(*size, device=place.device) for size in ((5, 3), (5,), (5, 3), (5,))]
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    def function(x, z):
        return mi.diagonal(x, z, *weights, activation="sigmoid")

    torch.testing.assert_close(torch.compile(function, backend=backend, fullgraph=True)(x, z), function(x, z))
    assert "mi_kernels" not in graphs[0].code and "sigmoid" in graphs[0].code


def block(x, scale, shift):
    return x + mi.modulate(F.layer_norm(x, x.shape[-1:]), scale, shift, scale_offset=1.0)


def test_norm_modulation_and_residual_are_one_kernel():
    """layer_norm -> modulate -> residual: Inductor generates one loop nest for all of it."""
    x = torch.randn(4, 16, 64)
    scale, shift = torch.randn(2, 4, 1, 64).unbind()
    found, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x, scale, shift)
    torch.testing.assert_close(found, block(x, scale, shift), rtol=1e-5, atol=1e-5)
    assert code.count('extern "C"') == 1
    assert "mi_kernels" not in code


def test_export(place):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.film = mi.nn.FiLM(4, context_features=3, device=place.device)
            self.gate = mi.nn.GatedInteraction(4, context_features=3, device=place.device)

        def forward(self, x, z):
            return self.gate(self.film(x, z), z)

    model, x, z = Model(), torch.randn(5, 4, device=place.device), torch.randn(5, 3, device=place.device)
    exported = torch.export.export(model, (x, z), dynamic_shapes=({0: torch.export.Dim("b")},) * 2)
    torch.testing.assert_close(exported.module()(x[:3], z[:3]), model(x[:3], z[:3]))


def test_jvp_of_a_compiled_function(place):
    x, scale, shift = TOKENS.arguments(torch.float64, place.device)

    def function(scale):
        return torch.func.jvp(lambda s: mi.modulate(x, s, shift, activation="tanh"), (scale,), (scale,))[1]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scale), function(scale), rtol=1e-12, atol=1e-12)
