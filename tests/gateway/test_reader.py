"""One upstream stream to deltas. The events are vLLM 0.32's own, recorded with `<think>` = 15 and `</think>` = 16."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.port import Call, Delta, Kind, Thinking
from gateway.backends.reader import MarkerIds, StreamReader
from gateway.errors import UpstreamError
from tests.scripted_stream import END_MARKER, THINK, Model, Say, Stream, Token, byte_tokens, tokens

Json = dict[str, Any]
A, T, I = Kind.ANSWER, Kind.THINKING, Kind.INJECTED  # noqa: E741  # the three kinds, in tables
IDS = MarkerIds(start=15, end=16)
HEAD = '{"id":"chatcmpl-b6e6","object":"chat.completion.chunk","created":1795410418,"model":"smollm2","choices":['
OPEN_PROMPT = "[1,9690,198,2683,359,253,5356,5646,11173,1,520,9531,198,15,198]"
CLOSED_PROMPT = "[1,9690,198,2683,359,15,1116,16,1116]"
USAGE = (
    '"usage":{"prompt_tokens":47,"total_tokens":91,"completion_tokens":44,"prompt_tokens_details":'
    '{"cached_tokens":32,"created_cache_tokens":32},"completion_tokens_details":{"reasoning_tokens":3}}'
)


def chunk(delta: str, ids: str | None = None, *, index: int = 0, finish: str = "null", logprobs: str = "null") -> bytes:
    """A chunk as vLLM writes it, with this delta and these token ids."""
    stop = ',"stop_reason":null' if finish != "null" else ""
    token_ids = "" if ids is None else f',"token_ids":{ids}'
    choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}{stop}{token_ids}}}'
    return f"{HEAD}{choice}]}}".encode()


def role(prompt: str = OPEN_PROMPT, *, index: int = 0) -> bytes:
    """The first chunk of a choice: its role, the prompt's ids beside it, and no token."""
    bare = chunk('{"role":"assistant","content":""}', index=index).decode()
    return f'{bare[:-1]},"prompt_token_ids":{prompt},"prompt_text":null}}'.encode()


def call(*, surface: Literal["chat", "completions"] = "chat", cap: int | None = 40, ids: bool = False) -> Call:
    """A call that may think."""
    return Call(
        surface=surface,
        request_id="req-1",
        model="smollm2",
        fields={},
        thinking=Thinking(enabled=True, cap=cap),
        max_tokens=100,
        wants_token_ids=ids,
    )


def reader(of: Call | None = None, *, markers: MarkerIds | None = IDS, **how: bool) -> StreamReader:
    """A reader of a backend that gives token ids."""
    return StreamReader(of or call(), markers, **{"expects_ids": True, **how})


def read(*events: bytes, by: StreamReader | None = None) -> list[Delta]:
    """The deltas of these events."""
    by = by or reader()
    out: list[Delta] = []
    for event in events:
        by.read(event, out)
    return out


def counts(deltas: list[Delta]) -> tuple[int, int, int]:
    """Thinking, answer and injected tokens together."""
    return sum(d.thinking for d in deltas), sum(d.answer for d in deltas), sum(d.injected for d in deltas)


def said(deltas: list[Delta]) -> tuple[str, str]:
    """Thinking and answer text as the deltas have it."""
    thinking = "".join(d.text for d in deltas if d.kind is T)
    return thinking, "".join(d.text for d in deltas if d.kind is A)


def shown(deltas: list[Delta], index: int = 0) -> tuple[str, str]:
    """Thinking and answer text as a client reads them in the events that pass."""
    parts: list[Json] = [
        choice["delta"]
        for delta in deltas
        if delta.wire
        for choice in json.loads(delta.wire)["choices"]
        if choice["index"] == index
    ]
    thinking = "".join(part.get("reasoning") or part.get("reasoning_content") or "" for part in parts)
    return thinking, "".join(part.get("content") or "" for part in parts)


# ------------------------------------------------------------------------------- one token per chunk


