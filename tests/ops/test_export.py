"""What leaves Python: torch.export, torch.jit.trace, ONNX, AOTInductor."""

import io
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from calls import CALLS
from torch import nn
from torch.export import Dim
from torch.utils.cpp_extension import include_paths, library_paths

import mi_kernels as mi
from mi_kernels import backends, cli, libraries
from mi_kernels.testing.samples import ODD, Sample

every_call = pytest.mark.parametrize("name", CALLS)
pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("fresh_compiler")]
# Those that round at other places while something compiles: plain PyTorch code, and rows with a layer each.
OTHERWISE = ("modulate", "mix", "norm", "norm-residual", "diagonal-shared", "segments-generated")


class Model(nn.Module):
    """A call with its weights as parameters."""

    def __init__(self, name, device, dtype=torch.float32):
        super().__init__()
        self.call = CALLS[name]
        tensors = [tensor.detach() for tensor in self.call.arguments(dtype, device)]
        self.inputs = tuple(tensors[:2])
        self.weights = nn.ParameterList(tensors[2:])

    def forward(self, x, z):
        return self.call(x, z, *self.weights)


def trained(module, inputs):
    """What a module computes and the gradients of its parameters."""
    module.zero_grad()
    y = module(*inputs)
    y.sin().sum().backward()
    return y.detach(), *[parameter.grad for parameter in module.parameters()]


def check(found, model, name):
    tolerances = {"rtol": 1e-5, "atol": 1e-6} if name in OTHERWISE else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, trained(model, model.inputs), **tolerances)


@every_call
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_train(strict, name, place):
    model = Model(name, place.device)
    program = torch.export.export(model, model.inputs, strict=strict)
    check(trained(program.module(), model.inputs), model, name)


def test_saved_programs_train(place):
    model = Model("interaction", place.device)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, model.inputs), file)
    file.seek(0)
    check(trained(torch.export.load(file).module(), model.inputs), model, "interaction")


def test_exported_programs_have_second_derivatives(place):
    model = Model("interaction", place.device, torch.float64)
    program = torch.export.export(model, model.inputs).module()

    def penalty(module):
        x, z = (tensor.clone().requires_grad_() for tensor in model.inputs)
        (dx,) = torch.autograd.grad(module(x, z).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), [x, z, *module.parameters()], allow_unused=True)

    torch.testing.assert_close(penalty(program), penalty(model))


class Shared(nn.Module):
    """Contexts that rows share, in one of the ways."""

    def __init__(self, kind, device):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(7, 3, 5, device=device))

    def forward(self, x, z):
        if self.kind == "pairs":
            return mi.interaction(x[:, :, None], z[:, None], self.weight)
        if self.kind == "generated":
            weight, _ = mi.generate(z, self.weight)
            return mi.apply_generated(x, weight[:, None])
        return mi.interaction(x, z[:1, None] if self.kind == "one" else z[:, None], self.weight)

    def inputs(self, samples, tokens, contexts):
        leading = (samples, contexts) if self.kind == "pairs" else (samples,)
        device = self.weight.device
        return torch.randn(samples, tokens, 5, device=device), torch.randn(*leading, 3, device=device)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "pairs", "one", "generated"])
def test_one_program_for_all_sizes(kind, strict, place):
    """No size is fixed, whichever plan is the best for the example."""
    model = Shared(kind, place.device)
    samples, tokens, contexts = (Dim(name, min=2, max=4096) for name in ("samples", "tokens", "contexts"))
    dims = {0: samples, 1: tokens}, {0: samples, 1: contexts} if kind == "pairs" else {0: samples}
    program = torch.export.export(model, model.inputs(3, 4, 6), strict=strict, dynamic_shapes=dims)
    for runnable in (program.module(), program.run_decompositions().module()):
        for sizes in ((2, 2, 2), (5, 70, 3), (40, 2, 50)):
            inputs = model.inputs(*sizes)
            torch.testing.assert_close(runnable(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@every_call
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_train(name, place):
    """torch.jit.trace compares its graph with that of a second run; TensorBoard's add_graph traces too."""
    model = Model(name, place.device)
    traced = torch.jit.trace(model, model.inputs)
    found = trained(traced, model.inputs)
    check(found, model, name)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(trained(torch.jit.load(file), model.inputs), found, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["interaction", "generated", "gated", "diagonal", "modulate"])
def test_traces_take_other_batches(name, place):
    model = Model(name, place.device)
    traced = torch.jit.trace(model, model.inputs)
    longer = [torch.cat([tensor, tensor]) for tensor in model.inputs]
    torch.testing.assert_close(traced(*longer), model(*longer))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "pairs", "one", "generated"])
def test_the_reference_takes_dynamic_sizes(kind, strict):
    with mi.backend("reference"):
        test_one_program_for_all_sizes(kind, strict, SimpleNamespace(device="cpu"))


