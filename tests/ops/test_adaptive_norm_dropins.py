"""Adaptive norms and their blocks as papers and repositories state them: ours computes the same.

Values, gradients and second derivatives in float64, with the published parameters as they are; and a block of
DiT-S in training on scikit-learn's digits, beside plain PyTorch.
"""

import functools

import adaptive_norms as published
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mi_kernels as mi
from mi_kernels.testing.errors import relative_error

B, T, C, Z = 3, 4, 6, 5


def same(ours, theirs, *tensors):
    """Both functions of the tensors: values, gradients, and the gradients of their sum of squares."""
    found = []
    for function in (ours, theirs):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        y = torch.cat([t.flatten() for t in (y if isinstance(y, tuple) else (y,))])
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device)
        first = torch.autograd.grad((y * weights).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
        second = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, second, strict=True)]
        found.append([y.detach(), *(g.detach() for g in first), *second])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


@pytest.fixture
def draw(place):
    def drawn(*sizes):
        return torch.randn(*sizes, dtype=torch.float64, device=place.device) * sizes[-1] ** -0.5

    return drawn


@pytest.fixture
def double(place):
    """A published module with all parameters drawn, in float64."""

    def made(module):
        module = module.to(place.device, torch.float64)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        return module

    return made


def check(module, ours, *inputs, call=lambda module, *inputs: module(*inputs)):
    """A published module, and a function of its parameters by name and of the inputs."""
    names = list(dict(module.named_parameters()))

    def theirs(*tensors):
        given = {f"of.{name}": t for name, t in zip(names, tensors[len(inputs) :], strict=True)}
        return torch.func.functional_call(Calling(module, call), given, tensors[: len(inputs)])

    def of_names(*tensors):
        return ours(dict(zip(names, tensors[len(inputs) :], strict=True)), *tensors[: len(inputs)])

    same(of_names, theirs, *inputs, *module.parameters())


class Calling(nn.Module):
    def __init__(self, of, call):
        super().__init__()
        self.of, self.call = of, call

    def forward(self, *inputs):
        return self.call(self.of, *inputs)


def chunks(p, emb, number):
    """Strided views of one linear layer's output, [B, 1, C] each."""
    return F.linear(F.silu(emb), p["linear.weight"], p.get("linear.bias"))[:, None].chunk(number, -1)


def flat(gates):
    return tuple(gate[:, 0] for gate in gates)


def test_ada_layer_norm(draw, double):
    """Diffusers: the scale first, of one vector."""

    def ours(p, x, temb):
        scale, shift = F.linear(F.silu(temb), p["linear.weight"], p["linear.bias"]).chunk(2)
        return mi.norm_modulate(x, scale, shift, weight=p["norm.weight"], bias=p["norm.bias"])

    module = double(published.AdaLayerNorm(Z, output_dim=2 * C, norm_elementwise_affine=True))
    check(module, ours, draw(B, T, C), draw(Z), call=lambda m, x, temb: m(x, temb=temb))


def test_ada_layer_norm_of_cogvideox(draw, double):
    """The shift first."""

    def ours(p, x, temb):
        shift, scale = chunks(p, temb, 2)
        return mi.norm_modulate(x, scale, shift)

    module = double(published.AdaLayerNorm(Z, output_dim=2 * C, chunk_dim=1))
    check(module, ours, draw(B, T, C), draw(B, Z), call=lambda m, x, temb: m(x, temb=temb))


def test_ada_layer_norm_zero(draw, double):
    def ours(p, x, emb):
        shift, scale, *others = chunks(p, emb, 6)
        return mi.norm_modulate(x, scale, shift, eps=1e-6), *flat(others)

    module = double(published.AdaLayerNormZero(C))
    check(module, ours, draw(B, T, C), draw(B, C), call=lambda m, x, emb: m(x, emb=emb))


def test_ada_layer_norm_zero_single(draw, double):
    def ours(p, x, emb):
        shift, scale, gate = chunks(p, emb, 3)
        return mi.norm_modulate(x, scale, shift, eps=1e-6), *flat([gate])

    check(double(published.AdaLayerNormZeroSingle(C)), ours, draw(B, T, C), draw(B, C))