def test_the_role_chunk_carries_the_prompt_and_no_token() -> None:
    """The prompt is counted, its ids are cut out, and the role goes on."""
    (delta,) = read(role())
    assert (delta.prompt_tokens, delta.thinking + delta.answer + delta.injected) == (15, 0)
    assert delta.wire == chunk('{"role":"assistant","content":""}')
    assert delta.prompt_token_ids is None


def test_a_thinking_token_passes_as_it_came_less_its_id() -> None:
    """The event is forwarded byte for byte, without the ids that the client did not ask for."""
    by = reader()
    read(role(), by=by)
    (delta,) = read(chunk('{"reasoning":"user"}', "[4093]"), by=by)
    assert (delta.kind, delta.text, delta.thinking, delta.token_ids) == (T, "user", 1, [4093])
    assert delta.wire == chunk('{"reasoning":"user"}')


def test_a_recorded_stream_is_counted_by_its_ids() -> None:
    """Role, thinking, marker, answer, end of sequence, usage, [DONE]: every token falls where its id says."""
    by = reader(call(cap=3))
    deltas = read(
        role(),
        chunk('{"reasoning":"user"}', "[4093]"),
        chunk('{"reasoning":"\\n"}', "[198]"),
        chunk("{}", "[16]"),
        chunk('{"content":"If"}', "[1937]"),
        chunk('{"content":" so"}', "[588]"),
        chunk("{}", "[2]", finish='"stop"'),
        f'{HEAD}],{USAGE},"system_fingerprint":"vllm-0.32.0-02a57ec9"}}'.encode(),
        b"[DONE]",
        by=by,
    )
    assert counts(deltas) == (2, 3, 1)
    assert said(deltas) == shown(deltas) == ("user\n", "If so")
    assert [d.capped for d in deltas] == [False, False, False, True, False, False, False]
    assert [d.finish_reason for d in deltas] == [None] * 6 + ["stop"]
    assert by.is_done
    assert by.usage is not None
    assert (by.usage.prompt_tokens, by.usage.completion_tokens) == (47, 44)
    assert (by.usage.cached_tokens, by.usage.reasoning_tokens) == (32, 3)


def test_the_marker_chunk_is_counted_and_silenced() -> None:
    """The closing marker arrives as an empty delta: injected, and nothing for the client."""
    by = reader()
    read(role(), by=by)
    (delta,) = read(chunk("{}", "[16]"), by=by)
    assert (delta.injected, delta.kind is T, delta.text, delta.wire) == (1, False, "", b"")


def test_a_special_token_without_text_is_thinking_all_the_same() -> None:
    """An empty delta does not mean a marker: `<|im_start|>` inside the thinking has none either."""
    by = reader()
    deltas = read(role(), chunk("{}", "[1]"), chunk('{"reasoning":"a"}', "[7]"), by=by)
    assert counts(deltas) == (2, 0, 0)
    assert deltas[1].wire == b""


def test_the_end_by_length_brings_the_last_text() -> None:
    """A finish chunk with text passes whole, ids cut."""
    by = reader()
    read(role(CLOSED_PROMPT), by=by)
    (delta,) = read(chunk('{"content":" to"}', "[288]", finish='"length"'), by=by)
    assert (delta.kind, delta.text, delta.answer, delta.finish_reason) == (A, " to", 1, "length")
    assert delta.wire == chunk('{"content":" to"}', finish='"length"')


@pytest.mark.parametrize(("cap", "thought"), [(40, 39), (5, 4), (1, 0), (0, 0)])
def test_the_templates_newline_counts_towards_a_native_cap(cap: int, thought: int) -> None:
    """With a newline after `<think>` in the prompt vLLM ends the thinking one token before the cap; that is capped."""
    deltas = read(role(), *[chunk('{"reasoning":"a"}', "[7]")] * thought, chunk("{}", "[16]"), by=reader(call(cap=cap)))
    assert counts(deltas) == (thought, 0, 1)
    assert deltas[-1].capped


def test_a_closed_prompt_is_an_answer_from_the_first_token() -> None:
    """In instant mode the template closes the thinking in the prompt."""
    deltas = read(role(CLOSED_PROMPT), chunk('{"content":"If"}', "[1937]"))
    assert counts(deltas) == (0, 1, 0)


