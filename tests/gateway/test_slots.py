"""One backend's slot over time: probed until it is up, suspected, not trusted for a while, and trusted again."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest

from gateway.backends.http_backend import HttpBackend
from gateway.backends.port import Capabilities
from gateway.config.placing import KvEventsConfig, PlacementConfig
from gateway.config.schema import BackendConfig
from gateway.errors import UpstreamError
from gateway.kv_events import KvIndex
from gateway.slots import PROBE_AGAIN_S, TRUST_AGAIN_MOST_S, TRUST_AGAIN_S, Slot
from tests.gateway.still import HOLDS_CAPS, config_of, models_of

LIES = Capabilities(cap_binds=False)
QUIET = Capabilities(cap_binds=True, cap_binds_with_tools=True, instant_is_quiet=True)
DOWN = UpstreamError("gone")
Story = Callable[[Slot, "Probed"], Coroutine[Any, Any, None]]


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when nothing else is to be done."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        """Seconds since it was made."""
        return self._now_s

    def _run_once(self) -> None:
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]  # no other way in
        while scheduled and scheduled[0].cancelled():
            heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]  # as the loop itself does
        if not self._ready and scheduled:  # type: ignore[attr-defined]  # as above
            self._now_s = max(self._now_s, scheduled[0].when())
        super()._run_once()  # type: ignore[misc]  # as above


class Probed:
    """A backend that is only probed.

    Attributes:
        finds: what the next probes find; the last one for ever.
        at_s: when it was probed.
    """

    id, kind = "a", "vllm"

    def __init__(self, *finds: Capabilities | Exception) -> None:
        self.finds = list(finds)
        self.at_s: list[float] = []

    async def probe(self) -> Capabilities:
        """See the port."""
        self.at_s.append(asyncio.get_running_loop().time())
        found = self.finds.pop(0) if len(self.finds) > 1 else self.finds[0]
        if isinstance(found, Exception):
            raise found
        return found

    def generate(self, call: Any, express: Any = None) -> AsyncGenerator[Any, None]:
        """See the port."""
        raise NotImplementedError


def in_jumping_time(story: Story, *finds: Capabilities | Exception) -> None:
    """Run a story while its slot is kept up; no time passes but on the loop's own clock."""
    backend: Any = Probed(*finds)

    async def work() -> None:
        slot = Slot(BackendConfig(id="a", url="http://127.0.0.1:1"), lambda: backend)
        keeping = asyncio.get_running_loop().create_task(slot.keep_up())
        try:
            await story(slot, backend)
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])

    loop = JumpingLoop()
    try:
        loop.run_until_complete(work())
    finally:
        loop.close()


def trusted(slot: Slot) -> bool:
    """Whether its own cap is relied upon."""
    return slot.capabilities is not None and bool(slot.capabilities.cap_binds)


def test_a_backend_is_probed_until_it_is_up() -> None:
    """Every failure waits a little; once up it is left alone."""

    async def story(slot: Slot, backend: Probed) -> None:
        await asyncio.sleep(1)
        assert (slot.is_up, slot.failure) == (False, "gone")
        await asyncio.sleep(1000)
        assert (slot.is_up, slot.failure) == (True, "")
        assert backend.at_s == [0, PROBE_AGAIN_S, 2 * PROBE_AGAIN_S]

    in_jumping_time(story, DOWN, DOWN, HOLDS_CAPS)


def test_a_bug_while_probing_is_survived() -> None:
    """Whatever a probe raises, the slot is down, says why, and is probed again."""

    async def story(slot: Slot, backend: Probed) -> None:
        await asyncio.sleep(1)
        assert (slot.is_up, "KeyError in the gateway" in slot.failure) == (False, True)
        await asyncio.sleep(100)
        assert (slot.is_up, slot.failure) == (True, "")
        assert backend.at_s == [0, 5 * PROBE_AGAIN_S]

    in_jumping_time(story, KeyError("oops"), HOLDS_CAPS)


def test_a_lost_backend_is_probed_at_once() -> None:
    """From the loss on it is out, and back as soon as it answers."""

    async def story(slot: Slot, backend: Probed) -> None:
        await asyncio.sleep(50)
        slot.mark_down("refused")
        assert (slot.is_up, slot.failure) == (False, "refused")
        await asyncio.sleep(1)
        assert backend.at_s == [0, 50]
        assert (slot.is_up, slot.failure) == (True, "")

    in_jumping_time(story, HOLDS_CAPS)


def test_a_lie_is_paid_for_with_a_pause_that_doubles() -> None:
    """It serves on, its own cap no longer trusted; each lie doubles the time to the next probe, up to an hour."""

    async def story(slot: Slot, backend: Probed) -> None:
        await asyncio.sleep(1)
        pauses_s = []
        for lies in range(1, 10):
            lied_at_s = asyncio.get_running_loop().time()
            slot.distrust()
            assert (slot.is_up, trusted(slot), slot.lies) == (True, False, lies)
            slot.distrust()  # calls that were on their way find the same out: that is one lie
            assert slot.lies == lies
            while not trusted(slot):
                await asyncio.sleep(1)
            pauses_s.append(backend.at_s[-1] - lied_at_s)
        assert pauses_s[:4] == [TRUST_AGAIN_S, 2 * TRUST_AGAIN_S, 4 * TRUST_AGAIN_S, 8 * TRUST_AGAIN_S]
        assert pauses_s[-2:] == [TRUST_AGAIN_MOST_S] * 2

    in_jumping_time(story, HOLDS_CAPS)


