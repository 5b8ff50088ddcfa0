"""The ready rules of mi.convert for adaptive norms: diffusers, and DiT's blocks in any repository.

As test_rules_gated.py: stand-ins always, diffusers where it can be imported.
"""

import copy
import importlib
import sys
import types

import adaptive_norms
import pytest
import stand_ins
import torch
from converted import check, check_left, draw
from helpers import Spy
from torch import nn

import mi_kernels as mi
from mi_kernels.testing.errors import relative_error

B, T, C, Z = 3, 4, 6, 5
NORM, CHAIN = "norm_modulate", "gated_residual_norm_modulate"


@pytest.fixture(params=["stand-in", "real"])
def diffusers(request):
    if request.param == "real":
        reason = "diffusers is not installed: too heavy"
        yield pytest.importorskip("diffusers.models.normalization", reason=reason, exc_type=ImportError)
    else:
        with stand_ins.installed("diffusers"):
            yield importlib.import_module("diffusers.models.normalization")


def together(layer, *inputs, **named):
    """All results as one vector."""
    y = layer(*inputs, **named)
    return torch.cat([t.flatten() for t in (y if isinstance(y, tuple) else (y,))])


def fused(layer, *inputs, **named):
    """How many calls of the operation a layer makes."""
    with torch.no_grad(), Spy() as spy:
        layer(*inputs, **named)
    return spy.names.count("norm_modulate")


# Class, arguments of the constructor, shapes of the inputs, calls of the operation.
LAYERS = {
    "AdaLayerNormZero": ((C,), [(B, T, C), (B, C)], 1),
    "AdaLayerNormZeroSingle": ((C,), [(B, T, C), (B, C)], 1),
    "SD35AdaLayerNormZeroX": ((C, "layer_norm", False), [(B, T, C), (B, C)], 2),
    "AdaLayerNormContinuous": ((C, Z), [(B, T, C), (B, Z)], 1),
    "LuminaLayerNormContinuous": ((C, Z, True, 1e-5, True, "layer_norm", 7), [(B, T, C), (B, Z)], 1),
    "CogView3PlusAdaLayerNormZeroTextImage": ((Z, C), [(B, T, C), (B, 2, C), (B, Z)], 2),
    "CogVideoXLayerNormZero": ((Z, C), [(B, T, C), (B, 2, C), (B, Z)], 2),
    "AdaGroupNorm": ((Z, C, 2, "silu"), [(B, C, 4, 3), (B, Z)], 1),
}


def calls(layer):
    """By position, or with the embedding by its name where other arguments come before it."""
    if type(layer).__name__.endswith("AdaLayerNormZero"):
        return lambda layer, x, emb: together(layer, x, emb=emb)
    return together


