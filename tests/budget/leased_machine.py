"""A ledger of leases played against the model by two processes over shared books.

Connections lose calls and answers, processes die or hang, leases end, and whoever is left sweeps.
"""

from __future__ import annotations

from typing import ClassVar, cast

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from budget.ledger import Amounts
from budget.ledgers.leased import LeasedLedger
from tests.budget.machine import AMOUNTS, PICK, SCOPE_SETS, LedgerMachine, Process
from tests.budget.model import Entry
from tests.budget.places import LeasedPlace, Place, SqlitePlace
from tests.budget.virtual import Fault, FaultyStore

LITTLE = st.builds(Amounts, tokens=st.integers(0, 3), thinking_tokens=st.integers(0, 3), nano_usd=st.integers(0, 3))
FAULT: st.SearchStrategy[Fault] = st.sampled_from(["before", "after"])
SWEPT_KEPT_S = 20 * 3600  # less than any store remembers what it swept


class LeasedMachine(LedgerMachine):
    """As its base, over a store that two processes share and that is not always there."""

    place_class: ClassVar[type[Place]] = SqlitePlace
    place: LeasedPlace
    lease_s = LeasedPlace.lease_s

    def begin(self) -> list[Process]:
        """Two processes on the same books."""
        return [self.new_process(), self.new_process()]

    def new_process(self) -> Process:
        """A process with the limits that are in force."""
        store = FaultyStore(self.place.store())
        return Process(self.place.ledger(*self.limits, store=store), store)

    @precondition(lambda self: self.any_open())
    @rule(pick=PICK, used=AMOUNTS)
    def report(self, pick: int, used: Amounts) -> None:
        """As its base, but within the hold: a sweep settles several holds at once, in no certain order.

        A rate that one of them gives back to, and another overruns, would be full or not by that order.
        """
        _, mine = self.pick_open(pick)
        super().report(pick, used.beyond(used.beyond(mine.ceiling)))

    @rule(pick=PICK, fault=FAULT)
    def lose_one(self, pick: int, fault: Fault) -> None:
        """The next call of a process to its store, or the answer, gets lost."""
        store = self.processes[pick % 2].store
        assert store is not None
        if store.always is None:
            store.faults.append(fault)

    @rule(pick=PICK, always=st.sampled_from(["before", "after", None, None]))
    def lose_all(self, pick: int, always: Fault | None) -> None:
        """The connection of a process breaks, in one direction or both, or is mended."""
        store = self.processes[pick % 2].store
        assert store is not None
        store.always = always
        store.faults.clear()

    @rule(pick=PICK)
    def beat(self, pick: int) -> None:
        """A process reports, sweeps, and looks whether a store that was lost is back."""
        process = self.processes[pick % 2]
        store = process.store
        assert store is not None
        always, faults, was_lost = store.always, list(store.faults), process.is_lost()
        swept = process.ledger.figures().swept
        self.run(cast("LeasedLedger", process.ledger).beat())
        while (answered := self.one_round(process, faults, always, is_lost=was_lost)) is None:
            if was_lost or always is not None:
                assert process.is_lost()
                return
        assert not process.is_lost()
        figures = process.ledger.figures()
        assert (figures.swept, figures.waiting) == (swept + answered, 0)

    def one_round(
        self, process: Process, faults: list[Fault | None], always: Fault | None, *, is_lost: bool
    ) -> int | None:
        """What a beat says until something gets lost; None then, else how many holds it swept."""
        calls = ["ping"] * (is_lost or bool(process.pending)) + ["deliver"] * bool(process.pending)
        calls += ["report"] * bool(process.open) + ["sweep"]
        swept = 0
        for call in calls:
            fault = faults.pop(0) if faults else always
            if fault != "before":
                swept = self.arrived(process, call)
            if fault is not None:
                return None
            if call == "deliver":
                process.pending.clear()
        return swept

    def arrived(self, process: Process, call: str) -> int:
        """A call of a beat has reached the store; how many holds it swept."""
        if call == "sweep":
            return self.model.sweep(self.now_s, self.lease_s)
        if call == "deliver":
            for entry, used in process.pending:
                if entry is not None:
                    self.model.end(entry, used, self.now_s)
        if call == "report":
            for mine in process.open:
                if mine.entry.is_held:
                    mine.entry.told = mine.used
                    mine.entry.lease_end_s = self.now_s + self.lease_s
        return 0

    @rule(pick=PICK, fault=FAULT, scopes=SCOPE_SETS, ceiling=AMOUNTS)
    def hold_at_the_second_attempt(self, pick: int, fault: Fault, scopes: list[str], ceiling: Amounts) -> None:
        """The first one, or its answer, gets lost."""
        self.lose_one(pick, fault)
        self.hold(pick, scopes, ceiling, "instant")

    @precondition(lambda self: self.any_open())
    @rule(pick=PICK, fault=FAULT, more=LITTLE)
    def extend_at_the_second_attempt(self, pick: int, fault: Fault, more: Amounts) -> None:
        """The first one, or its answer, gets lost."""
        self.lose_one(self.processes.index(self.pick_open(pick)[0]), fault)
        self.extend(pick, more)

    @precondition(lambda self: self.any_open())
    @rule(pick=PICK, used=AMOUNTS)
    def hang(self, pick: int, used: Amounts) -> None:
        """A process reports and then does nothing for longer than its lease, while another one sweeps."""
        self.report(pick, used)
        at = self.processes.index(self.pick_open(pick)[0])
        self.beat(at)
        self.time_passes(self.lease_s)
        self.beat(1 - at)

    @rule(pick=PICK)
    def die(self, pick: int) -> None:
        """A process is killed; another one takes its place, and knows nothing of its holds."""
        self.run(self.place.kill(cast("LeasedLedger", self.processes[pick % 2].ledger)))
        self.processes[pick % 2] = self.new_process()

    def before_time_passes(self, until_s: float) -> None:
        """An owner that was paused comes back while the store still knows what it swept."""
        for process in self.processes:
            late = [mine for mine in process.open if is_late(mine.entry, until_s)]
            if late or any(entry is not None and is_late(entry, until_s) for entry, _ in process.pending):
                self.mend(process)
                for mine in late:
                    self.finish(process, mine)

    def mend(self, process: Process) -> None:
        """The connection is there again, and the process has noticed."""
        at = self.processes.index(process)
        self.lose_all(at, None)
        self.beat(at)

    def end_everything(self) -> None:
        """Processes end what they have open, and the dead are swept."""
        for process in self.processes:
            self.mend(process)
        super().end_everything()
        self.place.clock.now += self.lease_s
        self.beat(0)


def is_late(entry: Entry, until_s: float) -> bool:
    """Whether a hold was swept long before."""
    return entry.swept is not None and not entry.is_over and until_s - entry.swept_s > SWEPT_KEPT_S
