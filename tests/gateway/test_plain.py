"""A backend's whole answer made ours: counted, stripped of what nobody asked for, and otherwise untouched."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budget.price import PriceTable
from budget.tokens import TokenCounts
from gateway.backends.reader import MarkerIds
from gateway.edge.extension import CapReport, Report, Spent, UsageReport
from gateway.edge.plain import PlainAnswer
from gateway.errors import UpstreamError
from gateway.tally import Tally

Json = dict[str, Any]
COUNTS, SPENT = TokenCounts(prompt=3, answer=2), Spent(tokens=5, thinking_tokens=0, nano_usd=0)
USAGE = UsageReport.of(COUNTS)
REPORT = Report(
    mode="instant",
    mode_reason="asked by model",
    capped=False,
    cap=CapReport(tokens=0, source="mode", enforcement="switch", hit=False),
    tokens=COUNTS,
    hold=SPENT,
    settled=SPENT,
    cost_usd=0.0,
    backend="a",
    request_id="req-1",
)
IDS = MarkerIds(start=15, end=16)
CLOSED, OPEN = [1, 520, 15, 1116, 16, 1116], [1, 520, 9531, 198, 15, 198]
NASTY = st.lists(
    st.sampled_from(
        [
            ',"token_ids":[1]',
            ',"prompt_token_ids":[2]',
            '"],"token_ids":[',
            '"model":"up/qwen"',
            "\\",
            '"',
            "😀",
            "\n",
            "a",
        ]
    ),
    max_size=5,
).map("".join)


def choice(content: str | None = "42", *, index: int = 0, ids: list[int] | None = None, **message: Any) -> Json:
    """One choice as vLLM writes it."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": content, "refusal": None, "reasoning": None, **message},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": ids,
        "routed_experts": None,
    }


def body(*choices: Json, prompt: list[int] | None = None, **more: object) -> Json:
    """A whole answer as vLLM 0.32 writes it, nulls included."""
    return {
        "id": "chatcmpl-ac89",
        "object": "chat.completion",
        "created": 1795410446,
        "model": "up/qwen",
        "choices": list(choices),
        "service_tier": None,
        "system_fingerprint": "vllm-0.32.0-02a57ec9",
        "usage": {
            "prompt_tokens": 6,
            "total_tokens": 9,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 4, "created_cache_tokens": 0, "multimodal_tokens": None},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        "prompt_logprobs": None,
        "prompt_token_ids": prompt,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
        **more,
    }


def dump(value: object) -> bytes:
    """JSON as vLLM writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def answered(
    answer: Json, *, markers: MarkerIds | None = IDS, model: str | None = None, ids: bool = False
) -> tuple[Json, Tally]:
    """What the client gets, and what was counted."""
    plain, tally = PlainAnswer(dump(answer), markers), Tally(PriceTable())
    plain.count(tally)
    out = plain.render(model, usage=USAGE, extension=REPORT, wants_token_ids=ids)
    decoded: Json = json.loads(out)
    return decoded, tally


def test_an_answer_passes_less_what_nobody_asked_for() -> None:
    """Ids and the backend's internals go, usage and `thinkgate` are ours, everything else is as it came."""
    whole = body(choice(ids=[7, 8, 2]), prompt=CLOSED, surprise={"deep": [1.50]})
    client, _ = answered(whole)
    hidden = {"prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params", "metrics"}
    expected = {name: value for name, value in whole.items() if name not in hidden}
    without = {name: value for name, value in whole["choices"][0].items() if name != "token_ids"}
    ours = {"usage": msgspec.to_builtins(USAGE), "thinkgate": msgspec.to_builtins(REPORT)}
    assert client == {**expected, "choices": [without], **ours}


def test_the_public_name_replaces_the_backends() -> None:
    """A model with another name at its backend is called by its public one; without, the name stays."""
    assert answered(body(choice(ids=[7])), model="qwen")[0]["model"] == "qwen"
    assert answered(body(choice(ids=[7])))[0]["model"] == "up/qwen"


def test_tokens_are_counted_by_their_ids() -> None:
    """With a closed prompt all tokens are answer, end of sequence included, and usage is kept for the rest."""
    _, tally = answered(body(choice(ids=[7, 8, 2]), prompt=CLOSED))
    assert (tally.answer, tally.wasted, tally.injected, tally.has_ids) == (3, 0, 0, True)
    counts = tally.counts()
    assert (counts.prompt, counts.cached, counts.answer, counts.thinking) == (2, 4, 3, 0)


def test_without_ids_the_usage_counts() -> None:
    """A backend without ids is taken at its own word."""
    _, tally = answered(body(choice()), markers=None)
    assert (tally.has_ids, tally.counts().answer) == (False, 3)


def test_thinking_in_instant_mode_is_cut_and_wasted() -> None:
    """A model that thinks all the same: its thinking reaches no client, and is counted as wasted."""
    client, tally = answered(body(choice("42", ids=[7, 8, 16, 9, 2], reasoning="hm so"), prompt=OPEN))
    assert client["choices"][0]["message"]["content"] == "42"
    assert "hm so" not in json.dumps(client)
    assert (tally.wasted, tally.injected, tally.answer) == (2, 1, 2)


