"""The layout for the kernels hub: it loads under any name, beside the package, with operations of its own."""

import ast
import base64
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import mi_kernels as mi
from tools import hub

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    output = tmp_path_factory.mktemp("hub") / "layout"
    hub.main([str(output)])
    return output


def variant(layout: Path, backend: str) -> Path:
    return layout / "build" / f"torch-{backend}"


def load(folder: Path) -> types.ModuleType:
    """As `kernels.get_kernel` does."""
    name = json.loads((folder / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def operands():
    generator = torch.Generator().manual_seed(0)
    sizes = (6, 5), (6, 3), (4, 3, 5), (4,)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in sizes]


def run(package):
    x, z, weight, bias = tensors = operands()
    y = package.interaction(x, z, weight, None, None, bias)
    first = torch.autograd.grad(y.sin().sum(), tensors, create_graph=True)
    return y, first, torch.autograd.grad(sum(g.cos().sum() for g in first), tensors[:3])


def test_two_builds_work_beside_the_package(layout):
    builds = [load(variant(layout, backend)) for backend in ("cpu", "cuda")]
    namespaces = {package.ops.namespace.NAMESPACE for package in (*builds, mi)}
    assert namespaces == {builds[0].__name__, builds[1].__name__, "mi_kernels"}
    expected = run(mi)
    for package in builds:
        assert package is not mi and package.interaction is not mi.interaction
        torch.testing.assert_close(run(package), expected, rtol=1e-12, atol=1e-12)
        names = {
            s.name.split("::")[1]
            for s in torch._C._jit_get_all_schemas()
            if s.name.startswith(package.__name__)
        }
        assert names == {
            s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if "mi_kernels::" in s.name[:12]
        }


def test_calls_of_a_build_reach_its_own_operations(layout):
    package = load(variant(layout, "cpu"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(package)
    names = {
        event.name.split("::")[0]
        for event in profile.events()
        if "mi_kernels" in event.name and "::" in event.name
    }
    assert names == {package.__name__}


@pytest.mark.compile
def test_a_build_compiles_without_graph_breaks(layout):
    package = load(variant(layout, "cpu"))
    x, z, weight, _ = operands()
    found = torch.compile(package.interaction, fullgraph=True, backend="aot_eager")(x, z, weight)
    torch.testing.assert_close(found, mi.interaction(x, z, weight), rtol=1e-12, atol=1e-12)


def test_modules_and_older_loaders(layout):
    package = load(variant(layout, "cpu"))
    layer = package.nn.GatedMLP(5, hidden_features=8)
    assert type(layer).__module__.startswith(package.__name__)
    layer(torch.randn(2, 5)).sum().backward()
    inner = variant(layout, "cpu") / "mi_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("an_older_loader", inner)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.interaction is package.interaction and module.nn is package.nn


def test_descriptions_fit_their_files(layout):
    found = sorted(path.name for path in (layout / "build").iterdir())
    assert found == sorted(f"torch-{backend}" for backend in hub.NOARCH)
    for folder in (layout / "build").iterdir():
        data = json.loads((folder / "metadata.json").read_text())
        assert data["id"].isidentifier() and data["backend"]["type"] == folder.name.removeprefix("torch-")
        files = {
            p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"
        }
        assert set(data["digest"]["files"]) == files - {"metadata.json"}
        for name, digest in data["digest"]["files"].items():
            assert base64.b64decode(digest) == hashlib.sha256((folder / name).read_bytes()).digest(), name
    text = (ROOT / "hub" / "build.toml").read_text()
    listed = re.search(r"^backends = \[(.*)\]$", text, re.M)[1]
    assert tuple(re.findall(r'"(\w+)"', listed)) == hub.NOARCH
    assert re.search(r'^name = "(.*)"$', text, re.M)[1] == hub.NAME
    kinds = {path.suffix for path in (layout / "torch-ext" / hub.PACKAGE).rglob("*") if path.is_file()}
    shipped = set(re.findall(r'"(\w+)"', re.search(r"^pyext = \[(.*)\]$", text, re.M)[1]))
    assert {kind.removeprefix(".") or "typed" for kind in kinds} <= shipped, (
        "files that the builder would leave out"
    )


def test_the_name_changes_with_the_sources(tmp_path):
    for part in ("mi_kernels", "csrc"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "file.py").write_text("1")
    (tmp_path / "CMakeLists.txt").write_text("")
    before = hub.unique(tmp_path)
    (tmp_path / "mi_kernels" / "built.so").write_text("not a source")
    assert hub.unique(tmp_path) == before
    (tmp_path / "csrc" / "file.py").write_text("2")
    assert hub.unique(tmp_path) != before
    assert hub.unique() == hub.unique(ROOT)


def test_imports_are_of_the_standard_library_torch_and_itself():
    """Of what is imported with the package; commands and rules import more when they are asked for."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in sorted((ROOT / "mi_kernels").rglob("*.py")):
        if {"demo", "rules", "testing"} & set(path.parts):
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.split(".")[0] for name in names} <= allowed, path


@pytest.mark.parametrize("name", ["thesis.txt", "build.toml", "metadata.json"])
def test_a_folder_with_other_files_is_not_replaced(tmp_path, capsys, name):
    (tmp_path / name).write_text("")
    for output in (tmp_path, tmp_path / name, ROOT / "hub"):
        with pytest.raises(SystemExit):
            hub.main([str(output)])
        assert "expected a new folder, or one that this has written" in capsys.readouterr().err
    assert (tmp_path / name).exists() and (ROOT / "hub" / "build.toml").exists()


def test_its_own_folder_is_written_anew(layout):
    left = layout / "build" / "torch-cpu" / "left.py"
    left.write_text("")
    hub.main([str(layout)])
    assert not left.exists() and (layout / "build.toml").exists()


def test_what_the_builder_builds_has_a_namespace_of_its_own(layout, tmp_path):
    """The builder adds `_ops.py`; here two builds of it."""
    packages = []
    for number in range(2):
        name = f"_mi_kernels_cuda_built{number}"
        folder = shutil.copytree(layout / "torch-ext" / "mi_kernels", tmp_path / name)
        (folder / "_ops.py").write_text(f"import torch\n\nops = torch.ops.{name}\n")
        (folder / "metadata.json").write_text(json.dumps({"id": name}))
        packages.append(load(folder))
        assert packages[-1].ops.namespace.NAMESPACE == name
    for package in packages:
        torch.testing.assert_close(run(package), run(mi), rtol=1e-12, atol=1e-12)


def test_files_that_git_does_not_have_stay_out(layout):
    have = {
        path.relative_to(layout / "torch-ext").as_posix() for path in (layout / "torch-ext").rglob("*.py")
    }
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "mi_kernels"], capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    assert have - {"mi_kernels/ops/build_facts.py"} == {n for n in listed.stdout.split() if n.endswith(".py")}


class Base:
    """What `kernels.benchmark.Benchmark` has."""

    seed, device = None, "cpu"

    def __init__(self):
        self.kernel = self.out = None


def test_each_workload_computes_what_its_reference_does(monkeypatch):
    stand_in = types.ModuleType("kernels.benchmark")
    stand_in.Benchmark = Base
    monkeypatch.setitem(sys.modules, "kernels", types.ModuleType("kernels"))
    monkeypatch.setitem(sys.modules, "kernels.benchmark", stand_in)
    spec = importlib.util.spec_from_file_location("benchmark_module", ROOT / "benchmarks" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    workloads = 0
    for cls in (
        one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__
    ):
        for name in (name.removeprefix("benchmark_") for name in vars(cls) if name.startswith("benchmark_")):
            torch.manual_seed(cls.seed)
            one = cls()
            one.kernel = mi
            getattr(one, f"setup_{name}")()
            getattr(one, f"benchmark_{name}")()
            torch.testing.assert_close(one.out, getattr(one, f"verify_{name}")(), rtol=1e-4, atol=1e-4)
            workloads += 1
    assert workloads >= 4


def test_the_loader_of_the_hub_takes_it(layout):
    kernels = pytest.importorskip(
        "kernels", reason="the loader of the hub is not installed: pip install kernels"
    )
    from kernels._rust import Build

    assert [str(one) for one in Build.open(str(layout)).general.backends]
    package = kernels.get_local_kernel(layout / "build")
    torch.testing.assert_close(run(package), run(mi), rtol=1e-12, atol=1e-12)
