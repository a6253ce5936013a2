"""Which backend of a model serves a call: what is known about each, put before router/placement.py.

Owns: the `Standing` of a backend (what its prefix cache should hold, prompts waiting there, what it says of itself, and
whether the prediction is trusted), the `Prompt` of a call, and choosing. Does not own: health (slots.py), tries
(attempts.py), where token ids come from (prompt_ids.py). A call costs O(blocks of its prompt + backends); models with
one backend never come here.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import msgspec

from router.health import outliers, slow_start
from router.placement import Bounded, Candidate, Capable, Healthy, home, place
from router.prefix import BLOCK_BYTES, MOST_BLOCKS, Agreement, Predicted, byte_chain, seed, token_chain

if TYPE_CHECKING:
    from gateway.backends.port import Call
    from gateway.config.placing import PlacementConfig
    from gateway.kv_events import KvIndex
    from gateway.load import Load
    from gateway.slots import Slot

BYTES_PER_TOKEN = 4.0  # until prompts were counted
PROMPT_FIELDS = ("tools", "messages", "prompt")  # in the order in which templates render them
_text = msgspec.json.Decoder(str)


class Standing:
    """What placement knows about one backend.

    Args:
        id: of the backend.
        config: how backends are compared.
        kv: what its prefix cache holds, where its events are followed.

    Attributes:
        number: the same for the same backend on every gateway.
        cache: what its prefix cache should hold.
        agreement: whether that is so.
        pending_tokens: of prompts that were placed there and not begun, without what is cached.
        waiting: calls in its own queue, as it said last.
        kv_use: part of its KV memory in use, 0 to 1, as it said last.
        limit: most calls of ours in flight, while it says that calls wait there; None: it has room.
        told: by index: prompt tokens of calls that ended, those predicted to be cached and those that were.
    """

    def __init__(self, id: str, config: PlacementConfig, kv: KvIndex | None = None) -> None:
        self.number = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big")
        blocks = int(config.cache_tokens * BYTES_PER_TOKEN) // BLOCK_BYTES
        self.cache = Predicted(blocks, ttl_s=config.ttl_s)
        self.agreement = Agreement()
        self.pending_tokens = 0
        self.waiting = 0
        self.kv_use = 0.0
        self.limit: int | None = None
        self.kv = kv
        self.told = {"predicted": [0, 0, 0]} | ({} if kv is None else {"exact": [0, 0, 0]})

    def hear(self, load: Load, bytes_per_token: float, in_flight: int = 0, most_waiting: int = 4) -> None:
        """What it said of itself, and how many calls of ours were in flight there.

        Of calls that wait there, all but `most_waiting` should have waited here, where order and fairness are; so
        as many fewer may be in flight. Once fewer wait there it may have more, step by step, up to as many as come.
        """
        self.waiting, self.kv_use = load.waiting, load.kv_use
        if load.waiting > most_waiting:
            self.limit = max(1, in_flight - (load.waiting - most_waiting))
        elif self.limit is not None:
            self.limit += max(1, self.limit // 8)
            if in_flight * 2 < self.limit:
                self.limit = None
        if load.cache_tokens:
            self.cache.resize(min(int(load.cache_tokens * bytes_per_token) // BLOCK_BYTES, MOST_BLOCKS))

    def unhear(self) -> None:
        """It says nothing any more, so what it said last holds no longer."""
        self.waiting, self.kv_use, self.limit = 0, 0.0, None

    def forget(self) -> None:
        """It was lost: its cache is gone, and what it said of itself. What its events say, they say."""
        self.cache.clear()
        self.unhear()


class Prompt:
    """One call as placement sees it, and what it adds to the backend it was placed on.

    Args:
        placing: of the model.
        call: whose prompt it is; None where nothing is known of it.
    """

    __slots__ = (
        *("_chains", "_exact", "_index", "_left", "_placing", "_predicted", "_salt", "_standing"),
        *("bytes", "chain", "ids", "tokens"),
    )

    def __init__(self, placing: Placing, call: Call | None) -> None:
        self._placing = placing
        self._standing: Standing | None = None
        self._left = self._predicted = 0
        self._exact: int | None = None
        self._index = "predicted"
        self.ids: Sequence[int] = ()
        self._chains: dict[tuple[str, int], list[int]] = {}
        self._salt = ""
        self.chain: list[int] = []
        self.bytes = 0
        if call is not None:
            fields = call.fields
            text = b"".join([bytes(fields[name]) for name in PROMPT_FIELDS if name in fields])
            self.bytes = len(text)
            if placing.config.index != "off":
                salt = fields.get("cache_salt")
                self._salt = "" if salt is None else _text.decode(salt)
                begin = seed(placing.upstream, "", self._salt) if self._salt else placing.seed
                self.chain = byte_chain(begin, text)
        self.tokens = int(self.bytes / placing.bytes_per_token)

    def read(self, ids: Sequence[int]) -> None:
        """Its token ids, so that indexes that follow events can be asked; none: they are not known."""
        if ids:
            self.ids, self.tokens = ids, len(ids)

    def _exact_hit(self, standing: Standing, now_s: float) -> int | None:
        """Tokens of it that a backend has, by its events; None where these are not followed, or its ids not known."""
        kv = standing.kv
        if kv is None or not kv.is_live or not self.ids:
            return None
        return kv.hit(self._token_chain(kv), len(self.ids), now_s)

    def _token_chain(self, kv: KvIndex) -> list[int]:
        """Its chain in blocks as that backend cuts them, under the adapter that it knows the model as."""
        upstream, size = self._placing.upstream, kv.exact.block_tokens
        key = (upstream if upstream in kv.adapters else "", size)
        chain = self._chains.get(key)
        if chain is None:
            chain = token_chain(seed("", key[0], self._salt), self.ids, size) if size else []
            self._chains[key] = chain
        return chain

    def hit_tokens(self, standing: Standing, now_s: float) -> int:
        """Of this prompt, expected in a backend's cache."""
        if standing.kv is not None and standing.kv.is_believed:
            exact = self._exact_hit(standing, now_s)
            if exact is not None:
                return exact
        if not self.chain or not standing.agreement.is_trusted:
            return 0
        return int(standing.cache.overlap(self.chain, now_s) * BLOCK_BYTES / self._placing.bytes_per_token)

    def place(self, standing: Standing, now_s: float) -> None:
        """It goes there: counted at once, so that the next call knows."""
        self.leave()
        self._standing = standing
        # Predicted also where that is not trusted: how else would it be again.
        self._predicted = standing.cache.overlap(self.chain, now_s) * BLOCK_BYTES
        cached = int(self._predicted / self._placing.bytes_per_token)
        self._exact, self._index = self._exact_hit(standing, now_s), "predicted"
        if self._exact is not None and standing.kv is not None:
            if standing.kv.is_believed:
                cached, self._index = self._exact, "exact"
            standing.kv.expect(self._token_chain(standing.kv), now_s)
        self._left = self.tokens - min(self.tokens, cached)
        standing.pending_tokens += self._left
        standing.cache.expect(self.chain, now_s)

    def began(self, now_s: float) -> None:
        """Its first byte came: the prompt is worked through, and in the cache."""
        if self._standing is not None:
            self.leave()
            self._standing.cache.expect(self.chain, now_s, is_sure=True)

    def leave(self) -> None:
        """It waits there no longer; any number of times."""
        if self._standing is not None:
            self._standing.pending_tokens -= self._left
            self._left = 0

    def ended(self, prompt_tokens: int, cached_tokens: int | None) -> None:
        """What the backend counted."""
        standing = self._standing
        if standing is None or not self.bytes or prompt_tokens <= 0:
            return
        self._placing.learn(self.bytes / prompt_tokens)
        if cached_tokens is None:
            return
        cached_tokens = min(cached_tokens, prompt_tokens)  # one that says more would be believed for long
        predicted = min(prompt_tokens, round(self._predicted / self.bytes * prompt_tokens))
        standing.agreement.add(predicted, cached_tokens, prompt_tokens)
        if self._exact is not None and standing.kv is not None:
            standing.kv.agreement.add(self._exact, cached_tokens, prompt_tokens)
            predicted = self._exact if self._index == "exact" else predicted
        for i, tokens in enumerate((prompt_tokens, predicted, cached_tokens)):
            standing.told[self._index][i] += tokens


