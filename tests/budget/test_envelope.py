"""The envelope of one request: whichever of its bounds is met first ends it."""

from __future__ import annotations

import pytest

from budget.envelope import Envelope
from budget.errors import BudgetError, EnvelopeSpent


def test_an_empty_envelope_bounds_nothing() -> None:
    """Without bounds there is nothing to check, and nothing is ever spent."""
    envelope = Envelope()
    assert not envelope.is_bounded()
    envelope.check(tokens=10**12, nano_usd=10**18, now_s=1e12)


@pytest.mark.parametrize(
    ("envelope", "part"),
    [
        (Envelope(tokens=10), "tokens"),
        (Envelope(nano_usd=10), "usd"),
        (Envelope(deadline_s=10.0), "seconds"),
    ],
)
def test_each_bound_is_spent_when_it_is_reached(envelope: Envelope, part: str) -> None:
    """Below the bound the request goes on; at the bound EnvelopeSpent names the part, every time it is asked."""
    assert envelope.is_bounded()
    envelope.check(tokens=9, nano_usd=9, now_s=9.99)
    for _ in range(2):
        with pytest.raises(EnvelopeSpent, match=part) as spent:
            envelope.check(tokens=10, nano_usd=10, now_s=10.0)
        assert spent.value.part == part
        assert isinstance(spent.value, BudgetError)


def test_the_other_parts_do_not_end_it() -> None:
    """A bound looks at its own part only."""
    Envelope(tokens=10).check(tokens=9, nano_usd=10**18, now_s=1e12)
    Envelope(nano_usd=10).check(tokens=10**12, nano_usd=9, now_s=1e12)
    Envelope(deadline_s=10.0).check(tokens=10**12, nano_usd=10**18, now_s=9.0)


def test_a_bound_of_zero_is_a_bound() -> None:
    """Zero is spent at once, and not taken for no bound."""
    with pytest.raises(EnvelopeSpent):
        Envelope(tokens=0).check(tokens=0, nano_usd=0, now_s=0.0)


def test_what_was_spent_already_makes_an_envelope_smaller() -> None:
    """Bounds shrink by what was spent, to nothing at most; where there is none there stays none."""
    envelope = Envelope(tokens=10, deadline_s=5.0)
    assert envelope.less(tokens=4, nano_usd=7) == Envelope(tokens=6, deadline_s=5.0)
    assert Envelope(tokens=3, nano_usd=9).less(tokens=4, nano_usd=2) == Envelope(tokens=0, nano_usd=7)
