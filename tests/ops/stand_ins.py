"""Layers with the attributes and formulas of other packages' layers, for tests where those are not installed.

Each group is what its package has under the names that mi_kernels/nn/rules imports.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import adaptive_norms
import torch
import torch.nn.functional as F
from torch import nn

import mi_kernels as mi


class Biaffine(nn.Module):
    """supar 1.1: s = [x; 1]^T W_o [y; 1] / n_in^scale for all pairs, without the dimension of one output."""

    def __init__(self, n_in, n_out=1, scale=0, bias_x=True, bias_y=True):
        super().__init__()
        self.n_in, self.n_out, self.scale = n_in, n_out, scale
        self.bias_x, self.bias_y = bias_x, bias_y
        self.weight = nn.Parameter(torch.zeros(n_out, n_in + bias_x, n_in + bias_y))

    def forward(self, x, y):
        x = F.pad(x, (0, int(self.bias_x)), value=1.0)
        y = F.pad(y, (0, int(self.bias_y)), value=1.0)
        return (x[:, None] @ self.weight @ y[:, None].mT / self.n_in**self.scale).squeeze(1)


class MultiplicativeInteractions2Modal(nn.Module):
    """MultiBench: y = W'(m1) m2 + b'(m1) with W of a matrix, of a vector or of a number for each m1."""

    def __init__(self, input_dims, output_dim, output, flatten=False, clip=None, grad_clip=None, flip=False):
        super().__init__()
        self.input_dims, self.output_dim, self.output = input_dims, output_dim, output
        self.flatten, self.clip, self.flip = flatten, clip, flip
        z, x = input_dims
        shapes = {
            "matrix3D": lambda o: ((z, x, *o), (z, *o), (x, *o), (*o,)),
            "matrix": lambda o: ((z, x, o), (z, o), (x, o), (o,)),
            "vector": lambda o: ((z, x), (z, x), (x,), (x,)),
            "scalar": lambda o: ((z,), (z,), (1,), (1,)),
        }[output](output_dim)
        self.W, self.U, self.V, self.b = (nn.Parameter(torch.randn(shape)) for shape in shapes)
        if grad_clip is not None:
            for parameter in self.parameters():
                parameter.register_hook(lambda grad: grad.clamp(*grad_clip))

    def forward(self, modalities):
        if len(modalities) == 1:
            return modalities[0]
        assert len(modalities) == 2
        z, x = modalities[::-1] if self.flip else modalities
        if self.flatten:
            z, x = z.flatten(1), x.flatten(1)
        if self.clip is not None:
            z, x = z.clip(*self.clip), x.clip(*self.clip)
        weight = torch.tensordot(z, self.W, 1) + self.V
        shift = torch.tensordot(z, self.U, 1) + self.b
        if self.output in ("vector", "scalar"):
            weight, shift = (t if t.dim() == 2 else t[:, None] for t in (weight, shift))
            return weight * x + shift
        return torch.einsum("bx,bx...->b...", x, weight) + shift


class TuckERInteraction(nn.Module):
    """pykeen: the core tensor times head, relation and tail, with dropout and normalisation in between."""

    def __init__(self, size, relation=None, dropouts=(0.3, 0.4, 0.5), apply_batch_normalization=True):
        super().__init__()
        self.core_tensor = nn.Parameter(torch.rand(size, relation or size, size) * 2 - 1)
        self.head_dropout, self.relation_dropout, self.head_relation_dropout = map(nn.Dropout, dropouts)
        norms = [nn.BatchNorm1d(size) if apply_batch_normalization else None for _ in range(2)]
        self.head_batch_norm, self.head_relation_batch_norm = norms

    def forward(self, h, r, t):
        h = self.head_dropout(normalised(h, self.head_batch_norm))
        generated = self.relation_dropout(torch.einsum("hrt,...r->...ht", self.core_tensor, r))
        x = normalised(torch.einsum("...ht,...h->...t", generated, h), self.head_relation_batch_norm)
        return (self.head_relation_dropout(x) * t).sum(-1)


def normalised(x, batch_norm):
    return x if batch_norm is None else batch_norm(x.flatten(0, -2)).view_as(x)


class LowRankTensorFusion(nn.Module):
    """MultiBench: LMF, whose factors are a list that the module does not register."""

    def __init__(self, input_dims, output_dim, rank, flatten=True):
        super().__init__()
        self.input_dims, self.output_dim, self.rank, self.flatten = input_dims, output_dim, rank, flatten
        self.factors = [nn.Parameter(torch.randn(rank, size + 1, output_dim)) for size in input_dims]
        self.fusion_weights = nn.Parameter(torch.randn(1, rank))
        self.fusion_bias = nn.Parameter(torch.zeros(1, output_dim))

    def forward(self, modalities, training=False):
        fused = 1
        for modality, factor in zip(modalities, self.factors, strict=False):
            modality = modality.flatten(1) if self.flatten else modality
            fused = fused * (F.pad(modality, (1, 0), value=1.0) @ factor)
        return torch.einsum("r,rbo->bo", self.fusion_weights[0], fused) + self.fusion_bias


class LlamaMLP(nn.Module):
    """transformers: two linear layers, and one behind their product."""

    def __init__(self, size, hidden, act, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, hidden, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(hidden, size, bias=bias)
        self.act_fn = act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class InheritedMLP(LlamaMLP):
    """The forward of another model's class."""