def test_a_prompt_without_markers_waits_for_an_opening_one() -> None:
    """A model that opens the thinking itself is counted from its own marker on."""
    deltas = read(
        role("[1,2,3]"),
        chunk("{}", "[15]"),
        chunk('{"reasoning":"hm"}', "[7]"),
        chunk("{}", "[16]"),
        chunk('{"content":"42"}', "[8]"),
    )
    assert counts(deltas) == (1, 1, 2)
    assert shown(deltas) == ("hm", "42")


# ------------------------------------------------------------------------------------- merged chunks


def test_tokens_merged_into_one_chunk_are_sorted_by_id() -> None:
    """Under load several tokens come together, the marker among them."""
    by = reader()
    read(role(), by=by)
    (delta,) = read(chunk('{"reasoning":"user\\nIf"}', "[4093,198,1937,16]"), by=by)
    assert (delta.kind, delta.text, delta.thinking, delta.injected) == (T, "user\nIf", 3, 1)
    assert delta.wire == chunk('{"reasoning":"user\\nIf"}')


@pytest.mark.parametrize("ids", [[4093, 16, 1937, 588], [4093, 16, 1937], [1937]])
def test_a_chunk_with_both_fields_becomes_two_deltas(ids: list[int]) -> None:
    """No delta mixes thinking with answer: texts part, and with them tokens and logprobs, if the marker is there."""
    by = reader()
    read(role(), by=by)
    logprobs = json.dumps({"content": [{"token": str(token)} for token in ids]})
    deltas = read(chunk('{"reasoning":"user","content":"If so"}', str(ids), finish='"stop"', logprobs=logprobs), by=by)
    assert [(d.kind, d.text, d.finish_reason) for d in deltas] == [(T, "user", None), (A, "If so", "stop")]
    at = ids.index(16) + 1 if 16 in ids else 0
    assert [d.token_ids for d in deltas] == [ids[:at], ids[at:]]
    assert [sum(counts([d])) for d in deltas] == [at, len(ids) - at]
    assert [[int(e["token"]) for e in d.logprobs["content"]] for d in deltas if d.logprobs] == [
        part for part in (ids[:at], ids[at:]) if part
    ]
    assert shown(deltas) == ("user", "If so")
    assert [json.loads(d.wire)["choices"][0]["delta"] for d in deltas] == [
        {"reasoning": "user"},
        {"content": "If so"},
    ]


def test_a_marker_chunk_may_carry_text() -> None:
    """A cap inside a character makes the marker's chunk bring what is left of it; the text goes on."""
    by = reader()
    read(role(), by=by)
    (delta,) = read(chunk('{"reasoning":"\ufffd\ufffd"}', "[16]"), by=by)
    assert (delta.kind, delta.text, delta.thinking, delta.injected) == (T, "\ufffd\ufffd", 0, 1)
    assert delta.wire == chunk('{"reasoning":"\ufffd\ufffd"}')


# ----------------------------------------------------------------------- fields that do not fit their tokens


def test_answer_text_in_the_thinking_field_is_moved() -> None:
    """A parser that lags behind (deepseek_r1, stop strings) puts the answer into `reasoning`: the ids know better."""
    by = reader()
    read(role(), chunk('{"reasoning":"user"}', "[4093]"), chunk("{}", "[16]"), by=by)
    (delta,) = read(chunk('{"reasoning":"assistant"}', "[520]"), by=by)
    assert (delta.kind, delta.answer) == (A, 1)
    assert json.loads(delta.wire)["choices"][0]["delta"] == {"content": "assistant"}
    (last,) = read(chunk('{"reasoning":" the"}', "[260]", finish='"stop"'), by=by)
    assert (last.kind, last.finish_reason) == (A, "stop")
    assert json.loads(last.wire)["choices"][0]["delta"] == {"content": " the"}
    assert json.loads(last.wire)["choices"][0]["finish_reason"] == "stop"


def test_thinking_text_in_the_answers_field_is_moved() -> None:
    """And the other way round: text whose tokens lie before the marker is thinking."""
    by = reader()
    read(role(), by=by)
    (delta,) = read(chunk('{"content":"hm"}', "[7]"), by=by)
    assert (delta.kind, delta.thinking) == (T, 1)
    assert json.loads(delta.wire)["choices"][0]["delta"] == {"reasoning": "hm"}


