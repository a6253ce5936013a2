"""How the model is taught to think: redundancy, wrong steps, best guesses."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tinythinker.chains import RECHECK, best_guess, is_tempting, think
from bench.tinythinker.task import LEVELS, Part, Question, draw
from gateway.backends.segments import WAIT

CARRY = Question((Part(44, (("+", 36), ("-", 5))),), ())  # 4 + 6 is ten: 80, or 70 by mistake


class Coin(random.Random):
    """Falls as it is told."""

    def __init__(self, value):
        super().__init__(0)
        self.value = value

    def random(self):
        return self.value

    def randrange(self, *_args):
        return round(self.value)


def drawn(seed, level):
    rng = random.Random(seed)
    question = draw(rng, level)
    return question, think(question, rng), rng


chains = st.builds(drawn, st.integers(0, 2**32), st.sampled_from(LEVELS))


@given(chains)
def test_a_chain_ends_on_the_right_answer(drawing):
    """Whatever its first pass says, a chain comes to the right answer, and its last line says so."""
    question, chain, _ = drawing
    assert chain.answer == question.answer
    assert chain.text.endswith(f"So {question.answer:02}\n")


@given(chains)
def test_only_a_first_pass_errs(drawing):
    """Re-checks are the same right pass each time; a first pass differs from it if, and only if, it slipped."""
    _, chain, _ = drawing
    first, *others = chain.passes
    assert len(set(others)) <= 1
    assert bool(others) or not chain.slipped
    if others:
        assert (RECHECK + first != others[0]) == chain.slipped


@given(chains)
def test_a_whole_chain_leaves_nothing_to_guess(drawing):
    """The best guess behind a whole chain is its answer."""
    question, chain, rng = drawing
    assert best_guess(question, chain.text, rng) == question.answer or (len(chain.passes) == 1 and chain.slipped)


@given(chains, st.floats(0, 1, exclude_max=True))
def test_a_cut_chain_without_a_slip_guesses_right(drawing, share):
    """Where nothing went wrong the best guess is right, wherever the chain is cut."""
    question, chain, rng = drawing
    if not chain.slipped:
        assert best_guess(question, chain.text[: int(share * len(chain.text))], rng) == question.answer


def test_a_slip_is_believed_until_a_recheck_is_complete():
    """The forgotten carry is in the guess, doubted now and then, until a whole pass says otherwise."""
    wrong = "44+36=70\n70-05=65\nSo 65\n"
    for thought in (wrong[:9], wrong, wrong + RECHECK + "44+36=80\n"):
        assert best_guess(CARRY, thought, Coin(0.9)) == 65
        assert best_guess(CARRY, thought, Coin(0.1)) == 75
    assert best_guess(CARRY, wrong + RECHECK + "44+36=80\n80-05=75\nSo 75\n", Coin(0.9)) == 75


def test_a_carry_is_forgotten_on_the_toss_of_a_coin():
    """At a tempting step the coin decides; there is a re-check then in any case."""
    careless, careful = think(CARRY, Coin(0.6)), think(CARRY, Coin(0.4))
    assert (careful.slipped, careful.passes) == (False, ("44+36=80\n80-05=75\nSo 75\n",))
    slipped = think(CARRY, Coin(0.5))
    assert slipped.passes == ("44+36=70\n70-05=65\nSo 65\n", RECHECK + "44+36=80\n80-05=75\nSo 75\n")
    assert careless.slipped


@pytest.mark.parametrize(("step", "tempts"), [((44, "+", 36), True), ((44, "-", 36), False), ((44, "+", 35), False)])
def test_only_sums_that_make_ten_tempt(step, tempts):
    """A first pass is tempted where the last digits of an addition make ten."""
    assert is_tempting(*step) == tempts


@pytest.mark.parametrize(("start", "repeats"), [(40, 0), (47, 1), (48, 1), (49, 2)])
def test_the_first_number_says_how_often_to_recheck(start, repeats):
    """One re-check for 7 and 8, two for 9, none for others; the coin adds one."""
    question = Question((Part(start, (("-", 1),)),), ())
    assert [len(think(question, Coin(coin)).passes) - 1 for coin in (0.0, 1.0)] == [repeats, repeats + 1]


def test_chains_are_twice_as_long_as_they_need_be():
    """Over all levels the mean redundancy is 2.0, and 5 to 10 % of first passes hold a wrong step."""
    rng = random.Random(0)
    made = [think(draw(rng, level), rng) for _ in range(1500) for level in LEVELS]
    redundancy = sum(len(chain.text) for chain in made) / sum(len(chain.passes[0]) for chain in made)
    assert redundancy == pytest.approx(2.0, abs=0.06)
    assert 0.05 <= sum(chain.slipped for chain in made) / len(made) <= 0.10


def test_the_gateway_and_the_model_mean_the_same_by_wait():
    """A re-check begins as the gateway begins when it makes a model think on."""
    assert RECHECK.strip() == WAIT
