"""A stream with token ids to deltas: the ids say what each token is, whatever field its text came in."""

from __future__ import annotations

import json

import pytest

from gateway.errors import UpstreamError
from tests.gateway.vllm_chunks import (
    CLOSED_PROMPT,
    HEAD,
    OPEN_PROMPT,
    USAGE,
    A,
    T,
    call,
    chunk,
    counts,
    read,
    reader,
    role,
    said,
    shown,
)

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
    at = ids.index(16) + 1 if 16 in ids else len(ids)  # the thinking is open
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
