"""Adaptive norms as diffusers and DiT publish them: attributes, formulas, arguments and results.

What rules are tested with where the packages are not installed, and what ours is compared with.
"""

import torch
import torch.nn.functional as F
from torch import nn


class FP32LayerNorm(nn.LayerNorm):
    def forward(self, inputs):
        parameters = (None if t is None else t.float() for t in (self.weight, self.bias))
        return F.layer_norm(inputs.float(), self.normalized_shape, *parameters, self.eps).to(inputs.dtype)


class RMSNorm(nn.Module):
    """The mean square in float32; weights of 16 bits have the normalised x in theirs."""

    def __init__(self, dim, eps, elementwise_affine=True, bias=False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if elementwise_affine and bias else None

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        y = hidden_states * torch.rsqrt(hidden_states.float().square().mean(-1, keepdim=True) + self.eps)
        if self.weight is None:
            return y.to(dtype)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            y = y.to(self.weight.dtype)
        return y * self.weight if self.bias is None else y * self.weight + self.bias


class _Norm(nn.Module):
    """silu, and a linear layer of some number of chunks."""

    def __init__(self, context, width, bias=True):
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(context, width, bias=bias)

    def chunks(self, emb, number):
        return self.linear(self.silu(emb)).chunk(number, dim=1)


class AdaLayerNorm(_Norm):
    """The scale first; with chunk_dim=1 (CogVideoX) the shift. With chunk_dim=0 temb is one vector."""

    def __init__(
        self,
        embedding_dim,
        num_embeddings=None,
        output_dim=None,
        norm_elementwise_affine=False,
        norm_eps=1e-5,
        chunk_dim=0,
    ):
        width = output_dim or 2 * embedding_dim
        super().__init__(embedding_dim, width)
        self.chunk_dim = chunk_dim
        self.emb = None if num_embeddings is None else nn.Embedding(num_embeddings, embedding_dim)
        self.norm = nn.LayerNorm(width // 2, norm_eps, norm_elementwise_affine)

    def forward(self, x, timestep=None, temb=None):
        if self.emb is not None:
            temb = self.emb(timestep)
        both = self.linear(self.silu(temb))
        if self.chunk_dim == 1:
            shift, scale = (t[:, None, :] for t in both.chunk(2, dim=1))
        else:
            scale, shift = both.chunk(2, dim=0)
        return self.norm(x) * (1 + scale) + shift


class AdaLayerNormZero(_Norm):
    def __init__(self, embedding_dim, num_embeddings=None, norm_type="layer_norm", bias=True):
        super().__init__(embedding_dim, 6 * embedding_dim, bias)
        self.emb = None if num_embeddings is None else Labels(num_embeddings, embedding_dim)
        layer = norm_type == "layer_norm"
        self.norm = (
            nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=1e-6)
            if layer
            else FP32LayerNorm(embedding_dim, elementwise_affine=False)
        )

    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.chunks(emb, 6)
        x = self.norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        return x, gate_msa, shift_mlp, scale_mlp, gate_mlp


class Labels(nn.Module):
    """In the place of CombinedTimestepLabelEmbeddings."""

    def __init__(self, number, size):
        super().__init__()
        self.table = nn.Embedding(number, size)

    def forward(self, timestep, class_labels, hidden_dtype=None):
        return self.table(class_labels) + torch.cos(timestep)[:, None]


class AdaLayerNormZeroSingle(_Norm):
    def __init__(self, embedding_dim, norm_type="layer_norm", bias=True):
        super().__init__(embedding_dim, 3 * embedding_dim, bias)
        self.norm = nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=1e-6)

    def forward(self, x, emb=None):
        shift_msa, scale_msa, gate_msa = self.chunks(emb, 3)
        return self.norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None], gate_msa


class SD35AdaLayerNormZeroX(_Norm):
    """Two modulations of one norm."""

    def __init__(self, embedding_dim, norm_type="layer_norm", bias=True):
        super().__init__(embedding_dim, 9 * embedding_dim, bias)
        self.norm = nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=1e-6)

    def forward(self, hidden_states, emb=None):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = self.chunks(emb, 9)
        n = self.norm(hidden_states)
        first, second = (n * (1 + b[:, None]) + a[:, None] for a, b in ((shift, scale), (shift2, scale2)))
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


class LuminaRMSNormZero(_Norm):
    def __init__(self, embedding_dim, norm_eps, norm_elementwise_affine):
        super().__init__(min(embedding_dim, 1024), 4 * embedding_dim)
        self.norm = RMSNorm(embedding_dim, eps=norm_eps)

    def forward(self, x, emb=None):
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.chunks(emb, 4)
        return self.norm(x) * (1 + scale_msa[:, None]), gate_msa, scale_mlp, gate_mlp


