"""Who goes next when the backends of a model are full: classes first, fairness between tenants within a class. Pure.

Owns: the bounded queue of one model. Within a class the tenant that was served the fewest tokens goes first (virtual
token counter, Sheng et al., OSDI 2024), and of a tenant's calls the oldest. A tenant that comes back from idling begins
where the others are: what it did not use is not saved up. Time is passed in. All operations O(log n), amortised.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
MOST_IDLE = 1024  # tenants that are remembered beyond those that wait


class QueueFull(Exception):
    """There is no place, and nobody who takes up more of it than this tenant."""


@dataclass(slots=True)
class Ticket(Generic[T]):
    """One call that waits.

    Attributes:
        item: what is handed back when it is its turn.
        tenant: whose it is.
        priority: its class; lower goes first.
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
class _Class(Generic[T]):
    """The calls of one class: a line per tenant, the tenants by what they were served, and how many calls wait."""

    lines: dict[str, deque[Ticket[T]]] = field(default_factory=dict)
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
        found = self._classes.setdefault(priority, _Class())
        found.size += 1
        line = found.lines.get(tenant)
        if line is None:
            line = found.lines[tenant] = deque()
            served = self._served[tenant] = max(self._served.get(tenant, 0.0), self._level)
            heapq.heappush(found.order, (served, next(self._number), tenant))
        line.append(ticket)
        newest = self._newest.setdefault(tenant, [])
        newest.append(ticket)
        if len(newest) > 2 * self._counts.get(tenant, 0) + 64:
            self._newest[tenant] = [each for each in newest if not each.is_gone]
        self._count(tenant, 1)
        return ticket, dropped

    def pop(self) -> Ticket[T] | None:
        """Whose turn it is; the tenant is charged. None when nobody waits."""
        for priority in sorted(self._classes):
            found = self._classes[priority]
            while found.order:
                served, number, tenant = heapq.heappop(found.order)
                line = found.lines[tenant]
                while line and line[0].is_gone:
                    line.popleft()
                if not line:
                    del found.lines[tenant]
                    continue
                current = self._served[tenant]
                if served < current:  # it was charged in another class meanwhile
                    heapq.heappush(found.order, (current, number, tenant))
                    continue
                ticket = line.popleft()
                self._level = max(self._level, current)
                self.charge(tenant, ticket.tokens)
                if line:
                    heapq.heappush(found.order, (self._served[tenant], next(self._number), tenant))
                else:
                    del found.lines[tenant]
                self._leave(ticket)
                return ticket
            del self._classes[priority]
        return None

    def ahead(self, tenant: str, priority: int) -> int:
        """About how many calls would be served before one that came now, as if all were equally large.

        All of better classes, and of its own class as many of each tenant as it would have itself: at most all.
        """
        ahead = sum(found.size for each, found in self._classes.items() if each < priority)
        own = self._classes.get(priority)
        if own is None:
            return ahead
        tenants = len(own.lines) + (tenant not in own.lines)
        return ahead + min(own.size, (self._counts.get(tenant, 0) + 1) * tenants - 1)

    def cancel(self, ticket: Ticket[T]) -> None:
        """It does not wait any longer; any number of times."""
        if not ticket.is_gone:
            self._leave(ticket)

    def charge(self, tenant: str, tokens: int) -> None:
        """A tenant was served so many tokens, or, below 0, fewer than it was charged for."""
        self._served[tenant] = max(self._served.get(tenant, 0.0), self._level if tokens > 0 else 0.0) + tokens
        if len(self._served) > 2 * (len(self._counts) + MOST_IDLE):
            self._served = {
                name: served for name, served in self._served.items() if name in self._counts or served > self._level
            }

    def _leave(self, ticket: Ticket[T]) -> None:
        ticket.is_gone = True
        self._classes[ticket.priority].size -= 1
        self._count(ticket.tenant, -1)

    def _count(self, tenant: str, by: int) -> None:
        self._size += by
        count = self._counts.get(tenant, 0) + by
        if count:
            self._counts[tenant] = count
            heapq.heappush(self._largest, (-count, tenant))
            if len(self._largest) > 4 * self.most + 64:
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