def test_ada_layer_norm_zero_x(draw, double):
    """Stable Diffusion 3.5: two modulations of one norm."""

    def ours(p, x, emb):
        shift, scale, *others, shift2, scale2, gate2 = chunks(p, emb, 9)
        first, second = (mi.norm_modulate(x, *each, eps=1e-6) for each in ((scale, shift), (scale2, shift2)))
        return first, *flat(others), second, *flat([gate2])

    check(double(published.SD35AdaLayerNormZeroX(C)), ours, draw(B, T, C), draw(B, C))


def test_ada_layer_norm_continuous(draw, double):
    def ours(p, x, emb):
        scale, shift = chunks(p, emb, 2)
        return mi.norm_modulate(x, scale, shift, weight=p["norm.weight"], bias=p["norm.bias"])

    check(double(published.AdaLayerNormContinuous(C, Z)), ours, draw(B, T, C), draw(B, Z))


def test_lumina_layer_norm_continuous(draw, double):
    """A scale alone, and a linear layer behind it."""

    def ours(p, x, emb):
        scale = F.linear(F.silu(emb), p["linear_1.weight"], p["linear_1.bias"])[:, None]
        y = mi.norm_modulate(x, scale, eps=1e-6)
        return F.linear(y, p["linear_2.weight"], p["linear_2.bias"])

    module = double(published.LuminaLayerNormContinuous(C, Z, False, 1e-6, out_dim=7))
    check(module, ours, draw(B, T, C), draw(B, Z))


def test_layer_norm_zero_of_text_and_image(draw, double):
    """CogView3: both norms of one linear layer."""

    def ours(p, x, context, emb):
        shift, scale, *gates, c_shift, c_scale, c1, c2, c3, c4 = chunks(p, emb, 12)
        x, context = mi.norm_modulate(x, scale, shift), mi.norm_modulate(context, c_scale, c_shift)
        return x, *flat(gates), context, *flat([c1, c2, c3, c4])

    module = double(published.CogView3PlusAdaLayerNormZeroTextImage(Z, C))
    check(module, ours, draw(B, T, C), draw(B, 2, C), draw(B, Z))


def test_layer_norm_zero_of_cogvideox(draw, double):
    def ours(p, x, text, emb):
        shift, scale, gate, text_shift, text_scale, text_gate = chunks(p, emb, 6)
        affine = {"weight": p["norm.weight"], "bias": p["norm.bias"]}
        x = mi.norm_modulate(x, scale, shift, **affine)
        return x, mi.norm_modulate(text, text_scale, text_shift, **affine), gate, text_gate

    check(double(published.CogVideoXLayerNormZero(Z, C)), ours, draw(B, T, C), draw(B, 2, C), draw(B, Z))


def test_ada_rms_of_lumina(draw):
    """Gao et al. 2024, LuminaRMSNormZero: rms(x) w (1 + scale), and tanh of the gate where it is used."""

    def theirs(x, h, emb, weight, norm, after):
        scale, gate, _, _ = F.linear(F.silu(emb), weight)[:, None].chunk(4, -1)

        def rms(x, w):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w

        y = rms(x, norm) * (1 + scale)
        return y, x + gate.tanh() * rms(h, after)

    def ours(x, h, emb, weight, norm, after):
        scale, gate, _, _ = F.linear(F.silu(emb), weight)[:, None].chunk(4, -1)
        y = mi.norm_modulate(x, scale, norm="rms", weight=norm)
        return y, mi.gated_residual(x, mi.norm_modulate(h, None, norm="rms", weight=after), gate.tanh())

    same(ours, theirs, draw(B, T, C), draw(B, T, C), draw(B, Z), draw(4 * C, Z), draw(C), draw(C))


def test_ada_group_norm(draw, double):
    def ours(p, x, emb):
        scale, shift = F.linear(emb, p["linear.weight"], p["linear.bias"])[:, :, None, None].chunk(2, 1)
        return mi.norm_modulate(x, scale, shift, norm="group", groups=2)

    check(double(published.AdaGroupNorm(Z, C, 2)), ours, draw(B, C, 4, 3), draw(B, Z))


