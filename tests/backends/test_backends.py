"""The choice of a backend, and the package without its compiled library."""

import shutil
import subprocess
import sys
import threading
import warnings
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import Spy

import mi_kernels as mi
from mi_kernels import backends, doctor, libraries
from mi_kernels.testing.samples import ODD, Sample

CPU_IS_BUILT = backends.why_not("cpu") is None
needs_cpu = pytest.mark.skipif(not CPU_IS_BUILT, reason=f"backend cpu cannot run: {backends.why_not('cpu')}")
AUTO = "interaction" if CPU_IS_BUILT else "interaction_portable"


def called(dtype=torch.float32):
    """The operations that an interaction runs."""
    with Spy() as spy:
        mi.interaction(*Sample(ODD).arguments(dtype))
    return spy.raw


def test_automatic_choice():
    assert called() == [AUTO]
    assert called(torch.int64) == ["interaction_portable"]


def test_nesting_and_restoring():
    with mi.backend("portable"):
        assert called() == ["interaction_portable"]
        with mi.backend("reference"):
            assert called() == []
            with mi.backend("auto"):
                assert called() == [AUTO]
            assert called() == []
        assert called() == ["interaction_portable"]
    assert called() == [AUTO]


def test_exceptions_restore():
    with pytest.raises(KeyError), mi.backend("reference"):
        raise KeyError
    assert called() == [AUTO]
    with pytest.raises(ValueError), mi.backend("portable"):
        mi.interaction(torch.ones(2, 3), torch.ones(3, 3), torch.ones(1, 3, 3))
    assert called() == [AUTO]


def test_threads_choose_for_themselves():
    seen = {}
    with mi.backend("reference"):
        thread = threading.Thread(target=lambda: seen.update(inner=called()))
        thread.start()
        thread.join()
        assert called() == []
    assert seen == {"inner": [AUTO]}


def test_one_choice_in_several_threads():
    """Each thread comes back to what it had, in whichever order they leave."""
    choice, inside, left = mi.backend("portable"), threading.Event(), threading.Event()
    seen = {}

    def other():
        with choice:
            inside.set()
            left.wait()
            seen["inside"] = called()
        seen["after"] = called()

    thread = threading.Thread(target=other)
    with mi.backend("reference"):
        with choice:
            thread.start()
            inside.wait()
        assert called() == []
        left.set()
        thread.join()
    assert seen == {"inside": ["interaction_portable"], "after": [AUTO]}


def test_as_a_decorator():
    assert mi.backend("portable")(called)() == ["interaction_portable"]


@pytest.mark.parametrize("name", ["gpu", "", "CPU", None, 3])
def test_unknown_name(name):
    message = "^backend: expected one of auto, reference, portable, cpu, triton, cuda, got "
    with pytest.raises(ValueError, match=message + repr(name)), mi.backend(name):
        pass
    assert called() == [AUTO]


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_backend_that_cannot_run_says_why(name):
    reason = backends.why_not(name)
    if reason is None:
        with mi.backend(name):
            pass
        return
    assert len(reason) > 10
    with pytest.raises(ValueError, match=f"^backend: '{name}' cannot run: .+"), mi.backend(name):
        pass


@needs_cpu
def test_cpu_refuses_what_it_cannot_take():
    with mi.backend("cpu"):
        with pytest.raises(ValueError, match="^backend: 'cpu' takes torch.float64, .*, got torch.int64$"):
            called(torch.int64)
        meta = [torch.empty(sizes, device="meta") for sizes in ODD.sizes()]
        with pytest.raises(ValueError, match="^backend: 'cpu' takes tensors on cpu, got device meta$"):
            mi.interaction(*meta)


