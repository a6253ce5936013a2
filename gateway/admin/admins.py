"""Who may use the admin API, and for what.

Owns: roles, the part of the tenants' tree that a scope-admin has, and its tokens. Does not own: HTTP (api/admin.py).

A scope-admin has paths such as `org:acme/team:ml`. A key lies within a path if every part of it is an owner of the key.
What the key pays from at the path's level and above can be set to exactly what the path says: so nobody can put a key
under somebody else's budget, or take one out from under a wider one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.errors import InvalidRequest, PermissionDenied

if TYPE_CHECKING:
    from gateway.admin.kept import Role

RANKS = {"org": 0, "team": 1, "user": 2, "key": 3}
PART = re.compile(r"(org|team|user|key|tag):[^\s/]+")
Scopes = Collection[str]


@dataclass(frozen=True, slots=True)
class Path:
    """A place in the tenants' tree.

    Attributes:
        owners: kind to name, such as `team` to `ml`.
        scope: the narrowest part.
        rank: of the narrowest part; wide is small.
    """

    owners: Mapping[str, str]
    scope: str
    rank: int

    @classmethod
    def parse(cls, text: str) -> Path:
        """From `org:acme/team:ml`. Raises: ValueError, which says what would be right."""
        parts = text.split("/")
        if not all(PART.fullmatch(part) for part in parts):
            raise ValueError(f"{text!r} must be parts such as org:acme/team:ml, without white space")
        owners = dict(part.split(":", 1) for part in parts)
        if "tag" in owners and len(parts) > 1:
            raise ValueError(f"{text!r}: a tag stands alone, it belongs to no owner")
        if len(owners) < len(parts) or [*owners] != sorted(owners, key=lambda kind: RANKS.get(kind, 0)):
            raise ValueError(f"{text!r} must go from wide to narrow: org, team, user, key, each once at most")
        return cls(owners, parts[-1], RANKS.get([*owners][-1], -1))

    @property
    def is_tag(self) -> bool:
        """Whether it is a tag, which is no place in the tree."""
        return self.rank < 0

    def holds(self, scopes: Scopes) -> bool:
        """Whether what has these scopes lies within."""
        return not self.is_tag and all(f"{kind}:{name}" in scopes for kind, name in self.owners.items())

    def above(self, scopes: Scopes) -> frozenset[str]:
        """Those of `scopes` that are on the path's level or above it in the tree."""
        return frozenset(scope for scope in scopes if RANKS.get(scope.partition(":")[0], 9) <= self.rank)


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks, and from where.

    Attributes:
        id: of its token; `root` or `cli`.
        paths: of a scope-admin.
        address: where the request comes from.
    """

    id: str
    role: Role
    paths: tuple[Path, ...] = ()
    address: str = ""
    request_id: str = ""

    def require(self, *roles: Role) -> None:
        """Raises: PermissionDenied for any other role."""
        if self.role not in roles:
            raise PermissionDenied(f"A token with the role {self.role} may not do this: it takes {' or '.join(roles)}.")

    def sees(self, scopes: Scopes) -> bool:
        """Whether what has these scopes is its to read."""
        return self.role != "scope-admin" or any(path.holds(scopes) for path in self.paths)

    def check_sees(self, what: str, scopes: Scopes) -> None:
        """Raises: PermissionDenied."""
        if not self.sees(scopes):
            raise PermissionDenied(f"{what} is outside this token's scopes ({self._shown()}).")

    def check_key(self, id: str, *, before: Scopes | None, after: Scopes, keys: Callable[[], Iterable[Scopes]]) -> None:
        """Whether it may make a key of these scopes, or change one from some to others.

        Args:
            id: of the key.
            before: its scopes so far; None for a new one.
            after: those it would have.
            keys: the scopes of each key there is; they tell which users are somebody else's.

        Raises: PermissionDenied.
        """
        self.require("admin", "scope-admin")
        if self.role == "admin":
            return
        if before is not None:
            self.check_sees(f"The key {id!r}", before)
        if not any(_may_move(path, before, after) for path in self.paths):
            raise PermissionDenied(
                f"This token may only have keys with exactly the owners that its scopes say ({self._shown()}), "
                "and narrower ones."
            )
        self._check_users(set(after) - set(before or ()), keys())
        tags = {path.scope for path in self.paths if path.is_tag}
        strange = {s for s in set(before or ()) ^ set(after) if s.startswith("tag:")} - tags
        if strange:
            raise PermissionDenied(f"{min(strange)} is not among this token's scopes ({self._shown()}).", param="tags")

    def _check_users(self, new: set[str], keys: Iterable[Scopes]) -> None:
        """A user who has keys elsewhere pays from a budget that is not this token's."""
        users = {scope for scope in new if scope.startswith("user:")}
        if users and any(not users.isdisjoint(scopes) and not self.sees(scopes) for scopes in keys):
            raise PermissionDenied(
                f"{min(users)} has keys outside this token's scopes ({self._shown()}), and one budget for all of them.",
                param="user",
            )

    def realm(self, keys: Iterable[Scopes]) -> frozenset[str]:
        """The scopes whose limits are a scope-admin's: its own, and narrower ones that all lie within them.

        Args:
            keys: the scopes of each key there is; they tell who belongs where.
        """
        inside: set[str] = {path.scope for path in self.paths}
        outside: set[str] = set()
        for scopes in keys:
            held = [path for path in self.paths if path.holds(scopes)]
            if not held:  # of most keys
                outside.update(scopes)
                continue
            for scope in scopes:
                rank = RANKS.get(scope.partition(":")[0], -1)
                is_inside = any(scope == path.scope or rank > path.rank for path in held)
                (inside if is_inside else outside).add(scope)
        return frozenset(inside - outside) | {path.scope for path in self.paths if path.is_tag}

    def _shown(self) -> str:
        return ", ".join("/".join(f"{kind}:{name}" for kind, name in path.owners.items()) for path in self.paths)


def _may_move(path: Path, before: Scopes | None, after: Scopes) -> bool:
    """Whether a key stays where the path says, and pays from nothing else at its level or above."""
    if not path.holds(after) or not path.holds(after if before is None else before):
        return False
    allowed = {f"{kind}:{name}" for kind, name in path.owners.items()} if before is None else path.above(before)
    return path.above(after) == allowed


def parse_paths(scopes: Iterable[str], role: Role) -> tuple[Path, ...]:
    """The paths of a token. Raises: InvalidRequest."""
    paths = []
    for i, scope in enumerate(scopes):
        try:
            paths.append(Path.parse(scope))
        except ValueError as exc:
            raise InvalidRequest(f"`scopes[{i}]`: {exc}.", param=f"scopes[{i}]") from exc
    if (role == "scope-admin") != bool(paths):
        raise InvalidRequest("`scopes`: a scope-admin has some, other roles have none.", param="scopes")
    return tuple(paths)
