"""The ready rules of mi.convert for pykeen, supar and MultiBench: layers compute and train as before.

They are not in the test extra (heavy, or no package): stand-ins with their attributes and formulas always
run, the packages themselves where they can be imported.
"""

import builtins
import subprocess
import sys

import pytest
import stand_ins
import torch
from converted import check, check_left, draw
from helpers import Spy
from torch import nn

import mi_kernels as mi

PLACES = {
    "pykeen": ("pykeen.nn.modules", "pykeen is not installed: too heavy for continuous integration"),
    "supar": ("supar.modules.affine", "supar is not installed: it needs nltk, stanza, transformers"),
    "multibench": ("fusions.common_fusions", "MultiBench is a repository, not a package"),
}


def package(name):
    @pytest.fixture(params=["stand-in", "real"])
    def found(request):
        module, reason = PLACES[name]
        if request.param == "real":
            yield pytest.importorskip(module, reason=reason, exc_type=ImportError)
        else:
            with stand_ins.installed(name):
                yield pytest.importorskip(module)

    return found


pykeen, supar, multibench = package("pykeen"), package("supar"), package("multibench")


def tucker(module, size, relation, dropouts=(0.0, 0.0, 0.0), norm=True):
    if module.TuckERInteraction is stand_ins.TuckERInteraction:
        return module.TuckERInteraction(size, relation, dropouts, norm)
    return module.TuckERInteraction(size, relation, *dropouts, apply_batch_normalization=norm)


