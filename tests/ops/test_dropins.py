"""Gates as their papers state them: values and gradients of the formula and of this package agree."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mi_kernels as mi


def same(ours, theirs, *tensors):
    """Both functions of the tensors, in float64: value and all gradients."""
    found = []
    for function in (ours, theirs):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
        found.append([y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.fixture
def draw(place):
    def drawn(*sizes):
        return torch.randn(*sizes, dtype=torch.float64, device=place.device)

    return drawn


def test_film_on_feature_maps(draw):
    """Perez et al. 2018, equation 2: FiLM(F_c | gamma_c, beta_c) = gamma_c F_c + beta_c."""

    def theirs(maps, gamma, beta):
        channels = [
            gamma[:, c, None, None] * maps[:, c] + beta[:, c, None, None] for c in range(maps.shape[1])
        ]
        return torch.stack(channels, 1)

    def ours(maps, gamma, beta):
        return mi.modulate(maps, gamma[..., None, None], beta[..., None, None])

    same(ours, theirs, draw(2, 3, 4, 5), draw(2, 3), draw(2, 3))


def test_film_of_graph_convolutions(draw):
    """Brockschmidt 2020 as torch_geometric's FiLMConv: relu(gamma_v * W h_u + beta_v), summed over edges."""
    source, target = torch.tensor([0, 1, 2, 3, 3, 0]), torch.tensor([1, 0, 0, 2, 1, 3])

    def messages(h, w, film, modulate):
        beta, gamma = F.linear(h, film).split(w.shape[0], -1)
        out = modulate(F.linear(h, w)[source], gamma[target], beta[target])
        return torch.zeros(4, w.shape[0], dtype=h.dtype).index_add(0, target, F.relu(out))

    same(
        lambda *t: messages(*t, mi.modulate),
        lambda *t: messages(*t, lambda x, gamma, beta: gamma * x + beta),
        draw(4, 3),
        draw(5, 3),
        draw(10, 3),
    )


def test_adaln_of_diffusion_transformers(draw):
    """Peebles and Xie 2023: x + gate * mlp(norm(x) * (1 + scale) + shift)."""

    def block(x, c, w, modulate):
        shift, scale, gate = F.linear(F.silu(c), w).chunk(3, -1)
        inner = modulate(F.layer_norm(x, x.shape[-1:]), shift.unsqueeze(1), scale.unsqueeze(1))
        return x, gate.unsqueeze(1), torch.tanh(inner)

    def ours(x, c, w):
        x, gate, inner = block(x, c, w, lambda x, t, s: mi.modulate(x, s, t, scale_offset=1.0))
        return mi.modulate(inner, gate, x)

    def theirs(x, c, w):
        x, gate, inner = block(x, c, w, lambda x, shift, scale: x * (1 + scale) + shift)
        return x + gate * inner

    same(ours, theirs, draw(2, 5, 4), draw(2, 3), draw(12, 3))


def test_highway_gate(draw):
    """Srivastava et al. 2015, equation 3: y = H(x) T(x) + x (1 - T(x)), T = sigmoid(W_T x + b_T)."""

    def theirs(x, h, w, b):
        t = torch.sigmoid(F.linear(x, w, b))
        return torch.tanh(F.linear(x, h)) * t + x * (1 - t)

    def ours(x, h, w, b):
        # y = x + T * (H - x): the diagonal form of H - x with the context x, and x added.
        return mi.diagonal(torch.tanh(F.linear(x, h)) - x, x, w, b, activation="sigmoid") + x

    same(ours, theirs, draw(5, 4), draw(4, 4), draw(4, 4), draw(4))


def test_lstm_gates(draw):
    """Hochreiter and Schmidhuber 1997 as torch.nn.LSTMCell: c' = f * c + i * g, h' = o * tanh(c')."""
    cell = nn.LSTMCell(3, 4, dtype=torch.float64).to(draw(1).device)

    def theirs(x, h, c):
        return torch.cat(cell(x, (h, c)), -1)

    def ours(x, h, c):
        i, f, g, o = (
            F.linear(x, cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh)
        ).chunk(4, -1)
        c = mi.modulate(c, f, mi.modulate(torch.tanh(g), i, activation="sigmoid"), activation="sigmoid")
        return torch.cat([mi.modulate(torch.tanh(c), o, activation="sigmoid"), c], -1)

    same(ours, theirs, draw(5, 3), draw(5, 4), draw(5, 4))


def test_lstm_forget_gate_is_a_diagonal_interaction(draw):
    """f * c with f = sigmoid(W [x, h] + b) is the diagonal form of c with the context [x, h]."""

    def theirs(c, x, h, w, b):
        return torch.sigmoid(F.linear(torch.cat([x, h], -1), w, b)) * c

    def ours(c, x, h, w, b):
        return mi.diagonal(c, torch.cat([x, h], -1), w, b, activation="sigmoid")

    same(ours, theirs, draw(5, 4), draw(5, 3), draw(5, 4), draw(4, 7), draw(4))