def norm_of(norm_type, size, eps, affine, bias):
    return nn.LayerNorm(size, eps, affine, bias) if norm_type == "layer_norm" else RMSNorm(size, eps, affine)


class AdaLayerNormContinuous(_Norm):
    def __init__(
        self,
        embedding_dim,
        conditioning_embedding_dim,
        elementwise_affine=True,
        eps=1e-5,
        bias=True,
        norm_type="layer_norm",
    ):
        super().__init__(conditioning_embedding_dim, 2 * embedding_dim, bias)
        self.norm = norm_of(norm_type, embedding_dim, eps, elementwise_affine, bias)

    def forward(self, x, conditioning_embedding):
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]


class LuminaLayerNormContinuous(nn.Module):
    def __init__(
        self,
        embedding_dim,
        conditioning_embedding_dim,
        elementwise_affine=True,
        eps=1e-5,
        bias=True,
        norm_type="layer_norm",
        out_dim=None,
    ):
        super().__init__()
        self.silu = nn.SiLU()
        self.linear_1 = nn.Linear(conditioning_embedding_dim, embedding_dim, bias=bias)
        self.norm = norm_of(norm_type, embedding_dim, eps, elementwise_affine, bias)
        self.linear_2 = None if out_dim is None else nn.Linear(embedding_dim, out_dim, bias=bias)

    def forward(self, x, conditioning_embedding):
        scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
        x = self.norm(x) * (1 + scale)[:, None, :]
        return x if self.linear_2 is None else self.linear_2(x)


class CogView3PlusAdaLayerNormZeroTextImage(_Norm):
    def __init__(self, embedding_dim, dim):
        super().__init__(embedding_dim, 12 * dim)
        self.norm_x, self.norm_c = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-5) for _ in range(2))

    def forward(self, x, context, emb=None):
        parts = self.chunks(emb, 12)
        x = self.norm_x(x) * (1 + parts[1][:, None]) + parts[0][:, None]
        context = self.norm_c(context) * (1 + parts[7][:, None]) + parts[6][:, None]
        return x, *parts[2:6], context, *parts[8:]


class CogVideoXLayerNormZero(_Norm):
    def __init__(self, conditioning_dim, embedding_dim, elementwise_affine=True, eps=1e-5, bias=True):
        super().__init__(conditioning_dim, 6 * embedding_dim, bias)
        self.norm = nn.LayerNorm(embedding_dim, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, hidden_states, encoder_hidden_states, temb):
        shift, scale, gate, enc_shift, enc_scale, enc_gate = (t[:, None, :] for t in self.chunks(temb, 6))
        hidden_states = self.norm(hidden_states) * (1 + scale) + shift
        return hidden_states, self.norm(encoder_hidden_states) * (1 + enc_scale) + enc_shift, gate, enc_gate


class AdaGroupNorm(nn.Module):
    def __init__(self, embedding_dim, out_dim, num_groups, act_fn=None, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.act = None if act_fn is None else {"silu": nn.SiLU()}[act_fn]
        self.linear = nn.Linear(embedding_dim, 2 * out_dim)

    def forward(self, x, emb):
        scale, shift = self.linear(self.act(emb) if self.act else emb)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(x, self.num_groups, eps=self.eps) * (1 + scale) + shift


DIFFUSERS = {
    cls.__name__: cls
    for cls in (
        FP32LayerNorm,
        RMSNorm,
        AdaLayerNorm,
        AdaLayerNormZero,
        AdaLayerNormZeroSingle,
        SD35AdaLayerNormZeroX,
        LuminaRMSNormZero,
        AdaLayerNormContinuous,
        LuminaLayerNormContinuous,
        CogView3PlusAdaLayerNormZeroTextImage,
        CogVideoXLayerNormZero,
        AdaGroupNorm,
    )
}


class Attention(nn.Module):
    """timm's, with biases: softmax(q k^T / sqrt(d)) v of the heads."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Peebles and Xie 2023: adaLN-Zero. ``norm`` makes the norms, which have no parameters in DiT."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, norm=None):
        super().__init__()
        norm = norm or (lambda size: nn.LayerNorm(size, elementwise_affine=False, eps=1e-6))
        self.norm1, self.attn = norm(hidden_size), Attention(hidden_size, num_heads)
        self.norm2, self.mlp = norm(hidden_size), Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class ParallelBlock(DiTBlock):
    """Under the same names, another formula."""

    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        h = gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale))
        return x + h + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
