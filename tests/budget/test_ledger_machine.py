"""The ledger against a model of it, and ledgers that cheat against the same model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from budget.ledger import Amounts, Limit
from budget.ledgers.memory import MemoryLedger
from tests.budget.machine import LedgerMachine

MANY = settings(max_examples=80, stateful_step_count=25, deadline=None)
FIND = settings(
    max_examples=400,
    stateful_step_count=25,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def test_the_ledger_agrees_with_its_definition() -> None:
    """Holds, reports, ends, clock jumps and reloads in any order leave the books as the history says."""
    run_state_machine_as_test(LedgerMachine, settings=MANY)


class DropsSettlements(MemoryLedger):
    """Gives a hold back without settling its use."""

    def settle(self, accounts: Sequence[Any], windows: Sequence[int], ceiling: Amounts, used: Amounts) -> None:
        super().settle(accounts, windows, ceiling, Amounts())


class ForgetsToRelease(MemoryLedger):
    """Settles no hold that used exactly nothing."""

    def settle(self, accounts: Sequence[Any], windows: Sequence[int], ceiling: Amounts, used: Amounts) -> None:
        if used != Amounts():
            super().settle(accounts, windows, ceiling, used)


class SkipsAScope(MemoryLedger):
    """Holds nothing in the widest scope."""

    def take(self, scopes: Sequence[str], ceiling: Amounts) -> list[Any]:
        return super().take(scopes[:2], ceiling)


class HoldsBeforeItLooks(MemoryLedger):
    """Takes scope after scope, and keeps what it has when a later one refuses."""

    def take(self, scopes: Sequence[str], ceiling: Amounts) -> list[Any]:
        taken = [account for scope in scopes for account in super(HoldsBeforeItLooks, self).take([scope], ceiling)]
        for _ in scopes[1:]:
            self._count(ceiling, -1)
        if not scopes:
            self._count(ceiling, 1)
        return taken


class SettlesIntoTheNextWindow(MemoryLedger):
    """Charges a hold to whatever window is open when it ends."""

    def settle(self, accounts: Sequence[Any], windows: Sequence[int], ceiling: Amounts, used: Amounts) -> None:
        super().settle(accounts, [account.window_id for account in accounts], ceiling, used)


class ForgetsDebt(MemoryLedger):
    """Never settles more than was held."""

    def settle(self, accounts: Sequence[Any], windows: Sequence[int], ceiling: Amounts, used: Amounts) -> None:
        super().settle(accounts, windows, ceiling, min(used, ceiling, key=lambda amounts: amounts.tokens))


class ForgetsOnReload(MemoryLedger):
    """Begins anew with every reload."""

    def set_limits(self, limits: Sequence[Limit]) -> None:
        self._accounts = {}
        super().set_limits(limits)


@pytest.mark.parametrize(
    "mutant",
    [
        DropsSettlements,
        ForgetsToRelease,
        SkipsAScope,
        HoldsBeforeItLooks,
        SettlesIntoTheNextWindow,
        ForgetsDebt,
        ForgetsOnReload,
    ],
)
def test_the_machine_catches_a_ledger_that_cheats(mutant: type[MemoryLedger]) -> None:
    """The machine above can fail: every ledger with one rule broken is found out."""
    machine = type(mutant.__name__, (LedgerMachine,), {"ledger_class": mutant})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=FIND)
