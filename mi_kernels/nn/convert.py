"""Conversion of existing models to the modules of this package, and back."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ._substitute import Rule, Rules, ask, check_rules, put, trial_copy
from .interaction import Bilinear
from .report import ConversionReport, LayerReport, counted, label, nothing

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Direction = Literal["mi_kernels", "torch"]
Known = dict[type[nn.Module], Rule]
_log = logging.getLogger("mi_kernels")
_PACKAGE = __name__.rpartition(".")[0] + "."
# On what a rule has made: what it was before. Copies and pickles keep it, a state dict has no place for it.
_FROM = "_converted_from"


def convert(module: ModuleT, *, to: Direction = "mi_kernels", rules: Rules | None = None) -> ModuleT:
    """Converts every ``nn.Bilinear`` in a model, or the model itself, to :class:`mi_kernels.nn.Bilinear`.

    Works in place and returns its argument. In place, so that everything that refers to the layer or to
    its parameters (optimisers, hooks, weight tying, a second attribute of the model, data-parallel
    wrappers) keeps referring to the same objects: only the class of the layer changes. Parameters,
    buffers, hooks, training flag, ``requires_grad``, device and dtype are therefore unchanged, and
    converting again has no effect. For a converted copy, ``convert(copy.deepcopy(model))``.

    ``convert(model, to="torch")`` is the inverse, with the same guarantees: the model can then be pickled,
    scripted or exported without this package.

    Converted: modules whose type is exactly ``nn.Bilinear`` (``mi_kernels.nn.Bilinear``), also with
    parametrizations (``torch.nn.utils.parametrize``). A compiled model (``torch.compile``) recompiles
    automatically.

    Left alone: other subclasses of ``nn.Bilinear``, because they may compute something else.

    Left alone with a UserWarning that names the layer: complex parameters, scripted or traced layers (convert
    first, and trace: a converted model cannot be scripted), layers whose ``forward`` was replaced, and those
    for which a rule gives a reason. With ``to="torch"`` also modules of this package without an equivalent in
    PyTorch, subclasses of this package's modules, and layers that a rule has made.

    The logger ``mi_kernels`` gets one line at level INFO, which says what was done;
    :func:`mi_kernels.conversion_report` says it layer by layer. Where nothing is converted, nor was before,
    there is a UserWarning.

    Args:
        module: any ``torch.nn.Module``. Only registered submodules are found, as by ``module.modules()``.
        to: ``"mi_kernels"``, or ``"torch"`` for the inverse.
        rules: functions for layers of other classes: ``{SomeClass: function}``. Of a layer whose type is
            exactly that class, ``function(layer)`` returns the layer itself, changed in place (a new
            ``__class__`` keeps all that is said above), or a module that is put in its place wherever it is
            registered; None to leave it alone, or a str that says why. Ready rules are in ``mi.nn.rules``:
            ``rules=mi.nn.rules.torch_geometric()``. Parametrized layers are left alone.

    Returns:
        ``module``, or what a rule puts in its place.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``, ``rules`` no mapping of classes of modules to
            functions, or a rule returns something else.
        ValueError: ``to`` is neither, or there are ``rules`` with ``to="torch"``.
        RuntimeError: a rule raises an error. The message names the layer; others may be converted already.

    Example:
        >>> model = mi.convert(torch.nn.Sequential(torch.nn.Bilinear(3, 5, 4)))
        >>> type(model[0])
        <class 'mi_kernels.nn.interaction.Bilinear'>
    """
    known = _known("convert", module, rules)
    if not isinstance(to, str) or to not in ("mi_kernels", "torch"):
        raise ValueError(f"convert: to: expected one of mi_kernels, torch, got {to!r}")
    if to == "torch":
        if rules is not None:
            raise ValueError("convert: rules: expected None with to='torch': a rule has no way back")
        known = {Bilinear: _to_torch}
        found = list(_found_ours(module))
    else:
        found = list(_found(module, known))  # complete before anything changes
    ours = to == "torch" or any(_ours(one) for one in module.modules())
    done, replaced = _apply(module, found, known)
    result = cast(ModuleT, put(module, replaced)) if replaced else module
    _say(type(module).__name__, done, None if ours else known)
    return result


def conversion_report(module: nn.Module, rules: Rules | None = None) -> ConversionReport:
    """What :func:`mi_kernels.convert` has done to a model, and what it would do.

    It looks at the model as it is: also at one that was copied, pickled or never converted. Nothing changes.

    Args:
        module: any ``torch.nn.Module``.
        rules: as of :func:`mi_kernels.convert`. Each is tried on a copy of the layer without data (on the
            meta device), so that the report knows what the rule leaves alone.

    Returns:
        A :class:`mi_kernels.ConversionReport`, a printable sequence of the layers that are converted, left
        alone, or would be converted. ``mi.nn.Bilinear`` counts as a converted ``nn.Bilinear``, also where the
        model was built with it; other modules of this package are not listed, unless a rule made them.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``, or ``rules`` no mapping of classes of modules to
            functions.

    Example:
        >>> model = torch.nn.Sequential(mi.nn.Bilinear(3, 3, 4), torch.nn.Bilinear(4, 4, 4))
        >>> print(mi.conversion_report(model))
        Sequential: 1 converted, 1 convertible
          0  nn.Bilinear  converted: mi.nn.Bilinear
          1  nn.Bilinear  convertible: mi.convert would convert it
    """
    known = _known("conversion_report", module, rules)
    entries = tuple(_tried(one, known) for one in _found(module, known))
    return ConversionReport(type(module).__name__, tuple(map(label, known)), entries)


class _Layer(NamedTuple):
    layer: nn.Module
    cls: type[nn.Module] | None  # whose rule is to be asked
    entry: LayerReport
    warn: bool = False


def _known(op: str, module: Any, rules: Rules | None) -> Known:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{op}: module: expected a torch.nn.Module, got {type(module).__name__}")
    return {nn.Bilinear: _to_mi_kernels, **({} if rules is None else check_rules(op, rules))}


def _found(module: nn.Module, known: Known) -> Iterator[_Layer]:
    """The layers that conversion concerns; a module with two names once."""
    made: list[tuple[str, str]] = []  # of what rules have made: the start of paths inside, and of which class
    for path, layer in module.named_modules():
        now = label(_class_of(layer))
        before = vars(layer).get(_FROM) or ("nn.Bilinear" if _is_of(layer, Bilinear) else None)
        if before is not None:
            if _FROM in vars(layer):
                made.append((f"{path}." if path else "", before))
            yield _Layer(layer, None, LayerReport(path, before, "converted", now))
            continue
        cls = next((cls for cls in known if _is_of(layer, cls)), None)
        if cls is not None and any(path.startswith(start) and of == label(cls) for start, of in made):
            continue  # its rule kept it inside of what it made of it
        if cls is not None:
            yield _to_ask(layer, cls, path, label(cls), _obstacle(layer, known[cls]))
        elif not isinstance(layer, Bilinear):
            cls = next((cls for cls in known if isinstance(layer, cls)), None)
            if cls is not None:
                reason = f"it is a subclass of {label(cls)} and may compute something else"
                yield _Layer(layer, None, LayerReport(path, now, "left", now, reason))


def _found_ours(module: nn.Module) -> Iterator[_Layer]:
    """The layers that have, or may have, to become PyTorch's."""
    for path, layer in module.named_modules():
        of_bilinear = _is_of(layer, Bilinear)
        if not isinstance(layer, torch.jit.ScriptModule) and _FROM in vars(layer):
            obstacle: str | None = f"a rule made it of {vars(layer)[_FROM]}, and has no way back"
        else:
            obstacle = _obstacle(layer, _to_torch) if of_bilinear else _stays(layer)
        if of_bilinear or obstacle is not None:
            yield _to_ask(layer, Bilinear, path, label(_class_of(layer)), obstacle)


