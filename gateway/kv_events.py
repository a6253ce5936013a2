"""vLLM's KV events: what they say, and whether none is missing.

Owns: the wire format (maps since vLLM 0.24, arrays before), what events make of a backend's index (`KvIndex`), and the
rule for when that index is believed. Pure: batches are handed in, in whatever order they arrived. Does not own: sockets
(kv_feed.py), blocks (router/exact.py).

Every server numbers its batches from 0, and keeps some of them for whoever missed one; there is no snapshot. An index
that saw every batch since 0, or since the cache was last emptied, is whole, and believed. Any other begins empty, and
can only understate what is cached; it is believed once its predictions agree with what the backend reports.
"""

from __future__ import annotations

import logging
from collections import Counter
from hashlib import blake2b
from typing import Any

import msgspec

from router.exact import Exact
from router.prefix import Agreement, Chain, Predicted, seed

log = logging.getLogger("thinkgate.kv")
SOON_S = 5.0  # for which a prompt that was placed is expected there, until its events arrive
SOON_BLOCKS = 16384
MOST_ADAPTERS = 1024
ATTENDED = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})  # others keep a part of a prefix
KINDS = ("batches", "malformed", "gaps", "replayed", "lost", "restarts", "orphans", "forgotten")


class BlockStored(msgspec.Struct, tag=True, gc=False):
    """One more copy of blocks that follow each other; see vLLM's class of the same name."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, gc=False):
    """One copy of each of these blocks is gone."""

    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    """Nothing is cached any more."""


class _StoredRow(BlockStored, tag="BlockStored", array_like=True):
    pass


class _RemovedRow(BlockRemoved, tag="BlockRemoved", array_like=True):
    pass


class _ClearedRow(AllBlocksCleared, tag="AllBlocksCleared", array_like=True):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]


_batches = msgspec.msgpack.Decoder(_Batch)
_maps = msgspec.msgpack.Decoder(BlockStored | BlockRemoved | AllBlocksCleared)
_rows = msgspec.msgpack.Decoder(_StoredRow | _RemovedRow | _ClearedRow)
Event = BlockStored | BlockRemoved | AllBlocksCleared


def decode_batch(payload: bytes) -> list[Event]:
    """The events of a batch, in order. Raises: msgspec.DecodeError, also for an event that nobody knows."""
    events: list[Event] = []
    for raw in _batches.decode(payload).events:
        data = bytes(raw)
        is_row = data[0] >> 4 == 9 or data[0] in {0xDC, 0xDD}
        events.append(_rows.decode(data) if is_row else _maps.decode(data))
    return events


class KvIndex:
    """What one backend's prefix cache holds, and whether that is believed.

    Args:
        backend: its id, for the log.

    Attributes:
        exact: the blocks.
        agreement: whether what it predicts comes true.
        is_live: connected, with every batch taken up that there is.
        adapters: names of LoRA adapters that blocks were stored for.
        counts: of KINDS.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self.exact = Exact()
        self.agreement = Agreement()
        self.is_live = False
        self.adapters: set[str] = set()
        self.counts: Counter[str] = Counter()
        self._next: int | None = None  # the batch that comes next; None until one was seen
        self._replayed_to = 0  # batches before this one may arrive a second time
        self._last = b""
        self._soon = Predicted(SOON_BLOCKS, ttl_s=SOON_S, unsure_s=SOON_S)

    @property
    def is_believed(self) -> bool:
        """Whether placement goes by it."""
        return self.is_live and self.agreement.is_trusted

    def hit(self, chain: Chain, prompt_tokens: int, now_s: float) -> int:
        """Tokens of a prompt that are cached, or will be in a moment. The last token is always worked on."""
        blocks = max(self.exact.overlap(chain), self._soon.overlap(chain, now_s))
        size = self.exact.block_tokens
        return min(blocks, (prompt_tokens - 1) // size) * size if size else 0

    def expect(self, chain: Chain, now_s: float) -> None:
        """A prompt was placed there, so that the next alike follows it before its events arrive."""
        self.exact.used(chain)
        self._soon.expect(chain, now_s)

    def is_new(self) -> bool:
        """Whether no batch was taken yet."""
        return not self._next

    def asks_from(self) -> int:
        """The batch to have replayed first: the last one taken, to see whether it is the same server."""
        return max((self._next or 0) - 1, 0)

    def is_last(self, number: int, payload: bytes) -> bool:
        """Whether a batch is the last one that was taken."""
        return self._next == number + 1 and self._last == _digest(payload)

    def caught_up(self) -> None:
        """All that was kept was replayed. If that was nothing, nothing is cached."""
        if self._next is None:
            self._empty(0, is_whole=True)

    def start_over(self) -> None:
        """Another server publishes now, as far as one can tell: what this one has cached is not known yet."""
        self.counts["restarts"] += 1
        log.info("kv events begin anew", extra={"backend": self._backend})
        self._empty(None, is_whole=True)

    def lose(self, why: str, number: int | None = None) -> None:
        """Something is missing for good: empty, and not believed until it proves right.

        Args:
            why: for the log.
            number: of the next batch, if known.
        """
        self.counts["lost"] += 1
        level = logging.WARNING if self.agreement.is_trusted else logging.DEBUG  # said once, not with every batch
        log.log(level, "kv events lost, prefixes are predicted", extra={"backend": self._backend, "reason": why})
        self._empty(number, is_whole=False)

    def disconnected(self) -> None:
        """Nothing is heard of it: not asked until it is connected and has caught up."""
        self.is_live = False

    def take(self, number: int, payload: bytes, *, is_replay: bool = False) -> bool:
        """One batch arrived. Returns: False, and takes nothing, if there is one missing before it."""
        if number == 0 and self._next and not self._replayed_to:
            self.start_over()
        if self._next is None:
            self._empty(0, is_whole=True) if number == 0 else self.lose("the first batches are gone", number)
        if number != self._next:
            return number < self._replayed_to
        self._next = number + 1
        self._last = _digest(payload)
        if is_replay:
            self._replayed_to = self._next
            self.counts["replayed"] += 1
        self.counts["batches"] += 1
        try:
            for event in decode_batch(payload):
                self._apply(event)
        except (msgspec.DecodeError, OverflowError, ValueError) as exc:
            self.counts["malformed"] += 1
            self.lose(f"a batch cannot be read: {exc}", self._next)
        return True

    def _apply(self, event: Event) -> None:
        if isinstance(event, BlockStored):
            if event.kv_cache_spec_kind in ATTENDED and event.locality != "REMOTE":
                self._stored(event)
        elif isinstance(event, BlockRemoved):
            if event.locality != "REMOTE":
                self.exact.removed((event.group_idx, event.medium), event.block_hashes)
        else:
            self._empty(self._next, is_whole=True)
        self.counts["orphans"], self.counts["forgotten"] = self.exact.orphans, self.exact.forgotten

    def _stored(self, event: BlockStored) -> None:
        if event.lora_name is not None and len(self.adapters) < MOST_ADAPTERS:
            self.adapters.add(event.lora_name)
        hashes, size = event.block_hashes, event.block_size
        named, salt = _nameable(event)
        if len(event.token_ids) != len(hashes) * size:
            named = 0  # some blocks were left out, and nobody says which
        root = seed("", event.lora_name or "", salt)
        group = (event.group_idx, event.medium)
        self.exact.stored(group, hashes[:named], event.parent_block_hash, event.token_ids[: named * size], root)
        self.exact.orphans += len(hashes) - named

    def _empty(self, number: int | None, *, is_whole: bool) -> None:
        self.exact.clear()
        self._soon.clear()
        self.agreement = Agreement(is_trusted=is_whole)
        if number != self._next:
            self._next, self._replayed_to, self._last = number, 0, b""


def _nameable(event: BlockStored) -> tuple[int, str]:
    """How many of its blocks are told by their token ids alone, from the first, and the salt they belong to.

    What else makes a block differ (pictures, embeddings) is named in its keys: those blocks are left out, and so is
    what follows them.
    """
    salt = ""
    for i, keys in enumerate(event.extra_keys or ()):
        left = list(keys or ())
        if left and left[0] == event.lora_name:
            del left[0]
        if i == 0 and event.parent_block_hash is None and len(left) == 1 and isinstance(left[0], str):
            salt = left.pop()
        if left:
            return i, salt
    return len(event.block_hashes), salt


def _digest(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=8).digest()
