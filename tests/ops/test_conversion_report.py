"""What mi.convert says, mi.conversion_report, and rules of one's own.

Over 400 lines: the three are tested on the same small models.
"""

import copy
import io
import logging
import pickle
import re
import warnings
from dataclasses import FrozenInstanceError

import pytest
import stand_ins
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mi_kernels as mi


class Pair(nn.Module):
    """A layer of a user's own: a bilinear form, times a number."""

    def __init__(self, size=3, factor=2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size, size))
        self.factor = factor

    def forward(self, a, b):
        return self.factor * nn.functional.bilinear(a, b, self.weight)


class FusedPair(Pair):
    def forward(self, a, b):
        return self.factor * mi.bilinear(a, b, self.weight)


class SpecialPair(Pair):
    pass


class Doubled(nn.Bilinear):
    pass


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, a, b):
        return self.inner(a, b)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.compare = nn.Bilinear(3, 3, 3)
        self.pair = Pair()
        self.inner = nn.ModuleList([nn.Linear(3, 3), Pair(), Doubled(3, 3, 3)])


def swap(layer):
    layer.__class__ = FusedPair
    return layer


def replace(layer):
    other = FusedPair(len(layer.weight), layer.factor)
    other.weight = layer.weight
    return other


def rows(report):
    return {entry.path: (entry.before, entry.status, entry.now) for entry in report}


def silent(function, *arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*arguments, **keywords)


LEFT = ("Doubled", "left", "Doubled")
BEFORE = {"compare": ("nn.Bilinear", "convertible", "nn.Bilinear"), "inner.2": LEFT}
PAIRS = {path: ("Pair", "convertible", "Pair") for path in ("pair", "inner.1")}


# the report


def test_a_model_that_was_never_converted():
    model = Model()
    assert rows(mi.conversion_report(model)) == BEFORE
    assert rows(mi.conversion_report(model, {Pair: swap})) == BEFORE | PAIRS
    assert rows(mi.conversion_report(model, rules={Pair: replace})) == BEFORE | PAIRS
    assert type(model.compare) is nn.Bilinear and type(model.pair) is Pair


@pytest.mark.parametrize("rule", [swap, replace])
def test_after_conversion_and_of_copies(rule):
    model = silent(mi.convert, Model(), rules={Pair: rule})
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    copies = [model, copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model)), loaded]
    copies[1].load_state_dict(Model().state_dict())
    expected = {
        "compare": ("nn.Bilinear", "converted", "mi.nn.Bilinear"),
        "pair": ("Pair", "converted", "FusedPair"),
        "inner.1": ("Pair", "converted", "FusedPair"),
        "inner.2": LEFT,
    }
    for one in copies:
        assert rows(mi.conversion_report(one)) == expected
        assert rows(mi.conversion_report(one, {Pair: rule})) == expected
    assert list(model.state_dict()) == list(Model().state_dict())


def test_classes_have_the_names_that_they_are_imported_by():
    """What a ready rule makes has none in mi.nn."""
    with stand_ins.installed("supar"):
        layer = mi.convert(stand_ins.Biaffine(3), rules=mi.nn.rules.supar())
        assert mi.conversion_report(layer)[0].now == "FusedBiaffine"
    layer = mi.convert(Pair(), rules={Pair: lambda _: mi.nn.Biaffine(2, 2, 2)})
    assert mi.conversion_report(layer)[0].now == "mi.nn.Biaffine"


def test_a_report_is_a_sequence_that_cannot_be_changed():
    report = mi.conversion_report(Model(), {Pair: swap})
    assert isinstance(report, mi.ConversionReport) and len(report) == 4
    assert report[0] is report.entries[0] is next(iter(report)) and report[-1].path == "inner.2"
    assert report.of("left") == (report[-1],) and len(report.of("convertible")) == 3
    assert report.of("converted") == ()
    assert (report.model, report.looked_for) == ("Model", ("nn.Bilinear", "Pair"))
    for changed in (report, report[0]):
        with pytest.raises(FrozenInstanceError):
            changed.model = changed.path = "other"
    assert report == mi.conversion_report(Model(), {Pair: swap})