def _to_ask(layer: nn.Module, cls: type[nn.Module], path: str, before: str, obstacle: str | None) -> _Layer:
    now = label(_class_of(layer))
    if obstacle is None:
        return _Layer(layer, cls, LayerReport(path, before, "convertible", now))
    return _Layer(layer, cls, LayerReport(path, before, "left", now, obstacle), warn=True)


def _apply(
    module: nn.Module, found: list[_Layer], known: Known
) -> tuple[list[_Layer], dict[nn.Module, nn.Module]]:
    """Asks the rules. What was done, and what belongs in the place of which layer."""
    done, replaced = [], dict[nn.Module, nn.Module]()
    # Of torch.compile: the wrapper goes on calling this very module. By name, to import no compiler.
    compiled = {one._orig_mod for one in module.modules() if type(one).__name__ == "OptimizedModule"}
    for one in found:
        layer, cls, entry, _ = one
        if cls is None or entry.status != "convertible":
            done.append(one)
            continue
        other = ask(known[cls], cls, layer, _full(type(module).__name__, entry.path))
        if isinstance(other, nn.Module) and other is not layer and layer in compiled:
            other = "torch.compile has wrapped it; convert the model before compiling it"
        if isinstance(other, nn.Module):
            if known[cls] not in (_to_mi_kernels, _to_torch):
                vars(other)[_FROM] = label(cls)
            if other is not layer:
                replaced[layer] = other
            entry = LayerReport(entry.path, entry.before, "converted", label(_class_of(other)))
        else:
            entry = LayerReport(entry.path, entry.before, "left", entry.now, other or _NO_REASON)
        done.append(_Layer(layer, cls, entry, bool(other)))
    return done, replaced