def test_a_moved_chunk_keeps_everything_else() -> None:
    """Id, time, model, logprobs and, if asked for, token ids survive the move."""
    by = reader(call(ids=True))
    read(role(), by=by)
    (delta,) = read(chunk('{"content":"hm"}', "[7]", logprobs='{"content":[{"token":"hm"}]}'), by=by)
    assert json.loads(delta.wire) == {
        "id": "chatcmpl-b6e6",
        "object": "chat.completion.chunk",
        "created": 1795410418,
        "model": "smollm2",
        "choices": [
            {
                "index": 0,
                "delta": {"reasoning": "hm"},
                "logprobs": {"content": [{"token": "hm"}]},
                "finish_reason": None,
                "token_ids": [7],
            }
        ],
    }


# ------------------------------------------------------------------------------- choices, tools, logprobs


def test_three_choices_are_counted_apart() -> None:
    """Each choice has its own markers; the prompt they share counts once."""
    deltas = read(
        role(index=0),
        role(index=1),
        role(index=2),
        chunk('{"reasoning":"a"}', "[7]", index=1),
        chunk("{}", "[16]", index=0),
        chunk('{"content":"b"}', "[8]", index=0),
        chunk('{"reasoning":"c"}', "[9]", index=1),
        chunk("{}", "[16]", index=2),
        chunk("{}", "[16]", index=1),
        chunk("{}", "[2]", index=2, finish='"stop"'),
    )
    by_choice = {index: counts([d for d in deltas if d.index == index]) for index in range(3)}
    assert by_choice == {0: (0, 1, 1), 1: (2, 0, 1), 2: (0, 1, 1)}
    assert sum(delta.prompt_tokens for delta in deltas) == 15
    assert [shown(deltas, index) for index in range(3)] == [("", "b"), ("ac", ""), ("", "")]


def test_several_choices_in_one_chunk_are_taken_apart() -> None:
    """A server that batches choices is read too; each choice goes out as a chunk of its own."""
    both = chunk('{"reasoning":"a"}', "[7]").decode()[:-2] + "," + chunk("{}", "[16]", index=1).decode()[len(HEAD) :]
    by = reader()
    read(role(index=0), role(index=1), by=by)
    first, second = read(both.encode(), by=by)
    assert (first.index, first.thinking, json.loads(first.wire)["choices"][0]["delta"]) == (0, 1, {"reasoning": "a"})
    assert (second.index, second.injected, second.wire) == (1, 1, b"")


def test_tool_calls_are_answer_tokens() -> None:
    """The call's own chunks pass; tokens that are still being parsed are counted and silent."""
    by = reader()
    read(role(CLOSED_PROMPT), by=by)
    named = (
        '{"content":null,"tool_calls":[{"id":"chatcmpl-tool-969","type":"function","index":0,'
        '"function":{"name":"get_weather"}}]}'
    )
    arguments = '{"content":null,"tool_calls":[{"index":0,"function":{"arguments":"1"}}]}'
    deltas = read(
        chunk(named, "[1002]"),
        chunk("{}", "[7]"),
        chunk(arguments, "[8]"),
        chunk("{}", "[2]", finish='"tool_calls"'),
        by=by,
    )
    assert counts(deltas) == (0, 4, 0)
    assert [bool(d.wire) for d in deltas] == [True, False, True, True]
    assert deltas[0].wire == chunk(named)
    assert deltas[0].tool_calls[0]["function"] == {"name": "get_weather"}
    assert deltas[3].finish_reason == "tool_calls"


@pytest.mark.parametrize("inline", [False, True])
def test_a_call_that_arrives_with_thinking_is_no_thinking(inline: bool) -> None:
    """Thinking and a tool call merged into one chunk part, so that hiding the one does not lose the other."""
    by = reader(inline=inline)
    read(role(), by=by)
    field = "content" if inline else "reasoning"
    both = f'{{"{field}":"hm","tool_calls":[{{"index":0,"function":{{"name":"f"}}}}]}}'
    thinking, called = read(chunk(both, "[7,16,1002]"), by=by)
    assert (thinking.kind, thinking.text, thinking.tool_calls, counts([thinking])) == (T, "hm", None, (1, 0, 1))
    assert (called.kind, called.text, counts([called])) == (A, "", (0, 1, 0))
    assert json.loads(called.wire)["choices"][0]["delta"] == {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}


