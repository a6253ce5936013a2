"""Bytes to events, events to chunks, and token ids cut out without touching anything else."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.events import (
    MAX_EVENT_BYTES,
    TAIL_TOKENS,
    EventSplitter,
    cut_prompt_ids,
    cut_token_ids,
    decode_chunk,
    prompt_ids,
)
from gateway.errors import UpstreamError

Json = dict[str, Any]
FEW = settings(max_examples=200, deadline=None)
LINES = st.sampled_from(
    [
        b"data: {}",
        b"data: a",
        b"data:b",
        b"data: ",
        b"data:",
        b"data:  two spaces",
        b": a comment",
        b":",
        b"event: ping",
        b"id: 7",
        b"retry: 5",
        b"",
        b"",
        b"",
        "data: ä€😀".encode(),
        b"database: no data",
        b" data: indented",
    ]
)
NASTY = st.sampled_from(
    [
        ',"token_ids":[1,2]',
        ',"token_ids":[',
        '\\",\\"token_ids\\":[7]',
        '"token_ids":null',
        ',"prompt_token_ids":[1,2]',
        ',"prompt_token_ids":[',
        '"],"prompt_token_ids":[9]',
        ',"prompt_text":null',
        '","finish_reason":"stop","token_ids":[1]}]}',
        "]",
        "\\",
        "😀",
        "\n",
        "plain",
    ]
)
TEXT = st.lists(NASTY, max_size=4).map("".join)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=60)


def whole(stream: bytes) -> list[bytes]:
    """The payloads of a stream that arrives in one piece."""
    return pieces([stream])


def pieces(chunks: list[bytes]) -> list[bytes]:
    """The payloads of a stream that arrives in these pieces."""
    splitter = EventSplitter()
    return [payload for chunk in chunks for payload in splitter.feed(chunk)] + splitter.finish()


def by_the_book(stream: bytes) -> list[bytes]:
    """The payloads as the HTML standard reads them, line by line; events without content are left out."""
    payloads, data = [], list[bytes]()
    for line in [*stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"), b""]:
        if not line:
            payloads.append(b"\n".join(data))
            data = []
        elif line.startswith(b"data:"):
            value = line[5:]
            data.append(value[1:] if value.startswith(b" ") else value)
    return [payload for payload in payloads if payload]


def dump(value: object) -> bytes:
    """JSON as vLLM writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


# ----------------------------------------------------------------------------------------------- framing


@pytest.mark.parametrize(
    ("stream", "payloads"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"event: x\nid: 1\ndata: a\n\n", [b"a"]),
        (b": ping\n\ndata: a\n\n: ping\n\n", [b"a"]),
        (b"data: \n\ndata:\n\n", []),
        (b"\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"data: a", [b"a"]),
        (b"data: a\n", [b"a"]),
        (b"data: [DONE]\n\n", [b"[DONE]"]),
        (b"", []),
    ],
)
def test_events_are_framed_as_the_standard_says(stream: bytes, payloads: list[bytes]) -> None:
    """Line endings, comments, other fields, several data lines and a missing end are all understood."""
    assert whole(stream) == payloads
    assert pieces([stream[i : i + 1] for i in range(len(stream))]) == payloads


@FEW
@given(
    lines=st.lists(LINES, max_size=12),
    ending=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    cuts=st.lists(st.integers(0, 300), max_size=8),
)
def test_chunk_borders_do_not_change_the_events(lines: list[bytes], ending: bytes, cuts: list[int]) -> None:
    """However the bytes are cut, also inside CRLF and inside a character, the events are those of the standard."""
    stream = b"".join(line + ending for line in lines)
    borders = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    chunks = [stream[a:b] for a, b in pairwise(borders)]
    assert pieces(chunks) == whole(stream) == by_the_book(stream)


def test_an_event_is_given_out_as_soon_as_it_is_complete() -> None:
    """Nothing waits for the next event, and nothing is given out before its blank line."""
    splitter = EventSplitter()
    assert splitter.feed(b"data: a\n") == []
    assert splitter.feed(b"\ndata: b") == [b"a"]
    assert splitter.feed(b"\n\n") == [b"b"]
    assert splitter.feed(b"data: c\n\n") == [b"c"]
    assert splitter.finish() == []


def test_an_event_without_an_end_is_refused() -> None:
    """A backend that never ends an event cannot fill the memory."""
    splitter = EventSplitter()
    splitter.feed(b"data: " + b"x" * (MAX_EVENT_BYTES - 6))
    with pytest.raises(UpstreamError, match="without an end"):
        splitter.feed(b"x")


