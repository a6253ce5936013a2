"""KV events in either wire format become an index that is believed exactly as long as nothing is missing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.kv_events import SOON_S, KvIndex
from router.prefix import seed, token_chain

SIZE = 4
FIELDS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}
Json = dict[str, Any]


def stored(blocks: list[int], parent: int | None = None, **more: Any) -> Json:
    """Blocks of one token each, named by it."""
    return {
        "type": "BlockStored",
        "block_hashes": blocks,
        "parent_block_hash": parent,
        "token_ids": [block for block in blocks for _ in range(SIZE)],
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **more,
    }


def removed(*blocks: int) -> Json:
    """One copy of each of these is gone."""
    return {"type": "BlockRemoved", "block_hashes": list(blocks), "medium": "GPU"}


CLEARED: Json = {"type": "AllBlocksCleared"}


def batch(*events: Json, ts: float = 1.0, as_rows: bool = False) -> bytes:
    """A batch as vLLM writes it: events as maps, or as arrays before 0.24."""
    rows = [[each["type"], *(each.get(name) for name in FIELDS.get(each["type"], ()))] for each in events]
    return msgspec.msgpack.encode([ts, rows if as_rows else list(events), 0])


def chain(*blocks: int, salt: str = "", adapter: str = "") -> list[int]:
    """The chain of a prompt of these blocks."""
    return token_chain(seed("", adapter, salt), [block for block in blocks for _ in range(SIZE)], SIZE)


def index_of(*batches: bytes) -> KvIndex:
    """An index that was told all of these, from 0 on."""
    index = KvIndex("a")
    for number, payload in enumerate(batches):
        assert index.take(number, payload)
    index.is_live = True
    return index


@pytest.mark.parametrize("as_rows", [False, True])
def test_both_wire_formats_say_the_same(as_rows: bool) -> None:
    """Events as maps and as arrays of older servers are followed alike."""
    index = index_of(batch(stored([1, 2]), stored([3], 2), as_rows=as_rows), batch(removed(3), as_rows=as_rows, ts=2.0))
    assert index.exact.overlap(chain(1, 2, 3)) == 2
    assert index.take(2, batch(CLEARED, as_rows=as_rows))
    assert len(index.exact) == 0


def test_the_last_token_of_a_prompt_is_always_worked_on() -> None:
    """A prompt of whole blocks that are all cached still leaves its last block to do, as at vLLM."""
    index = index_of(batch(stored([1, 2, 3])))
    assert index.hit(chain(1, 2, 3), 3 * SIZE, 0.0) == 2 * SIZE
    assert index.hit(chain(1, 2, 3), 3 * SIZE + 1, 0.0) == 3 * SIZE


def test_a_prompt_that_was_placed_is_expected_until_its_events_arrive() -> None:
    """Between placing and its events a prompt is found, for a few seconds."""
    index = index_of(batch(stored([9])))
    index.expect(chain(1, 2), 0.0)
    assert index.hit(chain(1, 2, 3), 3 * SIZE, 0.0) == 2 * SIZE
    assert index.hit(chain(1, 2, 3), 3 * SIZE, SOON_S) == 0


def test_salts_and_adapters_are_kept_apart() -> None:
    """A tenant's block is found under its salt only, an adapter's under its name only."""
    index = index_of(
        batch(stored([1], extra_keys=[["ada"]]), stored([2], lora_name="law", extra_keys=[["law", "bob"]]), stored([3]))
    )
    assert index.exact.overlap(chain(1, salt="ada")) == 1
    assert index.exact.overlap(chain(2, salt="bob", adapter="law")) == 1
    assert index.exact.overlap(chain(3)) == 1
    assert [index.exact.overlap(chain(block)) for block in (1, 2)] == [0, 0]
    assert index.adapters == {"law"}


@pytest.mark.parametrize(
    "event",
    [
        stored([1, 2], extra_keys=[None, [["picture", 3]]]),
        stored([1, 2], extra_keys=[["salt", "embedding"], None]),
        stored([1, 2], token_ids=[1] * 4 * SIZE),
    ],
)
def test_what_token_ids_alone_do_not_tell_is_left_out(event: Json) -> None:
    """Blocks with pictures or embeddings, and events that skip blocks, are never taken for a hit."""
    index = index_of(batch(event))
    assert index.exact.overlap(chain(1, 2)) < 2
    assert index.counts["orphans"] >= 1
    assert index.is_believed


@pytest.mark.parametrize("event", [stored([1], kv_cache_spec_kind="mamba"), stored([1], locality="REMOTE")])
def test_other_caches_are_not_followed(event: Json) -> None:
    """Layers that keep a part of a prefix only, and caches elsewhere, say nothing of what is reused."""
    assert len(index_of(batch(event)).exact) == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff",
        batch({"type": "BlockStored"}),
        batch({"type": "Unheard"}),
        batch(stored([1], token_ids=[-1] * SIZE)),
        batch(stored([1], token_ids=[2**40] * SIZE)),
        msgspec.msgpack.encode([1.0, [7], 0]),
    ],
)
def test_a_batch_that_cannot_be_read_costs_trust_and_nothing_else(payload: bytes) -> None:
    """After one malformed batch the index is empty and not believed; it goes on, and a cleared cache mends it."""
    index = index_of(batch(stored([1])))
    assert index.take(1, payload)
    assert (len(index.exact), index.is_believed, index.counts["malformed"]) == (0, False, 1)
    assert index.take(2, batch(stored([2])))
    assert index.exact.overlap(chain(2)) == 1
    assert index.take(3, batch(CLEARED, stored([3])))
    assert index.is_believed
    assert index.exact.overlap(chain(3)) == 1


def test_a_missing_batch_is_noticed_and_one_that_comes_twice_is_not_counted_twice() -> None:
    """A hole is refused; after a replay what arrives again is passed over."""
    index = KvIndex("a")
    assert index.take(0, batch(stored([1])), is_replay=True)
    assert index.take(1, batch(stored([1]), ts=2.0), is_replay=True)
    assert not index.take(3, batch(removed(1)))
    assert index.take(0, batch(stored([1])))
    assert index.take(2, batch(removed(1)))
    assert index.exact.overlap(chain(1)) == 1


def test_who_comes_late_is_believed_once_it_proves_right() -> None:
    """An index that missed the first batches begins empty and without trust, and earns it by agreeing."""
    index = KvIndex("a")
    assert index.take(700, batch(stored([2], parent=1), stored([3])))
    index.is_live = True
    assert (index.is_believed, index.counts["lost"], index.exact.overlap(chain(3))) == (False, 1, 1)
    for _ in range(20):
        index.agreement.add(100, 100, 100)
    assert index.is_believed


def test_numbers_that_begin_anew_are_a_restart() -> None:
    """Without a replay, batch 0 after others means another server, which has nothing cached."""
    index = index_of(batch(stored([1])), batch(stored([2])))
    assert index.take(0, batch(stored([3])))
    assert [index.exact.overlap(chain(block)) for block in (1, 2, 3)] == [0, 0, 1]
    assert (index.is_believed, index.counts["restarts"]) == (True, 1)


def test_an_index_that_is_wrong_is_not_believed() -> None:
    """Disagreement with what the backend reports demotes it by itself, and a connection lost does so at once."""
    index = index_of(batch(stored([1])))
    index.disconnected()
    assert not index.is_believed
    index.is_live = True
    for _ in range(20):
        index.agreement.add(100, 0, 100)
    assert not index.is_believed


EVENTS = st.one_of(
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(stored),
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(lambda blocks: removed(*blocks)),
    st.just(CLEARED),
)


@settings(max_examples=200, deadline=None)
@given(batches=st.lists(st.lists(EVENTS, max_size=3), max_size=8), junk=st.dictionaries(st.integers(0, 7), st.binary()))
def test_whatever_arrives_the_index_goes_on(batches: list[list[Json]], junk: dict[int, bytes]) -> None:
    """No bytes raise; without junk the index is believed, with junk it is unless the cache was cleared later."""
    index, whole = KvIndex("a"), True
    for number, events in enumerate(batches):
        assert index.take(number, junk.get(number, batch(*events)))
        whole = number not in junk and (whole or CLEARED in events)
    assert index.agreement.is_trusted == whole
