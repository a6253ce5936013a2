"""Backends behind a name: one per address, coming and going while requests are served."""

from __future__ import annotations

import pytest

from gateway.names import Names
from tests.gateway.live import INSTANT, MODEL, ask, live, tree_of
from tests.gateway.still import config_of
from tests.scripted_backend import ScriptedBackend


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