def test_meta_tensors_have_shapes():
    meta = [torch.empty(sizes, device="meta") for sizes in ODD.sizes()]
    y = mi.interaction(*meta)
    assert y.device.type == "meta" and y.shape == (5, 11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_backends_agree(dtype):
    results = []
    for name in ("reference", "portable", "cpu", "auto"):
        if backends.why_not(name) is None:
            with mi.backend(name):
                results.append(mi.interaction(*Sample(ODD).arguments(dtype)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


SCRIPT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mi_kernels as mi
    from mi_kernels import backends
    import torch
    x = torch.ones(4, 5, requires_grad=True)
    for _ in range(3):
        y = mi.interaction(x, torch.ones(4, 3), torch.ones(2, 3, 5))
    y.sum().backward()
about = [w for w in caught if "mi_kernels" in str(w.message)]
assert len(about) == 1 and issubclass(about[0].category, RuntimeWarning), caught
assert "portable" in str(about[0].message), about[0].message
assert about[0].filename == "<string>", about[0].filename
assert y.eq(15).all() and x.grad.eq(6).all()
assert "not built" in backends.why_not("cpu")
try:
    with mi.backend("cpu"):
        pass
except ValueError as error:
    assert "not built" in str(error), error
else:
    raise AssertionError("backend cpu was accepted")
print(mi.__file__)
"""


def without_native_parts(target: Path) -> Path:
    source = Path(mi.__file__).parent
    shutil.copytree(source, target / "mi_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


@pytest.mark.subprocess
def test_import_without_the_compiled_library(tmp_path):
    root = without_native_parts(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().startswith(str(root)), "another copy of the package was imported"


@pytest.mark.subprocess
def test_import_with_a_broken_library(tmp_path):
    root = without_native_parts(tmp_path)
    (root / "mi_kernels" / "libmi_kernels_cpu.so").write_bytes(b"no library")
    script = SCRIPT.replace("not built", "could not be loaded")
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("empty", ["x", "z", "out", "all"])
def test_explain_of_zero_sizes(empty, place):
    rows, context, width, out = 2, 3, 4, 5
    if empty == "all":
        rows = context = width = out = 0
    width, context, out = (
        0 if empty == name else size for name, size in (("x", width), ("z", context), ("out", out))
    )
    weight = torch.ones(out, context, width, requires_grad=True)
    plan = mi.explain(mi.interaction, torch.ones(rows, width), torch.ones(rows, context), weight)
    assert plan.operations == 0


@pytest.mark.parametrize("empty", ["x", "z", "out", "rows"])
def test_explain_of_zero_sizes_without_a_product(empty, place):
    """The compiled planner cuts outputs into blocks, of which there are none."""
    sizes = {"rows": 60, "z": 3, "x": 4, "out": 5} | {empty: 0}
    rows, context, width, out = sizes.values()
    u, v = torch.ones(out, context, requires_grad=True), torch.ones(out, width)
    x, z = torch.ones(rows, width, requires_grad=True), torch.ones(rows, context, requires_grad=True)
    for terms in ((u, None), (None, v), (u, v)):
        plan = mi.explain(mi.interaction, x, z, None, *terms)
        assert plan.op == "forward" and plan.backward[0].op == "input_grads"


@pytest.mark.parametrize("empty", ["x", "z", "rows"])
def test_explain_of_gates_of_zero_sizes(empty, place):
    """As above: a gate has as many outputs as features."""
    sizes = {"rows": 60, "z": 3, "x": 4} | {empty: 0}
    rows, context, width = sizes.values()
    x, z = torch.ones(rows, width, requires_grad=True), torch.ones(rows, context, requires_grad=True)
    w, u, v = torch.ones(width, context, width), torch.ones(width, context), torch.ones(width, width)
    for terms in ((w, None, None), (None, u, None), (None, None, v), (w, u, v)):
        assert mi.explain("gated_interaction", x, z, *terms).op == "gated_interaction"
    for terms in ((u,), (u, None, u)):
        assert mi.explain("diagonal", x, z, *terms).op == "diagonal"


def test_a_backend_is_checked_when_it_is_named():
    with pytest.raises(ValueError, match="expected one of .*, got 'foo'"):
        mi.backend("foo")


def test_explain_names_the_operation_in_its_complaints():
    with pytest.raises(TypeError, match="explain: bilinear: missing a required argument: 'input2'"):
        mi.explain(mi.bilinear, torch.ones(2, 3))


@pytest.mark.skipif(backends.interpreting(), reason="the interpreter needs no GPU")
@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
def test_triton_says_which_gpus_it_needs(monkeypatch):
    best = {"capability": (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(libraries, "best_capability", lambda: best["capability"])
    with pytest.raises(ValueError, match="'triton' cannot run: .* 8.0 or later, the best one here has 7.5"):
        mi.backend("triton")
    best["capability"] = (8, 0)
    assert backends.why_not("triton") is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert backends.why_not("triton") is None  # of AMD: only `verify` can tell
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU that Triton reaches" in backends.why_not("triton")


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["80", "90a"], (8, 0), True),
        (["80", "90a"], (12, 0), True),
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["80"], (7, 5), False),
        ([], (9, 0), False),
    ],
)
def test_cuda_says_which_gpus_it_was_built_for(built, capability, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(libraries, "best_capability", lambda: capability)
    monkeypatch.setattr(libraries, "cuda_architectures", lambda: built)
    monkeypatch.setattr(libraries, "cuda_error", None)
    reason = backends.why_not("cuda")
    assert reason is None if runs else ("was built for" if built else "build it again") in reason


def test_doctor_knows_libraries_without_their_facts(monkeypatch):
    """They run all the same, so that nothing may say that they were not built, or built for nothing."""
    monkeypatch.setattr(libraries, "build_info", lambda: None)
    monkeypatch.setattr(backends, "cpu_library_error", lambda: None)
    monkeypatch.setattr(libraries, "cuda_architectures", lambda: ["90a"])
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    text = doctor.as_text()
    assert "libraries are loaded" in text and "not built" not in text and "runs (built for 90a)" in text
    monkeypatch.setattr(backends, "cpu_library_error", lambda: "a reason")
    assert "not built" in doctor.as_text()


def test_a_backend_without_a_block_warns():
    """It selects nothing, and says so where it is dropped, at the user's line."""
    with pytest.warns(RuntimeWarning, match=r"mi_kernels.backend\('portable'\) selected nothing") as caught:
        mi.backend("portable")
        assert called() == [AUTO]
    assert caught[0].filename == __file__


def test_a_backend_that_was_used_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mi.backend("portable"):
            pass
        mi.backend("portable")(called)()
        with ExitStack() as stack:
            stack.enter_context(mi.backend("portable"))
        with pytest.raises(ValueError):
            mi.backend("gpu")


def test_a_selection_can_be_nested_in_itself():
    selection = mi.backend("reference")
    with selection:
        with selection:
            assert called() == []
        assert called() == []
    assert called() == [AUTO]


@pytest.mark.compile
def test_a_block_inside_of_a_compiled_function(fresh_compiler):
    def function(x, z, weight):
        with mi.backend("reference"):
            y = mi.interaction(x, z, weight)
        return y + mi.interaction(x, z, weight)

    arguments = Sample(ODD).arguments(torch.float64)[:3]
    with Spy() as spy:
        expected = function(*arguments)
    assert spy.raw == [AUTO]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*arguments), expected)