def test_a_backend_that_still_lies_when_probed_stays_without_trust() -> None:
    """A probe that finds the cap ignored ends the matter: it is held another way from then on."""

    async def story(slot: Slot, backend: Probed) -> None:
        await asyncio.sleep(1)
        slot.distrust()
        await asyncio.sleep(10 * TRUST_AGAIN_S)
        assert (slot.is_up, trusted(slot)) == (True, False)
        assert backend.at_s == [0, 1 + TRUST_AGAIN_S]

    in_jumping_time(story, HOLDS_CAPS, LIES)


def test_a_backend_that_is_lost_while_not_trusted_is_probed_at_once() -> None:
    """The pause is for a backend that serves; one that does not has to be found again."""

    async def story(slot: Slot, backend: Probed) -> None:
        await asyncio.sleep(1)
        slot.distrust()
        await asyncio.sleep(10)
        slot.mark_down("refused")
        await asyncio.sleep(1)
        assert backend.at_s == [0, 11]
        await asyncio.sleep(PROBE_AGAIN_S)
        assert backend.at_s == [0, 11, 11 + PROBE_AGAIN_S]
        assert trusted(slot)

    in_jumping_time(story, HOLDS_CAPS, DOWN, HOLDS_CAPS)


def test_a_probe_that_fails_takes_no_serving_backend_out() -> None:
    """Whether it still serves is for the calls to find out; it is probed on, and trusted when that succeeds."""

    async def story(slot: Slot, backend: Probed) -> None:
        await asyncio.sleep(1)
        slot.distrust()
        await asyncio.sleep(TRUST_AGAIN_S + 1)
        assert (slot.is_up, trusted(slot), slot.failure) == (True, False, "gone")
        await asyncio.sleep(PROBE_AGAIN_S)
        assert (slot.is_up, trusted(slot), slot.failure) == (True, True, "")

    in_jumping_time(story, HOLDS_CAPS, DOWN, HOLDS_CAPS)


def test_thinking_in_instant_mode_costs_that_trust_only() -> None:
    """The template's switch is no longer relied upon, the cap still is."""

    async def story(slot: Slot, backend: Probed) -> None:
        await asyncio.sleep(1)
        slot.distrust(instant=True)
        assert slot.capabilities is not None
        assert (slot.capabilities.instant_is_quiet, slot.capabilities.cap_binds, slot.lies) == (False, True, 1)
        await asyncio.sleep(TRUST_AGAIN_S + 1)
        assert slot.capabilities == QUIET

    in_jumping_time(story, QUIET)


@pytest.mark.parametrize("found", [LIES, None, Capabilities()])
def test_what_was_never_trusted_cannot_lie(found: Capabilities | None) -> None:
    """A backend that is down, or whose cap was not measured to bind, is not suspected."""
    slot = models_of(config_of(), found)["qwen"].slots[0]
    slot.distrust()
    assert (slot.capabilities, slot.lies, slot.suspect.is_set()) == (found, 0, False)


def test_a_lie_is_known_to_the_backend_and_says_so() -> None:
    """The next call does not send the cap any more, tools or not, and `thinkgate check` would name the lies."""
    slot = models_of(config_of())["qwen"].slots[0]
    assert isinstance(slot.backend, HttpBackend)
    slot.distrust()
    found = slot.backend.capabilities
    assert found is slot.capabilities
    assert (found.cap_binds, found.cap_binds_with_tools) == (False, False)
    assert found.detail["cap"] == "ignored in service, 1 times"


async def test_draining_waits_for_the_last_call() -> None:
    """A slot that gets no new calls is drained when those in flight have ended, whatever way they end."""
    slot = models_of(config_of())["qwen"].slots[0]
    await slot.drained()
    with slot:
        draining = asyncio.get_running_loop().create_task(slot.drained())
        await asyncio.sleep(0)
        with contextlib.suppress(UpstreamError), slot:
            raise DOWN
        await asyncio.sleep(0)
        assert not draining.done()
    await draining
    assert slot.in_flight == 0


async def test_events_are_followed_anew_whenever_a_backend_comes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is followed before it is up; each time it was lost and is back, the feed is connected again."""
    events = {"endpoint": "tcp://{host}:5557", "replay": "tcp://{host}:5558"}
    entry = BackendConfig.model_validate({"id": "a", "url": "http://[::1]:1", "kv_events": events})
    backend: Any = Probed(HOLDS_CAPS)
    slot = Slot(entry, lambda: backend, PlacementConfig(index="exact"))
    running: list[str] = []

    class Feed:
        """One that only says that it runs."""

        def __init__(self, index: KvIndex, config: KvEventsConfig) -> None:
            assert index is slot.standing.kv
            self._where = f"{config.endpoint} {config.replay}"

        async def run(self) -> None:
            """See KvFeed."""
            running.append(self._where)
            try:
                await asyncio.Event().wait()
            finally:
                running.remove(self._where)

    monkeypatch.setattr("gateway.kv_feed.KvFeed", Feed)
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(slot.follow_events())
        await asyncio.sleep(0)
        assert running == []
        for _ in range(3):
            slot.came_up.set()
            for _ in range(5):
                await asyncio.sleep(0)
            assert running == ["tcp://[::1]:5557 tcp://[::1]:5558"]
        following.cancel()
    assert running == []


async def test_a_backend_without_events_follows_none() -> None:
    """Where they are not configured, or not asked for, there is no index and nothing to wait for."""
    entry = BackendConfig.model_validate({"id": "a", "url": "http://h:1", "kv_events": {}})
    backend: Any = Probed(HOLDS_CAPS)
    for slot in (
        Slot(entry, lambda: backend),
        Slot(entry.model_copy(update={"kv_events": None}), lambda: backend, PlacementConfig(index="exact")),
    ):
        assert slot.standing.kv is None
        await slot.follow_events()