def test_logprobs_keep_even_a_marker_alive() -> None:
    """A client that asked for logprobs gets those of markers too, so their chunk is not silenced."""
    logprobs = '{"content":[{"token":"</think>","logprob":-21.7,"bytes":null,"top_logprobs":[]}]}'
    by = reader()
    read(role(), by=by)
    (delta,) = read(chunk("{}", "[16]", logprobs=logprobs), by=by)
    assert delta.wire == chunk("{}", logprobs=logprobs)
    assert delta.logprobs["content"][0]["logprob"] == -21.7


def test_who_asks_for_token_ids_gets_them() -> None:
    """Then events pass with their ids, and the prompt's ids are told for every choice."""
    by = reader(call(ids=True))
    first, second = read(role(), role(index=1), by=by)
    assert (first.wire, second.wire) == (role(), role(index=1))
    assert first.prompt_token_ids == second.prompt_token_ids == json.loads(OPEN_PROMPT)
    assert (first.prompt_tokens, second.prompt_tokens) == (15, 0)
    (token,) = read(chunk('{"reasoning":"user"}', "[4093]"), by=by)
    assert token.wire == chunk('{"reasoning":"user"}', "[4093]")
    (marker,) = read(chunk("{}", "[16]"), by=by)
    assert (marker.token_ids, marker.wire) == ([16], b"")


def test_an_error_in_the_stream_is_raised() -> None:
    """An engine that fails makes vLLM send an error object and then [DONE]: the first of them ends it."""
    by = reader()
    read(role(), by=by)
    with pytest.raises(UpstreamError, match="EngineCore encountered an issue"):
        read(b'{"error":{"message":"EngineCore encountered an issue","type":"InternalServerError","code":500}}', by=by)
    assert not by.is_done


# ------------------------------------------------------------------------------------ without token ids


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_without_ids_the_field_says_what_it_is(field: str) -> None:
    """A server without token ids is counted by events, in either name of the thinking field; the role is no token."""
    by = reader(markers=None, expects_ids=False)
    deltas = read(
        chunk('{"role":"assistant","content":""}'),
        chunk(f'{{"{field}":"hm"}}'),
        chunk(f'{{"{field}":" so"}}'),
        chunk('{"content":"42"}'),
        chunk('{"tool_calls":[{"index":0}]}'),
        chunk("{}", finish='"stop"'),
        by=by,
    )
    assert counts(deltas) == (2, 2, 0)
    assert said(deltas) == shown(deltas) == ("hm so", "42")
    assert deltas[1].wire == chunk(f'{{"{field}":"hm"}}')


def test_an_event_without_ids_is_no_token_where_ids_are_given() -> None:
    """A backend that gives ids and sends an event without them has sent no token."""
    deltas = read(role(), chunk('{"reasoning":"a"}', "[7]"), chunk('{"reasoning":"b"}', "null"))
    assert counts(deltas) == (1, 0, 0)
    assert shown(deltas) == ("ab", "")


# ----------------------------------------------------------------------------------------- inline markers

INLINE = ["<think>", "hm ", "so", "</think>", "4", "2"]


def test_inline_markers_are_split_by_text_where_there_are_no_ids() -> None:
    """Thinking that arrives as marked content goes on as `reasoning`, the markers go nowhere."""
    by = reader(markers=None, expects_ids=False, inline=True)
    events = [chunk('{"role":"assistant","content":""}'), *[chunk(json.dumps({"content": text})) for text in INLINE]]
    deltas = read(*events, chunk("{}", finish='"stop"'), by=by)
    assert said(deltas) == shown(deltas) == ("hm so", "42")
    assert counts(deltas) == (2, 2, 2)
    assert json.loads(deltas[0].wire)["choices"][0]["delta"]["role"] == "assistant"
    assert json.loads(deltas[-1].wire)["choices"][0]["finish_reason"] == "stop"


