"""The study of sequences: what is held out, what is equal, what the models compute."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from studies import sequence
from studies.core.models import parameters
from studies.core.study import Record, Results, Trial

pytestmark = [pytest.mark.tools, pytest.mark.usefixtures("one_thread")]

QUICK = Trial("sequence", sequence.TASK, sequence.RIVAL, rate=2e-2, seed=3, quick=True)


def test_a_paragraph_stays_where_it_stands_first():
    text = "one\ntwo\n\n  three\n \n   one\n   two\n\nfour\n\nthree"
    assert sequence.paragraphs(text) == "one\ntwo\n\n  three\n\nfour"


def test_no_character_is_both_seen_and_held_out():
    """Of a text in which each character stands twice, side by side, and none in two blocks."""
    pairs = sequence.BLOCK // 2
    text = "".join(chr(0x10000 + i) * 2 for i in range(20 * pairs)) + "a rest"
    train, validation, test, characters = sequence.encoded(text)
    assert characters == 16 * pairs + 1
    assert torch.equal(train.flatten(), torch.arange(1, characters).repeat_interleave(2))
    assert (validation.shape, test.shape) == ((2, sequence.BLOCK), (2, sequence.BLOCK))
    assert torch.cat((validation, test)).eq(sequence.OTHER).all()


def test_characters_that_are_rare_in_the_training_part_share_a_number():
    text = "ab" * (4 * sequence.BLOCK - 1) + "xy" + "x" * sequence.BLOCK + "y" * sequence.BLOCK
    train, validation, test, characters = sequence.encoded(text)
    assert characters == 3 and train.flatten()[:2].tolist() == [1, 2]
    assert train[-1, -2:].tolist() == [sequence.OTHER] * 2
    assert validation.eq(sequence.OTHER).all() and test.eq(sequence.OTHER).all()


def test_hardly_a_long_passage_of_the_real_text_is_in_two_parts():
    """Of the held-out strings of 100 characters, whatever their line breaks, one of fifty at most."""
    train, validation, test = sequence.parts(sequence.text())
    seen = {one for block in train for one in strings(block)}
    for part in (validation, test):
        found = [one in seen for block in part for one in strings(block)]
        assert len(found) > 10_000 and sum(found) < len(found) / 50


def strings(block, length=100):
    line = " ".join(block.split())
    return {line[i : i + length] for i in range(len(line) - length + 1)}


def made(name, characters=5, hidden=7, seed=0):
    torch.manual_seed(seed)
    return sequence.Characters(name, characters, hidden)


@pytest.mark.parametrize("budget", [sequence.BUDGET, sequence.QUICK_BUDGET])
def test_ours_have_no_more_parameters_than_the_rivals(budget):
    """The figures of the statement: by at most one of fifty. A unit of the small models is more than that."""
    characters = sequence.data()[3]
    sizes = {
        name: parameters(made(name, characters, sequence.units(name, characters, budget)))
        for name in sequence.MODELS
    }
    slack = 0.02 if budget == sequence.BUDGET else 0.05
    assert all((1 - slack) * budget < sizes[name] <= budget for name in sequence.OURS)
    assert all(budget <= sizes[name] < (1 + slack) * budget for name in sequence.RIVALS)


@pytest.mark.parametrize("name", sequence.MODELS)
def test_every_model_starts_alike(name):
    model = made(name)
    assert torch.equal(model.embedding.weight, made(sequence.RIVAL).embedding.weight)
    assert torch.equal((model.layer.bias_ih_l0 + model.layer.bias_hh_l0)[7:14], torch.ones(7))


def test_windows_depend_on_the_seed_alone():
    blocks = torch.arange(3 * sequence.BLOCK).view(3, sequence.BLOCK)
    first = sequence.windows(blocks, 1)
    drawn = [first(), first()]
    torch.manual_seed(5)
    second = sequence.windows(blocks, 1)
    assert all(torch.equal(window, second()) for window in drawn)
    assert not torch.equal(*drawn) and not torch.equal(drawn[0], sequence.windows(blocks, 2)())
    assert drawn[0].shape == (sequence.ROWS, sequence.WINDOW + 1)
    assert torch.equal(drawn[0].diff(dim=1), torch.ones(sequence.ROWS, sequence.WINDOW))
    assert torch.equal(drawn[0][:, 0] // sequence.BLOCK, drawn[0][:, -1] // sequence.BLOCK)


def test_what_the_decoders_compute():
    """Scores of the state h and the embedded character e, by the formulas of the statement."""
    h, e = torch.randn(2, 3, 7).double(), torch.randn(2, 3, sequence.EMBEDDING).double()
    model = sequence.MultiplicativeDecoder(7, 5).double()
    p = {name: one.detach() for name, one in model.interaction.named_parameters()}
    product = (h @ p["factor_x"].T) * (e @ p["factor_z"].T)
    wanted = product @ p["factor_out"].T + h @ p["weight_x"].T + e @ p["weight_z"].T + p["bias"]
    assert torch.allclose(model(h, e), wanted, rtol=0, atol=1e-12)
    concat = sequence.ConcatDecoder(7, 5).double()
    wanted = h @ concat.linear.weight[:, :7].T + e @ concat.linear.weight[:, 7:].T + concat.linear.bias
    assert torch.allclose(concat(h, e), wanted, rtol=0, atol=1e-12)


def test_bits_are_of_the_next_character():
    """A model that always gives the character after this one the probability 1/2."""
    text = torch.tensor([[0, 1, 2, 0, 1], [1, 2, 0, 1, 1]])
    scores = torch.eye(3).roll(1, 1).mul(math.log(4.0))
    given = sequence.bits(lambda part: scores[part], text)
    assert given.item() == pytest.approx((7 * math.log2(6 / 4) + math.log2(6)) / 8)


@pytest.mark.parametrize("name", sequence.MODELS)
def test_a_quick_trial_learns_more_than_frequencies_and_is_repeated_exactly(name):
    trial = replace(QUICK, model=name)
    outcome = sequence.train(trial)
    assert outcome.validation < bits_of_frequencies() and outcome.score < bits_of_frequencies()
    assert sequence.train(trial) == outcome


def bits_of_frequencies():
    """What a character of the training part costs if nothing but their frequencies is known."""
    counts = Counter(sequence.data()[0].flatten().tolist()).values()
    return sum(count * math.log2(sum(counts) / count) for count in counts) / sum(counts)


def test_claims_are_of_the_seeds_that_won():
    """Four of five are enough, three are not; the curves say the same as the scores."""
    scores = {
        "multiplicative LSTM": [1.0, 1.0, 1.0, 1.0, 2.5],
        "MI-LSTM": [1.0, 1.0, 1.0, 2.5, 2.5],
        "LSTM + multiplicative decoder": [1.5] * 5,
        "LSTM + concat decoder": [1.4] * 5,
        "LSTM": [2.0] * 5,
    }
    every = [
        Record(sequence.TASK, model, 1e-2, seed, 1, score, 0.0, ((100 * score, sequence.TARGET),))
        for model in scores
        for seed, score in enumerate(scores[model])
    ]
    held = {claim.text: claim.holds for claim in sequence.claims(Results(sequence.STUDY, every))}
    less, steps = "fewer bits per character than", f"at {sequence.TARGET} bits in fewer steps than LSTM"
    assert held == {
        f"multiplicative LSTM: {less} LSTM": True,
        f"MI-LSTM: {less} LSTM": False,
        f"LSTM + multiplicative decoder: {less} LSTM": True,
        f"LSTM + multiplicative decoder: {less} LSTM + concat decoder": False,
        f"multiplicative LSTM: {steps}": True,
        f"MI-LSTM: {steps}": False,
        f"LSTM + multiplicative decoder: {steps}": True,
    }