@pytest.mark.parametrize("channels_last", [False, True])
def test_film_of_the_residual_block_of_guided_diffusion(channels_last, draw):
    """Dhariwal and Nichol 2021, use_scale_shift_norm: out_rest(out_norm(h) (1 + scale) + shift) + skip."""

    def block(norm):
        def of(x, emb, conv, emb_layer, bias, weight, offset, out):
            x = x.to(memory_format=torch.channels_last) if channels_last else x
            h = F.conv2d(F.silu(x), conv, padding=1)
            both = F.linear(F.silu(emb), emb_layer, bias)[..., None, None]
            h = norm(h, *both.chunk(2, dim=1), weight, offset)
            return x + F.conv2d(F.silu(h), out, padding=1)

        return of

    def theirs(h, scale, shift, weight, offset):
        return F.group_norm(h, 3, weight, offset, 1e-5) * (1 + scale) + shift

    def ours(h, scale, shift, weight, offset):
        return mi.norm_modulate(h, scale, shift, norm="group", weight=weight, bias=offset, groups=3)

    parameters = draw(C, C, 3, 3), draw(2 * C, Z), draw(2 * C), draw(C), draw(C), draw(C, C, 3, 3)
    same(block(ours), block(theirs), draw(B, C, 4, 3), draw(B, Z), *parameters)


def test_adain_of_stylegan(draw):
    """Karras et al. 2019: instance norm of maps, a style of each sample: each channel is a group."""

    def theirs(x, w, affine, bias):
        style = F.linear(w, affine, bias).view(-1, 2, C, 1, 1)
        x = x - x.mean((2, 3), keepdim=True)
        x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + 1e-8)
        return x * (style[:, 0] + 1) + style[:, 1]

    def ours(x, w, affine, bias):
        scale, shift = F.linear(w, affine, bias)[..., None, None].chunk(2, 1)
        return mi.norm_modulate(x, scale, shift, norm="group", groups=C, eps=1e-8)

    same(ours, theirs, draw(B, C, 4, 3), draw(B, Z), draw(2 * C, Z), draw(2 * C))


def test_adain_of_style_transfer(draw):
    """Huang and Belongie 2017, equation 8: sigma(y) (x - mu(x)) / sigma(x) + mu(y), with their eps."""

    def moments(x):
        return x.flatten(2).mean(2)[..., None, None], (x.flatten(2).var(2) + 1e-5).sqrt()[..., None, None]

    def theirs(x, style):
        mean, std = moments(style)
        own = x.flatten(2)
        centred = x - own.mean(2)[..., None, None]
        return std * centred / (own.var(2, correction=0) + 1e-5).sqrt()[..., None, None] + mean

    def ours(x, style):
        mean, std = moments(style)
        return mi.norm_modulate(x, std, mean, norm="group", groups=C, scale_offset=0.0)

    same(ours, theirs, draw(B, C, 4, 3), draw(B, C, 2, 5))


def attention(x, y, q, k, v):
    """One head, of x to y."""
    scores = torch.softmax((x @ q.T) @ (y @ k.T).mT * C**-0.5, -1)
    return scores @ (y @ v.T)