class Placing:
    """Choosing among the backends of one model.

    Args:
        upstream: the model's name at its backends.
        config: how they are compared.

    Attributes:
        bytes_per_token: of its prompts, as counted of late.
    """

    def __init__(self, upstream: str, config: PlacementConfig) -> None:
        self.upstream, self.config = upstream, config
        self.seed = seed(upstream)
        self._filters = (Healthy(), Capable(), Bounded(side_by_side=config.side_by_side))
        self.bytes_per_token = BYTES_PER_TOKEN

    def prompt(self, call: Call | None) -> Prompt:
        """A call as placement sees it."""
        return Prompt(self, call)

    def learn(self, bytes_per_token: float) -> None:
        """One more prompt was counted."""
        self.bytes_per_token += 0.05 * (min(max(bytes_per_token, 1.0), 16.0) - self.bytes_per_token)

    def choose(
        self, slots: Sequence[Slot], without: Collection[Slot], prompt: Prompt | None, now_s: float
    ) -> Slot | None:
        """The slot for a call, which is counted there; None when none is usable."""
        prompt = prompt or Prompt(self, None)
        at_home = home(prompt.chain[0], [slot.standing.number for slot in slots]) if prompt.chain else None
        candidates = [
            self._candidate(slot, prompt, now_s, is_usable=slot.is_up and slot not in without, is_home=i == at_home)
            for i, slot in enumerate(slots)
        ]
        usable = [candidate.is_usable for candidate in candidates]
        for candidate, slot in zip(candidates, slots, strict=True):
            candidate.is_usable &= slot.breaker.allows(now_s)
        placement = place(candidates, random.choice, prompt.tokens, filters=self._filters)
        if placement is None:  # better one that failed of late than nobody
            for candidate, is_usable in zip(candidates, usable, strict=True):
                candidate.is_usable = is_usable
            placement = place(candidates, random.choice, prompt.tokens, filters=self._filters)
        if placement is None:
            return None
        slot = slots[placement.position]
        slot.breaker.placed(now_s)
        prompt.place(slot.standing, now_s)
        return slot

    def _candidate(self, slot: Slot, prompt: Prompt, now_s: float, *, is_usable: bool, is_home: bool) -> Candidate:
        standing = slot.standing
        return Candidate(
            slot.config.id,
            is_usable,
            slot.in_flight,
            slot.config.weight * slow_start(now_s - slot.up_since_s, self.config.slow_start_s),
            cached_tokens=prompt.hit_tokens(standing, now_s),
            pending_tokens=standing.pending_tokens,
            waiting=standing.waiting,
            kv_use=standing.kv_use,
            cost=slot.config.cost,
            is_home=is_home,
        )


def eject_outliers(slots: Sequence[Slot], now_s: float) -> None:
    """Open the breakers of backends that fail clearly more often than the model's others."""
    shares = [slot.breaker.outcomes.share(now_s) for slot in slots]
    for i in outliers(shares):
        if slots[i].breaker.state(now_s) == "closed":
            slots[i].breaker.open(now_s)
