"""What PyTorch does with modules, done with every module of mi.nn: docs/guides/tools.md names these tests."""

import copy
import functools
import io
import pickle
from pathlib import Path

import every_module
import pytest
import torch
from calls import CALLS
from every_module import CASES, inputs, made, result
from helpers import Spy, plain
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mi_kernels as mi

pytestmark = pytest.mark.tools
every_module_of_nn = pytest.mark.parametrize("name", CASES)
trainable = pytest.mark.parametrize("name", [name for name in CASES if name != "BoundLinear"])  # it is frozen
DOUBLE = torch.float64
# One of each family, where every module would take long.
FAMILIES = (
    "MultiplicativeInteraction",
    "Biaffine",
    "LowRankInteraction",
    "DiagonalInteraction",
    "GLU",
    "HyperLinear",
)
FAMILIES += ("AdaLayerNorm", "MultiplicativeLSTM")


def trained(call, module, given):
    """What a call computes, and the gradients of inputs and parameters."""
    module.zero_grad()
    leaves = [t.clone().requires_grad_() for t in given]
    y = result(call(*leaves))
    y.sin().sum().backward()
    return [y.detach(), *(t.grad for t in (*leaves, *module.parameters()))]


def assert_equal(found, expected, limit=0.0):
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


def weights(module):
    """(owner, name) of each parameter with more than one dimension."""
    own = ((m, name, p) for m in module.modules() for name, p in m.named_parameters(recurse=False))
    return [(m, name) for m, name, p in list(own) if p.dim() > 1]


def test_every_module_is_here():
    assert set(CASES) == set(mi.nn.__all__)
    for name in CASES:
        assert all(p.count_nonzero() == p.numel() for p in made(name).parameters())


def reloaded(module, name):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = made(name, seed=1)
    other.load_state_dict(torch.load(file))
    return other


COPIES = {
    "deepcopy": lambda module, name: copy.deepcopy(module),
    "pickle": lambda module, name: pickle.loads(pickle.dumps(module)),
    "state_dict": reloaded,
}


@pytest.mark.parametrize("way", COPIES)
@every_module_of_nn
def test_copies(name, way):
    module, given = made(name), inputs(name)
    other = COPIES[way](module, name)
    assert other is not module
    assert_equal(trained(other, other, given), trained(module, module, given))


