"""Another model where the one asked for cannot serve: along the configured chain, before the first byte.

Owns: which model of the chain is next, and what is told of it. Slow path. Does not own: the budget; the caller holds
again, at the new model's price.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from gateway.edge.extension import Degraded

if TYPE_CHECKING:
    from gateway.degrade import Request
    from gateway.errors import GatewayError
    from gateway.prepare import Prepared


class Fallbacks:
    """The chain of one request.

    Args:
        request: what came from the client.
        asked: as it was prepared for the model it names.

    Attributes:
        failure: why that model could not serve, once it could not.
    """

    __slots__ = ("_asked", "_left", "_request", "failure")

    def __init__(self, request: Request, asked: Prepared) -> None:
        self._request, self._asked = request, asked
        self.failure: GatewayError | None = None
        self._left: list[str] = []

    def after(self, error: GatewayError, failed: Prepared, *, has_started: bool) -> Prepared:
        """The request on the next model that may serve it, not held yet. Raises: the error, where there is none.

        Args:
            error: of the model that it ran on.
            failed: as it ran there.
            has_started: the response has begun.
        """
        if has_started:
            raise error
        if self.failure is None:
            gone = {self._asked.model.name, failed.model.name}
            self._left = [name for name in self._asked.model.config.fallback if name not in gone]
            self.failure = error
        found = self.instead()
        if found is None:
            raise error
        return found

    def instead(self) -> Prepared | None:
        """The same, where a model of the chain could not be held; None at its end, and before it was begun."""
        if self.failure is None or not self._left:
            return None
        why = self.failure.code or self.failure.type
        asked, heard = self._asked, self._request.hear()
        while self._left:
            name = self._left.pop(0)
            found = self._request.again(asked, heard._replace(ask=replace(asked.ask, model=name, named=None)))
            if found is None:
                continue  # not for this key, or not with what the request asks for
            told = Degraded(step="model", was=asked.model.name, to=name, scope=asked.model.scope, unit=why)
            return replace(found, degraded=(told,))
        return None
