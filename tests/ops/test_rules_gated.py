"""The ready rules of mi.convert for gated MLPs: transformers, timm, x_transformers; MultiBench's LMF.

As test_conversion_rules.py: stand-ins always, the packages where they can be imported.
"""

import copy
import importlib

import pytest
import stand_ins
import torch
from converted import check, check_left, derivatives, draw
from helpers import Spy
from torch import nn

import mi_kernels as mi


def package(name, *modules):
    @pytest.fixture(params=["stand-in", "real"])
    def found(request):
        if request.param == "real":
            for module in modules:
                last = pytest.importorskip(module, reason=f"{name} is not installed", exc_type=ImportError)
            yield last
        else:
            with stand_ins.installed(name):
                yield importlib.import_module(modules[-1])

    return found


timm = package("timm", "timm.layers.mlp")
x_transformers = package("x_transformers", "x_transformers.x_transformers")


@pytest.fixture
def models():
    with stand_ins.installed("transformers"):
        yield importlib.import_module("transformers.models.some.modeling_some")


ACTS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "gelu_new": stand_ins.NewGELUActivation(),
    "relu": nn.ReLU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "identity": nn.Identity(),
}


def gated(layer, *inputs):
    """Whether a layer's gated linear unit is one call."""
    with torch.no_grad(), Spy() as spy:
        layer(*inputs)
    return spy.names == ["dual_linear"]


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
@pytest.mark.parametrize("kind", ["LlamaMLP", "InheritedMLP", "Phi3MLP", "MoonshineDecoderMLP"])
def test_forms_of_transformers(models, kind, act):
    layer = getattr(models, kind)(5, 7, copy.deepcopy(act))
    layer = check(layer, mi.nn.rules.transformers(), draw(2, 3, 5))
    assert gated(layer, draw(4, 5)) and gated(layer, draw(5))
    name = {"Phi3MLP": "hidden_states", "MoonshineDecoderMLP": "hidden_states"}.get(kind, "x")
    x = draw(4, 5)
    torch.testing.assert_close(layer(**{name: x}), layer(x))


def test_biases_of_transformers(models):
    check(models.LlamaMLP(5, 7, nn.SiLU(), bias=True), mi.nn.rules.transformers(), draw(6, 5))


def test_other_forwards_of_transformers_have_no_rule(models):
    rules = mi.nn.rules.transformers()
    kinds = models.LlamaMLP, models.InheritedMLP, models.Phi3MLP
    assert set(rules) == {*kinds, models.MoonshineDecoderMLP, models.T5DenseGatedActDense}
    mi.convert(nn.Sequential(models.LlamaMLP(5, 7, nn.SiLU())), rules=rules)
    assert set(mi.nn.rules.transformers()) == set(rules)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_t5(models, dropout):
    layer = models.T5DenseGatedActDense(5, 7, stand_ins.NewGELUActivation(), dropout)
    check(layer, mi.nn.rules.transformers(), draw(2, 3, 5))


def test_t5_keeps_its_last_layer_in_another_dtype(models):
    layer = models.T5DenseGatedActDense(5, 7, stand_ins.NewGELUActivation()).bfloat16()
    layer.wo.float()
    before = copy.deepcopy(layer)
    mi.convert(layer, rules=mi.nn.rules.transformers())
    x = torch.randn(6, 5).bfloat16()
    assert gated(layer, x) and layer(x).dtype == torch.float32
    # The kernel rounds once, the layer after each of its steps: 2^-8 of sums below 1.
    torch.testing.assert_close(layer(x), before(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (stand_ins.FastGELUActivation(), "its activation is none of mi.glu's"),
        (nn.LeakyReLU(), r"its activation is none of mi.glu's, or has hooks (LeakyReLU)"),
        (nn.Softplus(beta=2), "its activation is none of mi.glu's"),
    ],
)
def test_other_activations_are_left(models, act, reason):
    check_left(models.LlamaMLP(5, 7, act), mi.nn.rules.transformers(), reason)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def change_type(layer):
    layer.gate_proj.__class__ = Adapted


