"""Rules of mi.convert: checks, calls, and what they return put in the place of layers."""

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ._init import check_function

Rule = Callable[[Any], nn.Module | str | None]
Rules = Mapping[type[Any], Rule]


def check_rules(op: str, rules: Any) -> dict[type[nn.Module], Rule]:
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"{op}: rules: expected a mapping of classes to functions, got {type(rules).__name__}"
        )
    for cls, rule in rules.items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            kind = cls.__name__ if isinstance(cls, type) else repr(cls)
            raise TypeError(f"{op}: rules: expected classes of torch.nn.Module as keys, got {kind}")
        check_function(op, f"rules[{cls.__name__}]", rule)
    return dict(rules)


def ask(rule: Rule, cls: type[nn.Module], layer: nn.Module, path: str) -> nn.Module | str | None:
    """What the rule of a class makes of a layer. Errors name the layer."""
    try:
        other: Any = rule(layer)
    except Exception as error:
        kind = type(error).__name__
        raise RuntimeError(
            f"convert: rules: {path}: the rule of {cls.__name__} raised {kind}: {error}"
        ) from error
    if other is None or isinstance(other, nn.Module | str):
        return other
    kind = f"the class {other.__name__}" if isinstance(other, type) else type(other).__name__
    raise TypeError(
        f"convert: rules: {path}: expected a torch.nn.Module, a str or None from the rule of {cls.__name__},"
        f" got {kind}"
    )


def trial_copy(layer: nn.Module) -> nn.Module:
    """A copy without data, which a rule may change: its parameters and buffers are on the meta device."""
    memo: dict[int, Tensor] = {}
    tensors: Iterable[Any] = chain(layer.parameters(), layer.buffers())
    for tensor in tensors:
        if not isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            twin = torch.empty_like(tensor, device="meta", requires_grad=False)
            known = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if known else twin
    return copy.deepcopy(layer, memo)


def put(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """``module`` with the replacements in the place of layers, wherever they are registered.

    Not inside of its own replacement, which may contain the layer.
    """
    visited: set[nn.Module] = set()

    def visit(parent: nn.Module, within: frozenset[nn.Module]) -> None:
        if parent in visited:
            return
        visited.add(parent)
        for name, child in list(parent._modules.items()):
            if child is not None:
                parent._modules[name], inside = turn(child, within)
                visit(parent._modules[name] or child, inside)

    def turn(layer: nn.Module, within: frozenset[nn.Module]) -> tuple[nn.Module, frozenset[nn.Module]]:
        if layer in within or layer not in replaced:
            return layer, within
        return replaced[layer], within | {layer}

    root, within = turn(module, frozenset())
    visit(root, within)
    return root
