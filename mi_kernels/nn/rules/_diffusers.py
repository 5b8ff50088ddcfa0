"""Adaptive norms of diffusers: each forward has the arguments and results of the class of its name."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers.models.normalization  # noqa: F401
import torch.nn.functional as F
from torch import nn

from .._substitute import Rule
from ._adaptive import NORMS, modulated, why_not_norm

normalization: Any = sys.modules["diffusers.models.normalization"]

# Both have statistics in float32. As far as the version has them.
_OWN = {"FP32LayerNorm": "layer", "RMSNorm": "rms"}
NORMS.update(
    {getattr(normalization, name): kind for name, kind in _OWN.items() if hasattr(normalization, name)}
)


def _layer_norm(self: Any, x: Any, timestep: Any = None, temb: Any = None) -> Any:
    if self.emb is not None:
        temb = self.emb(timestep)
    temb = self.linear(self.silu(temb))
    if self.chunk_dim == 1:
        shift, scale = temb.chunk(2, dim=1)
        return modulated(x, self.norm, scale[:, None, :], shift[:, None, :])
    scale, shift = temb.chunk(2, dim=0)
    return modulated(x, self.norm, scale, shift)


def _zero_x(self: Any, hidden_states: Any, emb: Any = None) -> Any:
    shift, scale, gate, *mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
    first = modulated(hidden_states, self.norm, scale[:, None], shift[:, None])
    second = modulated(hidden_states, self.norm, scale2[:, None], shift2[:, None])
    return first, gate, *mlp, second, gate2


def _zero(
    self: Any,
    x: Any,
    timestep: Any = None,
    class_labels: Any = None,
    hidden_dtype: Any = None,
    emb: Any = None,
) -> Any:
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, gate, *mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
    return modulated(x, self.norm, scale[:, None], shift[:, None]), gate, *mlp


def _zero_single(self: Any, x: Any, emb: Any = None) -> Any:
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return modulated(x, self.norm, scale[:, None], shift[:, None]), gate


def _rms_zero(self: Any, x: Any, emb: Any = None) -> Any:
    scale, *others = self.linear(self.silu(emb)).chunk(4, dim=1)
    return modulated(x, self.norm, scale[:, None]), *others


def _continuous(self: Any, x: Any, conditioning_embedding: Any) -> Any:
    emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
    scale, shift = emb.chunk(2, dim=1)
    return modulated(x, self.norm, scale[:, None, :], shift[:, None, :])


def _scale_continuous(self: Any, x: Any, conditioning_embedding: Any) -> Any:
    scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
    y = modulated(x, self.norm, scale[:, None, :])
    return y if self.linear_2 is None else self.linear_2(y)


def _text_image(self: Any, x: Any, context: Any, emb: Any = None) -> Any:
    parts = self.linear(self.silu(emb)).chunk(12, dim=1)
    (shift, scale, *others), (c_shift, c_scale, *c_others) = parts[:6], parts[6:]
    x = modulated(x, self.norm_x, scale[:, None], shift[:, None])
    return x, *others, modulated(context, self.norm_c, c_scale[:, None], c_shift[:, None]), *c_others


def _video_zero(self: Any, hidden_states: Any, encoder_hidden_states: Any, temb: Any) -> Any:
    parts = self.linear(self.silu(temb)).chunk(6, dim=1)
    shift, scale, gate, enc_shift, enc_scale, enc_gate = (part[:, None, :] for part in parts)
    hidden_states = modulated(hidden_states, self.norm, scale, shift)
    return hidden_states, modulated(encoder_hidden_states, self.norm, enc_scale, enc_shift), gate, enc_gate


def _group_norm(self: Any, x: Any, emb: Any) -> Any:
    emb = self.act(emb) if self.act else emb
    scale, shift = self.linear(emb)[:, :, None, None].chunk(2, dim=1)
    norm = partial(F.group_norm, num_groups=self.num_groups, eps=self.eps)
    options = {"norm": "group", "groups": self.num_groups, "eps": self.eps}
    return modulated(x, norm, scale, shift, options=options)


FORWARDS: dict[str, Callable[..., Any]] = {
    "AdaLayerNorm": _layer_norm,
    "AdaLayerNormZero": _zero,
    "AdaLayerNormZeroSingle": _zero_single,
    "SD35AdaLayerNormZeroX": _zero_x,
    "AdaLayerNormContinuous": _continuous,
    "LuminaRMSNormZero": _rms_zero,
    "LuminaLayerNormContinuous": _scale_continuous,
    "CogView3PlusAdaLayerNormZeroTextImage": _text_image,
    "CogVideoXLayerNormZero": _video_zero,
    "AdaGroupNorm": _group_norm,
}


def _ask(fused: type[nn.Module], layer: nn.Module) -> nn.Module | str:
    parts = [part for name, part in layer.named_children() if name.startswith("norm")]
    reason = next((reason for reason in map(why_not_norm, parts) if reason is not None), None)
    if reason is None:
        layer.__class__ = fused
    return reason or layer


def _other(layer: nn.Module) -> str:
    return "its forward takes other arguments than those that are known here"


def _rules() -> dict[type[nn.Module], Rule]:
    """Of the classes that the version has, each with a subclass in this module, where pickles find it."""
    found: dict[type[nn.Module], Rule] = {}
    for name, forward in FORWARDS.items():
        cls = getattr(normalization, name, None)
        if cls is None:
            continue
        own, theirs = (list(inspect.signature(each).parameters) for each in (forward, cls.forward))
        found[cls] = _other
        if own == theirs:
            content = {"forward": forward, "__module__": __name__, "__doc__": cls.__doc__}
            fused = globals()[f"Fused{name}"] = type(f"Fused{name}", (cls,), content)
            found[cls] = partial(_ask, fused)
    return found


RULES = _rules()
