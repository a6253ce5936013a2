"""Who goes next when the backends of a model are full: fairness between tenants, classes within a tenant. Pure.

Owns: the bounded queue of one model. The tenant that was served the fewest tokens goes first (virtual token counter,
Sheng et al., OSDI 2024), and of its calls the best class, then the oldest. Anybody may ask for a class, so it overtakes
no other tenant; but calls that give way (priority above 0) wait for all others. A tenant that comes back from idling
begins where the others are: what it did not use is not saved up. Time is passed in. All operations O(log n), amortised.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
MOST_IDLE = 1024  # tenants that are remembered beyond those that wait
FEW = 64  # that are gone are not worth tidying up


class QueueFull(Exception):
    """There is no place, and nobody who takes up more of it than this tenant."""


@dataclass(slots=True)
class Ticket(Generic[T]):
    """One call that waits.

    Attributes:
        item: what is handed back when it is its turn.
        tenant: whose it is.
        priority: its class; lower goes first, within its tenant; above 0 it gives way to all others.
        tokens: what it is charged for, about.
        since_s: when it came.
        is_gone: served, dropped or left.
    """

    item: T
    tenant: str
    priority: int
    tokens: int
    since_s: float
    is_gone: bool = False


@dataclass(slots=True)
class _Line(Generic[T]):
    """One tenant's calls of one class, the next one first; some of them may be gone."""

    number: int  # of its place in the order; other places of this tenant there are old
    calls: list[tuple[int, int, Ticket[T]]] = field(default_factory=list)
    waiting: int = 0
    by_priority: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Class(Generic[T]):
    """The calls that give way alike: a line per tenant, the tenants by what they were served, and how many wait."""

    lines: dict[str, _Line[T]] = field(default_factory=dict)
    order: list[tuple[float, int, str]] = field(default_factory=list)
    size: int = 0


