"""mi.patch: unchanged programs run on these kernels, as before to rounding; and it can be undone."""

import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import mi_kernels as mi

# In a tuple: a patch would replace it in a global variable of a module.
TORCH = (F.bilinear,)


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert F.bilinear is torch.bilinear is TORCH[0], "a test left a patch"


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Bilinear(4, 3, 5, dtype=torch.float64)


def pair(*leading, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*leading, n, dtype=dtype, generator=generator).requires_grad_(grad) for n in (4, 3)]


def run(call, tensors):
    y = call(*tensors)
    first = torch.autograd.grad(y.sin().sum(), tensors, create_graph=True)
    return y, first, torch.autograd.grad(sum(g.cos().sum() for g in first), tensors)


@pytest.mark.parametrize("leading", [(), (6,), (2, 6), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_pytorch(layer, leading, bias):
    inputs = pair(*leading)
    tensors = [*inputs, layer.weight, *([layer.bias] if bias else [])]
    expected = run(F.bilinear, tensors)
    with mi.patched() as patch:
        found = run(F.bilinear, tensors)
    assert patch.taken == 1 and not patch.refused
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_model_that_exists_runs_on_the_kernels_until_the_block_ends(layer):
    x, z = pair(6)
    assert "mi_kernels" not in type(layer).__module__
    with mi.patched() as patch:
        patched = layer(x, z)
    assert patched.grad_fn.name() != layer(x, z).grad_fn.name()
    assert patch.taken == 1, "a call after the block was counted"


def test_a_subclass_of_the_layer_is_taken_too():
    class Doubled(nn.Bilinear):
        def forward(self, input1, input2):
            return 2 * super().forward(input1, input2)

    layer, tensors = Doubled(4, 3, 5).double(), pair(6)
    expected = layer(*tensors)
    with mi.patched() as patch:
        torch.testing.assert_close(layer(*tensors), expected, rtol=1e-12, atol=1e-12)
    assert patch.taken == 1


def test_patches_overlap_and_are_undone_in_any_order(layer):
    tensors = pair(6)
    first, second = mi.patch(), mi.patch()
    layer(*tensors)
    first.remove()
    layer(*tensors)
    assert F.bilinear is not TORCH[0]
    second.remove()
    second.remove()
    layer(*tensors)
    assert (first.taken, second.taken) == (1, 2)
    assert "removed" in repr(second) and "taken=2" in repr(second)


def test_a_patch_ends_with_an_error(layer):
    with pytest.raises(KeyError), mi.patched():
        raise KeyError
    assert F.bilinear is TORCH[0]


def test_modules_that_have_imported_the_function_get_it_too(monkeypatch, layer):
    module = types.ModuleType("a_users_module")
    module.score = TORCH[0]
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    with mi.patched() as patch:
        module.score(*pair(6), layer.weight)
        later = types.ModuleType("imported_meanwhile")
        later.bilinear = F.bilinear
        monkeypatch.setitem(sys.modules, "imported_meanwhile", later)
    assert patch.taken == 1 and module.score is later.bilinear is TORCH[0]


def test_the_function_of_another_package_is_not_replaced(monkeypatch):
    def bilinear(*arguments):
        return TORCH[0](*arguments)

    monkeypatch.setattr(F, "bilinear", bilinear)
    message = rf"patch: expected torch\.nn\.functional\.bilinear to be PyTorch's own, got .* {__name__}"
    with pytest.raises(RuntimeError, match=message):
        mi.patch()
    assert torch.bilinear is TORCH[0] and F.bilinear is bilinear
    monkeypatch.undo()


class Marked(torch.Tensor):
    pass


def odd(name, layer):
    """Arguments whose result could be another one, and the reason given."""
    x, z = pair(6, grad=False)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    return {
        "subclass": ([x.as_subclass(Marked), z, weight, bias], "no plain tensor"),
        "complex": ([t.to(torch.complex128) for t in (x, z, weight, bias)], "dtype is torch.complex128"),
        "mixed": ([x.float(), z, weight, bias], "dtypes differ"),
        "broadcast": ([x, z[0], weight, bias], "PyTorch refuses"),
        "sizes": ([x, z[:, :2], weight, bias], "PyTorch refuses"),
        "rank": ([x, z, weight[0], bias], "PyTorch refuses"),
        "scalar": ([x, z, weight, bias[0]], "bias broadcasts"),
        "sparse": ([x.to_sparse(), z, weight, bias], "not dense"),
        "meta": ([x, z, weight.to("meta"), bias], "devices differ"),
        "nothing": ([x[:, :0], z, weight[:, :0], bias], "PyTorch refuses"),
    }[name]


NAMES = "subclass complex mixed broadcast sizes rank scalar sparse meta nothing".split()


def outcome(arguments):
    try:
        return F.bilinear(*arguments)
    except (RuntimeError, NotImplementedError, IndexError) as error:
        return type(error), str(error).splitlines()[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_is_not_safe_is_left_to_pytorch_and_says_why(layer, name):
    arguments, reason = odd(name, layer)
    expected = outcome(arguments)
    with mi.patched() as patch:
        found = outcome(arguments)
    assert patch.taken == 0 and [reason in text for text in patch.refused] == [True]
    if isinstance(expected, torch.Tensor):
        assert type(found) is type(expected) and found.device == expected.device
        assert name == "meta" or torch.equal(found, expected)  # PyTorch returns uninitialised memory for it
    else:
        assert found == expected


def test_dtypes_under_autocast_are_those_of_pytorch():
    """And values those of float32: PyTorch rounds what is inside of it to bfloat16."""
    layer, tensors = nn.Bilinear(4, 3, 5), pair(6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(*tensors).dtype == torch.float32
        with mi.patched() as patch:
            found = layer(*tensors)
    assert patch.taken == 1 and found.dtype == torch.float32
    torch.testing.assert_close(found, layer(*tensors))


@pytest.mark.parametrize("how", ["trace", "script", "export", "strict"])
def test_programs_that_are_saved_do_not_need_this_package(layer, how):
    tensors = [t.detach() for t in pair(6)]
    expected = layer(*tensors)
    with mi.patched() as patch:
        if how == "trace":
            program = torch.jit.trace(layer, tensors, check_trace=False)
        elif how == "script":
            program = torch.jit.script(layer)
        else:
            exported = torch.export.export(layer, tuple(tensors), strict=how == "strict")
            program = exported.module()
    text = str(program.graph)
    assert "mi_kernels::" not in text and "mi_kernels." not in text.replace("mi_kernels.patch", "")
    assert "aten::bilinear" in text or "aten.bilinear" in text
    assert patch.taken == 0
    if how == "trace":  # under compilers nothing is counted
        assert set(patch.refused) == {"the call is recorded, to run without this package"}
    torch.testing.assert_close(program(*tensors), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.compile
def test_compiled_programs_hold_the_kernels(layer):
    tensors = pair(6)
    expected = run(layer, tensors)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    with mi.patched():
        compiled = torch.compile(layer, backend=keep, fullgraph=True)
        y = compiled(*tensors)
        with pytest.raises(Exception, match="patch: expected a call outside of torch.compile"):
            torch.compile(mi.patch, fullgraph=True)()
    assert "mi_kernels" in str(graphs[0].graph)
    torch.testing.assert_close(y, expected[0], rtol=1e-12, atol=1e-12)


def test_transforms_work_where_pytorch_has_no_rule(layer):
    x, z = pair(6, grad=False)
    with mi.patched() as patch:
        found = torch.func.vmap(lambda a, b: F.bilinear(a, b, layer.weight, layer.bias))(x, z)
    assert patch.taken == 1
    torch.testing.assert_close(found, layer(x, z), rtol=1e-12, atol=1e-12)


def test_what_is_kept_from_the_time_of_a_patch_is_pytorch_again(layer):
    with mi.patched() as patch:
        kept = F.bilinear
    y = kept(*pair(6), layer.weight, layer.bias)
    assert (
        patch.taken == 0 and y.grad_fn.name() == F.bilinear(*pair(6), layer.weight, layer.bias).grad_fn.name()
    )


def test_a_block_can_be_entered_again(layer):
    patched = mi.patched()
    layer(*pair(6))
    for count in (1, 2):
        with patched, patched:
            layer(*pair(6))
        layer(*pair(6))
        assert patched.taken == count
    with mi.patch() as patch:
        layer(*pair(6))
    assert patch.taken == 1


class Seen(TorchFunctionMode):
    def __init__(self):
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_modes_see_the_function_once(layer):
    expected, tensors = layer(*pair(6)), pair(6)
    with mi.patched() as patch, Seen() as seen:
        y = layer(*tensors)
    assert seen.names.count("bilinear") == 1 and patch.taken == 1
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    with mi.patched() as patch, torch.device("cpu"):
        layer(*tensors)
    assert patch.taken == 1


def test_functionalize_is_left_to_pytorch(layer):
    tensors = [t.detach() for t in pair(6)]
    weight, bias = layer.weight.detach(), layer.bias.detach()
    with mi.patched() as patch:
        y = torch.func.functionalize(lambda x, z: F.bilinear(x, z, weight, bias))(*tensors)
    assert patch.taken == 0 and "functionalize" in next(iter(patch.refused))
    torch.testing.assert_close(y, layer(*tensors).detach(), rtol=1e-12, atol=1e-12)


def test_messages_and_help_name_the_function():
    with mi.patched():
        assert F.bilinear.__doc__ == TORCH[0].__doc__
        with pytest.raises(TypeError, match=r"^bilinear\(\) missing"):
            F.bilinear(torch.ones(2, 3))