def test_the_table():
    model = mi.convert(Model(), rules={Pair: swap})
    model.append = nn.Bilinear(1, 1, 1)
    assert str(mi.conversion_report(model)).splitlines() == [
        "Model: 3 converted, 1 left alone, 1 convertible",
        "  compare  nn.Bilinear  converted: mi.nn.Bilinear",
        "  pair     Pair         converted: FusedPair",
        "  inner.1  Pair         converted: FusedPair",
        "  inner.2  Doubled      left alone: it is a subclass of nn.Bilinear and may compute something else",
        "  append   nn.Bilinear  convertible: mi.convert would convert it",
    ]


def test_nothing_found_is_said_plainly():
    report = mi.conversion_report(nn.Sequential(nn.Linear(2, 2)), {Pair: swap})
    assert not report and str(report).startswith(
        "Sequential: found nothing to convert: no nn.Bilinear, no Pair"
    )


def test_the_model_itself():
    assert rows(mi.conversion_report(nn.Bilinear(2, 2, 2))) == {"": BEFORE["compare"]}
    assert "(the model)" in str(mi.conversion_report(nn.Bilinear(2, 2, 2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_convert_warns_of_is_left_with_the_reason():
    replaced = nn.Bilinear(2, 2, 2)
    replaced.forward = lambda a, b: a
    model = nn.ModuleDict(
        {
            "scripted": torch.jit.script(nn.Bilinear(2, 2, 2)),
            "replaced": replaced,
            "complex": nn.Bilinear(2, 2, 2, dtype=torch.complex64),
            "special": SpecialPair(),
        }
    )
    report = mi.conversion_report(model, {Pair: swap})
    reasons = {entry.path: entry.reason for entry in report.of("left")}
    assert "TorchScript" in reasons["scripted"] and "forward was replaced" in reasons["replaced"]
    assert reasons["complex"] == "its parameters are complex"
    assert reasons["special"] == "it is a subclass of Pair and may compute something else"
    with pytest.warns(UserWarning) as caught:
        mi.convert(model, rules={Pair: swap})
    said = " ".join(str(one.message) for one in caught)
    assert all(reason in said for path, reason in reasons.items() if path != "special")
    assert mi.conversion_report(model, {Pair: swap}) == report


def test_parametrized_layers_are_reported_by_their_own_class():
    model = nn.ModuleList([parametrizations.weight_norm(nn.Bilinear(2, 2, 2))])
    assert rows(mi.conversion_report(model)) == {"0": BEFORE["compare"]}
    mi.convert(model)
    assert rows(mi.conversion_report(model)) == {"0": ("nn.Bilinear", "converted", "mi.nn.Bilinear")}


def test_there_and_back():
    model = mi.convert(mi.convert(Model()), to="torch")
    assert rows(mi.conversion_report(model)) == BEFORE


def test_of_a_rule_that_refuses():
    rules = {Pair: lambda layer: "its factor is 2" if layer.factor == 2 else None}
    model = nn.ModuleList([Pair(), Pair(factor=3.0)])
    before = mi.conversion_report(model, rules)
    with pytest.warns(UserWarning, match=r"^convert: ModuleList\.0 is left alone: its factor is 2$"):
        mi.convert(model, rules=rules)
    assert mi.conversion_report(model, rules) == before
    assert [entry.status for entry in before] == ["left", "left"]
    assert [entry.reason for entry in before] == [
        "its factor is 2",
        "its rule leaves it, and gives no reason",
    ]


def test_a_trial_of_a_rule_changes_nothing():
    def destructive(layer):
        layer.weight.data.zero_()
        layer.weight = None
        layer.note = "changed"
        return FusedPair()

    layer = Pair()
    expected, state = copy.deepcopy(layer.state_dict()), set(vars(layer))
    assert mi.conversion_report(layer, {Pair: destructive})[0].status == "convertible"
    assert torch.equal(layer.weight, expected["weight"]) and set(vars(layer)) == state


def test_a_rule_that_reads_values_decides_later():
    def by_value(layer):
        return swap(layer) if layer.weight.abs().max().item() > 0 else "its weight is zero"

    entry = mi.conversion_report(Pair(), {Pair: by_value})[0]
    assert entry.status == "convertible" and "its rule decides; on a copy without data it raised" in str(
        entry
    )


def test_lazy_and_shared_layers():
    lazy = nn.LazyLinear(3)
    report = mi.conversion_report(nn.ModuleList([lazy, lazy]), {nn.LazyLinear: lambda layer: nn.Identity()})
    assert [entry.path for entry in report.of("convertible")] == ["0"]


# what convert says


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="mi_kernels")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "mi_kernels"]


def test_one_line_of_the_log(log):
    model = Model()
    silent(mi.convert, model, rules={Pair: swap})
    silent(mi.convert, model, rules={Pair: swap})
    mi.convert(mi.convert(nn.Bilinear(2, 2, 2)), to="torch")
    left = "Model.inner.2: it is a subclass of nn.Bilinear and may compute something else"
    see = "; see mi.conversion_report(model)"
    assert log() == [
        f"convert: Model: 3 layers converted (1 nn.Bilinear, 2 Pair), 1 left alone: {left}{see}",
        f"convert: Model: 0 layers converted, 3 converted before, 1 left alone: {left}{see}",
        f"convert: Bilinear: 1 layer converted (1 nn.Bilinear){see}",
        f"convert: Bilinear: 1 layer converted (1 mi.nn.Bilinear){see}",
    ]


def test_a_line_names_a_few_of_those_left(log):
    mi.convert(nn.ModuleList([nn.Bilinear(2, 2, 2), *(Doubled(2, 2, 2) for _ in range(9))]))
    assert "9 left alone: ModuleList.1: " in log()[0] and "ModuleList.5: " in log()[0]
    assert "ModuleList.6: " not in log()[0] and log()[0].endswith("; ...; see mi.conversion_report(model)")


def test_warnings_that_are_errors_come_last():
    """Everything is in its place before them."""
    model = nn.ModuleList([Pair(), nn.Bilinear(2, 2, 2, dtype=torch.complex64)])
    with pytest.raises(UserWarning, match="complex"):
        silent(mi.convert, model, rules={Pair: replace})
    assert type(model[0]) is FusedPair


def test_nothing_is_printed_by_default(capfd):
    mi.convert(Model())
    assert capfd.readouterr() == ("", "")


def test_a_model_without_such_layers_gets_a_warning(log):
    message = "convert: Sequential: found nothing to convert: no nn.Bilinear, no Pair (rules= takes your own"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}") as caught:
        mi.convert(nn.Sequential(nn.Linear(2, 2)), rules={Pair: swap})
    assert caught[0].filename == __file__
    assert log() == ["convert: Sequential: 0 layers converted; see mi.conversion_report(model)"]