def test_squeeze_and_excitation(draw):
    """Hu et al. 2018, equations 2 to 4: x_c * sigmoid(W2 relu(W1 mean(x)))_c."""

    def squeezed(x, w1):
        return F.relu(F.linear(x.mean((2, 3)), w1))

    def theirs(x, w1, w2):
        return x * torch.sigmoid(F.linear(squeezed(x, w1), w2))[..., None, None]

    def ours(x, w1, w2):
        gate = F.linear(squeezed(x, w1), w2)[..., None, None]
        return mi.modulate(x, gate, activation="sigmoid")

    same(ours, theirs, draw(2, 6, 3, 4), draw(2, 6), draw(6, 2))
    channels_last = draw(2, 6, 3, 4).contiguous(memory_format=torch.channels_last)
    same(ours, theirs, channels_last, draw(2, 6), draw(6, 2))


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("sigmoid", torch.sigmoid),
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("relu", F.relu),
        ("identity", lambda t: t),
    ],
)
def test_gated_linear_units(name, act, draw):
    """Dauphin et al. 2017 and Shazeer 2020: act(x W + b) * (x V + c)."""

    def theirs(x, w, b, v, c):
        return act(F.linear(x, w, b)) * F.linear(x, v, c)

    def ours(x, w, b, v, c):
        return mi.diagonal(F.linear(x, v, c), x, w, b, activation=name)

    same(ours, theirs, draw(2, 5, 3), draw(6, 3), draw(6), draw(6, 3), draw(6))
    if name == "sigmoid":
        x = draw(4, 8)
        torch.testing.assert_close(
            mi.modulate(x[:, :4], x[:, 4:], activation="sigmoid"), F.glu(x, -1), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_attention_over_features(name, draw):
    """Jayakumar et al. 2020, section 4: m = act(f(z, x)), y = m * x."""

    def theirs(x, z, w, u, v, b):
        m = torch.einsum("bi,oij,bj->bo", z, w, x) + z @ u.T + x @ v.T + b
        return (torch.sigmoid(m) if name == "sigmoid" else m.softmax(-1)) * x

    same(
        lambda *t: mi.gated_interaction(*t, activation=name),
        theirs,
        *(draw(*size) for size in ((5, 4), (5, 3), (4, 3, 4), (4, 3), (4, 4), (4,))),
    )


def test_modules_compute_their_formulas(place):
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "device": place.device}
    x, z = torch.randn(6, 4, **options), torch.randn(6, 3, **options)
    layer = mi.nn.DiagonalInteraction(
        4, context_features=3, weight_x=True, activation="tanh", scale_offset=0.5, **options
    )
    gate = torch.tanh(F.linear(z, layer.weight, layer.bias) + F.linear(x, layer.weight_x)) + 0.5
    expected = gate * x + F.linear(z, layer.shift_weight, layer.shift_bias)
    torch.testing.assert_close(layer(x, z), expected, rtol=1e-12, atol=1e-12)
    layer = mi.nn.GatedInteraction(4, context_features=3, activation="softmax", **options)
    inner = mi.interaction(x, z, layer.weight, layer.weight_z, layer.weight_x, layer.bias)
    torch.testing.assert_close(layer(x, z), inner.softmax(-1) * x, rtol=1e-12, atol=1e-12)
    for channel_dim, size in ((1, (6, 4, 2, 5)), (-1, (6, 5, 4)), (1, (6, 4))):
        layer = mi.nn.FiLM(4, context_features=3, channel_dim=channel_dim, **options)
        maps = torch.randn(size, **options)
        assert torch.equal(layer(maps, z), maps)  # starts as the identity
        nn.init.normal_(layer.weight)
        scale, shift = F.linear(z, layer.weight, layer.bias).chunk(2, -1)
        ones = (1,) * (maps.dim() - 2)
        view = (6, 4, *ones) if channel_dim == 1 else (6, *ones, 4)
        expected = (1 + scale.view(view)) * maps + shift.view(view)
        torch.testing.assert_close(layer(maps, z), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("channel_dim", "size", "frames"),
    [
        (-1, (2, 5, 4), (2, 5)),
        (1, (2, 4, 5), (2, 5)),
        (-1, (2, 5, 3, 4), (2, 5)),
        (1, (2, 4, 5, 3), (2, 5)),
        (1, (2, 4, 5, 3), (2, 5, 3)),
        (1, (4, 4, 4), (4, 4)),
    ],
    ids=str,
)
def test_film_of_a_context_for_each_frame(channel_dim, size, frames, draw, place):
    """Frame by frame it is the layer of feature maps; values and gradients."""
    layer = mi.nn.FiLM(
        4, context_features=3, channel_dim=channel_dim, dtype=torch.float64, device=place.device
    )
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)

    def theirs(x, z):
        x = x.movedim(channel_dim, -1)  # [*frames, ..., C]
        scale, shift = F.linear(z, layer.weight, layer.bias).chunk(2, -1)
        middle = (slice(None),) * len(frames) + (None,) * (x.dim() - len(frames) - 1)
        return ((1 + scale[middle]) * x + shift[middle]).movedim(-1, channel_dim)

    same(layer, theirs, draw(*size), draw(*frames, 3))


