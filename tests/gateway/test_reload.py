"""Reloading: the file, its link or a signal says when; what is new is in force at once, what runs is not dropped."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config.load import load_config
from gateway.config.schema import Config
from gateway.reload import Reloader
from tests.gateway.live import (
    ASK,
    DEADLINE_S,
    INSTANT,
    MODEL,
    STREAM,
    Client,
    Json,
    Live,
    ask,
    key_headers,
    live,
    tree_of,
)
from tests.gateway.test_edge import key_of, limits_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script

RELOADED, REFUSED = "configuration reloaded", "configuration refused, the old one stays in force"


@asynccontextmanager
async def reloading(
    path: Path, monkeypatch: pytest.MonkeyPatch, tree: Json, overrides: Json | None = None
) -> AsyncIterator[tuple[Live, Reloader]]:
    """A gateway whose configuration file is watched."""
    monkeypatch.setattr("gateway.reload.POLL_S", 0.02)
    write(path, {**tree, "routing": {"scorer": "none"}})
    started = load_config(path, overrides=overrides).model_dump(mode="json", exclude_unset=True)
    async with live(started) as gateway, asyncio.TaskGroup() as tasks:
        reloader = Reloader(gateway.gateway, path, overrides=overrides)
        watching = tasks.create_task(reloader.run())
        yield gateway, reloader
        watching.cancel()


def write(path: Path, tree: Json | str) -> None:
    """Replace the file in one step, as an editor or a ConfigMap does."""
    new = path.with_suffix(".new")
    new.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    new.rename(path)


async def test_changed_file_is_in_force(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New keys, limits, ceilings and models hold for the next request after the file changed."""
    path, tree = tmp_path / "thinkgate.yaml", tree_of(scripted)
    async with reloading(path, monkeypatch, tree) as (gateway, _):
        assert (await ask(gateway)).status == 200
        other = tree_of(scripted, model={"thinking": {"default_tokens": 8, "max_tokens": 9}})
        other["keys"] = [key_of("ada", "good")]
        other["limits"] = limits_of(("key:ada", "requests", 2, "day"))
        other["models"]["second"] = {**other["models"][MODEL]}
        write(path, other)
        await gateway.logs.wait(RELOADED)
        assert (await ask(gateway)).status == 401
        answer = await ask(gateway, headers=key_headers("good"))
        assert answer.json["thinkgate"]["cap"]["tokens"] == 8
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        listed = await ask(gateway, b"", "/v1/models", method="GET", headers=key_headers("good"))
        assert [entry["id"] for entry in listed.json["data"]] == [MODEL, "second"]
        assert gateway.metric("thinkgate_config_reloads_total", outcome="accepted") == 1
        assert gateway.metric("thinkgate_config_reload_failed") == 0