class ClampedMLP(LlamaMLP):
    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x)).clamp(max=self.limit)
        return self.down_proj(gate * self.up_proj(x))


class ScaledMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.scale


class OtherInputMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(self.norm(x)))


class Phi3MLP(nn.Module):
    """transformers: both layers in one, the gate first."""

    def __init__(self, size, hidden, act):
        super().__init__()
        self.gate_up_proj = nn.Linear(size, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size, bias=False)
        self.activation_fn = act

    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class MoonshineDecoderMLP(nn.Module):
    """transformers: both layers in one, the gate last."""

    def __init__(self, size, hidden, act):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, 2 * hidden), nn.Linear(hidden, size)
        self.activation_fn = act

    def forward(self, hidden_states):
        hidden_states, gate = self.fc1(hidden_states).chunk(2, dim=-1)
        return self.fc2(self.activation_fn(gate) * hidden_states)


class T5DenseGatedActDense(nn.Module):
    """transformers: with dropout, and a last layer that may have another dtype."""

    def __init__(self, size, hidden, act, dropout=0.0):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(size, hidden, bias=False) for _ in range(2))
        self.wo = nn.Linear(hidden, size, bias=False)
        self.dropout, self.act = nn.Dropout(dropout), act

    def forward(self, x):
        x = self.dropout(self.act(self.wi_0(x)) * self.wi_1(x))
        weight = self.wo.weight
        if isinstance(weight, torch.Tensor) and x.dtype != weight.dtype and weight.dtype != torch.int8:
            x = x.to(weight.dtype)
        return self.wo(x)