@pytest.mark.parametrize("z", [(5, 3), (2, 4, 3), (2, 6, 3), (2, 5, 6, 3), (2, 5, 6, 7, 3)], ids=str)
def test_film_names_the_contexts_that_it_takes(z):
    expected = (
        r"z: expected shape \[Z\], \[2, Z\], \[2, 5, Z\] or \[2, 5, 7, Z\] \(sizes of x, or 1\), got \["
    )
    with pytest.raises(ValueError, match=f"^FiLM: {expected}"):
        mi.nn.FiLM(4, context_features=3)(torch.ones(2, 4, 5, 7), torch.ones(z))


def test_film_says_where_it_looks_for_channels():
    x, z = torch.ones(2, 5, 4), torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"^FiLM: x: expected size 4 in dimension 1 .*channel_dim=-1.*\[2, 5, 4\]$"
    ):
        mi.nn.FiLM(4, context_features=3)(x, z)
    with pytest.raises(ValueError, match="^FiLM: x: expected size 5 in the last dimension .*channel_dim=1 "):
        mi.nn.FiLM(5, context_features=3, channel_dim=-1)(x, z)


def test_modules_start_as_documented_and_say_what_is_wrong():
    torch.manual_seed(0)
    layer = mi.nn.DiagonalInteraction(2000, context_features=50, weight_x=True)
    x, z = torch.randn(300, 2000), torch.randn(300, 50)
    gate = F.linear(z, layer.weight, layer.bias) + F.linear(x, layer.weight_x)
    assert abs(float(gate.var()) - 1) < 0.05
    assert abs(float(F.linear(z, layer.shift_weight).var()) - 1) < 0.05
    assert "activation='identity'" in repr(layer)
    assert "FiLM(features=2" in repr(mi.nn.FiLM(2, context_features=3))
    for bad in (
        lambda: mi.nn.FiLM(2, context_features=3, channel_dim=2),
        lambda: mi.nn.FiLM(2, context_features=3, activation="softmax"),
        lambda: mi.nn.FiLM(2, context_features=3)(torch.ones(4, 3), torch.ones(4, 3)),
        lambda: mi.nn.FiLM(2, context_features=3)(torch.ones(4, 2), torch.ones(3, 3)),
        lambda: mi.nn.DiagonalInteraction(-1, context_features=3),
        lambda: mi.nn.GatedInteraction(2, context_features=3, activation="swish"),
    ):
        with pytest.raises(ValueError, match="^(FiLM|DiagonalInteraction|GatedInteraction): .*expected"):
            bad()


def test_film_names_the_argument_that_is_wrong():
    layer, x, z = mi.nn.FiLM(2, context_features=3), torch.ones(4, 2), torch.ones(4, 3)
    for arguments, error, message in (
        ((x, z.double()), TypeError, r"z: expected torch.float32 \(the dtype of weight\), got torch.float64"),
        ((x.long(), z), TypeError, "x: expected a dtype of float64, .*, got torch.int64"),
        ((x.to("meta"), z), ValueError, r"x: expected device cpu \(that of weight\), got meta"),
        ((x, z.long()), TypeError, "z: expected torch.float32 .*, got torch.int64"),
        (([1.0], z), TypeError, "x: expected a torch.Tensor, got list"),
        ((x, None), TypeError, "z: expected a torch.Tensor, got NoneType"),
        ((x, z.to("meta")), ValueError, r"z: expected device cpu \(that of weight\), got meta"),
    ):
        with pytest.raises(error, match=f"^FiLM: {message}$"):
            layer(*arguments)
    with torch.autocast("cpu", torch.bfloat16):  # any floating-point dtypes go together
        assert layer(x, z.bfloat16()).dtype == torch.float32
        with pytest.raises(TypeError, match="^FiLM: z: expected a dtype of .*, got torch.int64$"):
            layer(x, z.long())
    assert layer.to("meta")(x.to("meta"), z.to("meta")).shape == (4, 2)  # a device without autocast