class FairQueue(Generic[T]):
    """The calls that wait for one model.

    Args:
        most: calls; a full queue drops the newest call of whoever has most of them, for a tenant that has fewer.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._classes: dict[int, _Class[T]] = {}
        self._served: dict[str, float] = {}
        self._most_served = MOST_IDLE
        self._level = 0.0
        self._counts: dict[str, int] = {}
        self._largest: list[tuple[int, str]] = []
        self._newest: dict[str, list[Ticket[T]]] = {}
        self._number = itertools.count()
        self._size = 0

    def __len__(self) -> int:
        """Calls that wait."""
        return self._size

    def push(self, item: T, tenant: str, *, priority: int, tokens: int, now_s: float) -> tuple[Ticket[T], T | None]:
        """Let a call wait; its ticket, and the item that had to go for it, if one had to. Raises: QueueFull."""
        dropped = self._make_room(tenant) if self._size >= self.most else None
        ticket = Ticket(item, tenant, priority, max(1, tokens), now_s)
        found = self._classes.setdefault(max(0, priority), _Class())
        found.size += 1
        line = found.lines.get(tenant)
        if line is None:
            self._set_served(tenant, max(self._served.get(tenant, 0.0), self._level))
            line = found.lines[tenant] = _Line(0)
            self._place(found, tenant, line)
        heapq.heappush(line.calls, (priority, next(self._number), ticket))
        line.waiting += 1
        line.by_priority[priority] = line.by_priority.get(priority, 0) + 1
        newest = self._newest.setdefault(tenant, [])
        newest.append(ticket)
        if len(newest) > 2 * self._counts.get(tenant, 0) + FEW:
            self._newest[tenant] = [each for each in newest if not each.is_gone]
        self._count(tenant, 1)
        return ticket, dropped

    def pop(self) -> Ticket[T] | None:
        """Whose turn it is; the tenant is charged. None when nobody waits."""
        for gives_way in sorted(self._classes):
            found = self._classes[gives_way]
            while found.order:
                served, number, tenant = heapq.heappop(found.order)
                line = found.lines.get(tenant)
                if line is None or line.number != number:
                    continue
                current = self._served[tenant]
                if served < current:  # it was charged in another class meanwhile
                    heapq.heappush(found.order, (current, number, tenant))
                    continue
                while line.calls[0][2].is_gone:
                    heapq.heappop(line.calls)
                ticket = line.calls[0][2]
                self._level = max(self._level, current)
                self.charge(tenant, ticket.tokens)
                self._leave(ticket)
                if line.waiting:
                    self._place(found, tenant, line)
                return ticket
            del self._classes[gives_way]
        return None

    def ahead(self, tenant: str, priority: int) -> int:
        """About how many calls would be served before one that came now, as if all were equally large.

        All that do not give way as it does; of the rest, as many of each tenant as it would have itself, or all.
        """
        ahead = sum(found.size for each, found in self._classes.items() if each < max(0, priority))
        own = self._classes.get(max(0, priority))
        if own is None:
            return ahead
        line = own.lines.get(tenant)
        mine = 0 if line is None else sum(n for each, n in line.by_priority.items() if each <= priority)
        tenants = len(own.lines) + (line is None)
        return ahead + min(own.size, (mine + 1) * tenants - 1)

    def cancel(self, ticket: Ticket[T]) -> None:
        """It does not wait any longer; any number of times."""
        if not ticket.is_gone:
            self._leave(ticket)

    def charge(self, tenant: str, tokens: int) -> None:
        """A tenant was served so many tokens, or, below 0, fewer than it was charged for."""
        at_least = self._level if tokens > 0 else 0.0
        self._set_served(tenant, max(self._served.get(tenant, 0.0), at_least) + tokens)

    def _set_served(self, tenant: str, served: float) -> None:
        self._served[tenant] = served
        if len(self._served) > self._most_served:
            keep = {name for name, each in self._served.items() if each > self._level} | self._counts.keys() | {tenant}
            self._served = {name: self._served[name] for name in keep if name in self._served}
            self._most_served = 2 * len(self._served) + MOST_IDLE

    def _place(self, found: _Class[T], tenant: str, line: _Line[T]) -> None:
        """Put a line where it belongs by what its tenant was served."""
        line.number = next(self._number)
        heapq.heappush(found.order, (self._served[tenant], line.number, tenant))
        if len(found.order) > 2 * len(found.lines) + FEW:
            lines = found.lines
            found.order = [each for each in found.order if each[2] in lines and lines[each[2]].number == each[1]]
            heapq.heapify(found.order)

    def _leave(self, ticket: Ticket[T]) -> None:
        ticket.is_gone = True
        found = self._classes[max(0, ticket.priority)]
        found.size -= 1
        lines = found.lines
        line = lines[ticket.tenant]
        line.waiting -= 1
        line.by_priority[ticket.priority] -= 1
        if not line.waiting:
            del lines[ticket.tenant]
        elif len(line.calls) > 2 * line.waiting + FEW:
            line.calls = [call for call in line.calls if not call[2].is_gone]
            heapq.heapify(line.calls)
        self._count(ticket.tenant, -1)

    def _count(self, tenant: str, by: int) -> None:
        self._size += by
        count = self._counts.get(tenant, 0) + by
        if count:
            self._counts[tenant] = count
            heapq.heappush(self._largest, (-count, tenant))
            if len(self._largest) > 4 * self.most + FEW:
                self._largest = [(-n, name) for name, n in self._counts.items()]
                heapq.heapify(self._largest)
        else:
            del self._counts[tenant]
            self._newest.pop(tenant, None)

    def _make_room(self, tenant: str) -> T:
        while self._largest and self._counts.get(self._largest[0][1]) != -self._largest[0][0]:
            heapq.heappop(self._largest)
        count, largest = self._largest[0] if self._largest else (0, tenant)
        if largest == tenant or -count <= self._counts.get(tenant, 0) + 1:
            raise QueueFull
        newest = self._newest[largest]
        while newest[-1].is_gone:
            newest.pop()
        ticket = newest.pop()
        self._leave(ticket)
        return ticket.item