def test_the_warning_names_what_was_left_in_silence():
    with pytest.warns(UserWarning, match="found nothing to convert; left alone: Sequential.0: it is a subcl"):
        mi.convert(nn.Sequential(Doubled(2, 2, 2)))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(mi.nn.FiLM(2, context_features=2)),
        nn.Sequential(mi.nn.Bilinear(2, 2, 2)),
        nn.Sequential(type("Own", (mi.nn.FiLM,), {})(2, context_features=2)),
    ],
)
def test_models_of_this_package_are_no_surprise(model):
    silent(mi.convert, model)
    silent(mi.convert, nn.Sequential(nn.Linear(2, 2)), to="torch")


def test_a_warning_of_its_own_is_enough():
    layer = nn.Bilinear(2, 2, 2, dtype=torch.complex64)
    with pytest.warns(UserWarning) as caught:
        mi.convert(layer)
    assert len(caught) == 1 and caught[0].filename == __file__


# rules


@pytest.mark.parametrize("rule", [swap, replace])
def test_rules_of_ones_own(rule):
    model, twin = Model(), Pair()
    model.again = model.pair
    model.inner.append(nn.ModuleDict({"again": model.pair}))
    model.other = twin
    twin.weight = model.pair.weight
    a, b = torch.randn(2, 5, 3)
    expected, weight = model.pair(a, b), model.pair.weight
    assert mi.convert(model, rules={Pair: rule}) is model
    assert model.pair is model.again is model.inner[3]["again"] and type(model.pair) is FusedPair
    assert type(model.other) is FusedPair and model.other.weight is weight is model.pair.weight
    torch.testing.assert_close(model.pair(a, b), expected)
    assert type(model.compare) is mi.nn.Bilinear and type(model.inner[0]) is nn.Linear


