"""Streams without token ids, with markers inside the text, of text completions, and whole streams of any shape."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway.vllm_chunks import A, Json, T, call, chunk, counts, read, reader, role, said, shown
from tests.scripted_stream import END_MARKER, THINK, Model, Say, Stream, Token, byte_tokens, tokens


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


def test_text_without_ids_counts_where_ids_are_given() -> None:
    """A backend that stops giving ids cannot think past its cap unseen: text counts, an empty event does not."""
    deltas = read(role(), chunk('{"reasoning":"a"}', "[7]"), chunk('{"reasoning":"b"}', "null"), chunk("{}", "null"))
    assert counts(deltas) == (2, 0, 0)
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
    """However inline thinking is cut into events, the client reads one text, and each token counts, with an id once."""

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
    assert sum(tokens_) == len(pieces) if has_ids else sum(tokens_) >= len(pieces)


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
