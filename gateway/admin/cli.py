"""`thinkgate keys`: what the admin API does with keys, from the shell, against the configured store.

Owns: arguments and what is printed. A secret goes to standard output alone, so that it can be piped; what else is said
of it goes to standard error. Does not own: what is done (keys.py).
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pydantic import ValidationError

from budget.errors import RecordsUnreachable
from gateway.admin.admins import Actor
from gateway.admin.keys import GRACE_S, KeyEntry, Keys
from gateway.admin.store import open_records
from gateway.admin.stored import Stored
from gateway.admin.tokens import SHELL_ID
from gateway.api.admin_bodies import KeyCreate, Rotation
from gateway.ask.complaint import invalid_model
from gateway.config.load import ConfigError, key_hash_secret, load_config
from gateway.errors import GatewayError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config.schema import Config

SHELL = Actor(SHELL_ID, "admin")
MOST_LISTED = 1_000_000
LISTS = ("models", "modes", "degrade", "tags")
HEAD = ("id", "source", "status", "owners", "models", "expires")


def add_keys_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `thinkgate keys`."""
    commands = parser.add_subparsers(dest="action", required=True)
    create = commands.add_parser("create", help="make a key and print its secret, once")
    create.add_argument("id")
    for name in ("user", "team", "org"):
        create.add_argument(f"--{name}", help="who pays")
    for name in LISTS:
        create.add_argument(f"--{name}", type=lambda text: text.split(","), help="separated by commas")
    create.add_argument("--max-thinking-tokens", type=int, help="ceiling of any request")
    create.add_argument("--reasoning-field", help="upstream or both")
    create.add_argument("--expires-at", help="such as 2027-01-31T12:00:00Z")
    listing = commands.add_parser("list", help="print the keys of file and store")
    listing.add_argument("--json", action="store_true", help="a JSON object a line")
    rotate = commands.add_parser("rotate", help="print another secret for a key; those it has end after a grace period")
    rotate.add_argument("id")
    rotate.add_argument("--grace-s", type=float, default=GRACE_S, help="seconds (default: a day); 0 ends them now")
    revoke = commands.add_parser("revoke", help="end a key, for good")
    revoke.add_argument("id")
    for command in (create, listing, rotate, revoke):
        command.add_argument("--config", type=Path, help="the gateway's configuration file", required=True)


def run_keys(options: argparse.Namespace, clock: Callable[[], float], out: TextIO, err: TextIO) -> int:
    """Do one of them; returns the exit status. Raises: ConfigError."""
    config = load_config(options.config)
    if config.store.kind == "memory":
        raise ConfigError(
            "store: keys in memory would be gone with this command: configure a store of the kind sqlite or redis, "
            "or put the key into the file"
        )
    try:
        return asyncio.run(_run(options, config, clock, out, err))
    except (GatewayError, RecordsUnreachable) as exc:
        err.write(f"thinkgate keys {options.action}: {getattr(exc, 'message', exc)}\n")
        return 1


async def _run(
    options: argparse.Namespace, config: Config, clock: Callable[[], float], out: TextIO, err: TextIO
) -> int:
    records = open_records(config.store, clock=clock)
    try:
        stored = Stored(records, clock=clock, hash_secret=key_hash_secret(config), must_match=True)
        await stored.refresh()
        keys = Keys(stored, lambda: config)
        if options.action == "list":
            entries, _ = keys.entries(SHELL, limit=MOST_LISTED)
            out.write("".join(f"{e.model_dump_json()}\n" for e in entries) if options.json else _table(entries))
        elif options.action == "revoke":
            entry = await keys.revoke(SHELL, options.id)
            err.write(f"The key {entry.id!r} is revoked.\n")
        else:
            entry, secret = await (_create(keys, options) if options.action == "create" else _rotate(keys, options))
            err.write(f"The key {entry.id!r} has this secret, which is not shown again:\n")
            out.write(f"{secret}\n")
    finally:
        await records.close()
    return 0


async def _create(keys: Keys, options: argparse.Namespace) -> tuple[KeyEntry, str]:
    said = {name: getattr(options, name, None) for name in KeyCreate.model_fields}
    try:
        body = KeyCreate.model_validate({name: value for name, value in said.items() if value is not None})
    except ValidationError as exc:
        raise invalid_model(exc.errors(include_url=False)) from exc
    return await keys.create(SHELL, body.id, body.traits(), expires_at=body.expires_at)


async def _rotate(keys: Keys, options: argparse.Namespace) -> tuple[KeyEntry, str]:
    try:
        rotation = Rotation(grace_s=options.grace_s)
    except ValidationError as exc:
        raise invalid_model(exc.errors(include_url=False)) from exc
    return await keys.rotate(SHELL, options.id, grace_s=rotation.grace_s)


def _table(entries: list[KeyEntry]) -> str:
    rows = [HEAD, *map(_row, entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _row(entry: KeyEntry) -> tuple[str, ...]:
    owners = " ".join(scope for scope in entry.scopes()[1:])
    models = "all" if entry.models is None else ",".join(entry.models)
    ends = "never" if entry.expires_at is None else entry.expires_at.isoformat(timespec="seconds")
    return entry.id, entry.source, entry.status, owners, models, ends
