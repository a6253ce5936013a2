"""Backends behind a name: one per address, coming and going while requests are served."""

from __future__ import annotations

import asyncio

import pytest

from gateway.config.schema import Config
from gateway.names import Names
from tests.gateway.live import INSTANT, MODEL, ask, live, tree_of
from tests.gateway.still import config_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script


class Book:
    """Addresses as a test says."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        """See `look_up`. Raises: OSError where there are none."""
        self.asked.append((host, port))
        if not self.addresses:
            raise OSError("no such host")
        return self.addresses


def behind(name: str) -> dict[str, object]:
    """A model whose backends stand behind a name."""
    return {"backends": [{"id": "a", "url": name, "weight": 2}]}


async def test_every_address_of_a_name_is_a_backend() -> None:
    """Each address has an entry of its own, with the name's settings; other entries stay as they are."""
    config, names = config_of(behind("dns+http://svc:8000/up")), Names(Book("10.0.0.7", "fd00::1"))
    backends = config.models["qwen"].backends
    assert [each.url for each in names.expanded(backends)] == ["http://svc:8000/up"]
    assert await names.refresh(config)
    assert [(each.id, each.url, each.weight) for each in names.expanded(backends)] == [
        ("a-10.0.0.7", "http://10.0.0.7:8000/up", 2),
        ("a-fd00--1", "http://[fd00::1]:8000/up", 2),
    ]
    plain = config_of().models["qwen"].backends
    assert names.expanded(plain) == list(plain)


async def test_a_name_that_cannot_be_looked_up_keeps_its_addresses() -> None:
    """A failing name server takes no backend away, and nothing is told to have changed."""
    config, book = config_of(behind("dns+http://svc:8000")), Book("10.0.0.7")
    names = Names(book)
    assert [await names.refresh(config) for _ in range(2)] == [True, False]
    book.addresses = []
    assert not await names.refresh(config)
    assert [each.id for each in names.expanded(config.models["qwen"].backends)] == ["a-10.0.0.7"]
    assert set(book.asked) == {("svc", 8000)}


def test_certificates_are_for_names() -> None:
    """`dns+https://` is refused, with what to use instead."""
    with pytest.raises(ValueError, match=r"use https:// or dns\+http://"):
        config_of(behind("dns+https://svc"))


async def test_addresses_come_and_go_while_serving(scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that appears is probed, one that is gone gets no call any more, and those that stay are kept."""
    tree, book = tree_of(scripted), Book("127.0.0.1")
    tree["models"][MODEL]["backends"][0]["url"] = f"dns+http://svc:{scripted.port}"
    tree["routing"] = {"placement": {"dns_s": 0.01}}
    monkeypatch.setattr("gateway.app.Names", lambda: Names(book))
    async with live(tree) as gateway:
        kept = gateway.slot()
        assert (await ask(gateway, INSTANT)).headers["x-thinkgate-backend"] == "a-127.0.0.1"
        book.addresses = ["127.0.0.1", "127.0.0.9"]
        await gateway.logs.wait("addresses changed", 2)
        slots = gateway.gateway.serving.models[MODEL].slots
        assert [slot.config.id for slot in slots] == ["a-127.0.0.1", "a-127.0.0.9"]
        assert (await ask(gateway, INSTANT)).headers["x-thinkgate-backend"] == "a-127.0.0.1"
        book.addresses = ["127.0.0.1"]
        await gateway.logs.wait("addresses changed", 3)
        assert gateway.gateway.serving.models[MODEL].slots == [kept]
        assert (await ask(gateway, INSTANT)).status == 200


async def test_a_call_at_an_address_that_is_gone_keeps_its_deadlines(
    scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that falls silent and leaves the configuration does not keep its calls for ever."""
    monkeypatch.setattr("gateway.app.SWEEP_S", 0.01)
    async with ScriptedBackend() as other:
        tree = tree_of(scripted, server={"timeouts": {"first_byte_s": 0.1}})
        async with live(tree) as gateway:
            silent = Gate()
            scripted.default = Script(gates={-1: silent})
            asking = asyncio.create_task(ask(gateway, {**INSTANT, "stream": True}))
            await silent.wait()
            gateway.gateway.reload(Config.model_validate({**tree, "models": tree_of(other)["models"]}))
            assert (await asking).status == 504
            await gateway.assert_settled()


async def test_addresses_found_during_a_reload_are_used(scripted: ScriptedBackend) -> None:
    """A look-up that a reload overtakes counts for the configuration that is in force by then."""
    tree = tree_of(scripted)
    tree["models"][MODEL]["backends"][0]["url"] = f"dns+http://svc:{scripted.port}"
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(host: str, port: int) -> list[str]:
        asked.set()
        await answer.wait()
        return ["127.0.0.1"]

    async with live(tree_of(scripted)) as gateway:
        gateway.gateway.names.lookup = slow
        gateway.gateway.reload(Config.model_validate(tree))
        looking = asyncio.create_task(gateway.gateway._look_names_up())
        await asked.wait()
        gateway.gateway.reload(Config.model_validate(tree))
        answer.set()
        assert await looking
        assert [slot.config.id for slot in gateway.gateway.serving.models[MODEL].slots] == ["a-127.0.0.1"]
        gateway.gateway._watch_slots()


async def test_what_can_be_no_name_is_no_address() -> None:
    """A name that nobody can encode is not found, and nothing else happens."""
    config = config_of(behind(f"dns+http://{'x' * 70}:8000"))
    assert not await Names().refresh(config)
