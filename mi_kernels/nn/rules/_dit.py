"""Blocks of DiT, in whichever class their forward is that of DiTBlock or of FinalLayer."""

import dis
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...functional import norms
from ...functional._call import call
from .._substitute import Rule
from ._adaptive import fits, modulated, options_of, why_not_norm

# A forward is read by calling it with a layer and inputs that write down what happens to them, and compared
# with what the published one writes. Whatever else it does with them raises an error. Branches that are not
# taken and modes that are entered are not written down: the code of a forward has to go straight on.
_OTHER_STEPS = ("JUMP", "FOR_ITER", "WITH", "SETUP", "STORE_ATTR", "STORE_GLOBAL", "DELETE")


class _Part:
    """An attribute of the layer, which is called and nothing else; a helper may get it, too."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, value: "_Value") -> "_Value":
        return _Value("call", self._name, value.done)

    def __bool__(self) -> bool:
        raise TypeError(self._name)

    def __eq__(self, other: Any) -> bool:
        raise TypeError(self._name)

    __hash__ = None  # type: ignore[assignment]


class _Layer:
    def __getattr__(self, name: str) -> _Part:
        return _Part(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)


class _Value:
    def __init__(self, *done: Any) -> None:
        self.done = done

    def __bool__(self) -> bool:
        raise TypeError(self.done)

    def _with(self, kind: str, other: Any) -> "_Value":
        done = other.done if isinstance(other, _Value) else float(other)
        return _Value(kind, *sorted((self.done, done), key=repr))  # both commute

    def __add__(self, other: Any) -> "_Value":
        return self._with("sum", other)

    def __mul__(self, other: Any) -> "_Value":
        return self._with("product", other)

    __radd__, __rmul__ = __add__, __mul__

    def chunk(self, chunks: int, dim: int) -> "list[_Value]":
        if dim not in (1, -1):
            raise ValueError(dim)
        return [_Value("chunk", index, chunks, self.done) for index in range(chunks)]

    def unsqueeze(self, dim: int) -> "_Value":
        return _Value("unsqueeze", dim, self.done)


def _modulate(x: Any, shift: Any, scale: Any) -> Any:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _dit_block(self: Any, x: Any, c: Any) -> Any:
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate.unsqueeze(1) * self.attn(_modulate(self.norm1(x), shift, scale))
    return x + gate_mlp.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), shift_mlp, scale_mlp))


def _final_layer(self: Any, x: Any, c: Any) -> Any:
    shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
    return self.linear(_modulate(self.norm_final(x), shift, scale))


def _written(forward: Any) -> Any:
    return forward(_Layer(), _Value("x"), _Value("c")).done


def _fused_block(layer: Any, x: Any, parts: Sequence[Tensor]) -> Any:
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
    h = layer.attn(modulated(x, layer.norm1, scale, shift))
    options = options_of(layer.norm2)
    if options is not None and _adds_up(options, x, h, gate) and fits(options, x, scale_mlp, shift_mlp):
        x, y = call(norms.gated_residual_norm_modulate, x, h, gate, scale_mlp, shift_mlp, **options)
    else:
        x = x + gate * h
        y = modulated(x, layer.norm2, scale_mlp, shift_mlp)
    h = layer.mlp(y)
    return call(norms.gated_residual, x, h, gate_mlp) if _adds_up({}, x, h, gate_mlp) else x + gate_mlp * h


def _adds_up(options: dict[str, Any], x: Any, h: Any, gate: Tensor) -> bool:
    return fits(options, x, h, gate) and h.shape == x.shape


def _fused_final(layer: Any, x: Any, parts: Sequence[Tensor]) -> Any:
    shift, scale = parts
    return layer.linear(modulated(x, layer.norm_final, scale, shift))


class Form(NamedTuple):
    """What a forward computes."""

    norms: tuple[str, ...]  # names of layers that are read, not called
    chunks: int
    fused: Callable[[Any, Any, Sequence[Tensor]], Any]


# By what the published forward writes.
FORMS = {
    _written(_dit_block): Form(("norm1", "norm2"), 6, _fused_block),
    _written(_final_layer): Form(("norm_final",), 2, _fused_final),
}


def form_of(cls: type[nn.Module]) -> Form | None:
    forward = inspect.getattr_static(cls, "forward")  # ScriptModule's is a descriptor for instances
    code = getattr(forward, "__code__", None)
    if (
        code is None
        or (code.co_argcount, code.co_kwonlyargcount) != (3, 0)
        or "adaLN_modulation" not in code.co_names
        or not _goes_straight_on(code)
    ):
        return None
    try:
        return FORMS.get(_written(forward))
    except Exception:  # it does something else
        return None


def _goes_straight_on(code: CodeType) -> bool:
    if getattr(code, "co_exceptiontable", b""):  # of with and try, from Python 3.11 on
        return False
    names = (instruction.opname for instruction in dis.get_instructions(code))
    return not any(step in name for name in names for step in _OTHER_STEPS)


class FusedDiT(nn.Module):
    """Before the class of a repository among the bases of a class."""

    form: Form
    of: type[nn.Module]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the class of the repository; each block leaves its last residual to the norm behind it."""
        if len(inputs) != 2 or named or not isinstance(inputs[1], Tensor) or inputs[1].dim() != 2:
            return super().forward(*inputs, **named)
        x, c = inputs
        modulation: Any = self._modules["adaLN_modulation"]
        parts = modulation(c).chunk(self.form.chunks, dim=1)
        return self.form.fused(self, x, [part.unsqueeze(1) for part in parts])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled by the class of the repository, as there is one of ours for each of them."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (self.of,), *reduced[2:]


def _new(cls: Any) -> nn.Module:
    fused = _fused(cls)
    return fused.__new__(fused)


@cache
def _fused(cls: Any) -> type[nn.Module]:
    own = {"form": form_of(cls), "of": cls, "__module__": __name__, "__doc__": cls.__doc__}
    return type(f"Fused{cls.__name__}", (FusedDiT, cls), own)


def _rule(layer: nn.Module) -> nn.Module | str:
    cls: Any = type(layer)
    form = form_of(cls)
    assert form is not None
    parts = (layer._modules.get(name) for name in form.norms)
    reason = next((reason for reason in map(why_not_norm, parts) if reason is not None), None)
    if reason is None:
        layer.__class__ = _fused(cls)
    return reason or layer


def _classes(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for derived in cls.__subclasses__():
        if not issubclass(derived, FusedDiT):
            yield derived
            yield from _classes(derived)


def rules() -> dict[type[nn.Module], Rule]:
    return {cls: _rule for cls in dict.fromkeys(_classes(nn.Module)) if form_of(cls) is not None}