def test_inline_markers_are_counted_by_ids_where_they_are_tokens() -> None:
    """With ids the text is still split by markers, and the counts are exact."""
    by = reader(inline=True)
    ids = [15, 7, 8, 16, 9, 10]
    deltas = read(
        role("[1,2]"),
        *[chunk(json.dumps({"content": text}), f"[{token}]") for text, token in zip(INLINE, ids, strict=True)],
        chunk("{}", "[2]", finish='"stop"'),
        by=by,
    )
    assert said(deltas) == shown(deltas) == ("hm so", "42")
    assert counts(deltas) == (2, 3, 2)


def test_markers_of_several_tokens_are_counted_once_they_are_certain() -> None:
    """Tokens whose text may be a marker are sorted when it is one, or turns out to be none."""
    by = reader(markers=None, inline=True, opened=True)
    texts = ["a", " <", "/b", "</", "think", ">", "42"]
    deltas = read(
        role("[1,2]"), *[chunk(json.dumps({"content": text}), f"[{20 + i}]") for i, text in enumerate(texts)], by=by
    )
    assert said(deltas) == shown(deltas) == ("a </b", "42")
    assert counts(deltas) == (3, 1, 3)


def test_merged_inline_tokens_are_shared_out_by_length() -> None:
    """Several tokens in one text without marker ids are sorted in proportion, and none is lost."""
    by = reader(markers=None, inline=True, opened=True)
    deltas = read(role("[1,2]"), chunk('{"content":"aaaaaaaa</think>bbbbbbbb"}', "[21,22,23]", finish='"stop"'), by=by)
    assert counts(deltas) == (1, 1, 1)
    assert [(d.kind, d.text) for d in deltas[1:]] == [(T, "aaaaaaaa"), (A, "bbbbbbbb")]


def test_the_first_words_of_an_answer_are_not_shown_twice() -> None:
    """Text that is held back because it might open the thinking goes out once, when it is certain."""
    by = reader(markers=None, expects_ids=False, inline=True)
    deltas = read(chunk('{"role":"assistant","content":"<th"}'), chunk('{"content":"e end>"}'), by=by)
    assert shown(deltas) == said(deltas) == ("", "<the end>")
    assert counts(deltas) == (0, 2, 0)


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "<th", "</", ">", "a", "b ", "\n", "😀"]), min_size=1, max_size=10
    ).map("".join),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    has_ids=st.booleans(),
    opened=st.booleans(),
)
def test_inline_text_reads_the_same_in_any_pieces(text: str, cuts: list[int], has_ids: bool, opened: bool) -> None:
    """However inline thinking is cut into events, the client reads one text, and every token is counted once."""

    def seen(pieces: list[str]) -> tuple[tuple[str, str], tuple[int, int, int]]:
        by = reader(markers=None, expects_ids=has_ids, inline=True, opened=opened)
        events = [
            chunk(json.dumps({"content": piece}), "[7]" if has_ids else None, finish='"stop"' if last else "null")
            for piece, last in zip(pieces, [False] * (len(pieces) - 1) + [True], strict=True)
        ]
        deltas = read(*events, by=by)
        assert said(deltas) == shown(deltas)
        return said(deltas), counts(deltas)

    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders) if a < b]
    texts, tokens_ = seen(pieces)
    assert texts == seen([text])[0]
    assert sum(tokens_) == len(pieces)


# -------------------------------------------------------------------------------------- text completions


def text_chunk(text: str, ids: str, *, index: int = 0, prompt: str = "null", finish: str = "null") -> bytes:
    """A chunk of `/v1/completions`, where the prompt's ids sit in the choice."""
    choice = (
        f'{{"index":{index},"text":{json.dumps(text)},"logprobs":null,"finish_reason":{finish},"stop_reason":null,'
        f'"prompt_token_ids":{prompt},"token_ids":{ids}}}'
    )
    return f'{{"id":"cmpl-1","object":"text_completion","created":1,"model":"smollm2","choices":[{choice}]}}'.encode()