def test_ada_ln_single_of_pixart(draw):
    """Chen et al. 2024: the table of the block added to what all blocks share; a cross attention in between.

    t [B, 6C] comes from one layer for all blocks. The cross attention's residual has no gate, and no norm
    before it; the norm behind it is one pass with it.
    """

    def parts(t, table):
        return (table[None] + t.reshape(len(t), 6, -1)).chunk(6, dim=1)

    def theirs(x, y, t, table, q, k, v, qc, kc, vc, up, down):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts(t, table)

        def modulated(x, shift, scale):
            return F.layer_norm(x, (C,), eps=1e-6) * (1 + scale) + shift

        own = modulated(x, shift_msa, scale_msa)
        x = x + gate_msa * attention(own, own, q, k, v)
        x = x + attention(x, y, qc, kc, vc)
        return x + gate_mlp * (F.gelu(modulated(x, shift_mlp, scale_mlp) @ up, approximate="tanh") @ down)

    def ours(x, y, t, table, q, k, v, qc, kc, vc, up, down):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts(t, table)
        own = mi.norm_modulate(x, scale_msa, shift_msa, eps=1e-6)
        x = mi.gated_residual(x, attention(own, own, q, k, v), gate_msa)
        cross = attention(x, y, qc, kc, vc)
        x, own = mi.gated_residual_norm_modulate(x, cross, None, scale_mlp, shift_mlp, eps=1e-6)
        return mi.gated_residual(x, F.gelu(own @ up, approximate="tanh") @ down, gate_mlp)

    square = [draw(C, C) for _ in range(6)]
    inputs = draw(B, T, C), draw(B, 2, C), draw(B, 6 * C), draw(6, C)
    same(ours, theirs, *inputs, *square, draw(C, 8), draw(8, C))


def theirs_and_ours(theirs, ours, *inputs):
    """Modules with parameters of one order."""
    names = [list(dict(module.named_parameters())) for module in (theirs, ours)]

    def called(module, names):
        def function(*tensors):
            given = dict(zip(names, tensors[len(inputs) :], strict=True))
            return torch.func.functional_call(module, given, tensors[: len(inputs)])

        return function

    assert [tuple(p.shape) for p in theirs.parameters()] == [tuple(p.shape) for p in ours.parameters()]
    same(called(ours, names[1]), called(theirs, names[0]), *inputs, *theirs.parameters())


