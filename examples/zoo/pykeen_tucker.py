"""PyKEEN's TuckER on Nations, as it is and converted by its rule.

    python examples/zoo/pykeen_tucker.py

TuckER (Balazevic et al., EMNLP 2019) scores a triple by a core tensor: sum_ijk C_ijk h_i r_j t_k. PyKEEN
first makes C x r, a matrix for each pair of a head and a relation in the batch; mi.convert with its rule
multiplies C by h and r in one pass, mi.interaction(h, r, C). Dropout of C x r (0.4 by default) needs that
matrix, which the rule then leaves to PyKEEN: this is timed, too, and what is trained, by both, has none.
Nations ships with PyKEEN (14 entities, 55 relations, 1592 triples); among 14 entities hits@10 says little.
"""

import sys

import torch
import torch.nn.functional as F
from _compare import Result, Step, compare, fit, main, need
from torch import Tensor, nn

import mi_kernels as mi

datasets = need("pykeen.datasets", "pykeen")
models = need("pykeen.models", "pykeen")
evaluation = need("pykeen.evaluation", "pykeen")


def converted(model: nn.Module) -> nn.Module:
    return mi.convert(model, rules=mi.nn.rules.pykeen())


def build(triples: object, dim: int, dropout: float, seed: int = 0) -> nn.Module:
    sizes = {"embedding_dim": dim, "relation_dim": dim}
    return models.TuckER(triples_factory=triples, dropout_1=dropout, random_seed=seed, **sizes)


def timed(triples: object, dtype: torch.dtype, batch: int, dim: int, dropout: float) -> tuple[Step, Step]:
    """Scores of all tails for a batch of heads and relations, as in training."""
    theirs, ours = build(triples, dim, dropout).to(dtype), converted(build(triples, dim, dropout).to(dtype))
    pairs = torch.stack([torch.randint(14, (batch,)), torch.randint(55, (batch,))], 1)

    def step(model: nn.Module) -> Step:
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
        model = converted(model)
    triples = nations.training.mapped_triples
    labels = torch.zeros(14, 55, 14).index_put(tuple(triples.T), torch.ones(1))
    pairs = triples[:, :2].unique(dim=0)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss(_: int) -> Tensor:
        batch = pairs[torch.randint(len(pairs), (128,))]
        return F.binary_cross_entropy_with_logits(model.score_t(batch), labels[tuple(batch.T)])

    losses = fit(loss, optimizer, steps)
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