@every_module_of_nn
def test_safetensors(name, tmp_path):
    """Also of modules that share tensors: these are stored once."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, other = (
        nn.ModuleList([made(name, seed=seed)] * 2 + [made(name, seed=seed + 2)]) for seed in (0, 1)
    )
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert_equal(other.state_dict(), model.state_dict())
    loose = safetensors.load(safetensors.save(model[0].state_dict()))
    other[2].load_state_dict(loose)
    assert_equal(other[2].state_dict(), model[0].state_dict())


@every_module_of_nn
def test_functional_call(name):
    module, other, given = made(name), made(name, seed=1), inputs(name)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    y = result(torch.func.functional_call(other, state, given))
    assert_equal(y, result(module(*given)))


@every_module_of_nn
def test_ensembles(name):
    """torch.func.stack_module_state and vmap: all members are one call."""
    members, given = [made(name, DOUBLE, seed) for seed in range(3)], inputs(name, DOUBLE)
    state = torch.func.stack_module_state(members)
    call = functools.partial(torch.func.functional_call, members[0])
    y = torch.func.vmap(lambda *stacked: result(call(stacked, given)))(*state)
    assert_equal(y, torch.stack([result(member(*given)) for member in members]), 1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@every_module_of_nn
def test_checkpoints(name, reentrant):
    module, given = made(name), inputs(name)
    call = functools.partial(checkpoint, module, use_reentrant=reentrant)
    assert_equal(trained(call, module, given), trained(module, module, given))


@every_module_of_nn
def test_selective_checkpoints(name):
    """Results of our operations are kept, all else is computed again."""
    module, given = made(name, DOUBLE), inputs(name, DOUBLE)
    kept = set()

    def policy(context, operation, *arguments, **options):
        if operation.namespace != "mi_kernels":
            return CheckpointPolicy.PREFER_RECOMPUTE
        kept.add(plain(operation.name().partition("::")[2]))
        return CheckpointPolicy.MUST_SAVE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    call = functools.partial(checkpoint, module, use_reentrant=False, context_fn=contexts)
    assert_equal(trained(call, module, given), trained(module, module, given), 1e-12)
    leaves = [t.clone().requires_grad_() for t in given]
    y = result(call(*leaves))
    with Spy() as spy:
        y.sum().backward()
    in_gradients = {"interaction", "modulate"}  # of all families
    assert kept and spy.names and not set(spy.names) & kept - in_gradients


@pytest.mark.parametrize("name", CALLS)
def test_selective_checkpoints_of_functions(name):
    """PyTorch refuses a result that is kept and then changed in place."""
    call = CALLS[name]
    leaves = call.arguments()

    def policy(context, operation, *arguments, **options):
        return CheckpointPolicy.MUST_SAVE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    results = [call(*leaves), checkpoint(call, *leaves, use_reentrant=False, context_fn=contexts)]
    expected, found = (torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True) for y in results)
    assert_equal(found, expected, 1e-12)


@every_module_of_nn
def test_averaged_models(name):
    """EMA and SWA."""
    module, given = made(name), inputs(name)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(module)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3)
    average.update_parameters(module)
    for mean, old in zip(average.module.parameters(), before, strict=True):
        assert_equal(mean.detach(), 2 * old, 1e-6)
    assert result(average(*given)).shape == result(module(*given)).shape


@trainable
def test_pruning(name):
    module, given = made(name), inputs(name)
    for owner, weight in weights(module):
        prune.l1_unstructured(owner, weight, amount=0.5)
    found = trained(module, module, given)
    for owner, weight in weights(module):
        if weight.endswith("_orig"):
            mask = getattr(owner, weight.removesuffix("_orig") + "_mask")
            assert not getattr(owner, weight).grad[mask == 0].any()
            prune.remove(owner, weight.removesuffix("_orig"))
    assert_equal(result(module(*given)).detach(), found[0])


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": functools.partial(parametrizations.spectral_norm, n_power_iterations=200),
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_parametrizations(name, kind):
    """On weights with two and three dimensions: what they promise holds, and what is trained learns."""
    module, given = made(name, DOUBLE), inputs(name, DOUBLE)
    before = result(module(*given))
    chosen = weights(module)
    assert chosen
    for owner, weight in chosen:
        PARAMETRIZATIONS[kind](owner, weight)
    y = result(module(*given))
    y.sin().sum().backward()
    for owner, weight in chosen:
        made_of = [p.grad for p in owner.parametrizations[weight].parameters()]
        assert made_of and all(grad is not None for grad in made_of)
        value = getattr(owner, weight)
        if kind == "spectral_norm":  # of W as a matrix [O, Z X]
            assert torch.linalg.matrix_norm(value.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
        elif kind == "orthogonal":  # each of the O matrices [Z, X], or their transposes
            rows = value if value.shape[-2] <= value.shape[-1] else value.mT
            assert_equal(
                rows @ rows.mT, torch.eye(rows.shape[-2], dtype=DOUBLE).expand(*rows.shape[:-1], -1), 1e-12
            )
        parametrize.remove_parametrizations(owner, weight)
    if kind == "weight_norm":
        assert_equal(y, before, 1e-12)
    module.eval()
    assert_equal(result(module(*given)), y, 1e-12)


def test_weight_norm_of_zeros_is_nan():
    """PyTorch's own: 0 / 0. The modules are those that the guide names, as they are constructed."""
    started = {name: getattr(mi.nn, name) for name in ("FiLM", "AdaLayerNorm", "AdaRMSNorm", "AdaGroupNorm")}
    modules = {name: cls(**every_module.CASES[name][0]) for name, cls in started.items()}
    modules["AdaLNZeroBlock"] = mi.nn.AdaLNZeroBlock(nn.Linear(4, 4), features=4, context_features=3)
    modules["HyperLinear"] = mi.nn.HyperLinear(4, out_features=5, context_features=3)
    modules["HyperLoRA"] = mi.nn.HyperLoRA(nn.Linear(4, 5), context_features=3, rank=2)
    modules["torch.nn.Linear"] = nn.Linear(3, 5)
    nn.init.zeros_(modules["torch.nn.Linear"].weight)
    for name, module in modules.items():
        given = (torch.randn(6, 3),) if name == "torch.nn.Linear" else inputs(name)
        assert result(module(*given)).isfinite().all()
        zeros = [(owner, weight) for owner, weight in weights(module) if not getattr(owner, weight).any()]
        assert zeros, name
        for owner, weight in zeros:
            parametrizations.weight_norm(owner, weight)
        assert result(module(*given)).isnan().any(), name
        with torch.no_grad():
            for owner, weight in zeros:
                parametrize.remove_parametrizations(owner, weight, leave_parametrized=True)
                getattr(owner, weight).normal_()
                parametrizations.weight_norm(owner, weight)
        assert result(module(*given)).isfinite().all(), name
    page = (Path(__file__).parents[2] / "docs" / "guides" / "tools.md").read_text()
    (row,) = [line for line in page.splitlines() if "test_weight_norm_of_zeros_is_nan" in line]
    assert all(f"`{name.removeprefix('torch.')}`" in row for name in modules)
    for name in set(CASES) - set(modules) - {"HyperMLP", "BoundLinear"}:  # of HyperLinear; frozen
        fresh = getattr(mi.nn, name)(**every_module.CASES[name][0])
        assert all(getattr(owner, weight).any() for owner, weight in weights(fresh)), name


