"""Modules of adaptive norms: parameters, contexts, residuals and calls. Formulas are in the drop-ins."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import Spy
from torch import nn

import mi_kernels as mi

B, T, C, Z = 3, 4, 6, 5
MAKERS = {
    "layer": lambda **kw: mi.nn.AdaLayerNorm(C, context_features=Z, affine=True, gate=True, **kw),
    "rms": lambda **kw: mi.nn.AdaRMSNorm(C, context_features=Z, shift=True, **kw),
    "group": lambda **kw: mi.nn.AdaGroupNorm(C, context_features=Z, groups=2, **kw),
    "block": lambda **kw: mi.nn.AdaLNZeroBlock(
        nn.Linear(C, C, dtype=kw.get("dtype")), features=C, context_features=Z, **kw
    ),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def drawn(layer):
    """In float64, with no parameter zero."""
    for parameter in layer.double().parameters():
        nn.init.normal_(parameter)
    return layer


def draw(*sizes):
    return torch.randn(*sizes, dtype=torch.float64)


def inputs(layer):
    return (draw(B, C, T) if isinstance(layer, mi.nn.AdaGroupNorm) else draw(B, T, C)), draw(B, Z)


def first(result):
    return result[0] if isinstance(result, tuple) else result


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def calls(layer, *given, **options):
    """The operations that run, but for those of plain PyTorch."""
    with torch.no_grad(), Spy() as spy:
        layer(*given, **options)
    return spy.names


def test_at_the_start_modulation_has_no_effect():
    """adaLN-Zero: the norm alone, a gate of zeros, a block that passes x on."""
    x, z = torch.randn(B, T, C), torch.randn(B, Z)
    y, gate = MAKERS["layer"]()(x, z)
    torch.testing.assert_close(y, F.layer_norm(x, (C,), eps=1e-6))
    assert gate.shape == (B, 1, C) and not gate.any()
    torch.testing.assert_close(MAKERS["rms"]()(x, z), F.rms_norm(x, (C,), eps=1e-6))
    maps = torch.randn(B, C, T, 2)
    torch.testing.assert_close(MAKERS["group"]()(maps, z), F.group_norm(maps, 2))
    assert torch.equal(MAKERS["block"]()(x, z), x)


def test_zero_init_is_a_choice(make):
    """Without it the linear layer is drawn as an nn.Linear is."""
    torch.manual_seed(0)
    layer = make(zero_init=False)
    linear = layer.adaLN_modulation[1] if isinstance(layer, mi.nn.AdaLNZeroBlock) else layer.linear
    assert linear.weight.abs().min() > 0
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    fresh = nn.Linear(linear.in_features, linear.out_features)
    assert torch.equal(linear.weight, fresh.weight) and torch.equal(linear.bias, fresh.bias)


def test_a_bias_is_a_choice(make):
    names = {name for name, _ in make(bias=False).named_parameters()}
    assert not any(name in names for name in ("linear.bias", "norm.bias", "adaLN_modulation.1.bias"))


def test_copies_and_factory_arguments(make):
    layer = drawn(make(zero_init=False))
    given = inputs(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        equal(first(other(*given)), first(layer(*given)))
    half = make(device="meta", dtype=torch.float16)
    assert all(
        p.is_meta == ("attn" not in n) and p.dtype == torch.float16 for n, p in half.named_parameters()
    )


def test_contexts_of_samples_and_positions(make):
    """[Z], [B, Z], [B, 1, Z] and [B, T, Z] are what each sample and position has by itself."""
    layer = drawn(make())
    x, _ = inputs(layer)
    dim = 1 if isinstance(layer, mi.nn.AdaGroupNorm) else -1
    z = draw(B, T, Z)
    one = first(layer(x, z[0, 0]))
    equal(one, first(layer(x, z[:1, 0].expand(B, Z))))
    equal(first(layer(x, z[:, 0])), torch.cat([first(layer(x[b : b + 1], z[b, 0])) for b in range(B)]))
    equal(first(layer(x, z[:, :1])), first(layer(x, z[:, 0])))
    of_all = first(layer(x, z)).movedim(dim, -1)
    for t in range(T):
        equal(of_all[:, t], first(layer(x, z[:, t])).movedim(dim, -1)[:, t])
    assert x.shape == of_all.movedim(-1, dim).shape


def test_an_unbatched_input():
    for name in ("layer", "rms", "block"):
        layer = drawn(MAKERS[name]())
        x, z = draw(C), draw(Z)
        equal(first(layer(x, z)), first(layer(x[None], z[None]))[0])


def test_contexts_that_fit_in_two_ways_are_refused(make):
    layer = make()
    if isinstance(layer, mi.nn.AdaGroupNorm):
        layer(torch.ones(B, C, B), torch.ones(B, Z))  # the channels are in between: of samples
        return
    with pytest.raises(
        ValueError, match=r"z: expected contexts of samples or of positions of x, got \[3, 5\]"
    ):
        layer(torch.ones(B, B, C), torch.ones(B, Z))


WRONG = {
    "no tensor": ([1.0], TypeError, "z: expected a torch.Tensor, got list"),
    "integers": (
        torch.ones(B, Z, dtype=torch.int64),
        TypeError,
        "z: expected a dtype of .*, got torch.int64",
    ),
    "size": (torch.ones(B, Z + 1), ValueError, r"z: expected shape \[..., Z=5\], got \[3, 6\]"),
    "none": (torch.ones(()), ValueError, r"z: expected shape \[..., Z=5\], got \[\]"),
    "lead": (torch.ones(2, Z), ValueError, r"z: expected shape .*, got \[2, 5\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_contexts_are_named(make, name):
    z, kind, message = WRONG[name]
    layer = make()
    x = inputs(layer)[0].float()
    with pytest.raises(kind, match=f"^{type(layer).__name__}: {message}"):
        layer(x, z)


@pytest.mark.parametrize("shape", [(C,), (B, C + 1, T)])
def test_wrong_maps_are_named(shape):
    with pytest.raises(ValueError, match=r"^AdaGroupNorm: x: expected shape \[B, C=6, ...\], got "):
        MAKERS["group"]()(torch.ones(shape), torch.ones(Z))


@pytest.mark.parametrize("gated", [False, True])
def test_a_residual_is_added_in_the_pass_of_the_norm(make, gated, place):
    layer = drawn(make()).to(place.device)
    x, z = (t.to(place.device) for t in inputs(layer))
    h = torch.randn_like(x)
    of_channels = x[..., :1] if isinstance(layer, mi.nn.AdaGroupNorm) else x[:, :1]
    gate = torch.randn_like(of_channels) if gated else None
    total = x + (h if gate is None else gate * h)
    found, expected = layer(x, z, (h, gate)), layer(total, z)
    if isinstance(layer, mi.nn.AdaLNZeroBlock):
        equal(found, expected)
        assert calls(layer, x, z, (h, gate)).count("norm_modulate") == 1
        return
    expected = expected if isinstance(expected, tuple) else (expected,)
    equal(found, (total, *expected))
    assert calls(layer, x, z, (h, gate)) == ["norm_modulate"]


@pytest.mark.parametrize(
    ("residual", "kind", "got"),
    [(torch.ones(2, B, T, C), TypeError, "Tensor"), (1, TypeError, "int"), ((1,), ValueError, "1 elements")],
    ids=["tensor", "int", "one"],
)
def test_a_residual_is_a_pair(make, residual, kind, got):
    """A tensor would be unpacked, too."""
    layer = make()
    message = rf"^{type(layer).__name__}: residual: expected a pair \(h, gate\), got {got}$"
    with pytest.raises(kind, match=message):
        layer(*(t.float() for t in inputs(layer)), residual)


def blocks(number, norm="layer"):
    parts = [
        (nn.Linear(C, C), nn.Sequential(nn.Linear(C, 8), nn.GELU(), nn.Linear(8, C))) for _ in range(number)
    ]
    options = {"features": C, "context_features": Z, "norm": norm}
    return [drawn(mi.nn.AdaLNZeroBlock(*each, **options)) for each in parts]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_chain_of_blocks_has_one_pass_at_each_norm(norm):
    """Two blocks and the last norm: five norms, and no residual by itself. The results are those of each."""
    first, second = blocks(2, norm)
    last = drawn(mi.nn.AdaLayerNorm(C, context_features=Z))
    x, z = draw(B, T, C), draw(B, Z)

    def chain(x, z):
        residual = None
        for block in (first, second):
            x, residual = block(x, z, residual, defer=True)
        return last(x, z, residual)

    total = second(first(x, z), z)
    equal(chain(x, z), (total, last(total, z)))
    names = calls(chain, x, z)
    assert names == ["norm_modulate"] * 5


@pytest.mark.parametrize(("norm", "function"), [("layer", F.layer_norm), ("rms", F.rms_norm)])
def test_a_block_with_one_layer(norm, function):
    """Three chunks, as in diffusers' AdaLayerNormZeroSingle."""
    options = {"features": C, "context_features": Z, "norm": norm, "eps": 1e-3}
    layer = drawn(mi.nn.AdaLNZeroBlock(nn.Linear(C, C), **options))
    x, z = draw(B, T, C), draw(B, Z)
    shift, scale, gate = layer.adaLN_modulation(z)[:, None].chunk(3, -1)
    n = function(x, (C,), eps=1e-3)
    equal(layer(x, z), x + gate * layer.attn(n * (1 + scale) + shift))


