"""Layers with the attributes and formulas of other packages' layers, for tests where those are not installed.

Each group is what its package has under the names that mi_kernels/nn/rules imports.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

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


PACKAGES = {
    "supar": {"supar.modules.affine": {"Biaffine": Biaffine}},
    "multibench": {
        "fusions.common_fusions": {"MultiplicativeInteractions2Modal": MultiplicativeInteractions2Modal}
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
        for added in sys.modules.keys() - before.keys():
            del sys.modules[added]
        sys.modules.update(before)
