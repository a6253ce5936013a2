"""The admin API: its routes together, and what they work on.

Owns: which parts there are. Each has its routes in a module of its own here, and what they do in one of
gateway/admin/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi.routing import APIRoute

from gateway.admin.keys import Keys
from gateway.admin.limits import Limits
from gateway.admin.tokens import AdminTokens
from gateway.api.admin_access import router as access
from gateway.api.admin_keys import router as keys
from gateway.api.admin_limits import router as limits
from gateway.api.admin_reports import router as reports
from gateway.config.load import environment

if TYPE_CHECKING:
    from budget.ledger import Ledger
    from gateway.admin.stored import Stored
    from gateway.config.schema import Config

ROUTERS = (keys, limits, access, reports)


def routes() -> list[APIRoute]:
    """Every route of the admin API."""
    return [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]


def admin_methods(path: str) -> str:
    """Which methods a path of the admin API takes, as in an Allow header; empty if it is none."""
    return ", ".join(sorted(m for route in routes() if route.path_regex.match(path) for m in route.methods or ()))


class Admin:
    """What the admin API works on.

    Args:
        stored: the store.
        config: what is in force.
        ledger: what tells usage and health.
    """

    def __init__(self, stored: Stored, config: Callable[[], Config], ledger: Callable[[], Ledger]) -> None:
        def root() -> tuple[str, str]:
            variable = config().server.admin_token_env
            return environment().get(variable, "").strip(), variable

        self.stored = stored
        self.ledger = ledger
        self.keys = Keys(stored, config)
        self.limits = Limits(stored, config, self.keys)
        self.tokens = AdminTokens(stored, root)