def change_hook(layer):
    layer.up_proj.register_forward_hook(lambda _, __, y: y * 2)


def change_backward_hook(layer):
    layer.up_proj.register_full_backward_hook(lambda *_: None)


def change_forward(layer):
    layer.up_proj.forward = lambda x: x.new_ones(len(x), 7)


def change_norm(layer):
    nn.utils.parametrizations.weight_norm(layer.gate_proj)


def change_act(layer):
    layer.act_fn = nn.LeakyReLU()


def change_act_hook(layer):
    layer.act_fn.register_forward_hook(lambda _, __, y: y + 1)


def change_parameter(layer):
    class Subclass(torch.Tensor):
        pass

    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.detach().as_subclass(Subclass))


CHANGES = {
    change_type: "a Adapted is where an nn.Linear was expected",
    change_hook: "has hooks",
    change_backward_hook: "has hooks",
    change_forward: "has hooks or another forward",
    change_norm: "is where an nn.Linear was expected",
    change_act: "its activation is none",
    change_act_hook: "its activation is none of mi.glu's, or has hooks (SiLU)",
    change_parameter: "a subclass of tensors",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_more_than_a_linear_layer_is_called(models, change):
    """Left before the conversion; afterwards its own forward runs."""
    torch.manual_seed(0)
    layer = models.LlamaMLP(5, 7, nn.SiLU()).double()
    changed = copy.deepcopy(layer)
    change(changed)
    check_left(changed, mi.nn.rules.transformers(), CHANGES[change])
    mi.convert(layer, rules=mi.nn.rules.transformers())
    x = draw(4, 5)
    assert gated(layer, x)
    change(layer)
    assert not gated(layer, x)
    found, expected = (each(x).as_subclass(torch.Tensor) for each in (layer, changed))
    assert torch.equal(found, expected)


def test_dtypes_of_converted_layers(models):
    layer = mi.convert(models.LlamaMLP(5, 7, nn.SiLU()), rules=mi.nn.rules.transformers())
    x = torch.randn(4, 5)
    with pytest.raises(RuntimeError, match="dtype"):  # that of F.linear
        layer(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert gated(layer, x) and gated(layer, x.bfloat16()) and layer(x).dtype == torch.bfloat16
    complex_layer = models.LlamaMLP(5, 7, nn.SiLU()).to(torch.complex64)
    check_left(complex_layer, mi.nn.rules.transformers(), "the dtype torch.complex64")


def test_hooks_of_the_last_layer_and_of_dropout_run(models):
    layer = mi.convert(models.T5DenseGatedActDense(5, 7, nn.ReLU()), rules=mi.nn.rules.transformers())
    seen = []
    for part in (layer.wo, layer.dropout):
        part.register_forward_hook(lambda module, *_: seen.append(module))
    assert gated(layer, torch.randn(4, 5)) and seen == [layer.dropout, layer.wo]


def test_converted_layers_under_function_transforms(models):
    layer = models.LlamaMLP(5, 7, nn.SiLU()).double()
    before = copy.deepcopy(layer)
    mi.convert(layer, rules=mi.nn.rules.transformers())
    x, state = draw(4, 5), dict(before.state_dict())

    def norms(module):
        def loss(state, x):
            return torch.func.functional_call(module, state, x).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(state, x)

    torch.testing.assert_close(norms(layer), norms(before), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lead", [(), (0,), (4,), (2, 0), (2, 3), (2, 1, 3)], ids=str)
def test_shapes_of_converted_layers(models, lead):
    layer = models.Phi3MLP(5, 7, nn.SiLU()).double()
    before = copy.deepcopy(layer)
    mi.convert(layer, rules=mi.nn.rules.transformers())
    x = draw(*lead, 5)
    for each in (x, x.transpose(0, -2) if len(lead) > 1 else x, x.expand(3, *lead, 5)):
        torch.testing.assert_close(layer(each), before(each), rtol=1e-9, atol=1e-11)


@pytest.mark.compile
def test_converted_layers_compile_whole(models):
    layer = mi.convert(models.T5DenseGatedActDense(5, 7, nn.GELU()), rules=mi.nn.rules.transformers())
    x = torch.randn(4, 5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


SIZES = {"hidden_size": 6, "intermediate_size": 10, "num_attention_heads": 1}
REAL = {
    "llama.LlamaMLP": ("LlamaConfig", {**SIZES, "mlp_bias": True}),
    "mistral.MistralMLP": ("MistralConfig", SIZES),
    "qwen3.Qwen3MLP": ("Qwen3Config", SIZES),
    "gemma2.Gemma2MLP": ("Gemma2Config", SIZES),
    "phi3.Phi3MLP": ("Phi3Config", {**SIZES, "pad_token_id": 0}),
    "modernbert.ModernBertMLP": ("ModernBertConfig", SIZES),
    "t5.T5DenseGatedActDense": (
        "T5Config",
        {"d_model": 6, "d_ff": 10, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.5},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_classes_of_transformers(name):
    pytest.importorskip("transformers.activations", reason="transformers is not installed: too heavy")
    import transformers

    file, cls = name.split(".")
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    config, options = REAL[name]
    layer = getattr(module, cls)(getattr(transformers, config)(**options))
    layer = check(layer, mi.nn.rules.transformers(), draw(2, 3, 6))
    assert gated(layer, draw(4, 6))


def test_glu_mlp_of_timm(timm):
    for number, options in enumerate(
        (
            {},
            {"act_layer": nn.SiLU, "gate_last": False},
            {"act_layer": nn.GELU, "norm_layer": nn.LayerNorm, "drop": 0.5},
        )
    ):
        torch.manual_seed(number)
        layer = check(timm.GluMlp(5, 14, **options), mi.nn.rules.timm(), draw(2, 3, 5))
        assert gated(layer, draw(4, 5))


def test_swiglu_of_timm(timm):
    for options in ({}, {"norm_layer": nn.LayerNorm, "drop": 0.5}):
        layer = check(timm.SwiGLU(5, 7, **options), mi.nn.rules.timm(), draw(2, 3, 5))
        assert gated(layer, draw(4, 5))


def test_activations_of_timm(timm):
    activations = importlib.import_module("timm.layers.activations")
    names = "Swish", "Mish", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "GELU", "GELUTanh", "QuickGELU"
    found = [getattr(activations, name) for name in names if hasattr(activations, name)]
    assert activations.QuickGELU in found
    for act in found:
        layer = mi.convert(timm.SwiGLU(5, 7, act_layer=act).double(), rules=mi.nn.rules.timm())
        x = draw(6, 5)
        assert gated(layer, x)
        expected, _, _ = derivatives(layer, [x], type(layer).__base__.forward)
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-11)


def test_what_is_left_of_timm(timm):
    rules = mi.nn.rules.timm()
    check_left(timm.GluMlp(4, 6, use_conv=True), rules, "convolutions")
    check_left(timm.GluMlp(4, 6, act_layer=nn.LeakyReLU), rules, "its activation is none of mi.glu's")
    check_left(timm.SwiGLU(4, 6, act_layer=nn.LeakyReLU), rules, "its activation is none of mi.glu's")
    for layer in (timm.GluMlp(4, 6), timm.SwiGLU(4, 6)):
        before = copy.deepcopy(layer)
        mi.convert(layer, rules=rules).act = before.act = nn.ELU()
        x = torch.randn(3, 4)
        assert not gated(layer, x) and torch.equal(layer(x), before(x))


@pytest.mark.parametrize("options", [{}, {"mult_bias": True}], ids=str)
def test_glu_of_x_transformers(x_transformers, options):
    layer = x_transformers.GLU(5, 7, nn.GELU(), **options)
    if options:
        nn.init.normal_(layer.mult_bias)
    layer = check(layer, mi.nn.rules.x_transformers(), draw(2, 3, 5))
    with torch.no_grad(), Spy() as spy:
        layer(draw(4, 5))
    assert spy.names == ["dual_linear"]


def test_what_is_left_of_x_transformers(x_transformers):
    rules = mi.nn.rules.x_transformers()
    check_left(x_transformers.GLU(5, 7, nn.SiLU(), softclamp=True), rules, "softclamp")
    check_left(x_transformers.GLU(5, 7, torch.sin), rules, "its activation is none of mi.glu's")
    layer = x_transformers.GLU(5, 7, nn.SiLU())
    layer.mult_bias = 2.0
    check_left(layer, rules, "mult_bias")
    layer = x_transformers.GLU(5, 7, nn.SiLU(), mult_bias=True)
    before = copy.deepcopy(layer)
    mi.convert(layer, rules=rules).act = before.act = nn.ELU()
    x = torch.randn(3, 5)
    assert not gated(layer, x) and torch.equal(layer(x), before(x))


@pytest.fixture
def multibench():
    """The real class puts its parameters on a GPU, and registers none of them."""
    with stand_ins.installed("multibench"):
        yield importlib.import_module("fusions.common_fusions")


def fusion(module, *arguments, **options):
    layer = module.LowRankTensorFusion(*arguments, **options).double()
    layer.factors = [nn.Parameter(factor.detach().double()) for factor in layer.factors]
    nn.init.normal_(layer.fusion_bias)
    return layer


@pytest.mark.parametrize("sizes", [(3, 4), (4, 3)])
def test_low_rank_fusion(multibench, sizes):
    layer = fusion(multibench, sizes, 64, 16)
    before = copy.deepcopy(layer)
    inputs = [draw(2048, size) for size in sizes]
    layer = check(layer, mi.nn.rules.multibench(), *inputs, call=lambda m, *pair: m(list(pair)))
    with torch.no_grad(), Spy() as spy:
        y = layer(inputs)
    assert spy.names == ["dual_linear"] and y.shape == (2048, 64)
    grads = [torch.autograd.grad(m(inputs).square().sum(), m.factors) for m in (layer, before)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


def test_low_rank_fusion_of_flattened_modalities(multibench):
    layer = fusion(multibench, (6, 8), 64, 16)
    inputs = draw(2048, 3, 2), draw(2048, 2, 4)
    with torch.no_grad(), Spy() as spy:
        mi.convert(copy.deepcopy(layer), rules=mi.nn.rules.multibench())(inputs)
    assert spy.names == ["dual_linear"]
    check(layer, mi.nn.rules.multibench(), *inputs, call=lambda m, *pair: m(list(pair)))


@pytest.mark.parametrize(("sizes", "rows"), [((3, 4), 2047), ((200, 150), 2099)])
def test_low_rank_fusion_of_few_rows_is_as_before(multibench, sizes, rows):
    """No copies of factors that are nearly as large as what they save."""
    layer = fusion(multibench, sizes, 64, 16)
    before = copy.deepcopy(layer)
    mi.convert(layer, rules=mi.nn.rules.multibench())
    inputs = [draw(rows, size) for size in sizes]
    with torch.no_grad():
        assert torch.equal(layer(inputs), before(inputs))
        inputs = [torch.cat((each, each[:1])) for each in inputs]
        with Spy() as spy:
            layer(inputs)
    assert spy.names == ["dual_linear"]


def test_what_is_left_of_low_rank_fusion(multibench):
    rules = mi.nn.rules.multibench()
    check_left(fusion(multibench, (3, 4, 2), 5, 2), rules, "it has 3 modalities, not two")
    check_left(fusion(multibench, (3, 4), 5, 2).to(torch.complex64), rules, "complex")
    layer = mi.convert(fusion(multibench, (3, 4), 64, 16), rules=rules)
    with Spy() as spy:
        assert layer([draw(2048, 3)]).shape == (2048, 64)
    assert spy.names == []
