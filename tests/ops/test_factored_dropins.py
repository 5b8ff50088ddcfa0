"""Gated MLPs and low-rank fusions as papers and repositories state them: ours computes the same.

Values, gradients and second derivatives in float64, with the published parameters as they are.
"""

import pytest
import torch
import torch.nn.functional as F

import mi_kernels as mi


def same(ours, theirs, *tensors):
    """Both functions of the tensors: value, gradients, and the gradients of their sum of squares."""
    found = []
    for function in (ours, theirs):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
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


def test_llama_mlp(draw):
    """Touvron et al. 2023: W2 (silu(W1 x) * W3 x), in transformers down_proj, gate_proj and up_proj."""

    def theirs(x, gate_proj, up_proj, down_proj):
        return (F.silu(x @ gate_proj.T) * (x @ up_proj.T)) @ down_proj.T

    def ours(x, gate_proj, up_proj, down_proj):
        return F.linear(mi.glu(x, gate_proj, weight_value=up_proj), down_proj)

    same(ours, theirs, draw(2, 3, 6), draw(8, 6), draw(8, 6), draw(6, 8))


def test_mixtral_experts(draw):
    """Jiang et al. 2024: sum_e s_e W2_e (silu(W1_e x) * W3_e x) over the two experts of each token.

    gate_up_proj [E, 2H, X] and down_proj [E, X, H] are transformers' parameters.
    """
    experts = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]])

    def mixed(x, scores, gate_up_proj, down_proj, glu):
        y = torch.zeros_like(x)
        for e in range(len(gate_up_proj)):
            token, choice = torch.where(experts == e)
            token, choice = token.to(x.device), choice.to(x.device)
            out = F.linear(glu(x[token], gate_up_proj[e]), down_proj[e])
            y = y.index_add(0, token, out * scores[token, choice, None])
        return y

    def theirs(*tensors):
        def glu(x, weight):
            gate, up = F.linear(x, weight).chunk(2, -1)
            return F.silu(gate) * up

        return mixed(*tensors, glu)

    same(lambda *t: mixed(*t, mi.glu), theirs, draw(5, 6), draw(5, 2), draw(3, 16, 6), draw(3, 6, 8))


def test_t5_gated_gelu(draw):
    """Raffel et al. 2020, version 1.1 (Shazeer 2020: GEGLU): wo (gelu_new(wi_0 x) * wi_1 x)."""

    def theirs(x, wi_0, wi_1, wo):
        t = x @ wi_0.T
        gelu = 0.5 * t * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3)))
        return (gelu * (x @ wi_1.T)) @ wo.T

    def ours(x, wi_0, wi_1, wo):
        return F.linear(mi.glu(x, wi_0, weight_value=wi_1, activation="gelu_tanh"), wo)

    same(ours, theirs, draw(2, 3, 6), draw(8, 6), draw(8, 6), draw(6, 8))


def test_timm_swiglu(draw):
    """timm's SwiGLU with a norm: fc2(norm(silu(fc1_g(x)) * fc1_x(x))), all with biases."""

    def behind(h, norm, fc2, b2):
        return F.linear(F.layer_norm(h, h.shape[-1:], norm), fc2, b2)

    def theirs(x, fc1_g, bg, fc1_x, bx, *rest):
        return behind(F.silu(F.linear(x, fc1_g, bg)) * F.linear(x, fc1_x, bx), *rest)

    def ours(x, fc1_g, bg, fc1_x, bx, *rest):
        return behind(mi.glu(x, fc1_g, bg, weight_value=fc1_x, bias_value=bx), *rest)

    layers = draw(8, 6), draw(8), draw(8, 6), draw(8)
    same(ours, theirs, draw(2, 3, 6), *layers, draw(8), draw(6, 8), draw(6))


@pytest.mark.parametrize("gate_last", [True, False])
def test_timm_glu_mlp(gate_last, draw):
    """timm's GluMlp, and with gate_last=False and silu its SwiGLUPacked: one layer for gate and value."""
    name, act = ("sigmoid", torch.sigmoid) if gate_last else ("silu", F.silu)

    def theirs(x, fc1, b1, fc2, b2):
        one, two = F.linear(x, fc1, b1).chunk(2, dim=-1)
        return F.linear(one * act(two) if gate_last else act(one) * two, fc2, b2)

    def ours(x, fc1, b1, fc2, b2):
        return F.linear(mi.glu(x, fc1, b1, activation=name, gate_first=not gate_last), fc2, b2)

    same(ours, theirs, draw(2, 3, 6), draw(16, 6), draw(16), draw(6, 8), draw(6))


def test_mlb(draw):
    """Kim et al. 2017, equation 6 and on: P^T (tanh(U^T q) * tanh(V^T v)) + b."""

    def theirs(q, v, u, w, p, b):
        return (torch.tanh(q @ u) * torch.tanh(v @ w)) @ p + b

    def ours(q, v, u, w, p, b):
        return mi.low_rank(v, q, w.T, u.T, p.T, bias=b, activation_x="tanh", activation_z="tanh")

    same(ours, theirs, draw(5, 6), draw(5, 4), draw(6, 7), draw(4, 7), draw(7, 3), draw(3))