def test_other_keywords_are_those_of_the_attention():
    class Scaled(nn.Module):
        def forward(self, x, by):
            return x * by

    layer = drawn(mi.nn.AdaLNZeroBlock(Scaled(), features=C, context_features=Z))
    x, z = draw(B, T, C), draw(B, Z)
    equal(layer(x, z, by=2.0) - x, 2 * (layer(x, z, by=1.0) - x))
    with pytest.raises(TypeError, match="by"):
        layer(x, z)


def test_hooks_of_the_parts_run():
    (block,), seen = blocks(1), []
    for part in (block.attn, block.mlp, block.adaLN_modulation):
        part.register_forward_hook(lambda module, *_: seen.append(module))
    block(draw(B, T, C), draw(B, Z))
    assert seen == [block.adaLN_modulation, block.attn, block.mlp]


@pytest.mark.parametrize("name", ["layer", "group", "block"])
def test_gradients_per_sample(name):
    layer = drawn(MAKERS[name]())
    x, z = inputs(layer)
    state = dict(layer.named_parameters())

    def loss(state, x, z):
        return first(torch.func.functional_call(layer, state, (x[None], z[None]))).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(state, x, z)
    for name, grads in found.items():
        for b in range(B):
            (own,) = torch.autograd.grad(loss(state, x[b], z[b]), state[name])
            torch.testing.assert_close(grads[b], own, rtol=1e-10, atol=1e-11)


@pytest.mark.compile
def test_a_chain_compiles_whole():
    first, second = blocks(2)
    x, z = draw(B, T, C), draw(B, Z)

    def chain(x, z):
        x, residual = first(x, z, defer=True)
        return second(x, z, residual)

    equal(torch.compile(chain, backend="aot_eager", fullgraph=True)(x, z), chain(x, z))


def test_autocast_computes_in_its_dtype():
    """As F.linear: parameters stay float32, the modulation is bfloat16."""
    layer = MAKERS["layer"](zero_init=False)
    x, z = torch.randn(B, T, C), torch.randn(B, Z)
    with torch.autocast("cpu", torch.bfloat16):
        y, gate = layer(x, z)
    assert gate.dtype == torch.bfloat16 and y.isfinite().all()
    torch.testing.assert_close(y.float(), layer(x, z)[0], rtol=2**-5, atol=2**-5)
