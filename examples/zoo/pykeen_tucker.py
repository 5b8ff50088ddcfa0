"""PyKEEN's TuckER on Nations, its interaction against the same through mi.interaction.

    python examples/zoo/pykeen_tucker.py

TuckER (Balazevic et al., EMNLP 2019) scores a triple by a core tensor: sum_ijk C_ijk h_i r_j t_k. PyKEEN first makes
C x r, a matrix for each relation in the batch, and then multiplies by h; mi.interaction(h, r, C) makes what is
multiplied by t in one pass. Dropout of C x r (0.4 by default) needs that matrix: then mi.generate makes it and
mi.apply_generated applies it. So the default model is timed too, and the model without that dropout is trained, by
both. Nations ships with PyKEEN (14 entities, 55 relations, 1592 triples); 14 tails make hits@10 an easy measure.
"""

import sys

import torch
import torch.nn.functional as F
from _compare import Result, Step, compare, main, need
from torch import Tensor

import mi_kernels as mi

datasets = need("pykeen.datasets", "pykeen")
modules = need("pykeen.nn.modules", "pykeen")
models = need("pykeen.models", "pykeen")
evaluation = need("pykeen.evaluation", "pykeen")


class FusedTuckER(modules.TuckERInteraction):
    """The same parameters, state and random numbers; the weight W [O, Z, X] is a view of C [X, Z, O]."""

    def forward(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        weight = self.core_tensor.permute(2, 1, 0)
        h = self.head_dropout(self.normalised(h, self.head_batch_norm))
        if self.training and self.relation_dropout.p > 0:
            generated, _ = mi.generate(r, weight)
            # PyKEEN's mask is that of [X, O], and its random numbers come in that order.
            dropped = self.relation_dropout(generated.transpose(-2, -1).contiguous())
            y = mi.apply_generated(h, dropped.transpose(-2, -1))
        else:
            y = mi.interaction(h, r, weight)
        y = self.head_relation_dropout(self.normalised(y, self.head_relation_batch_norm))
        return (y * t).sum(-1)

    def normalised(self, x: Tensor, norm: torch.nn.BatchNorm1d | None) -> Tensor:
        return x if norm is None else norm(x.reshape(-1, x.shape[-1])).view_as(x)


def fused(model: torch.nn.Module) -> torch.nn.Module:
    """In place: only the class of the interaction changes."""
    model.interaction.__class__ = FusedTuckER
    return model


def build(triples: object, dim: int, dropout: float, seed: int = 0) -> torch.nn.Module:
    sizes = {"embedding_dim": dim, "relation_dim": dim}
    return models.TuckER(triples_factory=triples, dropout_1=dropout, random_seed=seed, **sizes)


def timed(triples: object, dtype: torch.dtype, batch: int, dim: int, dropout: float) -> tuple[Step, Step]:
    """Scores of all tails for a batch of heads and relations, as in training."""
    theirs, ours = build(triples, dim, dropout).to(dtype), fused(build(triples, dim, dropout).to(dtype))
    pairs = torch.stack([torch.randint(14, (batch,)), torch.randint(55, (batch,))], 1)

    def step(model: torch.nn.Module) -> Step:
        def forward() -> Tensor:
            torch.manual_seed(0)  # the same masks for both
            return model.score_t(pairs)

        return Step(forward, list(model.parameters()))

    return step(ours), step(theirs)


def train(ours: bool, steps: int, dim: int) -> tuple[list[float], str]:
    """(losses, metrics on test triples): scores of all tails at once, with binary cross entropy."""
    nations = datasets.Nations()
    model = build(nations.training, dim, dropout=0.0)
    if ours:
        model = fused(model)
    triples = nations.training.mapped_triples
    labels = torch.zeros(14, 55, 14).index_put(tuple(triples.T), torch.ones(1))
    pairs = triples[:, :2].unique(dim=0)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        batch = pairs[torch.randint(len(pairs), (128,))]
        loss = F.binary_cross_entropy_with_logits(model.score_t(batch), labels[tuple(batch.T)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    evaluator = evaluation.RankBasedEvaluator()
    known = [triples, nations.validation.mapped_triples]
    found = evaluator.evaluate(
        model, nations.testing.mapped_triples, batch_size=64, additional_filter_triples=known, use_tqdm=False
    )
    names = {"MRR": "inverse_harmonic_mean_rank", "hits@1": "hits@1", "hits@10": "hits@10"}
    values = (f"{name} {found.get_metric(f'tail.realistic.{key}'):.3f}" for name, key in names.items())
    return losses, ", ".join(values)


def run(steps: int, quick: bool) -> Result:
    dim, batch, trained = (24, 32, 24) if quick else (200, 128, 64)
    triples = datasets.Nations().training
    cases = {"without dropout of C x r": 0.0, "with it": 0.4}
    comparisons = [
        compare(f"batch {batch}, {name}", lambda dtype, p=p: timed(triples, dtype, batch, dim, p), quick)
        for name, p in cases.items()
    ]
    (theirs, before), (ours, after) = (train(which, steps, trained) for which in (False, True))
    scores = {"filtered ranks of test tails": f"theirs {before}; ours {after}"}
    return Result(comparisons, {"theirs": theirs, "ours": ours}, scores)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, steps=500))
