"""The token ids of a call's prompt, as its backends see them: what an index that follows KV events is asked with.

Owns: asking a backend's /tokenize within a bound of time, and keeping what it said. Does not own: what the ids are for
(placing.py). A call waits `wait_s` at most, and not at all for a second after nobody answered in time.
"""

from __future__ import annotations

import asyncio
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from gateway.backends.segments import NOT_IN_SEGMENTS, tokenize_body
from gateway.errors import GatewayError, UpstreamRejected

if TYPE_CHECKING:
    from gateway.backends.port import Call
    from gateway.slots import Slot

MOST_KEPT = 4_000_000  # token ids, of four bytes
PAUSE_S = 1.0
# Rendered by the backend as more than text: its blocks are not told by token ids alone.
_MEDIA = re.compile(rb'"(?:image_url|input_image|video_url|input_audio|audio_url|image_embeds)"')
_ids = msgspec.json.Decoder(list[int])


class PromptIds:
    """Of the calls of one model.

    Args:
        slots: of the model.
        wait_s: how long a call may wait for them.
        clock: seconds.
        most_kept: token ids that are remembered; the longest unused go first.
    """

    def __init__(
        self, slots: Sequence[Slot], wait_s: float, clock: Callable[[], float], most_kept: int = MOST_KEPT
    ) -> None:
        self._slots, self._wait_s, self._clock, self._most = slots, wait_s, clock, most_kept
        self._kept: OrderedDict[bytes, array[int]] = OrderedDict()
        self._size = 0
        self._not_before_s = 0.0
        self.asked = self.late = 0

    def __len__(self) -> int:
        """Token ids that are remembered."""
        return self._size

    async def of(self, call: Call) -> Sequence[int]:
        """The ids of its prompt; empty where they are not known in time, or would not tell what is cached."""
        if any(name in call.fields for name in NOT_IN_SEGMENTS):
            return ()
        if call.surface == "completions":
            prompt = bytes(call.fields.get("prompt", b""))
            if not prompt.startswith(b'"'):
                return _given(prompt)
        elif _MEDIA.search(bytes(call.fields["messages"])):
            return ()
        key = blake2b(tokenize_body(call), digest_size=16).digest()
        kept = self._kept.get(key)
        if kept is None:
            kept = await self._ask(call)
            self._keep(key, kept)
        else:
            self._kept.move_to_end(key)
        return kept

    async def _ask(self, call: Call) -> array[int]:
        """Of the least busy backend that is up."""
        slots = [slot for slot in self._slots if slot.is_up and slot.standing.kv and slot.standing.kv.is_live]
        if not slots or self._clock() < self._not_before_s:
            return array("I")
        slot = min(slots, key=lambda slot: slot.in_flight)
        assert slot.backend is not None
        self.asked += 1
        try:
            async with asyncio.timeout(self._wait_s):
                return array("I", await slot.backend.tokenize(call))
        except UpstreamRejected:
            return array("I")  # the client's mistake, which the call itself will tell
        except (GatewayError, TimeoutError, OverflowError):
            self.late += 1
            self._not_before_s = self._clock() + PAUSE_S
            return array("I")

    def _keep(self, key: bytes, ids: array[int]) -> None:
        if not ids or len(ids) > self._most:
            return
        self._size += len(ids) - len(self._kept.pop(key, ()))
        self._kept[key] = ids
        while self._size > self._most:
            self._size -= len(self._kept.popitem(last=False)[1])


def _given(prompt: bytes) -> Sequence[int]:
    """A prompt that is token ids already; several prompts in one call are not told apart."""
    try:
        return _ids.decode(prompt)
    except msgspec.DecodeError:
        return ()
