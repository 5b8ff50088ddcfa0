"""APG of FuxiCTR: layers of a click model whose weights are generated for each row, on synthetic clicks.

    python examples/zoo/fuxictr_apg.py

Adaptive parameter generation (Yan et al., NeurIPS 2022; model_zoo/APG of reczoo/FuxiCTR): y = h U S(z) V +
b(z), where U [in, k] and V [k, out] are shared, each the product of two matrices, and a network makes S
[k, k] and b [out] of a condition z. FuxiCTR makes S for each row, and multiplies by torch.bmm. Here the
last layer of that network is the weight of an interaction: split_head names its parts, and S is never
made. Written from the formula, with the sizes of FuxiCTR's template: layers of 300, k = 8, U and V through
64, a hypernetwork of 512 and 256; and with k = 32, as S of 64 numbers has little to save.
"""

import sys

import torch
import torch.nn.functional as F
from _compare import Result, Step, compare, fit, main, steps_of
from torch import Tensor, nn

import mi_kernels as mi

GROUPS, FIELDS, EMBEDDING, VALUES = 20, 6, 8, 30


class Published(nn.Module):
    """h [B, in] and a condition [B, C] give [B, out]; the hypernetwork's outputs are b, then S row by row."""

    def __init__(self, inputs: int, out: int, condition: int, hidden: list[int], k: int, over: int) -> None:
        super().__init__()
        shapes = {"U_l": (inputs, over), "U_r": (over, k), "V_l": (k, over), "V_r": (over, out)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(nn.init.xavier_normal_(torch.empty(shape))))
        self.k, self.out, widths = k, out, [condition, *hidden]
        layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        self.body = nn.Sequential(*(module for pair in layers for module in pair))
        self.last = nn.Linear(widths[-1], out + k * k)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        offset, generated = self.last(self.body(condition)).split([self.out, self.k**2], 1)
        low = (h @ (self.U_l @ self.U_r)).unsqueeze(1)
        low = torch.bmm(low, generated.reshape(-1, self.k, self.k)).squeeze(1)
        return low @ (self.V_l @ self.V_r) + offset


class Ours(Published):
    """The same parameters, of which S(z) = z W + V0 is never made."""

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        z, k = self.body(condition), self.k
        shapes = [(self.out,), (k, k)]
        (u, c), (w, v) = mi.split_head(self.last.weight, self.last.bias, shapes, order="in,out")
        low = mi.interaction(h @ (self.U_l @ self.U_r), z, w, weight_x=v)
        return low @ (self.V_l @ self.V_r) + F.linear(z, u, c)


class Clicks(nn.Module):
    """Two such layers, both conditioned on the group of the user ("group-wise" in FuxiCTR)."""

    def __init__(self, kind: type[Published], width: int, hidden: list[int], k: int, over: int) -> None:
        super().__init__()
        self.groups, self.values = nn.Embedding(GROUPS, 16), nn.Embedding(FIELDS * VALUES, EMBEDDING)
        self.first = kind(FIELDS * EMBEDDING, width, 16, hidden, k, over)
        self.second = kind(width, width, 16, hidden, k, over)
        self.decide = nn.Linear(width, 1)

    def forward(self, group: Tensor, fields: Tensor) -> Tensor:  # [B], [B, FIELDS] -> [B]
        h = self.values(fields + VALUES * torch.arange(FIELDS)).flatten(1)
        z = self.groups(group)
        return self.decide(F.relu(self.second(F.relu(self.first(h, z)), z))).squeeze(-1)


def clicks(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each group of users has its own taste in each field: what one likes, another does not."""
    taste, value = torch.randn(GROUPS, FIELDS, 4), torch.randn(FIELDS, VALUES, 4)
    group, fields = torch.randint(GROUPS, (count,)), torch.randint(VALUES, (count, FIELDS))
    logit = (taste[group] * value[torch.arange(FIELDS), fields]).sum((1, 2)) / 2
    return group, fields, torch.bernoulli(logit.sigmoid())


def area(score: Tensor, click: Tensor) -> float:
    """The area under the ROC curve: how often a click has the higher score."""
    rank = score.argsort().argsort().double() + 1
    clicked, count = click.bool(), int(click.sum())
    return float((rank[clicked].sum() - count * (count + 1) / 2) / (count * (len(click) - count)))


def train(kind: type[Published], steps: int, width: int, others: tuple) -> tuple[list[float], float]:
    """(losses, area under the curve on held-out clicks)."""
    torch.manual_seed(0)
    group, fields, click = clicks(60000)
    model = Clicks(kind, width, *others)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss(_: int) -> Tensor:
        batch = torch.randint(50000, (500,))
        return F.binary_cross_entropy_with_logits(model(group[batch], fields[batch]), click[batch])

    losses = fit(loss, optimizer, steps)
    with torch.no_grad():
        return losses, area(model(group[50000:], fields[50000:]), click[50000:])


def run(steps: int, quick: bool) -> Result:
    width, others = (40, ([24], 4, 8)) if quick else (300, ([512, 256], 8, 64))

    def make(dtype: torch.dtype, batch: int, rank: int) -> tuple[Step, Step]:
        hidden, _, over = others
        built = (width, width, width, hidden, rank, over)  # "self-wise": the input is the condition
        theirs, ours = (kind(*built).to(dtype) for kind in (Published, Ours))
        ours.load_state_dict(theirs.state_dict())
        h = torch.randn(batch, width, dtype=dtype, requires_grad=True)
        return steps_of(ours, theirs, h, h)

    cases = [(50, others[1])] if quick else [(1000, 8), (1000, 32)]
    comparisons = [
        compare(f"batch {n}, k {k}", lambda dtype, n=n, k=k: make(dtype, n, k), quick) for n, k in cases
    ]
    (theirs, before), (ours, after) = (train(kind, steps, width, others) for kind in (Published, Ours))
    scores = {"area under the curve on held-out clicks": f"theirs {before:.3f}, ours {after:.3f}"}
    return Result(comparisons, {"theirs": theirs, "ours": ours}, scores)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, steps=500))
