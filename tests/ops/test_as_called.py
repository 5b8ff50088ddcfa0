"""What bind() and to_dense() make is what a call computes, or is refused: pruning, hooks, other forwards."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import mi_kernels as mi

F64 = {"dtype": torch.float64}
SIZES = {"in_features": 5, "out_features": 4, "context_features": 3}
MAKERS = {
    "HyperLinear": lambda: mi.nn.HyperLinear(**SIZES, **F64),
    "head": lambda: mi.nn.HyperLinear.from_linear(nn.Linear(3, 4 * 5 + 4, **F64), 5, 4),
    "HyperMLP": lambda: mi.nn.HyperMLP([5, 6, 4], context_features=3, **F64),
    "HyperLoRA": lambda: mi.nn.HyperLoRA(nn.Linear(5, 4, **F64), context_features=3, rank=2),
}
# Parts that a bound layer takes the place of: hooks on each of them would be left out.
PARTS = [(kind, "") for kind in MAKERS] + [("HyperMLP", "layers.1"), ("HyperLoRA", "linear")]
WEIGHTS = [("HyperLinear", ""), ("head", ""), ("HyperMLP", "layers.1"), ("HyperLoRA", "linear")]
of_each_part = pytest.mark.parametrize(("kind", "part"), PARTS)


def made(kind):
    torch.manual_seed(0)
    module = MAKERS[kind]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def weights(module):
    owned = ((owner, *named) for owner in module.modules() for named in owner.named_parameters(recurse=False))
    return list(owned)


def check(module):
    x, z = torch.randn(2, 7, 5, **F64), torch.randn(2, 3, **F64)
    found = module.bind(z)(x), module.bind(z[0])(x[0])  # before any call, which sets what hooks compute
    torch.testing.assert_close(found, (module(x, z).detach(), module(x[0], z[0]).detach()))


def refused(kind, part, match):
    where = f"bind: {part}" if part else "bind"
    return pytest.raises(
        TypeError, match=rf"^\w*{'HyperLinear' if kind == 'head' else kind}\w*: {where}: {match}"
    )


@pytest.mark.parametrize("kind", MAKERS)
def test_pruned_layers_are_bound_as_they_are_called(kind):
    """After a step of training, too, where attributes are stale until the next call."""
    module = made(kind)
    for owner, name, _ in weights(module):
        prune.random_unstructured(owner, name, amount=0.3)
    check(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    check(module)
    owner, name, _ = weights(module)[0]
    prune.random_unstructured(owner, name.removesuffix("_orig"), amount=0.3)  # a second method
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-2)
    check(module)


@pytest.mark.parametrize("kind", MAKERS)
def test_binding_leaves_the_graph_of_a_pruned_layer_alone(kind):
    """A penalty of the attribute still trains after a call of bind, which computes without a graph."""
    module = made(kind)
    owner, name, _ = weights(module)[-1]
    prune.random_unstructured(owner, name, amount=0.3)
    before = getattr(owner, name)
    module.bind(torch.randn(3, **F64))
    assert getattr(owner, name) is before and before.requires_grad


@of_each_part
@pytest.mark.parametrize("kept", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_refused(kind, part, kept):
    module = made(kind)

    def doubled(*_):
        return None

    handle = getattr(module.get_submodule(part), f"register_{kept}_hook")(doubled)
    with refused(kind, part, "expected no hooks .*, got doubled: remove them"):
        module.bind(torch.randn(3, **F64))
    handle.remove()
    check(module)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "part"), WEIGHTS)
def test_weights_that_hooks_compute_are_refused(kind, part):
    """The old forms of spectral_norm and weight_norm; their parametrizations are followed."""
    old = {"SpectralNorm": nn.utils.spectral_norm, "WeightNorm": nn.utils.weight_norm}
    for name, applied in old.items():
        module = made(kind)
        applied(module.get_submodule(part), "weight")
        with refused(kind, part, f"expected no hooks .*, got {name}: .*torch.nn.utils.parametrizations"):
            module.bind(torch.randn(3, **F64))
    module = made(kind)
    parametrizations.weight_norm(module.get_submodule(part), "weight")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    check(module)


@of_each_part
def test_another_forward_is_refused(kind, part):
    module = made(kind)
    inner = module.get_submodule(part)
    inner.forward = lambda *arguments: 7 * type(inner).forward(inner, *arguments)
    with refused(kind, part, "expected the forward of .*, got another on the instance"):
        module.bind(torch.randn(3, **F64))
    del inner.forward
    check(module)


class Doubled(mi.nn.HyperLinear):
    def forward(self, x, z, segment_ids=None):
        return super().forward(x, 2 * z, segment_ids)


class DoubledAndBound(Doubled):
    def bind(self, z):
        return super().bind(2 * z)


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_subclasses_with_a_forward_of_their_own():
    """Inside of a HyperMLP, too."""
    with pytest.raises(
        TypeError, match="Doubled: bind: expected the forward of HyperLinear, .*it needs a bind"
    ):
        Doubled(**SIZES, **F64).bind(torch.randn(3, **F64))
    check(DoubledAndBound(**SIZES, **F64))
    network = made("HyperMLP")
    network.layers[0] = Doubled(5, out_features=6, context_features=3, **F64)
    with refused("HyperMLP", "layers.0", "expected the forward of HyperLinear, got that of Doubled"):
        network.bind(torch.randn(3, **F64))
    network.layers[0] = DoubledAndBound(5, out_features=6, context_features=3, **F64)
    check(network)
    network.layers[0] = nn.Identity()
    with refused("HyperMLP", "layers.0", "expected a HyperLinear, got Identity: merge its own adapter"):
        network.bind(torch.randn(3, **F64))
    adapter = made("HyperLoRA")
    adapter.linear = Called(5, 4, **F64)
    with refused("HyperLoRA", "linear", "expected the forward of Linear, got that of Called"):
        adapter.bind(torch.randn(3, **F64))


class Masked(prune.RandomUnstructured):
    def __call__(self, module, inputs):
        super().__call__(module, inputs)
        inputs[0].mul_(2)


def test_methods_of_pruning_that_do_more_are_refused():
    module = made("HyperLinear")
    Masked.apply(module, "weight", 0.3)
    with refused("HyperLinear", "", "expected no hooks .*, got Masked"):
        module.bind(torch.randn(3, **F64))


def test_global_hooks_run_on_bound_layers():
    """They see each module that is called: what bind returns, too."""
    seen, bound = [], made("HyperLinear").bind(torch.randn(3, **F64))
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        bound = made("HyperLinear").bind(torch.randn(3, **F64))
        bound(torch.randn(5, **F64))
    finally:
        handle.remove()
    assert seen == [bound]


@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_dense_weights_of_pruned_factors(core):
    layer = mi.nn.LowRankInteraction(
        5, context_features=3, out_features=4, rank=2, core=core, bias=False, **F64
    )
    prune.random_unstructured(layer, "factor_x", amount=0.3)
    with torch.no_grad():
        layer.factor_x_orig.mul_(3)
    x, z = torch.randn(6, 5, **F64), torch.randn(6, 3, **F64)
    weight = layer.to_dense()
    layer.weight_x = layer.weight_z = None
    torch.testing.assert_close(mi.interaction(x, z, weight), layer(x, z))
    assert weight.requires_grad
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="^LowRankInteraction: to_dense: expected no hooks"):
        layer.to_dense()