def test_mlb_of_image_regions(draw):
    """Its attention: one question for all regions of an image."""

    def theirs(q, v, u, w, p):
        return (torch.tanh(q @ u)[:, None] * torch.tanh(v @ w)) @ p

    def ours(q, v, u, w, p):
        maps = {"activation_x": "tanh", "activation_z": "tanh"}
        return mi.low_rank(v, q[:, None], w.T, u.T, p.T, **maps)

    same(ours, theirs, draw(2, 6), draw(2, 5, 4), draw(6, 7), draw(4, 7), draw(7, 3))


def test_mutan(draw):
    """Ben-younes et al. 2017, equations 5 to 8, as MutanFusion of block.bootstrap.pytorch.

    q and v are projected (with tanh), then merged by layers of R times O outputs each, summed over R.
    """
    rank, out = 3, 4

    def projected(q, v, linear_q, linear_v):
        return torch.tanh(q @ linear_q.T), torch.tanh(v @ linear_v.T)

    def theirs(q, v, linear_q, linear_v, merge_q, merge_v, w_out):
        q, v = projected(q, v, linear_q, linear_v)
        product = (q @ merge_q.T) * (v @ merge_v.T)
        return product.view(-1, rank, out).sum(1) @ w_out.T

    def ours(q, v, linear_q, linear_v, merge_q, merge_v, w_out):
        q, v = projected(q, v, linear_q, linear_v)
        factor_q, factor_v = (t.unflatten(0, (rank, out)) for t in (merge_q, merge_v))
        return mi.low_rank(v, q, factor_v, factor_q, w_out)

    layers = draw(5, 6), draw(7, 8), draw(rank * out, 5), draw(rank * out, 7), draw(3, out)
    same(ours, theirs, draw(4, 6), draw(4, 8), *layers)


def test_mfb(draw):
    """Yu et al. 2017, equation 4: sum pooling over k of U^T x * V^T y; then power and L2 normalisation."""
    k, out = 3, 4

    def normalised(z):
        return F.normalize(torch.sign(z) * torch.sqrt(z.abs() + 1e-3), dim=-1)

    def theirs(x, y, u, v):
        product = (x @ u) * (y @ v)  # outputs of one pool lie side by side
        return normalised(product.view(-1, out, k).sum(-1))

    def ours(x, y, u, v):
        factor_x, factor_y = (t.unflatten(1, (out, k)).permute(2, 1, 0) for t in (u, v))
        return normalised(mi.low_rank(x, y, factor_x, factor_y))

    same(ours, theirs, draw(5, 6), draw(5, 7), draw(6, out * k), draw(7, out * k))


def test_lmf(draw):
    """Liu et al. 2018, equation 11, as MultiBench's LowRankTensorFusion, with factors [rank, X + 1, O]."""

    def padded(x):
        return F.pad(x, (1, 0), value=1.0)

    def theirs(a, b, factor_a, factor_b, weights, bias):
        fused = (padded(a) @ factor_a) * (padded(b) @ factor_b)  # [rank, B, out]
        return (weights @ fused.transpose(0, 1)).squeeze(1) + bias

    def ours(a, b, factor_a, factor_b, weights, bias):
        factor_b = weights.view(-1, 1, 1) * factor_b
        return mi.low_rank(padded(b), padded(a), factor_b.mT, factor_a.mT, bias=bias)

    same(ours, theirs, draw(5, 3), draw(5, 4), draw(2, 4, 6), draw(2, 5, 6), draw(1, 2), draw(1, 6))


@pytest.mark.parametrize("form", ["diagonal", "low_rank"])
def test_dcn_mix(form, draw):
    """Wang et al. 2021 (DCN V2), equations 3 and 4: x' = sum_i G_i(x) x0 * (U_i g(C_i g(V_i^T x)) + b) + x.

    x0 times a linear map of the gated h_i = g(C_i g(V_i^T x)) of all experts at once, as softmax sums to 1.
    """
    experts, rank, width = 3, 2, 5

    def gated_experts(x, v, c, g):
        inside = torch.tanh(torch.einsum("bx,exr->ber", x, v))
        inside = torch.tanh(torch.einsum("ber,esr->bes", inside, c))
        return inside, torch.softmax(x @ g.T, -1)

    def theirs(x0, x, u, v, c, g, bias):
        inside, gate = gated_experts(x, v, c, g)
        out = x0[:, None] * (torch.einsum("ber,exr->bex", inside, u) + bias)
        return (gate[..., None] * out).sum(1) + x

    def ours(x0, x, u, v, c, g, bias):
        inside, gate = gated_experts(x, v, c, g)
        h = (inside * gate[..., None]).flatten(1)
        factor = u.transpose(1, 2).reshape(experts * rank, width).T
        if form == "diagonal":
            return mi.diagonal(x0, h, factor, bias) + x
        h, factor = F.pad(h, (0, 1), value=1.0), torch.cat((factor, bias[:, None]), 1)
        return mi.low_rank(x0, h, torch.eye(width, dtype=x.dtype, device=x.device), factor) + x

    tensors = draw(experts, width, rank), draw(experts, width, rank), draw(experts, rank, rank)
    same(ours, theirs, draw(4, width), draw(4, width), *tensors, draw(experts, width), draw(width))


def test_distmult(draw):
    """Yang et al. 2015: sum_r (A h)_r (D r)_r t_r for all tails t, as the factor_out."""

    def theirs(h, r, a, d, tails):
        return torch.einsum("br,br,tr->bt", h @ a.T, r @ d.T, tails)

    same(mi.low_rank, theirs, draw(4, 5), draw(4, 6), draw(7, 5), draw(7, 6), draw(8, 7))