MODULES = {
    "AdaLayerNormContinuous": (
        lambda: published.AdaLayerNormContinuous(C, Z),
        lambda: mi.nn.AdaLayerNorm(C, context_features=Z, affine=True, scale_first=True, eps=1e-5),
    ),
    "AdaLayerNormContinuous of rms": (
        lambda: published.AdaLayerNormContinuous(C, Z, norm_type="rms_norm"),
        lambda: mi.nn.AdaRMSNorm(C, context_features=Z, shift=True, scale_first=True, eps=1e-5),
    ),
    "AdaLayerNormZeroSingle": (
        lambda: published.AdaLayerNormZeroSingle(Z, bias=False),
        lambda: mi.nn.AdaLayerNorm(Z, context_features=Z, gate=True, bias=False),
    ),
    "AdaGroupNorm": (
        lambda: published.AdaGroupNorm(Z, C, 2),
        lambda: mi.nn.AdaGroupNorm(C, context_features=Z, groups=2, silu=False),
    ),
    "AdaGroupNorm with silu": (
        lambda: published.AdaGroupNorm(Z, C, 3, "silu", 1e-4),
        lambda: mi.nn.AdaGroupNorm(C, context_features=Z, groups=3, eps=1e-4),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_take_the_state_of_diffusers(name, draw, double):
    theirs, ours = (double(make()) for make in MODULES[name])
    ours.load_state_dict(theirs.state_dict())
    width = Z if "Single" in name else C
    x = draw(B, C, 4, 3) if "Group" in name else draw(B, T, width)
    z, state = draw(B, Z), theirs.state_dict()
    if "rms" in name:  # theirs has float32 in float64
        theirs.norm = nn.RMSNorm(C, 1e-5, device=x.device, dtype=x.dtype)
        theirs.load_state_dict(state)
    found, expected = ours(x, z), theirs(x, z)
    for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one.view_as(other), other, rtol=1e-9, atol=1e-11)


def test_block_of_dit(draw, double):
    """Peebles and Xie 2023, DiTBlock, with its parameters under their names."""
    theirs = double(published.DiTBlock(C, 2))
    parts = published.Attention(C, 2), published.Mlp(C, 4 * C)
    ours = double(mi.nn.AdaLNZeroBlock(*parts, features=C, context_features=C))
    ours.load_state_dict(theirs.state_dict())
    theirs_and_ours(theirs, ours, draw(B, T, C), draw(B, C))


class Published(nn.Module):
    """Blocks one after the other, and the last layer."""

    def __init__(self, size, heads, depth, out):
        super().__init__()
        self.blocks = nn.ModuleList(published.DiTBlock(size, heads) for _ in range(depth))
        self.final_layer = published.FinalLayer(size, out)

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


class Ours(nn.Module):
    """The same of ours: every residual but the first one is added by the norm behind it."""

    def __init__(self, size, heads, depth, out):
        super().__init__()
        parts = [(published.Attention(size, heads), published.Mlp(size, 4 * size)) for _ in range(depth)]
        options = {"features": size, "context_features": size}
        self.blocks = nn.ModuleList(mi.nn.AdaLNZeroBlock(*each, **options) for each in parts)
        self.linear = nn.Linear(size, out)
        self.norm = mi.nn.AdaLayerNorm(size, context_features=size)

    def forward(self, x, c):
        residual = None
        for block in self.blocks:
            x, residual = block(x, c, residual, defer=True)
        _, y = self.norm(x, c, residual)
        return self.linear(y)


def test_chain_of_blocks_of_dit(draw, double):
    """Across the borders of blocks, to the last layer, whose parameters have DiT's order, not the names."""
    theirs, ours = double(Published(C, 2, 2, 7)), Ours(C, 2, 2, 7).to(draw(1))
    theirs_and_ours(theirs, ours, draw(B, T, C), draw(B, C))


STEPS, BATCH, SIZE, HEADS = 20, 6, 384, 6  # DiT-S has 384 features and 6 heads


class Denoiser(nn.Module):
    """A block of DiT-S between a patch embedding of 8 x 8 pixels and the last layer: it predicts noise."""

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Linear(4, SIZE)
        self.position = nn.Parameter(torch.randn(16, SIZE) * 0.02)
        self.label, self.time = nn.Embedding(10, SIZE), nn.Linear(1, SIZE)
        self.body = kind(SIZE, HEADS, 1, 4)

    def forward(self, noisy, time, label):
        patches = F.pixel_unshuffle(noisy[:, None], 2).flatten(2).mT  # [B, 16, 4]
        c = self.label(label) + self.time(time[:, None])
        y = self.body(self.embed(patches) + self.position, c)
        return F.pixel_shuffle(y.mT.unflatten(2, (4, 4)), 2)[:, 0]


def curve(kind, dtype, device="cpu"):
    """The losses [STEPS, BATCH] of each image from one start, in float32, on the same batches and noise."""
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)  # until the end of the test
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images) / 8 - 1, torch.from_numpy(digits.target)
    torch.manual_seed(1)
    start = Denoiser(Published)
    for name, parameter in start.named_parameters():
        if "adaLN_modulation" in name:  # DiT's zeros; but for small numbers, for the block to take part
            nn.init.normal_(parameter, std=0.02)
    model = Denoiser(kind)
    with torch.no_grad():
        for own, parameter in zip(model.parameters(), start.parameters(), strict=True):
            own.copy_(parameter)
    model.to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    random, losses = torch.Generator().manual_seed(2), []
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,), generator=random)
        time = torch.rand(BATCH, generator=random)
        noise = torch.randn(BATCH, 8, 8, generator=random)
        clean = images[chosen].float()
        noisy = (1 - time[:, None, None]) * clean + time[:, None, None] * noise
        given = (t.to(device, dtype) for t in (noisy, time))
        error = model(*given, labels[chosen].to(device)) - noise.to(device, dtype)
        loss = error.square().mean((1, 2))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


@functools.cache
def plain(dtype):
    """Of plain PyTorch; it is trained once for all backends."""
    return curve(Published, dtype)


def test_training_on_digits_in_float64(place):
    """The curves are one, and it learns: losses fall by a third at least."""
    expected = plain(torch.float64)
    found = curve(Ours, torch.float64, place.device)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    first, last = expected[:6].mean(), expected[-6:].mean()
    assert last < first * 2 / 3


def test_training_on_digits_in_float32(place):
    """Our curve is at most twice as far from that in float64 as plain PyTorch's."""
    exact = plain(torch.float64)
    found = curve(Ours, torch.float32, place.device)
    allowed = 2 * relative_error(plain(torch.float32), exact)
    assert relative_error(found, exact) <= allowed