def test_text_completions_are_answers_by_ids() -> None:
    """A raw prompt has no markers: every token is answer, and the prompt's ids are cut out of the choice."""
    by = reader(call(surface="completions"), markers=None)
    deltas = read(
        text_chunk("</think>user", "[16,4093]", prompt="[1,2,3]"),
        text_chunk("\nIf", "[198]", finish='"length"'),
        by=by,
    )
    assert counts(deltas) == (0, 3, 0)
    assert (deltas[0].prompt_tokens, deltas[1].finish_reason) == (3, "length")
    assert b"token_ids" not in deltas[0].wire
    assert [json.loads(d.wire)["choices"][0]["text"] for d in deltas] == ["</think>user", "\nIf"]


def test_several_prompts_and_choices_keep_their_indexes() -> None:
    """Two prompts times two choices are four indexes; each tells its own prompt's ids to who asked."""
    by = reader(call(surface="completions", ids=True), markers=None)
    deltas = read(
        *[text_chunk("a", "[7]", index=i, prompt="[1,2]" if i < 2 else "[3]") for i in range(4)],
        by=by,
    )
    assert [d.index for d in deltas] == [0, 1, 2, 3]
    assert [d.prompt_token_ids for d in deltas] == [[1, 2], [1, 2], [3], [3]]


def test_several_text_choices_in_one_chunk_leave_the_shape_to_the_edge() -> None:
    """A rebuilt text completion is no chat chunk: without a wire the encoder writes it."""
    one, other = text_chunk("a", "[7]").decode(), text_chunk("b", "[8]", index=1).decode()
    by = reader(call(surface="completions"), markers=None)
    both = one[:-2] + "," + other[other.index("[") + 1 :]
    assert [(d.index, d.text, d.wire) for d in read(both.encode(), by=by)] == [(0, "a", b""), (1, "b", b"")]


# ------------------------------------------------------------------------------------------ whole streams


@settings(max_examples=100, deadline=None)
@given(
    thinking=st.text(alphabet="ab ä😀", max_size=12),
    answer=st.text(alphabet="cd ö", max_size=12),
    merged=st.integers(1, 5),
    n=st.integers(1, 3),
    by_bytes=st.booleans(),
    opens_itself=st.booleans(),
    cap=st.none() | st.integers(0, 8),
    wants_ids=st.booleans(),
)
def test_a_whole_stream_is_counted_token_by_token_however_it_is_merged(
    thinking: str,
    answer: str,
    merged: int,
    n: int,
    by_bytes: bool,
    opens_itself: bool,
    cap: int | None,
    wants_ids: bool,
) -> None:
    """Over choices, merges, split characters and caps: counts are those of the tokens, texts those of the model."""
    make = byte_tokens if by_bytes else tokens
    model = Model(start_marker=[Token(THINK, "<think>")] if opens_itself else (), end_marker=END_MARKER)
    request: Json = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "hi"}],
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
        "thinking_token_budget": cap,
        "chat_template_kwargs": {"enable_thinking": not opens_itself},
    }
    say = Say(thinking=make(thinking), answer=make(answer))
    choices = [model.generate(request, i, say, thinks=True) for i in range(n)]
    stream = Stream(model=model, request=request, surface="chat", choices=choices, tokens_per_event=merged)
    by = reader(call(cap=cap, ids=wants_ids))
    deltas = read(*[event.removeprefix(b"data: ").removesuffix(b"\n\n") for event in stream.events()], by=by)
    assert by.is_done
    for choice in choices:
        mine = [d for d in deltas if d.index == choice.index]
        kinds = [kind for kind, _ in choice.parts]
        assert counts(mine) == (
            kinds.count("thinking"),
            kinds.count("answer") + kinds.count("eos"),
            kinds.count("marker"),
        )
        assert said(mine) == shown(deltas, choice.index) == (choice.text("thinking"), choice.text("answer"))
        assert [token for d in mine for token in d.token_ids] == choice.ids()
        assert sum(d.finish_reason is not None for d in mine) == 1
    assert b"token_ids" not in b"".join(d.wire for d in deltas) or wants_ids