_NO_REASON = "its rule leaves it, and gives no reason"


def _tried(one: _Layer, known: Known) -> LayerReport:
    """The entry of a layer; where a rule decides, by a trial."""
    layer, cls, entry, _ = one
    if cls is None or entry.status != "convertible" or known[cls] is _to_mi_kernels:
        return entry
    try:
        other = ask(known[cls], cls, trial_copy(layer), entry.path)
    except Exception as error:  # such as of a rule that reads values
        said = f"its rule decides; on a copy without data it raised {type(error.__cause__ or error).__name__}"
        return LayerReport(entry.path, entry.before, "convertible", entry.now, said)
    if isinstance(other, nn.Module):
        return entry
    return LayerReport(entry.path, entry.before, "left", entry.now, other or _NO_REASON)


def _say(model: str, done: list[_Layer], looked_for: Known | None) -> None:
    """The line of the log, and the warnings."""
    new = [one.entry.before for one in done if one.entry.status == "converted" and one.cls is not None]
    left = [one for one in done if one.entry.status == "left"]
    before = len(done) - len(new) - len(left)
    paths = [_full(model, one.entry.path) for one in left]
    reasons = [f"{path}: {one.entry.reason}" for path, one in zip(paths, left, strict=True)]
    some = "; ".join(reasons[:_NAMED] + ["..."] * (len(reasons) > _NAMED))
    line = f"convert: {model}: {len(new)} layer{'s' * (len(new) != 1)} converted"
    line += f" ({counted(new)})" if new else ""
    line += f", {before} converted before" if before else ""
    line += f", {len(left)} left alone: {some}" if left else ""
    _log.info("%s; see mi.conversion_report(model)", line)
    warned = [(path, one.entry.reason) for path, one in zip(paths, left, strict=True) if one.warn]
    for path, reason in warned:
        warnings.warn(f"convert: {path} is left alone: {reason}", UserWarning, stacklevel=3)
    if looked_for is not None and not new and not before and not warned:
        found = f"found nothing to convert; left alone: {some}" if left else nothing(map(label, looked_for))
        warnings.warn(f"convert: {model}: {found}", UserWarning, stacklevel=3)


_NAMED = 5  # layers in a line of the log, of those left alone: a model may have hundreds


def _full(model: str, path: str) -> str:
    return f"{model}.{path}" if path else model


def _is_of(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a layer is exactly of a class, scripted and parametrized ones included."""
    if isinstance(layer, torch.jit.ScriptModule):
        return cls is not Bilinear and layer.original_name == cls.__name__
    return _class_of(layer) is cls


def _class_of(layer: nn.Module) -> type[nn.Module]:
    # parametrize gives each module its own class, derived from the original one.
    return type(layer).__base__ if parametrize.is_parametrized(layer) else type(layer)  # type: ignore


def _ours(layer: nn.Module) -> list[type]:
    """The classes of this package from which a layer's is derived, besides Bilinear."""
    return [one for one in type(layer).__mro__ if one.__module__.startswith(_PACKAGE) and one is not Bilinear]


def _obstacle(layer: nn.Module, rule: Rule) -> str | None:
    if isinstance(layer, torch.jit.ScriptModule):
        return "its code is compiled by TorchScript; convert the model first, and trace it"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance and would not be that of the new class"
    if rule not in (_to_mi_kernels, _to_torch):
        parametrized = parametrize.is_parametrized(layer)
        return "it is parametrized, and a rule cannot be asked for such a layer" if parametrized else None
    if any(parameter.is_complex() for parameter in layer.parameters()):
        return "its parameters are complex"
    return None


def _stays(layer: nn.Module) -> str | None:
    """Why a module of this package, or a subclass of one, cannot be converted to one of PyTorch's."""
    ours = _ours(layer)
    if ours:
        return f"torch.nn has no {ours[0].__name__}"
    return "it is a subclass of mi_kernels.nn.Bilinear" if isinstance(layer, Bilinear) else None


def _to_mi_kernels(layer: nn.Module) -> nn.Module:
    return _swap(layer, Bilinear)


def _to_torch(layer: nn.Module) -> nn.Module:
    return _swap(layer, nn.Bilinear)


def _swap(layer: nn.Module, new: type[nn.Module]) -> nn.Module:
    if parametrize.is_parametrized(layer):
        layer.__class__ = _parametrized_class(type(layer), new)
    else:
        layer.__class__ = new
    return layer


def _parametrized_class(old: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The class that parametrize would have created for a layer of class ``base``.

    A new class instead of new bases for the old one, which deep copies of the layer share.
    """
    own = {name: value for name, value in vars(old).items() if name not in ("__dict__", "__weakref__")}
    return type(old.__name__, (base,), own)
