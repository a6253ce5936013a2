"""Ledgers that cheat: each breaks one rule of the books, for the machine to find out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from budget.accounts import Account, Books
from budget.ledger import Amounts, Limit, Standing
from budget.ledgers.memory import MemoryLedger
from budget.ledgers.sqlite import SqliteStore
from budget.ledgers.sqlite_books import Sheet
from budget.ledgers.store import Booking, Settlement

Accounts = Sequence[Account]
Pages = Sequence[Books]


class DropsSettlements(MemoryLedger):
    """Gives a hold back without settling its use."""

    def settle(self, accounts: Accounts, books: Pages, ceiling: Amounts, used: Amounts) -> None:
        super().settle(accounts, books, ceiling, Amounts())


class ForgetsToRelease(MemoryLedger):
    """Settles no hold that used exactly nothing."""

    def settle(self, accounts: Accounts, books: Pages, ceiling: Amounts, used: Amounts) -> None:
        if used != Amounts():
            super().settle(accounts, books, ceiling, used)


class RefundsTwice(MemoryLedger):
    """Gives back twice what was held and not used."""

    def settle(self, accounts: Accounts, books: Pages, ceiling: Amounts, used: Amounts) -> None:
        super().settle(accounts, books, ceiling, used)
        for account, page in zip(accounts, books, strict=True):
            if account.unit == "tokens" and ceiling.tokens > used.tokens:
                account.settle(page, self.clock(), ceiling.tokens - used.tokens, 0)


class SkipsAScope(MemoryLedger):
    """Holds nothing in the widest scope."""

    def accounts(self, scopes: Sequence[str]) -> Sequence[Account]:
        return super().accounts(scopes[:2])


class HoldsBeforeItLooks(MemoryLedger):
    """Takes account after account, and keeps what it has when a later one refuses."""

    def take(self, accounts: Accounts, ceiling: Amounts) -> list[Books]:
        taken = [page for account in accounts for page in super(HoldsBeforeItLooks, self).take([account], ceiling)]
        for _ in accounts[1:]:
            self._count(ceiling, -1, -1)
        if not accounts:
            self._count(ceiling, 1, 1)
        return taken


class SettlesIntoTheNextWindow(MemoryLedger):
    """Charges a hold to whatever window is open when it ends."""

    def settle(self, accounts: Accounts, books: Pages, ceiling: Amounts, used: Amounts) -> None:
        super().settle(accounts, [account.turn(self.clock()) for account in accounts], ceiling, used)


class ExtendsInTheNextWindow(MemoryLedger):
    """Charges an extension to whatever window is open."""

    def extend(self, accounts: Accounts, books: Pages, more: Amounts) -> None:
        super().extend(accounts, [account.turn(self.clock()) for account in accounts], more)


class ForgetsDebt(MemoryLedger):
    """Never settles more than was held."""

    def settle(self, accounts: Accounts, books: Pages, ceiling: Amounts, used: Amounts) -> None:
        super().settle(accounts, books, ceiling, min(used, ceiling, key=lambda amounts: amounts.tokens))


class ForgetsOnReload(MemoryLedger):
    """Begins anew with every reload."""

    def set_limits(self, limits: Sequence[Limit]) -> None:
        self._known = {}
        super().set_limits(limits)


class ForgetsWhenTheClockJumpsBack(MemoryLedger):
    """Begins anew where the clock has been set to."""

    def take(self, accounts: Accounts, ceiling: Amounts) -> list[Books]:
        for account in accounts:
            if hasattr(account, "books"):
                account.books = {start: page for start, page in account.books.items() if start <= self.clock()}
        return super().take(accounts, ceiling)


class UsageByTheDayOfItsEnd(MemoryLedger):
    """Enters usage under the day on which a request ended."""

    def enter_usage(self, epoch_day: int, scopes: Sequence[str], mode: str, used: Amounts) -> None:
        super().enter_usage(int(self.clock() // 86_400), scopes, mode, used)


class CheatingStore(SqliteStore):
    """Does something to the tables before an operation."""

    def _cheating(self, work: Callable[[Sheet], None], before: str) -> asyncio.Future[None]:
        def cheat(sheet: Sheet) -> None:
            sheet._connection.execute(before)
            work(sheet)

        return self._call(cheat)


class SweepsTwice(CheatingStore):
    """Does not remember what it swept."""

    async def sweep(self, lease_s: float) -> int:
        swept = await super().sweep(lease_s)
        await self._cheating(lambda _: None, "UPDATE holds SET state = 0 WHERE state = 1")
        return swept


class SweepsNothing(SqliteStore):
    """Leaves the holds of the dead as they are."""

    async def sweep(self, lease_s: float) -> int:
        return 0


class SweepsWithoutSettling(CheatingStore):
    """Gives the holds of the dead back without settling what was reported."""

    async def sweep(self, lease_s: float) -> int:
        await self._cheating(lambda _: None, "UPDATE holds SET used_tokens = 0, used_thinking_tokens = 0")
        return await super().sweep(lease_s)


class AddsLateSettlements(CheatingStore):
    """Settles a hold that was swept on top of what the sweep settled."""

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        before = "UPDATE holds SET used_tokens = 0, used_thinking_tokens = 0, used_nano_usd = 0 WHERE state = 1"
        return self._cheating(lambda sheet: sheet.settle(settlements), before)


class IgnoresLateSettlements(CheatingStore):
    """Leaves what was swept as it is."""

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        before = "UPDATE holds SET state = 2 WHERE state = 1"
        return self._cheating(lambda sheet: sheet.settle(settlements), before)


class SettlesTwice(CheatingStore):
    """Does not remember what it settled."""

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        before = "UPDATE holds SET state = 0 WHERE state = 2"
        return self._cheating(lambda sheet: sheet.settle(settlements), before)


class TakesTwice(SqliteStore):
    """Does not remember what it holds."""

    async def take(self, booking: Booking, lease_s: float, *, is_certain: bool = False) -> list[Standing]:
        def twice(sheet: Sheet) -> list[Standing]:
            sheet._connection.execute("DELETE FROM holds WHERE id = ?", (booking.hold_id,))
            return sheet.take(booking, lease_s, is_certain=is_certain)

        return await self._call(twice)


class ExtendsTwice(SqliteStore):
    """Holds more with each attempt to extend."""

    async def extend(self, booking: Booking, more: Amounts) -> list[Standing]:
        def twice(sheet: Sheet) -> list[Standing]:
            sheet._connection.execute(
                "UPDATE holds SET tokens = ?, thinking_tokens = ?, nano_usd = ? WHERE id = ?",
                (
                    booking.ceiling.tokens - more.tokens,
                    booking.ceiling.thinking_tokens - more.thinking_tokens,
                    booking.ceiling.nano_usd - more.nano_usd,
                    booking.hold_id,
                ),
            )
            return sheet.extend(booking)

        return await self._call(twice)


class KeepsWhatNobodyTook(SqliteStore):
    """Does not release a hold whose owner never learned that it has it."""

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        return super().settle([one for one in settlements if one.was_taken])


IN_MEMORY: list[type[MemoryLedger]] = [
    DropsSettlements,
    ForgetsToRelease,
    RefundsTwice,
    SkipsAScope,
    HoldsBeforeItLooks,
    SettlesIntoTheNextWindow,
    ExtendsInTheNextWindow,
    ForgetsDebt,
    ForgetsOnReload,
    ForgetsWhenTheClockJumpsBack,
    UsageByTheDayOfItsEnd,
]
IN_SQLITE: list[type[SqliteStore]] = [
    SweepsTwice,
    SweepsNothing,
    SweepsWithoutSettling,
    AddsLateSettlements,
    IgnoresLateSettlements,
    SettlesTwice,
    TakesTwice,
    ExtendsTwice,
    KeepsWhatNobodyTook,
]
