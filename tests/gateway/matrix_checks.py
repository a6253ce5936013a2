"""What has to be true of every answer in the enforcement matrix, whatever its column.

Owns: reading a stream as a strict client, and the claims: the cap held by an independent count, the answer
whole, nothing of ours in the content, usage as docs/api.md defines it, a legal stream that says the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from budget.chain import TRIAL_TOKENS
from tests.gateway.asgi import Answered
from tests.gateway.matrix import DEFAULT, INSTANT_COLUMNS, LIMIT, MARKUP, NATURAL, WRAP_UP, Cell, Json
from tests.gateway.matrix_benches import Bench, Processed

EOS = "<|im_end|>"
LEGAL = {"stop", "length", "tool_calls", "content_filter", "function_call"}
KINDS = ("prompt", "cached", "thinking", "answer", "injected", "planner", "probe", "wasted")


def read_stream(body: bytes) -> Json:
    """A whole stream, folded into the shape of an answer that was not streamed; illegal ones fail."""
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({(c["id"], c["model"], c["created"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    *chunks, last = chunks
    assert last["choices"] == []
    whole: Json = {"choices": {}, "model": last["model"], "usage": last["usage"]}
    finishes = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    for chunk in chunks:
        assert ("thinkgate" in chunk) == (chunk is finishes[-1])
        assert "usage" not in chunk
        (part,) = chunk["choices"]
        _fold(whole["choices"], part)
        if chunk.get("prompt_token_ids") is not None:
            whole["prompt_token_ids"] = chunk["prompt_token_ids"]
    whole["thinkgate"] = finishes[-1]["thinkgate"]
    whole["choices"] = [whole["choices"][index] for index in sorted(whole["choices"])]
    return whole


def _fold(choices: dict[int, Json], part: Json) -> None:
    index, delta = part["index"], dict(part["delta"])
    role = delta.pop("role", None)
    assert (role == "assistant") == (index not in choices), "the role comes once, at the beginning"
    choice = choices.setdefault(index, {"index": index, "message": {"role": role}, "logprobs": None})
    assert not choice.get("finish_reason"), "a choice went on after its finish"
    message = choice["message"]
    for piece in delta.pop("tool_calls", None) or ():
        _join(message.setdefault("tool_calls", []), piece)
    for name, text in delta.items():
        assert name in {"content", "reasoning", "reasoning_content"}
        if text is not None:
            message[name] = message.get(name, "") + text
    if part.get("logprobs"):
        entries = part["logprobs"]["content"]
        choice["logprobs"] = {"content": [*(choice["logprobs"] or {"content": []})["content"], *entries]}
    choice["token_ids"] = choice.get("token_ids", []) + (part.get("token_ids") or [])
    choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part.get("stop_reason")


def _join(calls: list[Json], piece: Json) -> None:
    if piece["index"] == len(calls):
        assert piece["type"] == "function"
        calls.append({"id": piece["id"], "type": "function", "function": {"name": "", "arguments": ""}})
    function = calls[piece["index"]]["function"]
    for name, text in piece["function"].items():
        function[name] += text or ""


def told(answer: Json, cell: Cell) -> Json:
    """What an answer says, without what may differ from call to call."""
    extension = dict(answer["thinkgate"])
    kept: Json = {"usage": {k: v for k, v in answer["usage"].items() if k != "prompt_tokens_details"}}
    kept["choices"] = [_said(choice) for choice in answer["choices"]]
    kept["prompt_token_ids"] = answer.get("prompt_token_ids")
    counts = dict(extension["tokens"])
    counts["prompt"] += counts.pop("cached")
    if extension.get("counted") == "estimated":  # by the size of the request, which says whether it streams
        for names, where in (({"prompt"}, counts), ({"prompt_tokens", "total_tokens"}, kept["usage"])):
            for name in names:
                where.pop(name)
    cap = {k: v for k, v in extension["cap"].items() if not k.startswith("resent")}
    for name in ("mode", "mode_reason", "ended_by", "counted", "backend"):
        kept[name] = extension.get(name)
    if cell.column in INSTANT_COLUMNS and not cell.of.is_honest:
        # The whole answer came in one piece: it was cut afterwards, and its markers counted as answer.
        return {"choices": [{**choice, "logprobs": None, "token_ids": None} for choice in kept["choices"]]}
    if not cell.is_exact():
        counts.pop("wasted")
        cap.pop("overrun_tokens", None)
    return {**kept, "tokens": counts, "cap": cap, "capped": extension["capped"]}


def _said(choice: Json) -> Json:
    message = choice["message"]
    return {
        "index": choice["index"],
        "content": message.get("content") or "",
        "reasoning": reasoning_of(message),
        "calls": calls_of(message),
        "logprobs": choice["logprobs"],
        "token_ids": choice.get("token_ids") or [],
        "finish": (choice["finish_reason"], choice.get("stop_reason")),
    }


def reasoning_of(message: Json) -> str:
    """The thinking text, under whichever name."""
    return message.get("reasoning") or message.get("reasoning_content") or ""


def calls_of(message: Json) -> tuple[tuple[str, str], ...]:
    """Names and arguments of its tool calls."""
    calls = message.get("tool_calls") or []
    assert len({call["id"] for call in calls}) == len(calls)
    return tuple((call["function"]["name"], call["function"]["arguments"]) for call in calls)


def read(answered: Answered, *, stream: bool) -> Json:
    """The answer, as the whole body has it."""
    assert answered.status == 200, answered.body
    if stream:
        return read_stream(answered.body)
    body: Json = json.loads(answered.body)
    assert body["object"] == "chat.completion"
    return body


def check(cell: Cell, bench: Bench, answer: Json, books: Processed | None) -> None:
    """Every claim about one answer."""
    assert [choice["index"] for choice in answer["choices"]] == list(range(cell.n))
    thought = [_thought(cell, bench, choice["message"], i) for i, choice in enumerate(answer["choices"])]
    for i, choice in enumerate(answer["choices"]):
        _check_choice(cell, choice, i)
        if cell.feature == "logprobs":
            _check_logprobs(bench, choice, thought[i], i)
    _check_report(cell, answer, thought)
    _check_usage(cell, answer, thought)
    if books is not None:
        _check_books(cell, answer, thought, books)


def _thought(cell: Cell, bench: Bench, message: Json, index: int) -> int:
    """Thinking tokens of a choice, counted by the text that the client got; within the cap, and not below it."""
    text, texts = reasoning_of(message), bench.thoughts(index)
    cap = len(texts) if cell.tokens is None else min(cell.tokens, len(texts))
    shown = text.removesuffix(WRAP_UP)
    count = next((n for n in range(len(texts) + 1) if "".join(texts[:n]) == shown), None)
    assert count is not None, f"choice {index} thought {shown!r}"
    assert cap - cell.slack() <= count <= cap
    is_cut = cell.tokens is not None and cell.tokens < len(texts)
    must_wrap = is_cut and count and (cell.how() == "two_phase" or cell.column == "embedded")
    assert text.endswith(WRAP_UP) or not must_wrap
    assert cell.tokens is not None or shown == text, "wrapped up without a cap"
    return count


def _check_choice(cell: Cell, choice: Json, index: int) -> None:
    wanted, message = cell.asks.wanted(0 if cell.column == "embedded" else index), choice["message"]
    content = message.get("content") or ""
    is_cut = wanted.finish_reason == "length"
    assert content == wanted.content[: len(content)] if is_cut else content == wanted.content
    assert not any(part in content for part in MARKUP)
    assert calls_of(message) == wanted.calls
    assert choice["finish_reason"] in LEGAL
    finish = wanted.finish_reason
    if cell.column == "embedded" and cell.feature == "tools_named":
        finish = "tool_calls"  # its engine says so for every call
    assert (choice["finish_reason"], choice.get("stop_reason")) == (finish, wanted.stop_reason)


def _check_logprobs(bench: Bench, choice: Json, thought: int, index: int) -> None:
    """An entry for every delivered token that was sampled, in order, with as many alternatives as asked for."""
    if choice["logprobs"] is None:
        assert not bench.column.is_honest, "only where thinking had to be cut out of a whole answer"
        return
    entries = choice["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    texts = [bytes(entry["bytes"]).decode() for entry in entries]
    said = "".join(texts).replace(EOS, "").replace("<think>", "").partition("</think>")
    thinking, content = "".join(bench.thoughts(index)[:thought]), choice["message"]["content"]
    assert (said[0] + said[2]).replace(WRAP_UP, "") == thinking + content


def _check_report(cell: Cell, answer: Json, thought: Sequence[int]) -> None:
    extension = answer["thinkgate"]
    cap, counts = extension["cap"], extension["tokens"]
    assert extension["mode"] == ("instant" if cell.tokens == 0 else "reasoning")
    assert cap["enforcement"] in cell.ways()
    named = cell.tokens if cell.tokens is not None else DEFAULT
    assert cap["tokens"] == named or ("clamped_from" in cap and cell.tokens is None and cap["tokens"] < named)
    assert cap["hit"] == extension["capped"]
    if cell.tokens and cell.tokens < NATURAL:
        assert cap["hit"]
    assert cap["hit"] <= (cell.tokens is not None)
    if cell.of.is_honest and cell.of.has_ids:
        assert "overrun_tokens" not in cap
        assert counts["wasted"] == 0 or cell.feature == "stop"
    # What came before a cut took effect counts against the hold: an answer up to the limit may end a little before it.
    assert extension.get("ended_by") in ({None, "hold"} if cell.may_end_early() else {None})
    assert counts["thinking"] == sum(thought)
    settled, hold = extension["settled"], extension["hold"]
    assert settled["tokens"] == sum(counts[kind] for kind in KINDS)
    assert settled["thinking_tokens"] == counts["thinking"]
    assert extension["cost_usd"] == settled["nano_usd"] / 1e9
    if cell.of.is_honest:
        assert all(settled[unit] <= hold[unit] for unit in settled)


def _check_usage(cell: Cell, answer: Json, thought: Sequence[int]) -> None:
    usage, counts = answer["usage"], answer["thinkgate"]["tokens"]
    assert usage["prompt_tokens"] > 0
    assert usage["prompt_tokens"] == counts["prompt"] + counts["cached"]
    assert usage["completion_tokens"] == counts["thinking"] + counts["answer"] + counts["injected"]
    if cell.feature == "limit":
        most = LIMIT * cell.n
        assert usage["completion_tokens"] <= most
        assert usage["completion_tokens"] == most or cell.may_end_early()
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": counts["cached"]}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": sum(thought)}


def _check_books(cell: Cell, answer: Json, thought: Sequence[int], books: Processed) -> None:
    """Against what the backend processed: each token it sent is in some kind, and in one only."""
    counts: dict[str, Any] = answer["thinkgate"]["tokens"]
    counted = counts["thinking"] + counts["answer"] + counts["injected"] + counts["wasted"]
    if cell.of.has_ids:
        assert counts["prompt"] + counts["cached"] == books.prompt
    assert counts["probe"] == TRIAL_TOKENS * books.trials
    if books.is_whole and cell.of.is_honest:
        assert list(thought) == books.thinking
    if books.is_whole and cell.feature != "stop":
        assert counted == books.output
        assert cell.of.has_ids or counts["answer"] >= books.answer
    else:
        assert counted <= books.output
    if cell.feature != "stop" and cell.of.is_honest and cell.of.has_ids:
        assert counts["answer"] == books.answer
    if cell.feature == "logprobs" and cell.of.has_ids and cell.of.is_honest:
        assert sum(len(choice["token_ids"]) for choice in answer["choices"]) == counted
