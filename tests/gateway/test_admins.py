"""Who may do what: tokens, roles, and the part of the tree that a scope-admin has."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admin.admins import Actor, Path, parse_paths
from gateway.auth import Key
from gateway.config.schema import KeyTraits
from gateway.errors import (
    ConflictingChange,
    EntryNotFound,
    GatewayError,
    InvalidRequest,
    PermissionDenied,
    Unauthenticated,
)
from tests.gateway.tenants import NOON, ROOT, VIEWER, Replica, replica, replicas, scoped

NAMES = st.sampled_from([None, "a", "b"])
TRAITS = st.builds(
    lambda org, team, user, tags: KeyTraits(org=org, team=team, user=user, tags=tuple(tags)),
    NAMES,
    NAMES,
    NAMES,
    st.sets(st.sampled_from("xy")),
)
PATHS = st.lists(
    st.sampled_from(["org:a", "team:a", "user:a", "org:a/team:a", "org:a/team:a/user:a", "team:b/user:b", "tag:x"]),
    min_size=1,
    max_size=3,
    unique=True,
)


def scopes(traits: KeyTraits) -> tuple[str, ...]:
    """What a key with these traits pays from."""
    return Key.from_traits("k", traits).scopes


def bearer(secret: str) -> bytes:
    """An Authorization header."""
    return f"Bearer {secret}".encode()


class TestPaths:
    """Places in the tenants' tree."""

    @pytest.mark.parametrize("text", ["org:acme", "org:acme/team:ml", "team:ml/user:ada/key:laptop", "tag:beta"])
    def test_a_path_goes_from_wide_to_narrow(self, text: str) -> None:
        """Its scope is the narrowest part."""
        assert Path.parse(text).scope == text.rpartition("/")[2]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "acme",
            "org:",
            "model:qwen",
            "team:ml/org:acme",
            "team:a/team:b",
            "tag:a/team:b",
            "team:a/tag:b",
            "org:a b",
        ],
    )
    def test_what_is_no_path_is_refused(self, text: str) -> None:
        """Another order, a kind twice, a tag among owners, a model or white space is a 400 that names the entry."""
        with pytest.raises(InvalidRequest) as refused:
            parse_paths(["org:acme", text], "scope-admin")
        assert refused.value.param == "scopes[1]"

    @pytest.mark.parametrize(("role", "paths"), [("scope-admin", []), ("admin", ["org:a"]), ("viewer", ["org:a"])])
    def test_scopes_are_a_scope_admins(self, role, paths) -> None:
        """A scope-admin without scopes, and another role with some, is refused."""
        with pytest.raises(InvalidRequest, match="scopes"):
            parse_paths(paths, role)

    @given(paths=PATHS, traits=TRAITS)
    def test_a_scope_admin_makes_only_keys_that_it_then_sees(self, paths: list[str], traits: KeyTraits) -> None:
        """What it may make lies within its paths, and pays from nothing at their level or above but what they say."""
        lead = scoped(*paths)
        try:
            lead.check_key("k", before=None, after=scopes(traits), keys=list)
        except PermissionDenied:
            return
        assert lead.sees(scopes(traits))
        owners = {scope for scope in scopes(traits) if not scope.startswith(("key:", "tag:"))}
        held = [path for path in lead.paths if path.holds(scopes(traits))]
        assert any(path.above(owners) == {f"{k}:{n}" for k, n in path.owners.items()} for path in held)
        assert {f"tag:{tag}" for tag in traits.tags} <= set(paths)

    def test_a_user_of_others_is_not_its_to_spend_for(self) -> None:
        """A key for a user who has keys elsewhere would pay from a budget that is not the scope-admin's."""
        lead = scoped("org:acme/team:ml")
        mine, others = ("org:acme", "team:ml", "user:eve", "key:k"), ("org:acme", "team:ops", "user:eve", "key:o")
        for before in (None, ("org:acme", "team:ml", "user:ada", "key:k")):
            with pytest.raises(PermissionDenied, match="user:eve has keys outside") as refused:
                lead.check_key("k", before=before, after=mine, keys=lambda: [others])
            assert refused.value.param == "user"
        lead.check_key("k", before=None, after=mine, keys=lambda: [mine])
        lead.check_key("k", before=mine, after=mine, keys=lambda: [mine, others])  # it has been hers before

    @given(paths=PATHS, steps=st.lists(TRAITS, min_size=1, max_size=5))
    def test_no_chain_of_changes_leads_out(self, paths: list[str], steps: list[KeyTraits]) -> None:
        """Whatever it changes one after the other, wide owners that no path names are never put on or taken off."""
        lead = scoped(*paths)
        first, *others = steps
        now = scopes(first)
        named = {f"{kind}:{name}" for path in lead.paths for kind, name in path.owners.items()}
        for traits in others:
            try:
                lead.check_key("k", before=now, after=scopes(traits), keys=list)
            except PermissionDenied:
                continue
            now = scopes(traits)
        least = min((path.rank for path in lead.paths if path.holds(scopes(first))), default=9)
        ranks = {"org": 0, "team": 1, "user": 2}
        moved = {s for s in set(now) ^ set(scopes(first)) if ranks.get(s.partition(":")[0], 9) < least}
        assert moved <= named
        if not lead.sees(scopes(first)):
            assert now == scopes(first)

    @given(paths=PATHS, keys=st.lists(TRAITS, max_size=5))
    def test_realm_never_reaches_a_key_outside(self, paths: list[str], keys: list[KeyTraits]) -> None:
        """No limit that a scope-admin may set, tags that it was given aside, bounds a key that it does not see."""
        lead = scoped(*paths)
        owned = [Key.from_traits(f"k{i}", traits).scopes for i, traits in enumerate(keys)]
        realm = {scope for scope in lead.realm(owned) if not scope.startswith("tag:")}
        assert all(lead.sees(of_key) for of_key in owned if realm & set(of_key))


