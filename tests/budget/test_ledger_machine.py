"""Ledgers against a model of them, and ledgers that cheat against the same model.

THINKGATE_STEPS=10000 plays so many steps on each ledger instead of a few hundred.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from budget.errors import BudgetError
from budget.ledgers.memory import MemoryLedger
from budget.ledgers.sqlite import SqliteStore
from tests.budget.leased_machine import LeasedMachine
from tests.budget.machine import LedgerMachine
from tests.budget.mutants import IN_MEMORY, IN_SQLITE
from tests.budget.places import PLACES, SHARED, MemoryPlace, SqlitePlace

RUN_STEPS = 40
STEPS = int(os.environ.get("THINKGATE_STEPS", "0"))
FOUND = (AssertionError, BudgetError)  # by the books, or by a hold that ought to have been granted
pytestmark = pytest.mark.timeout(60 + STEPS // 20)
FIND = settings(
    max_examples=1000,
    stateful_step_count=RUN_STEPS,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def steps(default: int) -> settings:
    """So many steps in all."""
    return settings(
        max_examples=max(1, (STEPS or default) // RUN_STEPS),
        stateful_step_count=RUN_STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def test_the_ledger_in_memory_agrees_with_its_definition() -> None:
    """Holds, extensions, reports, ends, clock jumps and reloads in any order leave the books as the history says."""
    run_state_machine_as_test(LedgerMachine, settings=steps(2000))


@pytest.mark.parametrize("kind", SHARED)
def test_a_shared_ledger_agrees_with_its_definition(kind: str) -> None:
    """So they do when two processes share the books, calls and answers get lost, and processes die or hang."""
    machine = type(kind, (LeasedMachine,), {"place_class": PLACES[kind]})
    run_state_machine_as_test(machine, settings=steps(800))


@pytest.mark.e2e
@pytest.mark.parametrize("mutant", IN_MEMORY)
def test_the_machine_catches_a_ledger_that_cheats(mutant: type[MemoryLedger]) -> None:
    """The machine above can fail: every ledger with one rule broken is found out."""
    place = type(mutant.__name__, (MemoryPlace,), {"ledger_class": mutant})
    machine = type(mutant.__name__, (LedgerMachine,), {"place_class": place})
    with pytest.raises(FOUND):
        run_state_machine_as_test(machine, settings=FIND)


@pytest.mark.e2e
@pytest.mark.parametrize("mutant", IN_SQLITE)
def test_the_machine_catches_a_store_that_cheats(mutant: type[SqliteStore]) -> None:
    """So is every store with one rule of leases and lost answers broken."""
    place = type(mutant.__name__, (SqlitePlace,), {"store_class": mutant})
    machine = type(mutant.__name__, (LeasedMachine,), {"place_class": place})
    with pytest.raises(FOUND):
        run_state_machine_as_test(machine, settings=FIND)