SHAPES = {
    "triples": ((6, 4), (6, 3), (6, 4)),
    "tails": ((6, 1, 4), (6, 1, 3), (1, 5, 4)),
    "heads": ((1, 5, 4), (6, 1, 3), (6, 1, 4)),
    "negatives": ((6, 1, 4), (6, 1, 3), (6, 5, 4)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("dropouts", "norm"), [((0.0, 0.0, 0.0), True), ((0.3, 0.0, 0.0), False), ((0.3, 0.4, 0.5), True)]
)
def test_tucker(pykeen, shapes, dropouts, norm):
    """Also with dropout of the relations: then everything is drawn as before, in the same layouts."""
    layer = tucker(pykeen, 4, 3, dropouts, norm)
    check(layer, mi.nn.rules.pykeen(), *(draw(*shape) for shape in shapes))


def test_tucker_is_one_call_without_dropout_of_the_relations(pykeen):
    inputs = [torch.randn(shape) for shape in SHAPES["tails"]]
    layer = mi.convert(tucker(pykeen, 4, 3, (0.3, 0.4, 0.5)), rules=mi.nn.rules.pykeen())
    hooks = mi.convert(tucker(pykeen, 4, 3), rules=mi.nn.rules.pykeen())
    hooks.relation_dropout.register_forward_hook(lambda *_: None)
    for module, names in ((layer, []), (layer.eval(), ["interaction"]), (hooks, [])):
        training = module.training
        with Spy() as spy:
            module.train(names == []) if module is layer else module
            module(*inputs)
        module.train(training)
        assert spy.names == names


def test_complex_tucker_is_left(pykeen):
    layer = tucker(pykeen, 4, 3, norm=False).to(torch.complex64)
    check_left(layer, mi.nn.rules.pykeen(), "its parameters are complex")


@pytest.mark.parametrize("n_out", [1, 3])
@pytest.mark.parametrize("scale", [0, 0.5])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_biaffine(supar, n_out, scale, biases):
    layer = supar.Biaffine(4, n_out, scale, *biases)
    nn.init.normal_(layer.weight)
    check(layer, mi.nn.rules.supar(), draw(2, 3, 4), draw(2, 5, 4))


def test_biaffine_of_another_version_is_left(supar):
    layer = supar.Biaffine(4)
    layer.mlp_x = nn.Linear(4, 4)
    check_left(layer, mi.nn.rules.supar(), "more parts than a weight")
    layer = supar.Biaffine(4)
    layer.weight = nn.Parameter(torch.zeros(1, 4))
    check_left(layer, mi.nn.rules.supar(), "its weight is not [n_out, 5, 5]")
    check_left(supar.Biaffine(4).to(torch.complex64), mi.nn.rules.supar(), "complex")


def multiplicative(module, *arguments, **options):
    layer = module.MultiplicativeInteractions2Modal(*arguments, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize(
    "options", [{}, {"flip": True}, {"clip": (-0.5, 0.5)}, {"flip": True, "clip": (-0.1, 2.0)}], ids=str
)
@pytest.mark.parametrize(("output", "size"), [("matrix", 5), ("matrix3D", (2, 3))])
def test_multiplicative_interactions(multibench, output, size, options):
    inputs = [draw(6, 3), draw(6, 4)]
    layer = multiplicative(multibench, (3, 4), size, output, **options)
    inputs = inputs[::-1] if options.get("flip") else inputs
    layer = check(layer, mi.nn.rules.multibench(), *inputs, call=lambda m, *pair: m(list(pair)))
    with Spy() as spy:
        layer(inputs)
    assert spy.names == ["interaction"]
    assert layer(inputs[:1]) is inputs[0]
    with pytest.raises(AssertionError):
        layer([*inputs, inputs[0]])


def test_multiplicative_interactions_of_flattened_modalities(multibench):
    layer = multiplicative(multibench, (6, 8), 5, "matrix", flatten=True)
    inputs = draw(6, 3, 2), draw(6, 2, 4)
    check(layer, mi.nn.rules.multibench(), *inputs, call=lambda m, *pair: m(list(pair)))


def test_clipped_gradients(multibench):
    """A hook of the parameters, which pickle does not take."""
    layer = multiplicative(multibench, (3, 4), 5, "matrix", grad_clip=(-1e-3, 1e-3)).double()
    mi.convert(layer, rules=mi.nn.rules.multibench())
    layer([draw(6, 3), draw(6, 4)]).square().sum().backward()
    assert all(parameter.grad.abs().max() == 1e-3 for parameter in layer.parameters())


@pytest.mark.parametrize("output", ["vector", "scalar"])
def test_other_multiplicative_interactions_are_left(multibench, output):
    layer = multiplicative(multibench, (3, 4), 4, output)
    check_left(layer, mi.nn.rules.multibench(), f"its output is {output!r}, where no weight is generated")


def test_complex_multiplicative_interactions_are_left(multibench):
    layer = multiplicative(multibench, (3, 4), 5, "matrix").to(torch.complex64)
    check_left(layer, mi.nn.rules.multibench(), "complex")


@pytest.mark.parametrize(
    ("name", "module", "advice"),
    [
        ("torch_geometric", "torch_geometric", "pip install torch_geometric"),
        ("pykeen", "pykeen", "pip install pykeen"),
        ("supar", "supar", "pip install supar"),
        ("transformers", "transformers", "pip install transformers"),
        ("timm", "timm", "pip install timm"),
        ("x_transformers", "x_transformers", "pip install x-transformers"),
        ("multibench", "fusions.common_fusions", "put a clone of https://github.com/pliang279/MultiBench on"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, name, module, advice):
    original = builtins.__import__

    def missing(wanted, *arguments):
        if wanted.split(".")[0] == module.split(".")[0]:
            raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)
        return original(wanted, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, f"mi_kernels.nn.rules._{name}", raising=False)
    monkeypatch.delattr(mi.nn.rules, f"_{name}", raising=False)
    message = rf"^mi\.nn\.rules\.{name}: cannot import {module} \(No module named .*\): {advice}"
    with pytest.raises(ImportError, match=message):
        getattr(mi.nn.rules, name)()


@pytest.mark.subprocess
def test_nothing_is_imported_before_a_rule_is_asked_for():
    names = ("torch_geometric", "pykeen", "supar", "fusions", "transformers", "timm", "x_transformers")
    program = f"import sys, mi_kernels; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