def unlike_zero(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_classes_of_diffusers(diffusers, name):
    arguments, shapes, number = LAYERS[name]
    layer = unlike_zero(getattr(diffusers, name)(*arguments))
    call = calls(layer)
    inputs = [draw(*shape) for shape in shapes]
    layer = check(layer, mi.nn.rules.diffusers(), *inputs, call=call)
    assert fused(lambda *inputs: call(layer, *inputs), *inputs) == number
    found, before = (each(inputs) for each in (results(layer), results(type(layer).__base__, layer)))
    assert type(found) is type(before)
    assert [t.shape for t in found] == [t.shape for t in before]


def results(layer, instance=None):
    """The results of a layer, or of its forward before the conversion, of inputs by their published names."""
    forward = layer if instance is None else types.MethodType(layer.forward, instance)
    if type(instance or layer).__name__.endswith("AdaLayerNormZero"):
        return lambda inputs: forward(inputs[0], emb=inputs[1])
    return lambda inputs: forward(*inputs)


@pytest.mark.parametrize("affine", [False, True])
def test_ada_layer_norm_of_a_table(diffusers, affine):
    """The scale first, of one time step."""
    layer = unlike_zero(diffusers.AdaLayerNorm(C, 9, norm_elementwise_affine=affine))
    layer = check(layer, mi.nn.rules.diffusers(), draw(B, T, C), torch.tensor(4))
    assert fused(layer, draw(T, C), torch.tensor(4)) == 1


def test_ada_layer_norm_of_an_embedding(diffusers):
    """The shift first."""
    layer = unlike_zero(diffusers.AdaLayerNorm(Z, output_dim=2 * C, chunk_dim=1))
    call = lambda layer, x, temb: layer(x, temb=temb)  # noqa: E731
    layer = check(layer, mi.nn.rules.diffusers(), draw(B, T, C), draw(B, Z), call=call)
    assert fused(layer, draw(B, T, C), temb=draw(B, Z)) == 1


def test_embeddings_are_called():
    with stand_ins.installed("diffusers"):
        layer = unlike_zero(adaptive_norms.AdaLayerNormZero(C, 9))
        inputs = draw(B, T, C), draw(B), torch.arange(B)
        layer = check(layer, mi.nn.rules.diffusers(), *inputs, call=together)
        assert fused(layer, *inputs) == 1


# What has its statistics in float32 in diffusers also in float64 is compared by the error rule.
FLOAT32 = {
    "AdaLayerNormZero": ((C, None, "fp32_layer_norm"), C),
    "LuminaRMSNormZero": ((C, 1e-5, True), C),
    "AdaLayerNormContinuous": ((C, Z, True, 1e-5, True, "rms_norm"), Z),
    "LuminaLayerNormContinuous": ((C, Z, False, 1e-5, True, "rms_norm"), Z),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FLOAT32)
def test_norms_of_float32(diffusers, name, dtype):
    """Converted, a layer is at most twice as far from exact results as before, and one rounding."""
    arguments, context = FLOAT32[name]
    layer = unlike_zero(getattr(diffusers, name)(*arguments)).to(dtype)
    before, parameters = copy.deepcopy(layer), dict(layer.named_parameters())
    layer = mi.convert(layer, rules=mi.nn.rules.diffusers())
    assert dict(layer.named_parameters()).keys() == parameters.keys()
    inputs = torch.randn(B, T, C).to(dtype), torch.randn(B, context).to(dtype)
    assert fused(lambda *inputs: results(layer)(inputs), *inputs) == 1
    exact = copy.deepcopy(before).double()
    exact.norm = exact_norm(exact.norm)
    expected = everything(exact, [t.double() for t in inputs])
    found, plain = everything(layer, inputs), everything(before, inputs)
    for ours, theirs, right in zip(found, plain, expected, strict=True):
        assert ours.dtype == theirs.dtype
        allowed = 2 * relative_error(theirs, right) + torch.finfo(dtype).eps
        assert relative_error(ours, right) <= allowed


def everything(layer, inputs):
    """Results, and gradients of their sum of squares for inputs and parameters."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = results(layer)(inputs)
    y = y if isinstance(y, tuple) else (y,)
    loss = sum(t.double().square().sum() for t in y)
    return [*y, *torch.autograd.grad(loss, [*inputs, *layer.parameters()])]


def exact_norm(norm):
    """The norm with statistics of float64."""
    size = (C,)
    weight = getattr(norm, "weight", None)
    if isinstance(norm, nn.LayerNorm):
        new = nn.LayerNorm(size, norm.eps, weight is not None, norm.bias is not None)
    else:
        new = nn.RMSNorm(size, norm.eps, weight is not None)
    new.double().load_state_dict(norm.state_dict())
    return new


def change_hook(layer):
    layer.norm.register_forward_hook(lambda _, __, y: y * 2)


def change_kind(layer):
    layer.norm = nn.BatchNorm1d(T, dtype=torch.float64)


def change_shape(layer):
    layer.norm = nn.LayerNorm((T, C), dtype=torch.float64)


CHANGES = {
    change_hook: "a norm of it has hooks or another forward",
    change_kind: "a BatchNorm1d is where a layer norm or RMS norm was expected",
    change_shape: "a norm of it is one over several dimensions",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_no_plain_norm_is_called(diffusers, change):
    """Left before the conversion; afterwards the norm is called."""
    rules = mi.nn.rules.diffusers()
    layer = unlike_zero(diffusers.AdaLayerNormContinuous(C, Z).double())
    changed = copy.deepcopy(layer)
    change(changed)
    check_left(changed, rules, CHANGES[change])
    mi.convert(layer, rules=rules)
    inputs = draw(B, T, C), draw(B, Z)
    assert fused(layer, *inputs) == 1
    change(layer)
    assert fused(layer, *inputs) == 0
    assert torch.equal(layer(*inputs), changed(*inputs))


def test_other_arguments_of_a_forward_are_left():
    class AdaGroupNorm(adaptive_norms.AdaGroupNorm):
        def forward(self, x, emb, scale=1):
            return super().forward(x, emb) * scale

    with stand_ins.installed("diffusers"):
        sys.modules["diffusers.models.normalization"].AdaGroupNorm = AdaGroupNorm
        check_left(AdaGroupNorm(Z, C, 2), mi.nn.rules.diffusers(), "other arguments")


@pytest.mark.parametrize(
    ("dtype", "low"), [(torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)], ids=str
)
def test_mixed_dtypes_and_autocast_are_as_before(diffusers, dtype, low):
    layer = unlike_zero(diffusers.AdaLayerNormZeroSingle(C))
    before = copy.deepcopy(layer)
    mi.convert(layer, rules=mi.nn.rules.diffusers())
    x, emb = torch.randn(B, T, C), torch.randn(B, C)
    x = x.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        found, expected = layer(x, emb), before(x, emb)
    assert all(map(torch.equal, found, expected))
    assert [t.dtype for t in found] == [t.dtype for t in expected]


def test_contexts_that_widen_x_are_as_before(diffusers):
    layer = unlike_zero(diffusers.AdaGroupNorm(Z, C, 2).double())
    before = copy.deepcopy(layer)
    mi.convert(layer, rules=mi.nn.rules.diffusers())
    x, emb = draw(1, C, 4, 4), draw(B, Z)
    assert layer(x, emb).shape == (B, C, 4, 4) and torch.equal(layer(x, emb), before(x, emb))


@pytest.mark.compile
def test_converted_norms_compile_whole(diffusers):
    layer = mi.convert(unlike_zero(diffusers.AdaLayerNormZeroSingle(C)), rules=mi.nn.rules.diffusers())
    x, emb = torch.randn(B, T, C), torch.randn(B, C)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, emb), layer(x, emb))


@pytest.mark.parametrize("norm", [None, nn.LayerNorm, lambda size: nn.RMSNorm(size, 1e-5)])
def test_block_of_dit(norm):
    """The second norm with the residual before it, and the last residual: three calls."""
    layer = unlike_zero(adaptive_norms.DiTBlock(C, 2, norm=norm))
    layer = check(layer, mi.nn.rules.dit(), draw(B, T, C), draw(B, C))
    with torch.no_grad(), Spy() as spy:
        layer(draw(B, T, C), draw(B, C))
    assert spy.names.count("norm_modulate") == 2
    first, second = (given for name, given in spy.calls if name == "norm_modulate")
    assert first[1] is None and second[1] is not None, "the second one has the residual"


def test_final_layer_of_dit():
    layer = unlike_zero(adaptive_norms.FinalLayer(C, 7))
    layer = check(layer, mi.nn.rules.dit(), draw(B, T, C), draw(B, C))
    assert fused(layer, draw(B, T, C), draw(B, C)) == 1


def test_other_forwards_under_the_names_of_dit_have_no_rule():
    class Product(adaptive_norms.FinalLayer):
        def forward(self, x, c):
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
            return self.linear(self.norm_final(x) * (1 * scale.unsqueeze(1)) + shift.unsqueeze(1))

    class ScaleFirst(adaptive_norms.FinalLayer):
        def forward(self, x, c):
            scale, shift = self.adaLN_modulation(c).chunk(2, dim=1)
            return self.linear(adaptive_norms.modulate(self.norm_final(x), shift, scale))

    class Optional(adaptive_norms.FinalLayer):
        def forward(self, x, c, mask=None):
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
            return self.linear(adaptive_norms.modulate(self.norm_final(x), shift, scale))

    class Keyword(adaptive_norms.FinalLayer):
        def forward(self, x, c, *, mask=None):
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
            return self.linear(adaptive_norms.modulate(self.norm_final(x), shift, scale))

    class Inherited(adaptive_norms.FinalLayer):
        """That of DiT."""

    rules = mi.nn.rules.dit()
    assert not {Product, ScaleFirst, Optional, Keyword} & set(rules) and Inherited in rules
    assert {adaptive_norms.DiTBlock, adaptive_norms.FinalLayer} <= set(rules)
    assert adaptive_norms.ParallelBlock not in rules
    mi.convert(adaptive_norms.DiTBlock(C, 2), rules=rules)
    assert set(mi.nn.rules.dit()) == set(rules)


class Halved(adaptive_norms.FinalLayer):
    """As published while it trains."""

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        y = self.linear(adaptive_norms.modulate(self.norm_final(x), shift, scale))
        return y if self.training else y / 2


class Unlike(adaptive_norms.FinalLayer):
    """As published but for one kind."""

    kind = "halved"

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        y = self.linear(adaptive_norms.modulate(self.norm_final(x), shift, scale))
        if self.kind == "halved":
            y = y / 2
        return y


def helper(x, halved):
    return x / 2 if halved in (True, "halved") else x


class Helped(adaptive_norms.FinalLayer):
    halved = True

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        y = self.linear(adaptive_norms.modulate(self.norm_final(x), shift, scale))
        return helper(y, self.halved)


class LowPrecision(adaptive_norms.FinalLayer):
    def forward(self, x, c):
        with torch.autocast("cpu", torch.bfloat16):
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
            return self.linear(adaptive_norms.modulate(self.norm_final(x), shift, scale))


@pytest.mark.parametrize("cls", [Halved, Unlike, Helped, LowPrecision])
def test_forwards_that_decide_what_they_do_have_no_rule(cls):
    """One run of them is that of DiT."""
    rules = mi.nn.rules.dit()
    assert cls not in rules and adaptive_norms.FinalLayer in rules


def test_what_is_left_of_dit():
    layer = unlike_zero(adaptive_norms.DiTBlock(C, 2).double())
    inputs = draw(B, T, C), draw(B, C)
    for name in ("norm1", "norm2"):
        changed = copy.deepcopy(layer)
        getattr(changed, name).register_forward_hook(lambda _, __, y: y * 2)
        check_left(changed, mi.nn.rules.dit(), "a norm of it has hooks")
        later = mi.convert(copy.deepcopy(layer), rules=mi.nn.rules.dit())
        getattr(later, name).register_forward_hook(lambda _, __, y: y * 2)
        torch.testing.assert_close(later(*inputs), changed(*inputs), rtol=1e-12, atol=1e-12)
    later = mi.convert(copy.deepcopy(layer), rules=mi.nn.rules.dit())
    assert torch.equal(later(c=inputs[1], x=inputs[0]), layer(*inputs)), "its own forward has names"
    one = draw(C)
    for function in (later, layer):  # chunks of dimension 1
        with pytest.raises(IndexError):
            function(inputs[0], one)
    later.attn.register_forward_hook(lambda _, __, h: h[:1])  # of another shape
    layer.attn.register_forward_hook(lambda _, __, h: h[:1])
    torch.testing.assert_close(later(*inputs), layer(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.compile
def test_converted_blocks_compile_whole():
    layer = mi.convert(unlike_zero(adaptive_norms.DiTBlock(C, 2)), rules=mi.nn.rules.dit())
    x, c = torch.randn(B, T, C), torch.randn(B, C)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, c), layer(x, c))
