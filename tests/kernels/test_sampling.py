"""Picking tokens: every rule against a plain-Python account of it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.params import Sampling
from kernels.sampling import Sampler, describe, keep_min_p, keep_top_k, keep_top_p, penalise

LOGITS = st.lists(st.integers(-40, 40).map(lambda i: i / 4), min_size=2, max_size=12, unique=True)
CPU = torch.device("cpu")


def probabilities(logits):
    """Softmax in plain Python."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def kept(logits):
    """Positions that were not dropped."""
    return {i for i, x in enumerate(logits.tolist()) if x != -math.inf}


def sampler(vocab=6, prompt=(), offset=0, **sampling):
    return Sampler(Sampling(**sampling), prompt, vocab=vocab, device=CPU, offset=offset)


@given(LOGITS, st.lists(st.integers(0, 3), min_size=12, max_size=12), st.sets(st.integers(0, 11)), st.data())
def test_penalties_agree_with_plain_arithmetic(logits, counts, prompt, data):
    """Repetition scales what was seen, frequency and presence subtract for what was put out."""
    repetition = data.draw(st.sampled_from([0.5, 1.0, 1.3]))
    frequency = data.draw(st.sampled_from([-1.0, 0.0, 0.7]))
    presence = data.draw(st.sampled_from([-0.5, 0.0, 2.0]))
    counts = counts[: len(logits)]
    expected = []
    for i, x in enumerate(logits):
        factor = (1 / repetition if x > 0 else repetition) if counts[i] or i in prompt else 1
        expected.append(x * factor - frequency * counts[i] - presence * (counts[i] > 0))
    got = penalise(
        torch.tensor(logits),
        torch.tensor(counts),
        torch.tensor([i in prompt for i in range(len(logits))]),
        Sampling(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence),
    )
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


@given(LOGITS, st.integers(1, 14))
def test_top_k_keeps_the_k_most_likely(logits, k):
    """All but the k largest are dropped."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    assert kept(keep_top_k(torch.tensor(logits), k)) == set(order[:k])


@given(LOGITS, st.sampled_from([0.01, 0.3, 0.55, 0.9, 0.999]))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    """Tokens are kept, most likely first, until their probabilities reach p."""
    shares = probabilities(logits)
    expected, total = set(), 0.0
    for i in sorted(range(len(logits)), key=lambda i: -logits[i]):
        expected.add(i)
        total += shares[i]
        if total >= p - 1e-6:
            break
    got = kept(keep_top_p(torch.tensor(logits), p))
    # Rounding may move a border that is met exactly.
    assert got == expected or abs(sum(shares[i] for i in got) - p) < 1e-5


@given(LOGITS, st.sampled_from([0.01, 0.2, 0.9]))
def test_min_p_drops_what_is_unlikely_next_to_the_best(logits, min_p):
    """A token stays if it has at least min_p times the best one's probability."""
    shares = probabilities(logits)
    certain = {i for i, share in enumerate(shares) if share > min_p * max(shares) * 1.0001}
    possible = {i for i, share in enumerate(shares) if share >= min_p * max(shares) * 0.9999}
    assert certain <= kept(keep_min_p(torch.tensor(logits), min_p)) <= possible


@given(LOGITS, st.integers(0, 2**31))
@settings(max_examples=50)
def test_a_seed_decides_everything(logits, seed):
    """The same seed and choice draw the same tokens; choice i draws as seed + i does."""
    row = torch.tensor(logits)
    draws = [
        [each.pick(row) for _ in range(8)]
        for each in (
            sampler(len(logits), seed=seed + 2),
            sampler(len(logits), seed=seed, offset=2),
        )
    ]
    assert draws[0] == draws[1]


def test_without_a_seed_two_choices_differ():
    """Without a seed, draws are not repeated."""
    row = torch.zeros(1000)
    first, second = (sampler(1000) for _ in range(2))
    assert [first.pick(row) for _ in range(9)] != [second.pick(row) for _ in range(9)]


def test_temperature_zero_takes_the_most_likely():
    """Without temperature the largest logit wins, whatever top-p says."""
    assert sampler(3, temperature=0, top_p=0.1).pick(torch.tensor([1.0, 3.0, 2.0])) == 1


def test_draws_follow_the_distribution():
    """Frequencies of many draws come close to the probabilities at that temperature."""
    row = torch.tensor([0.0, 1.0, 2.0])
    one = sampler(3, temperature=2.0, seed=5)
    draws = [one.pick(row) for _ in range(4000)]
    expected = probabilities([x / 2 for x in row.tolist()])
    for i, share in enumerate(expected):
        assert draws.count(i) / len(draws) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("rule", [{"top_k": 2}, {"top_p": 0.85}, {"min_p": 0.2}])
def test_dropped_tokens_are_never_drawn(rule):
    """Top-k, top-p and min-p each keep the third of three tokens out of every draw."""
    one = sampler(3, seed=6, **rule)
    assert {one.pick(torch.tensor([0.0, 1.0, 2.0])) for _ in range(300)} == {1, 2}


def test_bias_moves_and_bans():
    """A bias is added to its token's logit."""
    row = torch.tensor([0.0, 1.0, 2.0])
    assert sampler(3, temperature=0, logit_bias={0: 5.0}).pick(row) == 0
    assert sampler(3, temperature=0, logit_bias={2: -100.0}).pick(row) == 1


def test_penalties_follow_what_was_put_out():
    """A token that was noted often enough falls behind the next best."""
    row = torch.tensor([0.0, 1.5, 2.0])
    one = sampler(3, temperature=0, frequency_penalty=0.3)
    seen = []
    for _ in range(4):
        seen.append(one.pick(row))
        one.note([seen[-1]])
    assert seen == [2, 2, 1, 2]


def test_the_repetition_penalty_sees_the_prompt():
    """A token of the prompt is penalised before it was ever put out."""
    row = torch.tensor([0.0, 1.5, 2.0])
    assert sampler(3, prompt=[2], temperature=0, repetition_penalty=2.0).pick(row) == 1


def test_a_grammar_beats_a_ban():
    """Banned tokens come back when the grammar leaves nothing else."""
    row = torch.tensor([0.0, 1.0, 2.0])
    only_two = torch.tensor([False, False, True])
    assert sampler(3, temperature=0).pick(row, banned=[2]) == 1
    assert sampler(3, temperature=0).pick(row, banned=[2], allowed=only_two) == 2


def test_reported_probabilities_are_the_models_own():
    """The log probability of a token ignores bias and temperature, and alternatives come best first."""
    row = torch.tensor([0.0, 1.0, 2.0])
    told = describe(row, 0, 2)
    shares = probabilities(row.tolist())
    assert told.chosen == pytest.approx(math.log(shares[0]), abs=1e-5)
    assert [i for i, _ in told.top] == [2, 1]
    assert describe(row, 1, 0).top == ()
    assert len(describe(row, 1, 99).top) == 3