async def test_a_file_is_read_beside_the_streams(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsing and validating take seconds with many keys: requests are served in the meantime."""
    path, tree = tmp_path / "thinkgate.yaml", tree_of(scripted)
    has_begun, may_end = threading.Event(), threading.Event()

    def slowly(*args: Any, **options: Any) -> Config:
        has_begun.set()
        assert may_end.wait(DEADLINE_S)
        return load_config(*args, **options)

    async with reloading(path, monkeypatch, tree) as (gateway, reloader):
        monkeypatch.setattr("gateway.reload.load_config", slowly)
        reloader.ask()
        assert await asyncio.to_thread(has_begun.wait, DEADLINE_S)
        assert (await ask(gateway)).status == 200
        assert gateway.metric("thinkgate_config_reloads_total", outcome="accepted") == 0
        may_end.set()
        await gateway.logs.wait(RELOADED)


async def test_running_stream_ends_under_the_old_configuration(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream goes on although its key and its model are gone, is settled, and then its backend is let go."""
    path, gate = tmp_path / "thinkgate.yaml", Gate()
    tree = tree_of(scripted, keys=[key_of("ada", "good")])
    async with reloading(path, monkeypatch, tree) as (gateway, _), Client(gateway.port) as client:
        pool = gateway.pool()
        scripted.queue(Script(gates={3: gate}))
        client.send(STREAM, headers=key_headers("good"))
        await gate.wait()
        model = tree["models"].pop(MODEL)
        write(path, {"keys": [key_of("eve", "new")], "models": {"other": model}})
        await gateway.logs.wait(RELOADED)
        assert (await ask(gateway, headers=key_headers("good"))).status == 401
        assert (await ask(gateway, headers=key_headers("new"))).status == 404
        gate.open()
        answer = await client.answer()
        assert answer.payloads()[-1] == "[DONE]"
        assert answer.chunks()[-1]["thinkgate"]["settled"]["tokens"] > 0
        await gateway.assert_settled()
        assert pool.busy() == 0


async def test_what_did_not_change_stays_up(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload keeps a backend whose entry did not change, and one that did is usable while it is probed again."""
    path, tree = tmp_path / "thinkgate.yaml", tree_of(scripted)
    async with reloading(path, monkeypatch, tree) as (gateway, _):
        slot = gateway.slot()
        tree["models"][MODEL]["answer"] = {"default_tokens": 32, "max_tokens": 64}
        write(path, tree)
        await gateway.logs.wait(RELOADED)
        assert gateway.slot() is slot
        gate = Gate()
        scripted.queue(Script(gates={-1: gate}))  # for the probe that the next reload starts
        tree["models"][MODEL]["thinking"]["default_tokens"] = 16
        tree["models"][MODEL]["backends"][0]["weight"] = 2
        write(path, tree)
        await gateway.logs.wait(RELOADED, 2)
        assert gateway.slot() is not slot
        assert gateway.slot().is_up
        await gate.wait()
        assert (await ask(gateway, INSTANT)).status == 200
        gate.open()
        await gateway.logs.wait("backend up", 2)


async def test_settled_budget_outlives_a_reload(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was spent and what is held counts against a limit whose amount a reload changed."""
    path = tmp_path / "thinkgate.yaml"
    tree = tree_of(scripted, limits=limits_of((f"model:{MODEL}", "requests", 3, "day")))
    async with reloading(path, monkeypatch, tree) as (gateway, _):
        for _ in range(3):
            assert (await ask(gateway, INSTANT)).status == 200
        assert (await ask(gateway, INSTANT)).status == 429
        tree["limits"][0]["amount"] = 4
        write(path, tree)
        await gateway.logs.wait(RELOADED)
        answer = await ask(gateway, INSTANT)
        assert (answer.status, answer.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        assert (await ask(gateway, INSTANT)).status == 429


BAD: list[tuple[str, str]] = [
    ("models: [", "line 1"),
    ("models: {}", "models"),
    ("- a list", "mapping"),
    ("", "mapping"),
    ("models: {qwen: {backends: [{id: a, url: ftp://x}]}}", "http://host:8000"),
    ("models: {qwen: {backends: [{id: a, url: http://x}], colour: red}}", "colour"),
    (
        "store: {kind: sqlite}\nmodels: {qwen: {backends: [{id: a, url: http://x}]}}",
        "store: cannot change while running",
    ),
    ("server: {key_hash_env: X}\nmodels: {qwen: {backends: [{id: a, url: http://x}]}}", "server.key_hash_env"),
    ("server: {port: 1}\nmodels: {qwen: {backends: [{id: a, url: http://x}]}}", "server.port"),
    (
        "keys: [{id: x, secret_env: NOT_SET_ANYWHERE}]\nmodels: {qwen: {backends: [{id: a, url: http://x}]}}",
        "NOT_SET_ANYWHERE",
    ),
    ("models: {qwen: {backends: [{id: a, url: http://x, api_key_env: NOT_SET_EITHER}]}}", "NOT_SET_EITHER"),
]


@pytest.mark.parametrize(("text", "says"), BAD)
async def test_bad_file_changes_nothing(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    """A file that cannot be used leaves the old configuration in force; log and metric say so until it is mended."""
    path, tree = tmp_path / "thinkgate.yaml", tree_of(scripted)
    async with reloading(path, monkeypatch, tree) as (gateway, _):
        before = gateway.gateway.serving
        write(path, text)
        record = await gateway.logs.wait(REFUSED)
        assert says in " ".join(vars(record)["problems"])
        assert gateway.gateway.serving is before
        assert gateway.metric("thinkgate_config_reload_failed") == 1
        assert gateway.metric("thinkgate_config_reloads_total", outcome="refused") == 1
        assert (await ask(gateway)).status == 200
        write(path, tree)
        await gateway.logs.wait(RELOADED)
        assert gateway.metric("thinkgate_config_reload_failed") == 0


async def test_file_that_is_gone_changes_nothing(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that vanished is refused once, not at every look, and is read again when it is back."""
    path, tree = tmp_path / "thinkgate.yaml", tree_of(scripted)
    async with reloading(path, monkeypatch, tree) as (gateway, _):
        path.unlink()
        await gateway.logs.wait(REFUSED)
        assert (await ask(gateway)).status == 200
        write(path, tree)
        await gateway.logs.wait(RELOADED)
        assert gateway.metric("thinkgate_config_reloads_total", outcome="refused") == 1


async def test_swapped_link_is_a_change(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ConfigMap swaps the link of its directory: that is noticed, the content being the same or not."""
    first, second, third = (tmp_path / name for name in ("..2026_1", "..2026_2", "..2026_3"))
    tree = tree_of(scripted)
    for folder, default in ((first, 32), (second, 8), (third, 8)):
        folder.mkdir()
        tree["models"][MODEL]["thinking"]["default_tokens"] = default
        write(folder / "thinkgate.yaml", tree)
    link = tmp_path / "..data"
    link.symlink_to(first)
    path = tmp_path / "thinkgate.yaml"
    path.symlink_to(Path("..data") / "thinkgate.yaml")
    monkeypatch.setattr("gateway.reload.POLL_S", 0.02)
    async with live(yaml.safe_load(path.read_text())) as gateway, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(Reloader(gateway.gateway, path).run())
        for count, folder in enumerate((second, third), start=1):
            new = tmp_path / "..data_tmp"
            new.symlink_to(folder)
            new.rename(link)
            await gateway.logs.wait(RELOADED, count)
            assert (await ask(gateway)).json["thinkgate"]["cap"]["tokens"] == 8
        watching.cancel()


async def test_signal_reloads_an_unchanged_file(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Being asked reloads at once, so that a secret that changed in the environment is taken over."""
    path = tmp_path / "thinkgate.yaml"
    monkeypatch.setenv("ADA_KEY", "old")
    tree = tree_of(scripted, keys=[{"id": "ada", "secret_env": "ADA_KEY"}])
    async with reloading(path, monkeypatch, tree) as (gateway, reloader):
        assert (await ask(gateway, headers=key_headers("old"))).status == 200
        monkeypatch.setenv("ADA_KEY", "new")
        reloader.ask()
        await gateway.logs.wait(RELOADED)
        assert (await ask(gateway, headers=key_headers("old"))).status == 401
        assert (await ask(gateway, headers=key_headers("new"))).status == 200


async def test_command_line_still_wins_after_a_reload(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port given on the command line is no change of the file's, at the start or later."""
    path, tree = tmp_path / "thinkgate.yaml", tree_of(scripted)
    async with reloading(path, monkeypatch, tree, {"port": 9999}) as (gateway, _):
        tree["models"][MODEL]["thinking"]["default_tokens"] = 8
        write(path, tree)
        await gateway.logs.wait(RELOADED)
        assert gateway.gateway.serving.config.server.port == 9999
        assert (await ask(gateway, ASK)).json["thinkgate"]["cap"]["tokens"] == 8