def test_the_model_itself_may_be_replaced():
    layer = Pair()
    other = mi.convert(layer, rules={Pair: replace})
    assert type(other) is FusedPair and other.weight is layer.weight
    assert mi.convert(layer, rules={Pair: swap}) is layer


def test_subclasses_do_not_fall_under_a_rule():
    model = silent(mi.convert, nn.ModuleList([Pair(), SpecialPair()]), rules={Pair: swap})
    assert type(model[1]) is SpecialPair


def test_a_rule_may_wrap_the_layer():
    """The layer inside of its replacement stays there."""
    pair = Pair()
    model = nn.ModuleList([pair, nn.Sequential(pair), Wrapped(nn.Bilinear(2, 2, 2))])
    mi.convert(model, rules={Pair: lambda pair: Wrapped(pair)})
    assert model[0] is model[1][0] and type(model[0]) is Wrapped and model[0].inner is pair
    assert type(model[2].inner) is mi.nn.Bilinear
    silent(mi.convert, model)


@pytest.mark.parametrize("root", [True, False], ids=["root", "part"])
def test_a_layer_is_wrapped_once(root):
    rules = {Pair: lambda pair: Wrapped(pair), nn.Bilinear: lambda layer: Wrapped(layer)}
    model = Pair() if root else nn.ModuleList([Pair(), nn.Bilinear(2, 2, 2)])
    model = mi.convert(model, rules=rules)
    assert model is mi.convert(model, rules=rules)
    wrapper = model if root else model[0]
    assert type(wrapper.inner) is Pair
    assert [entry.status for entry in mi.conversion_report(model, rules)] == ["converted"] * (2 - root)
    wrapper.other = nn.Bilinear(2, 2, 2)  # of another class than what the rule has wrapped
    mi.convert(model)
    assert type(wrapper.other) is mi.nn.Bilinear


def test_modules_that_contain_each_other():
    outer, inner = nn.Module(), nn.Module()
    outer.inner, inner.outer, inner.pair = inner, outer, Pair()
    mi.convert(outer, rules={Pair: replace})
    assert type(outer.inner.outer.inner.pair) is FusedPair


def test_layers_inside_of_what_a_rule_takes():
    """A rule takes the outer layer, and the inner ones are converted as well, wherever they are now."""
    model = nn.ModuleList([Wrapped(nn.ModuleList([nn.Bilinear(2, 2, 2), Pair()]))])
    mi.convert(model, rules={Wrapped: lambda layer: nn.ModuleDict({"in": layer.inner}), Pair: replace})
    assert type(model[0]["in"][0]) is mi.nn.Bilinear and type(model[0]["in"][1]) is FusedPair


def test_a_rule_for_bilinear_comes_before_ours():
    class Own(nn.Bilinear):
        pass

    def rule(layer):
        layer.__class__ = Own
        return layer

    model = nn.ModuleList([nn.Bilinear(2, 2, 2)])
    mi.convert(model, rules={nn.Bilinear: rule})
    assert type(model[0]) is Own
    assert rows(mi.conversion_report(model)) == {
        "0": ("nn.Bilinear", "converted", "test_a_rule_for_bilinear_comes_before_ours.<locals>.Own")
    }