# ------------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize(
    "event",
    [
        b"",
        b"x",
        b"[]",
        b"null",
        b'"[DONE]"',
        b'{"choices":5}',
        b'{"choices":[5]}',
        b'{"choices":[{"token_ids":["a"]}]}',
        b'{"choices":[{"delta":{"content":5}}]}',
        b'{"choices":[{"index":"0"}]}',
        b'{"usage":{"prompt_tokens":"many"}}',
        b'{"choices":[]',
        b'{"choices":' + b"[" * 100_000,
        b'{"choices":[{"delta":{"content":"\xff"}}]}',
    ],
)
def test_what_is_no_chunk_is_the_backends_fault(event: bytes) -> None:
    """Anything that cannot be read is an UpstreamError, and so a 502."""
    with pytest.raises(UpstreamError, match="not a completion chunk"):
        decode_chunk(event)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ({"message": "engine died", "code": 500}, "engine died"),
        ({"message": None}, "no reason given"),
        ({}, "no reason given"),
        ("out of memory", "out of memory"),
        (5, "5"),
    ],
)
def test_an_error_in_the_stream_is_raised_with_its_message(error: object, said: str) -> None:
    """A top-level `error` ends the stream as the backend's failure."""
    with pytest.raises(UpstreamError, match=f"The backend failed: {said}"):
        decode_chunk(dump({"error": error}))


def test_unknown_parts_of_a_chunk_are_ignored() -> None:
    """A chunk may hold more than the gateway reads, and less."""
    chunk = decode_chunk(b'{"x":1,"choices":[{"delta":{"content":"a","y":[{}]},"z":null}],"error":null}')
    assert chunk.choices[0].delta is not None
    assert (chunk.choices[0].delta.content, chunk.choices[0].index, chunk.usage) == ("a", 0, None)


# --------------------------------------------------------------------------------------------- cut ids


def chunk_of(text: str, ids: list[int] | None, *, role: str | None = None) -> Json:
    """A chat chunk whose every string is `text`, with the key order of vLLM."""
    delta: Json = {"role": role} if role else {}
    entry = {"token": text, "logprob": -1.5, "bytes": [1], "top_logprobs": []}
    call = {"index": 0, "function": {"arguments": text}}
    choice: Json = {
        "index": 0,
        "delta": {**delta, "content": text, "tool_calls": [call]},
        "logprobs": {"content": [entry]},
        "finish_reason": None,
        "stop_reason": text,
    }
    if ids is not None:
        choice["token_ids"] = ids
    return {"id": text, "object": "chat.completion.chunk", "created": 1, "model": text, "choices": [choice]}


@FEW
@given(text=TEXT, ids=IDS)
def test_cutting_token_ids_touches_nothing_else(text: str, ids: list[int]) -> None:
    """The chunk without its ids is the chunk without its ids, whatever its strings look like."""
    chunk = chunk_of(text, ids)
    assert json.loads(cut_token_ids(dump(chunk))) == chunk_of(text, None)
    without = dump(chunk_of(text, None))
    assert cut_token_ids(without) == without


@FEW
@given(text=TEXT, ids=IDS, token_ids=IDS)
def test_cutting_prompt_ids_touches_nothing_else(text: str, ids: list[int], token_ids: list[int]) -> None:
    """The prompt's ids and its empty text go, are counted, and their end is remembered; the rest stays."""
    chunk = {**chunk_of(text, token_ids), "prompt_token_ids": ids, "prompt_text": None}
    event, count, tail = cut_prompt_ids(dump(chunk))
    assert json.loads(event) == chunk_of(text, token_ids)
    assert count == len(ids)
    assert tail == ids[len(ids) - len(tail) :]
    assert len(tail) == min(len(ids), TAIL_TOKENS)
    assert prompt_ids(dump(chunk)) == ids
    assert json.loads(cut_token_ids(event)) == chunk_of(text, None)


@FEW
@given(text=TEXT)
def test_without_prompt_ids_an_event_stays_as_it_is(text: str) -> None:
    """Text that only looks like prompt ids is left alone."""
    event = dump(chunk_of(text, None))
    assert cut_prompt_ids(event) == (event, 0, [])


@given(size=st.integers(150, 170), last=st.integers(0, 9))
def test_the_tail_is_right_where_its_window_begins(size: int, last: int) -> None:
    """Around the size of the window that is looked at, no id is cut in half."""
    ids = [int("7" * (size % 9 + 1)), *([1234567] * (size // 8)), last]
    _, count, tail = cut_prompt_ids(dump({"choices": [], "prompt_token_ids": ids}))
    assert (count, tail) == (len(ids), ids[-TAIL_TOKENS:])


def test_prompt_ids_inside_a_choice_are_cut_too() -> None:
    """Text completions carry them in the choice, before the token ids."""
    choice = {"index": 0, "text": "a", "stop_reason": None, "prompt_token_ids": [1, 2, 3], "token_ids": [7]}
    event, count, tail = cut_prompt_ids(dump({"choices": [choice]}))
    assert json.loads(event) == {"choices": [{"index": 0, "text": "a", "stop_reason": None, "token_ids": [7]}]}
    assert (count, tail) == (3, [1, 2, 3])


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices":[],"prompt_token_ids":[1,2',
        b'{"choices":[],"prompt_token_ids":[1,"a"]}',
        b'{"choices":[],"prompt_token_ids":[[1],[2]]}',
        b'{"choices":[],"prompt_token_ids":[1.5]}',
    ],
)
def test_broken_prompt_ids_are_the_backends_fault(event: bytes) -> None:
    """Ids that are none end as an UpstreamError, not as a crash."""
    with pytest.raises(UpstreamError):
        decode_chunk(cut_prompt_ids(event)[0])
