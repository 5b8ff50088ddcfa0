"""Conversion of existing models to the modules of this package, and back."""

import warnings
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from mi_kernels.nn.interaction import Bilinear

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Direction = Literal["mi_kernels", "torch"]
# The class of a layer before and after.
_CLASSES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "mi_kernels": (nn.Bilinear, Bilinear),
    "torch": (Bilinear, nn.Bilinear),
}


def convert(module: ModuleT, *, to: Direction = "mi_kernels") -> ModuleT:
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

    Skipped silently: other subclasses of ``nn.Bilinear``, because they may compute something else.

    Skipped with a UserWarning that names the layer: complex parameters, scripted or traced layers (convert
    before scripting), and layers whose ``forward`` was replaced. With ``to="torch"`` also modules of this
    package without an equivalent in PyTorch, and subclasses of this package's modules.

    Args:
        module: any ``torch.nn.Module``. Only registered submodules are found, as by ``module.modules()``.
        to: ``"mi_kernels"``, or ``"torch"`` for the inverse.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``.
        ValueError: ``to`` is neither.

    Example:
        >>> model = mi.convert(torch.nn.Sequential(torch.nn.Bilinear(3, 5, 4)))
        >>> type(model[0])
        <class 'mi_kernels.nn.interaction.Bilinear'>
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert: module: expected a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(to, str) or to not in _CLASSES:
        raise ValueError(f"convert: to: expected one of {', '.join(_CLASSES)}, got {to!r}")
    old, new = _CLASSES[to]
    # named_modules() yields a module with two names once; the list is complete before anything changes.
    for name, layer in list(module.named_modules()):
        obstacle = _obstacle(layer) if _computes(layer, old) else _stays(layer) if to == "torch" else None
        if obstacle is not None:
            path = f"{type(module).__name__}.{name}" if name else type(module).__name__
            warnings.warn(f"convert: {path} is left alone: {obstacle}", UserWarning, stacklevel=2)
        elif type(layer) is old:
            layer.__class__ = new
        elif _computes(layer, old):
            layer.__class__ = _parametrized_class(type(layer), new)
    return module


def _computes(layer: nn.Module, old: type[nn.Module]) -> bool:
    if isinstance(layer, torch.jit.ScriptModule):
        return old is nn.Bilinear and layer.original_name == "Bilinear"
    if type(layer) is old:
        return True
    # parametrize gives each module its own class, derived from the original one.
    return parametrize.is_parametrized(layer) and type(layer).__bases__ == (old,)


def _obstacle(layer: nn.Module) -> str | None:
    if isinstance(layer, torch.jit.ScriptModule):
        return "its code is compiled by TorchScript; convert the model before scripting it"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance and would not be that of the new class"
    if any(parameter.is_complex() for parameter in layer.parameters()):
        return "its parameters are complex"
    return None


def _stays(layer: nn.Module) -> str | None:
    """Why a module of this package, or a subclass of one, cannot be converted to one of PyTorch's."""
    ours = [one for one in type(layer).__mro__ if one.__module__.startswith(_PACKAGE) and one is not Bilinear]
    if ours:
        return f"torch.nn has no {ours[0].__name__}"
    return "it is a subclass of mi_kernels.nn.Bilinear" if isinstance(layer, Bilinear) else None


_PACKAGE = __name__.rpartition(".")[0] + "."


def _parametrized_class(old: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The class that parametrize would have created for a layer of class ``base``.

    A new class instead of new bases for the old one, which deep copies of the layer share.
    """
    own = {name: value for name, value in vars(old).items() if name not in ("__dict__", "__weakref__")}
    return type(old.__name__, (base,), own)