class TestTokens:
    """Tokens of the admin API."""

    def test_without_a_root_token_nobody_is_let_in(self) -> None:
        """While the variable is unset, every token is a 403 that names it."""
        one = replica()
        one.root = ""
        for header in (None, b"Bearer ", b"Bearer x", b"Basic x"):
            with pytest.raises(PermissionDenied, match="THINKGATE_ADMIN_TOKEN") as refused:
                one.tokens.identify(header)
            assert refused.value.status == 403

    @pytest.mark.parametrize(
        "header", [None, b"", b"Bearer", b"Bearer ", b"Basic root-secret", b"Bearer root", b"Bearer \xff"]
    )
    def test_wrong_tokens_are_refused(self, header: bytes | None) -> None:
        """A missing, malformed or unknown token is a 401 that repeats nothing."""
        with pytest.raises(Unauthenticated) as refused:
            replica().tokens.identify(header)
        assert "root" not in refused.value.message

    def test_root_token_is_an_admin(self) -> None:
        """Whoever has it may do everything, and is told apart by address and request."""
        actor = replica().tokens.identify(b"bearer  root-secret ", address="192.0.2.1", request_id="r")
        assert actor == Actor("root", "admin", address="192.0.2.1", request_id="r")

    async def test_a_stored_token_has_its_role(self) -> None:
        """Its secret is told once and lets in on every replica, with the role and paths it was given."""
        here, there = replicas(2)
        entry, secret = await here.tokens.create(ROOT, "lead", "scope-admin", ("org:acme/team:ml",))
        await there.stored.refresh()
        actor = there.tokens.identify(bearer(secret))
        assert (actor.id, actor.role, [path.scope for path in actor.paths]) == ("lead", "scope-admin", ["team:ml"])
        assert secret not in entry.model_dump_json()
        assert entry == there.tokens.entries(ROOT)[0]

    async def test_keys_and_tokens_are_not_mixed_up(self) -> None:
        """An API key is no admin token."""
        one = replica()
        secret = await one.make("ada")
        with pytest.raises(Unauthenticated):
            one.tokens.identify(bearer(secret))

    async def test_revoked_and_expired_tokens_are_refused(self) -> None:
        """A token ends when it is revoked, on every replica, or at its time; while root is unset it is of no use."""
        here, there = replicas(2)
        _, first = await here.tokens.create(ROOT, "first", "admin", ())
        soon = dt.datetime.fromtimestamp(NOON + 60, dt.UTC)
        _, second = await here.tokens.create(ROOT, "second", "viewer", (), expires_at=soon)
        assert (await here.tokens.revoke(ROOT, "first")).status == "revoked"
        revoked_at = here.tokens.entries(ROOT)[0].revoked_at
        here.clock.now += 60
        assert (await here.tokens.revoke(ROOT, "first")).revoked_at == revoked_at
        await there.stored.refresh()
        for one in (here, there):
            for secret in (first, second):
                with pytest.raises(Unauthenticated):
                    one.tokens.identify(bearer(secret))
        assert [entry.status for entry in here.tokens.entries(VIEWER)] == ["revoked", "expired"]

    async def test_only_admins_make_and_end_tokens(self) -> None:
        """A viewer lists them, a scope-admin does not even that; neither makes or revokes one."""
        one = replica()
        await one.tokens.create(ROOT, "t", "viewer", ())
        lead = scoped("team:ml")
        assert len(one.tokens.entries(VIEWER)) == 1
        with pytest.raises(PermissionDenied):
            one.tokens.entries(lead)
        for actor in (VIEWER, lead):
            for call in (one.tokens.create(actor, "x", "admin", ()), one.tokens.revoke(actor, "t")):
                with pytest.raises(PermissionDenied):
                    await call

    async def test_what_cannot_be_made_or_ended_is_said(self) -> None:
        """An id that is taken or stands for somebody else is a 409, a past time a 400, an unknown token a 404."""
        one = replica()
        await one.tokens.create(ROOT, "t", "viewer", ())
        past = dt.datetime.fromtimestamp(NOON, dt.UTC)
        cases: list[tuple[type[GatewayError], object]] = [
            (ConflictingChange, one.tokens.create(ROOT, "t", "viewer", ())),
            (ConflictingChange, one.tokens.create(ROOT, "root", "viewer", ())),
            (ConflictingChange, one.tokens.create(ROOT, "cli", "viewer", ())),
            (InvalidRequest, one.tokens.create(ROOT, "new", "viewer", (), expires_at=past)),
            (EntryNotFound, one.tokens.revoke(ROOT, "nobody")),
        ]
        for error, call in cases:
            with pytest.raises(error):
                await call  # type: ignore[misc]

    async def test_audit_log_tells_of_tokens_and_not_their_secrets(self) -> None:
        """Making and revoking are entries; revoking twice is one."""
        one = replica()
        _, secret = await one.tokens.create(ROOT, "t", "viewer", ())
        await one.tokens.revoke(ROOT, "t")
        await one.tokens.revoke(ROOT, "t")
        entries = await one.audit()
        assert [(e["action"], e["target"]) for e in entries] == [("token.create", "t"), ("token.revoke", "t")]
        assert secret not in str(entries)


async def test_token_of_another_hash_secret_is_unusable() -> None:
    """After a change of the hash secret a token is refused and listed as such."""
    old = replica(hash_secret="the first secret")
    _, secret = await old.tokens.create(ROOT, "t", "viewer", ())
    new = Replica(old.records, old.clock, old.config, hash_secret="another secret")
    await new.stored.refresh()
    with pytest.raises(Unauthenticated):
        new.tokens.identify(bearer(secret))
    assert [entry.status for entry in new.tokens.entries(ROOT)] == ["unusable"]
