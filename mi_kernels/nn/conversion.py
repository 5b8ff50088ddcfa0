"""Existing models onto the modules of this package."""

import warnings
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from mi_kernels.nn.interaction import Bilinear

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def convert(module: ModuleT) -> ModuleT:
    """Make every ``nn.Bilinear`` in a model, or the model itself, an :class:`mi_kernels.nn.Bilinear`.

    Works in place and returns its argument. In place, because everything that refers to the layer or to
    its parameters (optimisers, hooks, weight tying, a second attribute of the model, data-parallel
    wrappers) goes on referring to the same objects: only the class of the layer changes. Parameters,
    buffers, hooks, training flag, ``requires_grad``, device and dtype are therefore untouched, and
    converting again does nothing. For a converted copy, ``convert(copy.deepcopy(model))``.

    Converted: modules whose type is exactly ``nn.Bilinear``, also with parametrizations
    (``torch.nn.utils.parametrize``). A model that ``torch.compile`` has compiled recompiles by itself.

    Left alone in silence: other subclasses of ``nn.Bilinear``, because they may compute something else.

    Left alone with a UserWarning that names the layer: complex parameters, scripted or traced layers
    (convert before scripting), and layers on which ``forward`` was replaced.

    Args:
        module: any ``torch.nn.Module``. Only registered submodules are found, as by ``module.modules()``.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no ``torch.nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert: module: expected a torch.nn.Module, got {type(module).__name__}")
    # The list is complete before anything changes: modules() yields an object with two names once.
    for name, layer in list(module.named_modules()):
        if not _computes_bilinear(layer):
            continue
        obstacle = _obstacle(layer)
        if obstacle is not None:
            path = f"{type(module).__name__}.{name}" if name else type(module).__name__
            warnings.warn(f"convert: {path} is left alone: {obstacle}", UserWarning, stacklevel=2)
        elif type(layer) is nn.Bilinear:
            layer.__class__ = Bilinear
        else:
            layer.__class__ = _parametrized_class(type(layer))
    return module


def _computes_bilinear(layer: nn.Module) -> bool:
    if isinstance(layer, torch.jit.ScriptModule):
        return layer.original_name == "Bilinear"
    if type(layer) is nn.Bilinear:
        return True
    # parametrize gives a module a class of its own, derived from the one it had.
    return parametrize.is_parametrized(layer) and type(layer).__bases__ == (nn.Bilinear,)


def _obstacle(layer: nn.Module) -> str | None:
    if isinstance(layer, torch.jit.ScriptModule):
        return "its code is compiled by TorchScript; convert the model before scripting it"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance and would not be that of the new class"
    if any(parameter.is_complex() for parameter in layer.parameters()):
        return "its parameters are complex"
    return None


def _parametrized_class(old: type[nn.Module]) -> type[nn.Module]:
    """The class that parametrize would have made of a :class:`mi_kernels.nn.Bilinear`.

    A new class, not new bases for the old one: a deepcopy of the layer shares the old one.
    """
    own = {name: value for name, value in vars(old).items() if name not in ("__dict__", "__weakref__")}
    return type(old.__name__, (Bilinear,), own)
