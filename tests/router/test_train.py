"""Training on made-up sources: what is fitted, and how it is judged."""

import numpy as np
import pytest

from router.features import NAMES
from router.scorer import parse_scorer, render_scorer
from router.train.card import card
from router.train.fit import Table, body_of, fit
from router.train.measure import measure
from router.train.sources import SOURCES, Source


def nothing(folder):
    """No texts: the tables are made here."""
    return iter(())


KNOWN = [
    Source("small talk", "instant", 1, "none", "made up", nothing),
    Source("letters", "instant", 2, "none", "made up", nothing),
    Source("advice", "instant", 2, "none", "made up", nothing),
    Source("puzzles", "reasoning", 3, "none", "made up", nothing),
    Source("sums", "reasoning", 4, "none", "made up", nothing),
    Source("proofs", "reasoning", 5, "none", "made up", nothing),
]


def table(source, seed):
    """Rows whose first feature tells the label, with noise."""
    noise = np.random.default_rng(seed)
    rows = noise.uniform(0, 0.3, (60, len(NAMES)))
    rows[:, 0] += 0.7 * (source.deserves == "reasoning")
    return Table(source, rows)


@pytest.fixture(scope="module")
def known():
    """Three sources of each label."""
    return [table(source, seed) for seed, source in enumerate(KNOWN)]


def test_the_same_data_give_the_same_bytes(known):
    """Fitting again, with the rows of each source in another order, gives the artefact bit for bit."""
    turned = [Table(each.source, each.rows[::-1]) for each in known]
    assert render_scorer(body_of(fit(known))) == render_scorer(body_of(fit(turned)))


def test_what_is_learnt_is_what_differs(known):
    """The telling feature weighs most, and the artefact says as the model does."""
    model = fit(known)
    scorer = parse_scorer(render_scorer(body_of(model)))
    assert max(range(len(NAMES)), key=scorer.weights.__getitem__) == 0
    for each in known:
        said = scorer.score([round(float(value), 4) for value in each.rows[0]])
        assert (said.probability >= scorer.high) == (each.source.deserves == "reasoning")


def test_each_source_is_judged_by_a_model_without_it(known):
    """A source whose label contradicts the others' is judged wrong, however well it could have been learnt."""
    odd = Source("odd", "instant", 1, "none", "made up", nothing)
    rows = table(KNOWN[4], 9).rows
    figures = measure([*known, Table(odd, rows)], [], fit(known))
    by_name = {each.table.source.name: each for each in figures.sources}
    assert by_name["odd"].right("instant") < 0.1
    assert by_name["small talk"].right("reasoning") > 0.9


def test_figures_are_those_of_a_perfect_split(known):
    """Where every text gets what it deserves, the figures say so, and so does the card."""
    figures = measure(known, known[:1], fit(known))
    assert figures.macro_f1("instant", by_text=True) == figures.accuracy("reasoning", by_text=False) == 1
    assert figures.coverage() == figures.decided_macro_f1() == 1
    assert figures.calibration_error() < 0.2
    assert "| small talk | 100.0 % | 100.0 % | 0.0 % |" in card(figures, "abc", len(NAMES))


def test_both_labels_have_several_sources_and_some_stay_outside():
    """Leaving one source out leaves others of its label, and ordinary chat is never learnt from."""
    learnt = [source for source in SOURCES if not source.is_outside]
    assert min(sum(source.deserves == label for source in learnt) for label in ("instant", "reasoning")) >= 3
    assert {source.deserves for source in SOURCES if source.is_outside} == {"instant", "reasoning"}