class LowRankUpdate(nn.Module):
    """A low-rank adapter of a weight with any number of dimensions, as docs/guides/tools.md has it."""

    def __init__(self, weight, rank):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.down = nn.Parameter(torch.randn(rank, columns, dtype=weight.dtype) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype))

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


@trainable
def test_low_rank_adapters(name):
    module, given = made(name, DOUBLE).requires_grad_(False), inputs(name, DOUBLE)
    before = result(module(*given))
    chosen = weights(module)
    for owner, weight in chosen:
        parametrize.register_parametrization(owner, weight, LowRankUpdate(getattr(owner, weight), 2))
    assert_equal(result(module(*given)), before)
    adapters = [p for p in module.parameters() if p.requires_grad]
    assert len(adapters) == 2 * len(chosen)
    optimizer = torch.optim.SGD(adapters, lr=1e-3)
    result(module(*given)).sin().sum().backward()
    optimizer.step()
    after = result(module(*given))
    assert not torch.equal(after, before)
    for owner, weight in chosen:
        parametrize.remove_parametrizations(owner, weight)  # merges the update
    assert_equal(result(module(*given)), after, 1e-12)


@every_module_of_nn
def test_state_dict_hooks(name):
    module, other, given = made(name), made(name, seed=1), inputs(name)
    old = {f"old.{key}": value for key, value in module.state_dict().items()}

    def renamed(module, state, *_):
        for key in [key for key in state if key.startswith("old.")]:
            state[key.removeprefix("old.")] = state.pop(key)

    other.register_load_state_dict_pre_hook(renamed)
    other.load_state_dict(old)
    assert_equal(result(other(*given)), result(module(*given)))


@every_module_of_nn
def test_meta_device(name):
    """Made without memory, then given the tensors of a checkpoint."""
    module, given = made(name), inputs(name)
    empty = copy.deepcopy(module).to("meta")
    empty.load_state_dict(module.state_dict(), assign=True)
    assert_equal(result(empty(*given)), result(module(*given)))


@every_module_of_nn
def test_data_parallel(name):
    """Without a GPU it calls the module itself."""
    module, given = made(name), inputs(name)
    assert_equal(result(nn.DataParallel(module)(*given)), result(module(*given)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_module_of_nn
def test_traces_of_modules(name):
    module, given = made(name, DOUBLE), inputs(name, DOUBLE)
    traced = torch.jit.trace(module, given)
    assert_equal(trained(traced, traced, given), trained(module, module, given), 1e-12)


@pytest.mark.compile
@every_module_of_nn
def test_exported_modules(name):
    module, given = made(name, DOUBLE), inputs(name, DOUBLE)
    program = torch.export.export(module, given).module()
    assert_equal(trained(program, program, given), trained(module, module, given), 1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_module_of_nn
def test_script_is_refused(name):
    """On its own and inside a model: by name, with what to use instead."""
    for model in (made(name), nn.Sequential(nn.ReLU(), made(name))):
        with pytest.raises(TypeError, match=rf"^{name}: torch.jit.script is not supported.*torch.export"):
            torch.jit.script(model)


class Leaves(torch.fx.Tracer):
    """Takes modules of mi.nn as one node, as torch.fx does those of torch.nn."""

    def is_leaf_module(self, module, path):
        return type(module).__module__.startswith("mi_kernels.") or super().is_leaf_module(module, path)


class Neighbours(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, first, second=None):
        given = (first.sin(),) if second is None else (first.sin(), second)
        return self.inner(*given)


@every_module_of_nn
def test_symbolic_traces(name):
    module, given = made(name), inputs(name)
    model = Neighbours(module)
    traced = torch.fx.GraphModule(model, Leaves().trace(model, {"second": None} if len(given) == 1 else None))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 1
    assert_equal(result(traced(*given)), result(model(*given)))


def test_symbolic_traces_of_functions_are_refused():
    with pytest.raises(TypeError, match="interaction: x: expected a torch.Tensor, got Proxy"):
        torch.fx.symbolic_trace(made("MultiplicativeInteraction"))
