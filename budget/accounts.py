"""The books of one limit: what hold, settle and correct do to them.

Owns: an account in memory, of either kind; every ledger that counts in Python moves these (ledgers/memory.py keeps
them for ever, ledgers/sqlite.py for one transaction). Time is passed in. Does not own: the rules (books.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from budget.books import (
    KEPT_WINDOWS,
    RATES,
    level_after_settling,
    level_now,
    present_window,
    rate_free,
    rate_reset_s,
    rate_standing,
    refusal,
    window_end,
)
from budget.ledger import Limit, Standing, Unit


class Books:
    """What one calendar window of one limit has settled and holds."""

    __slots__ = ("debt", "end_s", "held", "settled", "start_s")

    def __init__(self, start_s: int, end_s: float, settled: int = 0, held: int = 0, debt: int = 0) -> None:
        self.start_s = start_s
        self.end_s = end_s
        self.settled, self.held, self.debt = settled, held, debt


class CalendarAccount:
    """A limit per hour or longer, or on concurrency: books per window, which begin with the first hold in it."""

    __slots__ = ("__weakref__", "_present", "books", "limit", "unit")

    def __init__(self, limit: Limit, books: Iterable[Books] = ()) -> None:
        self.limit = limit
        self.unit = limit.unit
        self.books = {page.start_s: page for page in books}
        self._present = Books(0, 0.0)

    def turn(self, now_s: float) -> Books:
        """The books of the present window."""
        present = self._present
        if present.start_s <= now_s < present.end_s:
            return present
        window = self.limit.window
        start_s = present_window(window, now_s, self.books)
        found = self.books.get(start_s)
        if found is None:
            return Books(start_s, window_end(window, start_s))
        self._present = found
        return found

    def free(self, books: Books, now_s: float) -> int:
        """Room for another hold; debt gives none, so an overrun is paid back by later requests."""
        return self.limit.amount - books.settled - books.held

    def standing(self, books: Books, now_s: float, need: int = 0) -> Standing:
        """What is left, and until when."""
        return Standing(self.limit, self.free(books, now_s), books.settled, self.reset_s(books, now_s))

    def reset_s(self, books: Books, now_s: float) -> float:
        """Until the window ends."""
        return books.end_s - now_s if books.end_s > now_s else 0.0

    def take(self, books: Books, now_s: float, need: int) -> None:
        """Hold."""
        books.held += need
        if books is not self._present and books.start_s not in self.books:
            self.books[books.start_s] = self._present = books
            for old in sorted(self.books)[:-KEPT_WINDOWS]:
                if not self.books[old].held and old != books.start_s:
                    del self.books[old]

    def settle(self, books: Books, now_s: float, held: int, used: int) -> None:
        """Replace a hold by its use; an overrun becomes debt."""
        books.held -= held
        if self.unit != "concurrency":
            books.settled += used
            if used > held:
                books.debt += used - held

    def correct(self, books: Books, now_s: float, held: int, swept: int, used: int) -> None:
        """Replace what a sweep settled for a hold of `held` by its use; what was not held any more is debt."""
        if self.unit != "concurrency":
            books.settled += used - swept
            books.debt += max(used - swept, -max(0, swept - held))

    def is_over(self, now_s: float) -> bool:
        """Nothing in it would be missed."""
        return all(books.end_s <= now_s and not books.held for books in self.books.values())


class RateAccount:
    """A limit per second or minute: a bucket that runs out, as fast as the limit of the last hold said.

    Attributes:
        level: as of `seen_s`.
        rate: the limit of the last hold.
    """

    __slots__ = ("__weakref__", "_books", "level", "limit", "rate", "seen_s", "unit")

    def __init__(self, limit: Limit, level: float = 0.0, seen_s: float = 0.0) -> None:
        self.limit = self.rate = limit
        self.unit = limit.unit
        self.level, self.seen_s = level, seen_s
        self._books = Books(0, float("inf"))

    def turn(self, now_s: float) -> Books:
        """A rate has no windows: always the same books, and nothing in them."""
        return self._books

    def free(self, books: Books, now_s: float) -> int:
        """What the bucket has room for."""
        return rate_free(self.limit, self._now(now_s))

    def standing(self, books: Books, now_s: float, need: int = 0) -> Standing:
        """What is left, and until when."""
        return rate_standing(self.limit, self._now(now_s), need)

    def reset_s(self, books: Books, now_s: float) -> float:
        """Until the bucket is empty."""
        return rate_reset_s(self.limit, self._now(now_s))

    def take(self, books: Books, now_s: float, need: int) -> None:
        """Hold."""
        self.level, self.rate = self._now(now_s) + need, self.limit

    def settle(self, books: Books, now_s: float, held: int, used: int) -> None:
        """Replace a hold by its use."""
        if held != used or now_s < self.seen_s:
            self.level = level_after_settling(self._now(now_s), held, used)

    def correct(self, books: Books, now_s: float, held: int, swept: int, used: int) -> None:
        """Replace what a sweep settled by its use."""
        self.settle(books, now_s, swept, used)

    def is_over(self, now_s: float) -> bool:
        """Nothing in it would be missed."""
        return not level_now(self.rate, self.level, self.seen_s, now_s)

    def _now(self, now_s: float) -> float:
        """The level; whoever looks after the clock was set back takes the bucket along."""
        if now_s != self.seen_s:
            self.level, self.seen_s = level_now(self.rate, self.level, self.seen_s, now_s), now_s
        return self.level


Account = CalendarAccount | RateAccount


def account_of(limit: Limit) -> Account:
    """An account for a new limit."""
    return RateAccount(limit) if limit.window in RATES else CalendarAccount(limit)


def hold_in(accounts: Sequence[Account], books: Sequence[Books], need: Mapping[Unit, int], now_s: float) -> None:
    """Hold in every account or in none; what needs nothing of a unit always fits there.

    Raises: HoldRefused for the tightest account that is short.
    """
    pages = list(zip(accounts, books, strict=True))
    for account, page in pages:
        if (wanted := need[account.unit]) and wanted > account.free(page, now_s):
            raise refusal([each.standing(at, now_s, need[each.unit]) for each, at in pages], need)
    for account, page in pages:
        account.take(page, now_s, need[account.unit])