@every_call
@pytest.mark.filterwarnings("ignore")
def test_onnx(name):
    """ONNX has no such operations, so the program is that of the reference, run here by onnxruntime."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = Model(name, "cpu").eval()
    program = torch.onnx.export(model, model.inputs, dynamo=True, verbose=False)
    torch.testing.assert_close(program(*model.inputs)[0], model(*model.inputs).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_converted_model():
    """Sizes stay free, as those of nn.Bilinear do."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.bilinear = nn.Bilinear(4, 6, 3)

        def forward(self, x, z):
            return self.bilinear(x, z).relu()

    model = mi.convert(Head())
    batch, inputs = {0: Dim("batch")}, (torch.randn(5, 4), torch.randn(5, 6))
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False, dynamic_shapes=(batch, batch))
    inputs = torch.randn(17, 4), torch.randn(17, 6)
    torch.testing.assert_close(program(*inputs)[0], model(*inputs).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_an_exported_program(capsys):
    """ONNX has none of our operations, so the program has to be exported in the reference form."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = Model("interaction", "cpu").eval()
    with mi.backend("reference"):
        plain = torch.export.export(model, model.inputs)
    program = torch.onnx.export(plain, dynamo=True, verbose=False)
    torch.testing.assert_close(program(*model.inputs)[0], model(*model.inputs).detach(), rtol=1e-4, atol=1e-5)
    kernels = torch.export.export(model, model.inputs)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="No ONNX function found for .*mi_kernels"):
        torch.onnx.export(kernels, dynamo=True, verbose=False)


def test_functionalize_is_refused(place):
    model = Model("linear", place.device)
    with pytest.raises(RuntimeError, match="Functionalize rule for custom_function_call"):
        torch.func.functionalize(model)(*model.inputs)


class Families(nn.Module):
    """A layer of each family, and weights by row, of what the C++ program below makes."""

    def __init__(self):
        super().__init__()
        self.interaction = mi.nn.MultiplicativeInteraction(8, context_features=3, out_features=8)
        self.norm = mi.nn.AdaLayerNorm(8, context_features=3)
        self.film = mi.nn.FiLM(8, context_features=3)
        self.glu = mi.nn.GLU(8, out_features=8)
        self.gate = mi.nn.GatedInteraction(8, context_features=3)
        self.lora = mi.nn.HyperLoRA(nn.Linear(8, 8), context_features=3, rank=2)
        self.recurrent = mi.nn.MultiplicativeLSTM(8, 8)
        self.biaffine = mi.nn.Biaffine(8, 8, 4)
        self.weight = nn.Parameter(torch.empty(3, 8, 3, 8))
        self.register_buffer("ids", torch.arange(6) // 2)
        for parameter in self.parameters():  # none is 0, as some are initialised
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x, z):
        y = self.glu(self.film(self.norm(self.interaction(x, z), z), z)).sin()
        y = mi.interaction(self.lora(self.gate(y, z), z), z, self.weight, weight_ids=self.ids)
        return self.biaffine(self.recurrent(y.unsqueeze(0))[0], x.unsqueeze(0))


def ramp(*sizes):
    return torch.linspace(-1, 1, math.prod(sizes)).reshape(sizes)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The path of a package of AOTInductor, and what it computes of `ramp`."""
    if backends.cpu_library_error() is not None:
        pytest.skip("no compiled library")
    folder = tmp_path_factory.mktemp("aotinductor")
    torch.manual_seed(0)
    model, given = Families().eval(), (ramp(6, 8), ramp(6, 3))
    with torch.no_grad():
        program = torch.export.export(model, given)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        torch.save((*given, model(*given)), folder / "tensors.pt")
    return path, folder / "tensors.pt"


LOADS = """
import sys, torch
{imports}
x, z, y = torch.load(sys.argv[1])
program = torch._inductor.aoti_load_package(sys.argv[2])
torch.testing.assert_close(program(x, z), y)
"""


def test_packages_of_aotinductor_need_the_import(package):
    """In a process of their own, and with nothing of the model but the package."""
    path, tensors = package

    def loaded(imports):
        command = [sys.executable, "-c", LOADS.format(imports=imports), tensors, path]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert loaded("import mi_kernels").returncode == 0, loaded("import mi_kernels").stderr
    assert "mi_kernels" in loaded("").stderr


RUNS = """
#include <dlfcn.h>
#include <cstdio>
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int, char** arguments) {
  if (dlopen(arguments[1], RTLD_NOW) == nullptr) return std::puts(dlerror()), 2;
  torch::inductor::AOTIModelPackageLoader program(arguments[2]);
  const auto y = program.run({at::linspace(-1, 1, 48).view({6, 8}), at::linspace(-1, 1, 18).view({6, 3})})[0];
  const auto flat = y.contiguous();
  for (int64_t i = 0; i < flat.numel(); ++i) std::printf("%.9g\\n", flat.const_data_ptr<float>()[i]);
}
"""


@pytest.mark.build
@pytest.mark.subprocess
def test_packages_of_aotinductor_run_without_python(package, tmp_path, capsys):
    """`python -m mi_kernels schemas`, compiled into a program, defines what the library has kernels for."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    path, tensors = package
    assert cli.main(["schemas"]) == 0
    (tmp_path / "schemas.cpp").write_text(capsys.readouterr().out)
    (tmp_path / "main.cpp").write_text(RUNS)
    places = [f"-I{folder}" for folder in include_paths()]
    places += [option for folder in library_paths() for option in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler, "-std=c++20", "-O0", "-w", abi, *places, "main.cpp", "schemas.cpp"]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl", "-o", "program"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run(
        [tmp_path / "program", libraries._LIBRARY, path], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    y = torch.load(tensors)[2]
    torch.testing.assert_close(torch.tensor([float(line) for line in ran.stdout.split()]), y.flatten())


def test_backends_are_named(place):
    operation = torch.ops.mi_kernels.differentiable_interaction
    x, z, *weights = Sample(ODD).arguments(torch.float32, place.device)
    with pytest.raises(ValueError, match="backend: expected one of cpu, cuda, portable, triton, got 'gpu'"):
        operation("gpu", x, z, *weights, None, None, None, None)
    with pytest.raises(
        ValueError, match=r"z: expected leading dimensions that broadcast with those of x \[5\], got \[4\]"
    ):
        operation(place.backend, x, z[:4], *weights, None, None, None, None)
