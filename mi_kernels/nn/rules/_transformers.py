"""Gated MLPs of transformers, in whichever of its many classes their forward is one."""

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import activations

from .._substitute import Rule
from ._gated import gated, of_package, why_not

# FastGELUActivation has a rounded constant.
of_package(
    activations,
    {
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
        "AccurateGELUActivation": "gelu_tanh",
        "QuickGELUActivation": "quick_gelu",
        "SiLUActivation": "silu",
        "MishActivation": "mish",
        "LinearActivation": "identity",
    },
)


class Form(NamedTuple):
    """What a forward computes, by the names of its layers: rest(act(gate(x)) * value(x))."""

    act: str
    gate: str
    value: str | None  # None: the second half of ``gate``, or the first one
    gate_first: bool
    rest: tuple[tuple[str, bool], ...]  # name, and whether its input takes the dtype of its weight

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.act, self.gate) if self.value is None else (self.act, self.gate, self.value)


# A forward is read by calling it with a layer and an input that write down what happens to them. Whatever
# else it does with them raises an error.

_CAST_TO = torch.float64
_X: tuple[Any, ...] = ("x",)


class _Layer:
    def __getattr__(self, name: str) -> "_Part":
        return _Part(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)


class _Part:
    def __init__(self, name: str) -> None:
        self.name = name
        self.weight = torch.empty(0, dtype=_CAST_TO, device="meta")

    def __bool__(self) -> bool:
        raise TypeError(self.name)

    def __call__(self, value: "_Value") -> "_Value":
        return _Value("call", self.name, value.done)


class _Value:
    dtype = object()  # that of no weight

    def __init__(self, *done: Any) -> None:
        self.done = done

    def __bool__(self) -> bool:
        raise TypeError(self.done)

    def __mul__(self, other: Any) -> "_Value":
        return _Value("product", self.done, other.done)

    def chunk(self, chunks: int, dim: int) -> "list[_Value]":
        if (chunks, dim) != (2, -1):
            raise ValueError(chunks, dim)
        return [_Value("half", index, self.done) for index in range(2)]

    def to(self, dtype: torch.dtype) -> "_Value":
        if dtype != _CAST_TO:
            raise ValueError(dtype)
        return _Value("cast", self.done)


def form_of(cls: type[nn.Module]) -> Form | None:
    code = getattr(cls.forward, "__code__", None)
    if code is None or code.co_argcount != 2 or code.co_kwonlyargcount or len(code.co_code) > 1000:
        return None
    forward: Any = cls.forward
    try:
        done = forward(_Layer(), _Value(*_X)).done
    except Exception:  # it does something else
        return None
    rest = []
    while done[0] == "call":
        _, name, done = done
        cast = done[0] == "cast"
        rest.append((name, cast))
        done = done[1] if cast else done
    if done[0] != "product":
        return None
    for activated, value in (done[1:], done[:0:-1]):
        match activated, value:
            case ("call", act, ("call", gate, ("x",))), ("call", other, ("x",)):
                return Form(act, gate, other, True, (*reversed(rest),))
            case ("call", act, ("half", index, ("call", gate, ("x",)) as packed)), ("half", last, same):
                if packed == same and index != last:
                    return Form(act, gate, None, index == 0, (*reversed(rest),))
    return None


class FusedGLU(nn.Module):
    """Before the class of the package among the bases of a class."""

    form: Form
    of: type[nn.Module]

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """As the layer of the package; one pass for the product and the activation."""
        form, parts = self.form, self._modules
        y = None
        if len(inputs) == 1 and not named:
            y = gated(inputs[0], *(parts.get(name) for name in form.parts), gate_first=form.gate_first)
        if y is None:
            return super().forward(*inputs, **named)
        for name, cast in form.rest:
            part: Any = parts[name]
            if cast and isinstance(part.weight, Tensor) and part.weight.dtype not in (y.dtype, torch.int8):
                y = y.to(part.weight.dtype)
            y = part(y)
        return y

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled by the class of the package, as there is one of ours for each of them."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (self.of,), *reduced[2:]


def _new(cls: Any) -> nn.Module:
    fused = _fused(cls)
    return fused.__new__(fused)


@cache
def _fused(cls: Any) -> type[nn.Module]:
    own = {"form": form_of(cls), "of": cls, "__module__": __name__, "__doc__": cls.__doc__}
    return type(f"Fused{cls.__name__}", (FusedGLU, cls), own)


def _mlp(layer: nn.Module) -> nn.Module | str:
    cls: Any = type(layer)
    form = form_of(cls)
    assert form is not None
    reason = why_not(*(layer._modules.get(name) for name in form.parts))
    if reason is None:
        layer.__class__ = _fused(cls)
    return reason or layer


def _classes() -> Iterator[type[nn.Module]]:
    """Of the models that are imported: each has a module of its own."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("transformers.", "transformers_modules.")) and ".modeling_" in name:
            for value in list(vars(module).values()):
                if isinstance(value, type) and issubclass(value, nn.Module):
                    yield value


def rules() -> dict[type[nn.Module], Rule]:
    found = dict.fromkeys(_classes())
    return {cls: _mlp for cls in found if not issubclass(cls, FusedGLU) and form_of(cls) is not None}
