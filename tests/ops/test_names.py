"""Names that a profiler, ``grad_fn`` and pictures of graphs show."""

import pytest
import torch
from calls import CALLS, Call
from torch.profiler import ProfilerActivity, profile

import mi_kernels as mi
from mi_kernels.ops import rules
from mi_kernels.testing.mix_samples import Mixing
from mi_kernels.testing.samples import Modulation

# A few elements are modulated by plain PyTorch code, whose nodes have PyTorch's names.
LARGE = (64, 32, 96)
CASES = CALLS | {
    "modulate": Call(mi.modulate, Modulation("large", LARGE, LARGE, None)),
    "mix": Call(mi.mix, Mixing("large", LARGE, LARGE, LARGE)),
}
# What the node that makes the result is called by. A call that is composed of others ends in one of theirs.
NAMES = {
    "generated": "ApplyGenerated",
    "segments-generated": "Interaction",
    "biaffine": "Biaffine",
    "biaffine-channels-first": "Biaffine",
    "low-rank-weights": "ApplyLowRank",
    "low-rank-weights-segments": "Interaction",
    "glu": "GLU",
    "glu-separate": "GLU",
    "glu-softmax": "Modulate",
    "low-rank": "LowRank",
    "low-rank-ranks": "LowRank",
    "modulate": "Modulate",
    "mix": "Mix",
    "norm": "NormModulate",
    "norm-residual": "NormModulate",
    "mlstm": "MultiplicativeRNN",
    "mi-gru": "MultiplicativeRNN",
    "second-order": "MultiplicativeRNN",
    "diagonal": "Diagonal",
    "diagonal-softmax": "Diagonal",
    "diagonal-shared": "Modulate",
    "gated": "GatedInteraction",
}
WORDS = {"glu": "GLU", "rnn": "RNN"}
FUNCTIONS = ["".join(WORDS.get(word, word.title()) for word in name.split("_")) for name in mi.__all__]
PARTS = ("", "InputGrads", "WeightGrads", "Grads", "Tangents", "Projection", "Rstd")
ALLOWED = {f"{function}{part}Backward" for function in FUNCTIONS for part in PARTS} | {"PermuteRowsBackward"}
every_case = pytest.mark.parametrize("name", CASES)


def names(*tensors):
    """Of the nodes of our rules, from results backwards."""
    waiting = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen = set(waiting)
    for node in waiting:
        sources = [source for source, _ in node.next_functions if source is not None and source not in seen]
        waiting += sources
        seen |= set(sources)
    return [node.name() for node in waiting if issubclass(getattr(node, "_forward_cls", object), rules.Rule)]


@every_case
def test_nodes_are_named_by_their_function(name, place):
    call = CASES[name]
    leaves = call.arguments(device=place.device)
    y = call(*leaves)
    found = names(y)
    expected = NAMES.get(name, "Interaction")
    if name.startswith("low-rank") and "weights" not in name:  # what follows the product is another node
        assert f"{expected}Backward" in found
    elif place.backend == "cpu":
        assert found[0] == f"{expected}Backward"
    gradients = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True, allow_unused=True)
    again = names(*gradients)
    assert again and set(found + again) <= ALLOWED


def _rules(base=rules.Rule):
    for rule in base.__subclasses__():
        yield rule
        yield from _rules(rule)


def test_every_rule_has_a_readable_name():
    shared = {"GateBackward", "DualLinearBackward"}  # bases alone
    found = {rule._backward_cls.__name__ for rule in _rules() if rule.__module__.startswith("mi_kernels.")}
    assert len(found) > 20
    assert found - shared <= ALLOWED


@every_case
def test_a_profile_shows_the_operations(name, place):
    call = CASES[name]
    leaves = call.arguments(device=place.device)

    def shown(work):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            result = work()
        return result, [event.key for event in profiled.key_averages()]

    y, forward = shown(lambda: call(*leaves))
    _, backward = shown(y.sum().backward)
    for events in (forward, backward):
        assert any(event.startswith("mi_kernels::") for event in events)
    assert set(names(y)) <= set(backward)