class NewGELUActivation(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class FastGELUActivation(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


class GluMlp(nn.Module):
    """timm: both layers in one, the gate last or first."""

    def __init__(
        self, size, hidden, act_layer=nn.Sigmoid, norm_layer=None, drop=0.0, use_conv=False, gate_last=True
    ):
        super().__init__()
        layer = (lambda *sizes: nn.Conv2d(*sizes, 1)) if use_conv else nn.Linear
        self.chunk_dim, self.gate_last = 1 if use_conv else -1, gate_last
        self.fc1, self.fc2 = layer(size, hidden), layer(hidden // 2, size)
        self.act, self.drop1, self.drop2 = act_layer(), nn.Dropout(drop), nn.Dropout(drop)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden // 2)

    def forward(self, x):
        one, two = self.fc1(x).chunk(2, dim=self.chunk_dim)
        x = one * self.act(two) if self.gate_last else self.act(one) * two
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class SwiGLU(nn.Module):
    """timm: two layers, and one behind their product."""

    def __init__(self, size, hidden, act_layer=nn.SiLU, norm_layer=None, drop=0.0):
        super().__init__()
        self.fc1_g, self.fc1_x, self.fc2 = (
            nn.Linear(*each) for each in ((size, hidden), (size, hidden), (hidden, size))
        )
        self.act, self.drop1, self.drop2 = act_layer(), nn.Dropout(drop), nn.Dropout(drop)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden)

    def forward(self, x):
        x = self.act(self.fc1_g(x)) * self.fc1_x(x)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class GLU(nn.Module):
    """x_transformers: both layers in one, the gate last; times learned numbers, or clamped."""

    def __init__(self, dim_in, dim_out, activation, mult_bias=False, softclamp=False):
        super().__init__()
        self.act, self.proj = activation, nn.Linear(dim_in, 2 * dim_out)
        self.up_softclamp_value = 25.0 if softclamp else None
        self.mult_bias = nn.Parameter(torch.ones(dim_out)) if mult_bias else 1.0

    def forward(self, x):
        up, gate = self.proj(x).chunk(2, dim=-1)
        if self.up_softclamp_value is not None:
            up = (up / self.up_softclamp_value).tanh() * self.up_softclamp_value
        return up * self.act(gate) * self.mult_bias


MODELS = (LlamaMLP, InheritedMLP, ClampedMLP, ScaledMLP, OtherInputMLP)
MODELS += (Phi3MLP, MoonshineDecoderMLP, T5DenseGatedActDense)

PACKAGES = {
    "transformers": {
        "transformers.activations": {
            "NewGELUActivation": NewGELUActivation,
            "FastGELUActivation": FastGELUActivation,
        },
        "transformers.models.some.modeling_some": {cls.__name__: cls for cls in MODELS},
    },
    "timm": {
        "timm.layers.activations": {"QuickGELU": QuickGELU},
        "timm.layers.mlp": {"GluMlp": GluMlp, "SwiGLU": SwiGLU},
    },
    "diffusers": {"diffusers.models.normalization": adaptive_norms.DIFFUSERS},
    "x_transformers": {"x_transformers.x_transformers": {"GLU": GLU}},
    "supar": {"supar.modules.affine": {"Biaffine": Biaffine}},
    "multibench": {
        "fusions.common_fusions": {
            "MultiplicativeInteractions2Modal": MultiplicativeInteractions2Modal,
            "LowRankTensorFusion": LowRankTensorFusion,
        }
    },
    "pykeen": {
        "pykeen.nn.modules": {"TuckERInteraction": TuckERInteraction, "apply_optional_bn": normalised},
        "pykeen.utils": {"einsum": torch.einsum},
    },
}


@contextmanager
def installed(name: str) -> Iterator[None]:
    """As if a package were installed that has the stand-ins under its names; afterwards as before."""
    ours = f"mi_kernels.nn.rules._{name}"
    before = dict(sys.modules)
    vars(mi.nn.rules).pop(f"_{name}", None)
    sys.modules.pop(ours, None)
    for path, content in PACKAGES[name].items():
        parts = path.split(".")
        for number in range(1, len(parts) + 1):
            parent = ".".join(parts[:number])
            if parent not in sys.modules or number == len(parts):
                sys.modules[parent] = ModuleType(parent)
        vars(sys.modules[path]).update(content)
    try:
        yield
    finally:
        vars(mi.nn.rules).pop(f"_{name}", None)
        roots = {path.split(".")[0] for path in PACKAGES[name]}
        for added in sys.modules.keys() - before.keys():
            if added == ours or added.split(".")[0] in roots:  # not what torch imports meanwhile
                del sys.modules[added]
        sys.modules.update(before)