def test_thinking_that_the_model_opens_itself_is_cut_too() -> None:
    """Without a marker in the prompt the model's own one opens the thinking."""
    client, tally = answered(body(choice(None, ids=[15, 7], reasoning="hm"), prompt=[1, 2]))
    assert (client["choices"][0]["message"]["content"], tally.wasted, tally.injected) == ("", 1, 1)


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_an_answer_in_the_thinking_field_is_moved(field: str) -> None:
    """A parser (deepseek_r1) that calls every instant answer reasoning is corrected: the ids show no thinking."""
    text: Json = {field: "it is 42"}
    client, tally = answered(body(choice(None, ids=[7, 2], **text), prompt=CLOSED))
    message = client["choices"][0]["message"]
    assert message["content"] == "it is 42"
    assert field not in message
    assert (tally.wasted, tally.answer) == (0, 2)


@pytest.mark.parametrize("length", [1, 2, 12, 60, 400])
@pytest.mark.parametrize("is_open", [True, False])
def test_the_end_of_any_prompt_tells_whether_it_is_open(length: int, is_open: bool) -> None:
    """Short and long prompts alike: the last marker among their last tokens decides."""
    prompt = [*[1234567] * length, *([15] if is_open else [15, 16]), 198]
    _, tally = answered(body(choice(ids=[7, 8]), prompt=prompt))
    assert (tally.wasted, tally.answer) == ((2, 0) if is_open else (0, 2))
    _, bare = answered(body(choice(ids=[7]), prompt=[15]))
    assert bare.wasted == 1


def test_who_asks_for_token_ids_gets_them() -> None:
    """Then output and prompt ids stay where vLLM puts them."""
    client, _ = answered(body(choice(ids=[7, 2]), prompt=CLOSED), ids=True)
    assert (client["choices"][0]["token_ids"], client["prompt_token_ids"]) == ([7, 2], CLOSED)


def test_several_choices_are_counted_and_stripped_together() -> None:
    """Every choice loses its ids and adds its tokens."""
    client, tally = answered(body(choice("a", ids=[7]), choice("b", index=1, ids=[8, 9]), prompt=CLOSED))
    assert [c["message"]["content"] for c in client["choices"]] == ["a", "b"]
    assert "token_ids" not in json.dumps(client)
    assert tally.answer == 3


def test_text_completions_have_no_thinking() -> None:
    """A raw prompt's tokens are all answer, and the prompt's ids go from the choice."""
    text = {"index": 0, "text": "</think>a", "finish_reason": "stop", "prompt_token_ids": [1, 2], "token_ids": [16, 7]}
    client, tally = answered(body(text))
    assert client["choices"] == [{"index": 0, "text": "</think>a", "finish_reason": "stop"}]
    assert (tally.answer, tally.injected) == (2, 0)


def test_missing_choices_are_the_backends_fault() -> None:
    """Fewer choices than were asked for is a bad answer; more is not our business."""
    plain = PlainAnswer(dump(body(choice(), choice(index=1))), IDS)
    plain.require(1)
    plain.require(2)
    with pytest.raises(UpstreamError, match="fewer choices"):
        plain.require(3)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b"{}",
        b'{"choices":{}}',
        b'{"choices":[5]}',
        b'{"choices":[{"index":0,"message":"hi"}]}',
        b'{"choices":[{"index":0,"token_ids":["a"]}]}',
        b'{"choices":[],"usage":{"prompt_tokens":"many"}}',
        b'{"choices":[',
        b'{"choices":[{"index":0,"message":{"reasoning":"\xff"}}]}',
        b'{"choices":[],"x":' + b"[" * 100_000,
        b'{"error":{"message":"no"}}',
    ],
)
def test_what_is_no_completion_is_the_backends_fault(answer: bytes) -> None:
    """Anything that cannot be read is an UpstreamError, and so a 502."""
    with pytest.raises(UpstreamError, match="no completion"):
        PlainAnswer(answer, IDS)


@settings(max_examples=150, deadline=None)
@given(
    text=NASTY,
    n=st.integers(1, 2),
    ids=st.booleans(),
    has_ids=st.booleans(),
    moved=st.booleans(),
)
def test_text_is_never_touched_whatever_it_looks_like(text: str, n: int, ids: bool, has_ids: bool, moved: bool) -> None:
    """Answers that quote our own field names come through character by character."""
    fields: Json = {"reasoning": text} if moved and has_ids else {}
    content = None if fields else text
    choices = [choice(content, index=i, ids=[7] if has_ids else None, **fields) for i in range(n)]
    client, _ = answered(body(*choices, prompt=CLOSED), model="qwen", ids=ids)
    assert [c["message"]["content"] or "" for c in client["choices"]] == [text] * n
    assert client["model"] == "qwen"
