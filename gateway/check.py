"""`thinkgate check`: validate a configuration, probe its backends, say what each can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from gateway.auth import Keyring
from gateway.config.load import key_hash_secret, secret_sha256s, webhook_secret
from gateway.errors import GatewayError
from gateway.models import build_models

if TYPE_CHECKING:
    from gateway.backends.port import Capabilities
    from gateway.config.schema import Config

HEAD = (
    "model",
    "backend",
    "kind",
    "cap",
    "cap+tools",
    "two-phase",
    "thinking in",
    "ids in",
    "ids out",
    "cached",
    "tools",
    "window",
)


async def check(config: Config, out: TextIO) -> int:
    """Print the table; 1 if anything is wrong, else 0.

    Raises: ConfigError when a secret or credential is missing.
    """
    Keyring(config, secret_sha256s(config))
    key_hash_secret(config)
    webhook_secret(config)
    rows: list[tuple[str, ...]] = [HEAD]
    remarks: list[str] = []
    failed = False
    for model in build_models(config).values():
        for slot in model.slots:
            name = f"{model.name}/{slot.config.id}"
            try:
                found = await slot.backend.probe()
            except GatewayError as exc:
                failed = True
                remarks.append(f"{name}: DOWN: {exc.message}")
                continue
            finally:
                await slot.backend.close()
            rows.append((model.name, slot.config.id, slot.config.kind, *_row(found)))
            remarks += [f"{name}: {key}: {text}" for key, text in found.detail.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    for row in rows:
        out.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
    remarks += [f"{key}: has no effect yet" for key in config.not_built_yet()]
    if remarks:
        out.write("\n" + "".join(f"{remark}\n" for remark in remarks))
    out.write("\nsome backends are down\n" if failed else "\nok\n")
    return 1 if failed else 0


def _row(found: Capabilities) -> tuple[str, ...]:
    return (
        _word(found.cap_binds, "binds", "ignored"),
        _word(found.cap_binds_with_tools, "binds", "ignored"),
        _word(found.forcing is not None, "yes", "no"),
        found.thinking_field or "none",
        _word(found.token_ids_in, "yes", "no"),
        _word(found.token_ids_out, "yes", "no"),
        _word(found.cached_tokens, "yes", "no"),
        _word(found.tools, "yes", "no"),
        str(found.max_model_len or "unknown"),
    )


def _word(value: bool | None, yes: str, no: str) -> str:
    return "unknown" if value is None else yes if value else no