def test_a_rule_is_asked_once_for_a_layer():
    asked = []
    layer = Pair()
    mi.convert(nn.ModuleList([layer, layer]), rules={Pair: lambda one: asked.append(one) or swap(one)})
    assert asked == [layer]


def test_parametrized_layers_are_not_given_to_rules():
    model = nn.ModuleList([parametrizations.weight_norm(Pair())])
    with pytest.warns(UserWarning, match=r"ModuleList\.0 is left alone: it is parametrized"):
        mi.convert(model, rules={Pair: swap})
    assert isinstance(model[0], Pair) and not isinstance(model[0], FusedPair)


def test_a_replaced_forward_is_not_given_to_rules():
    layer = Pair()
    layer.forward = lambda a, b: a
    with pytest.warns(UserWarning, match="Pair is left alone: its forward was replaced"):
        mi.convert(layer, rules={Pair: swap})


def test_what_a_rule_made_does_not_go_back():
    model = mi.convert(Model(), rules={Pair: swap})
    message = r"^convert: Model\.pair is left alone: a rule made it of Pair, and has no way back$"
    with pytest.warns(UserWarning, match=message):
        mi.convert(model, to="torch")
    assert type(model.pair) is FusedPair and type(model.compare) is nn.Bilinear


def test_a_compiled_layer_is_not_replaced():
    """The wrapper would go on calling the old one; a change of class it notices."""
    compiled = torch.compile(Pair(), backend="eager")
    with pytest.warns(
        UserWarning, match=r"OptimizedModule\._orig_mod is left alone: torch\.compile has wrapped"
    ):
        mi.convert(compiled, rules={Pair: replace})
    assert type(compiled._orig_mod) is Pair
    mi.convert(compiled, rules={Pair: swap})
    assert type(compiled._orig_mod) is FusedPair


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Pair], "convert: rules: expected a mapping of classes to functions, got list"),
        ({"Pair": swap}, "convert: rules: expected classes of torch.nn.Module as keys, got 'Pair'"),
        ({int: swap}, "convert: rules: expected classes of torch.nn.Module as keys, got int"),
        ({Pair: 3}, r"convert: rules\[Pair\]: expected a function, got int"),
        ({Pair: FusedPair}, r"convert: rules\[Pair\]: expected a function, got the class FusedPair"),
    ],
)
def test_rules_are_checked(rules, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        mi.convert(Model(), rules=rules)
    with pytest.raises(TypeError, match=f"^{message.replace('convert', 'conversion_report', 1)}$"):
        mi.conversion_report(Model(), rules)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (
            lambda layer: 3,
            TypeError,
            "expected a torch.nn.Module, a str or None from the rule of Pair, got int",
        ),
        (lambda layer: FusedPair, TypeError, "from the rule of Pair, got the class FusedPair"),
        (lambda layer: 1 / 0, RuntimeError, "the rule of Pair raised ZeroDivisionError: division by zero"),
    ],
)
def test_errors_of_a_rule_name_the_layer(rule, error, message):
    with pytest.raises(error, match=rf"^convert: rules: Model\.pair: .*{re.escape(message)}") as caught:
        mi.convert(Model(), rules={Pair: rule})
    assert error is TypeError or isinstance(caught.value.__cause__, ZeroDivisionError)


def test_rules_have_no_way_back():
    with pytest.raises(ValueError, match="^convert: rules: expected None with to='torch'"):
        mi.convert(Model(), to="torch", rules={Pair: swap})


@pytest.mark.parametrize("module", [None, nn.Bilinear, [nn.Bilinear(2, 2, 2)]], ids=["none", "class", "list"])
def test_only_modules_have_a_report(module):
    kind = type(module).__name__
    with pytest.raises(
        TypeError, match=f"^conversion_report: module: expected a torch.nn.Module, got {kind}$"
    ):
        mi.conversion_report(module)
