"""The scripted upstream goes on from token ids as a real model does: tests of two-phase enforcement rely on it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script, refusal
from tests.scripted_stream import (
    END_OF_SEQUENCE,
    END_THINK,
    EOS,
    NEWLINE,
    THINK,
    Model,
    Say,
    Token,
    tokens,
    tool_call_tokens,
)

Json = dict[str, Any]
ASK: Json = {"model": "scripted", "messages": [{"role": "user", "content": "what is 6 times 7"}]}
THINKS = Say(thinking=tokens("a b c d e f g h"), answer=tokens("it is 42"))
THINKING, ANSWER = [t.id for t in THINKS.thinking], [t.id for t in THINKS.answer]
WHOLE = [*THINKING, END_THINK, *ANSWER, EOS]
WRAP_UP = [*(t.id for t in tokens("time is up")), END_THINK, NEWLINE]


class Client(httpx.AsyncClient):
    """A plain client that speaks as the gateway does in two phases."""

    async def prompt(self, **fields: Any) -> list[int]:
        """The rendered prompt as ids."""
        answer = await self.post("/tokenize", json={**ASK, **fields})
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["tokens"]
        return ids

    async def plain(self, prompt: Sequence[int] | str, **fields: Any) -> Json:
        """A completions call that is not streamed: its only choice, with `usage` beside it."""
        asked = {"model": "scripted", "prompt": prompt, "return_token_ids": True, "max_tokens": 400, **fields}
        answer = await self.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        body: Json = answer.json()
        return {**body["choices"][0], "usage": body["usage"]}

    async def streamed(self, prompt: Sequence[int] | str, **fields: Any) -> list[Json]:
        """The events of a streamed completions call."""
        asked = {"model": "scripted", "prompt": prompt, "return_token_ids": True, "max_tokens": 400, "stream": True}
        answer = await self.post("/v1/completions", json={**asked, **fields})
        *events, done, _ = answer.text.split("\n\n")
        assert done == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture
async def client(scripted: ScriptedBackend) -> AsyncIterator[Client]:
    """A client of the scripted backend."""
    async with Client(base_url=scripted.url, timeout=10) as client:
        yield client


async def test_tokenizer_agrees_with_the_chat_endpoint(scripted: ScriptedBackend, client: Client) -> None:
    """/tokenize renders what a chat call is rendered to, and /detokenize gives forced text back."""
    for more in ({}, {"chat_template_kwargs": {"enable_thinking": False}}, {"tools": [{"type": "function"}]}):
        chat = {**ASK, **more, "return_token_ids": True}
        body = (await client.post("/v1/chat/completions", json=chat)).json()
        assert body["prompt_token_ids"] == await client.prompt(**more)
    text = "\n\nTime is up.</think>\n\n"
    ids = (await client.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()["tokens"]
    assert (ids[:2], ids[-3:]) == ([NEWLINE, NEWLINE], [END_THINK, NEWLINE, NEWLINE])
    back = await client.post("/detokenize", json={"model": "scripted", "tokens": [*ids, *await client.prompt()]})
    assert back.json()["prompt"].startswith(text + "<|im_start|>what is 6 times 7<|im_end|>\n<think>\n")
    assert (await client.post("/detokenize", json={"model": "scripted"})).json()["error"]["code"] == 400


async def test_two_phases_over_http(scripted: ScriptedBackend, client: Client) -> None:
    """One queued script serves both calls of a conversation, and the exchanges say which was which."""
    scripted.queue(Script(say=[THINKS]))
    base = await client.prompt()
    first = await client.plain(base, max_tokens=3, stop_token_ids=[END_THINK])
    assert (first["token_ids"], first["finish_reason"], first["stop_reason"]) == (THINKING[:3], "length", None)
    second = await client.plain([*base, *THINKING[:3], *WRAP_UP])
    assert (second["token_ids"], second["text"], second["finish_reason"]) == ([*ANSWER, EOS], "it is 42", "stop")
    one, two = scripted.calls
    assert [(e.choice, e.phase, e.base, e.tail) for e in (one, two)] == [
        (0, 0, len(base), []),
        (0, 1, len(base), [*THINKING[:3], *WRAP_UP]),
    ]
    assert scripted.chains[0].ids() == [*THINKING[:3], *WRAP_UP, *ANSWER, EOS]
    assert two.json["prompt"][: len(base)] == base


@pytest.mark.parametrize("seed", [7, None])
@pytest.mark.parametrize("cap", [0, 1, 4])
async def test_every_choice_has_its_own_chain(
    scripted: ScriptedBackend, client: Client, seed: int | None, cap: int
) -> None:
    """Chains say what their choice says: told by the distance of their seeds, else by their order and their ids."""
    say = [Say(thinking=tokens(f"{i} b c d e"), answer=tokens(f"is {i}")) for i in range(3)]
    scripted.queue(Script(say=say, seed=seed))
    base = await client.prompt()
    order = [0, 1, 2] if seed is None else [2, 0, 1]
    seeds = [{} if seed is None else {"seed": seed + i} for i in range(3)]
    said: dict[int, list[int]] = {i: [] for i in order}
    for i in order if cap else []:
        said[i] = (await client.plain(base, max_tokens=cap, **seeds[i]))["token_ids"]
    for i in reversed(order) if cap else order:
        assert (await client.plain([*base, *said[i], *WRAP_UP], **seeds[i]))["text"] == f"is {i}"
    assert sorted(chain.index for chain in scripted.chains) == [0, 1, 2]
    assert all(len(chain.calls) == 1 + (cap > 0) for chain in scripted.chains)


async def test_cut_chat_goes_on_as_chains(scripted: ScriptedBackend, client: Client) -> None:
    """Completions calls continue the choices of a chat call with the same prompt, without taking from the queue."""
    say = [Say(thinking=tokens(f"{i} b c d e"), answer=tokens(f"is {i}")) for i in range(2)]
    scripted.queue(Script(say=say, model=Model(honours_cap=False)))
    body = (await client.post("/v1/chat/completions", json={**ASK, "n": 2, "return_token_ids": True})).json()
    base = body["prompt_token_ids"]
    for i in (1, 0):
        kept = body["choices"][i]["token_ids"][:2]
        assert (await client.plain([*base, *kept, *WRAP_UP]))["text"] == f"is {i}"
    assert [(e.choice, e.phase) for e in scripted.calls[1:]] == [(1, 1), (0, 1)]


async def test_chat_cut_before_its_first_token_goes_on_too(scripted: ScriptedBackend, client: Client) -> None:
    """A chat call that is cut has its chains continued by prompts that repeat nothing, though rendered anew."""
    say = [Say(thinking=tokens("b c d e"), answer=tokens(f"is {i}")) for i in range(2)]
    scripted.queue(Script(say=say, gates={2: Gate()}))
    async with client.stream("POST", "/v1/chat/completions", json={**ASK, "n": 2, "stream": True}):
        pass
    await scripted.calls[0].wait_closed()
    base = await client.prompt()
    assert [(await client.plain([*base, *WRAP_UP]))["text"] for _ in range(2)] == ["is 0", "is 1"]


async def test_new_request_with_the_same_prompt_is_a_new_conversation(
    scripted: ScriptedBackend, client: Client
) -> None:
    """Rendering a prompt again begins anew: the next queued script serves it."""
    scripted.queue(
        Script(say=[Say(answer=tokens("one"))]), refusal(503, "busy"), Script(say=[Say(answer=tokens("two"))])
    )
    for expected in ("one", None, "two"):
        base = await client.prompt()
        if expected is None:
            asked = {"model": "scripted", "prompt": base}
            assert (await client.post("/v1/completions", json=asked)).status_code == 503
        else:
            assert (await client.plain([*base, *WRAP_UP]))["text"] == expected


async def test_stop_token_is_the_last_id_and_has_no_text(scripted: ScriptedBackend, client: Client) -> None:
    """A stop token ends the call, named as a number; its text is there only if stops are to be shown."""
    scripted.default = Script(say=[THINKS])
    base = await client.prompt()
    stopped = await client.plain(base, stop_token_ids=[END_THINK])
    assert stopped["token_ids"] == [*THINKING, END_THINK]
    assert (stopped["text"], stopped["stop_reason"], stopped["finish_reason"]) == ("a b c d e f g h", END_THINK, "stop")
    shown = await client.plain(base, stop_token_ids=[END_THINK], include_stop_str_in_output=True)
    assert shown["text"] == "a b c d e f g h</think>"
    events = await client.streamed(base, stop_token_ids=[END_THINK], stream_options={"include_usage": True})
    *chunks, usage = events
    assert "".join(c["choices"][0]["text"] for c in chunks) == "a b c d e f g h"
    assert chunks[-1]["choices"][0]["token_ids"] == [END_THINK]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == base
    assert usage["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize(("shown", "text"), [(False, "a b "), (True, "a b c d")])
@pytest.mark.parametrize("merged", [1, 3])
async def test_stop_string_ends_the_text_where_vllm_ends_it(
    scripted: ScriptedBackend, client: Client, shown: bool, text: str, merged: int
) -> None:
    """Text that may become a stop string is held back; its tokens stay in the ids, and it is named."""
    scripted.default = Script(say=[THINKS], tokens_per_event=merged)
    base = await client.prompt()
    events = await client.streamed(base, stop=["zz", "c d"], include_stop_str_in_output=shown)
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == text
    assert [i for choice in choices for i in choice["token_ids"]] == THINKING[:4]
    assert (choices[-1]["stop_reason"], choices[-1]["finish_reason"]) == ("c d", "stop")
    if merged == 1:
        assert [choice["text"] for choice in choices[:2]] == (["a", " b"] if shown else ["", "a"])
    assert (await client.plain(base, stop="c d", include_stop_str_in_output=shown))["text"] == text


async def test_marker_of_several_tokens_is_a_stop_string(scripted: ScriptedBackend, client: Client) -> None:
    """Such a marker tokenizes to its tokens, and ends a call as text that is shown."""
    start, end = (Token(41, "<"), Token(42, "think>")), (Token(31, "</"), Token(32, "think"), Token(33, ">"))
    scripted.model = Model(start_marker=start, end_marker=end, template_opens=True)
    scripted.default = Script(say=[THINKS])
    marker = await client.post("/tokenize", json={"prompt": "</think>"})
    assert marker.json()["tokens"] == [31, 32, 33]
    base = await client.prompt()
    assert base[-3:] == [41, 42, NEWLINE]
    first = await client.plain(base, stop=["</think>"], include_stop_str_in_output=True)
    assert (first["token_ids"], first["stop_reason"]) == ([*THINKING, 31, 32, 33], "</think>")
    assert (await client.plain([*base, *first["token_ids"]]))["text"] == "it is 42"


async def test_end_of_sequence_can_come_inside_the_thinking(scripted: ScriptedBackend, client: Client) -> None:
    """The choice ends there, on both endpoints; a chain that is continued answers all the same."""
    say = Say(thinking=[*tokens("a b"), END_OF_SEQUENCE, *tokens("c d")], answer=tokens("it is 42"))
    scripted.default = Script(say=[say])
    base = await client.prompt()
    first = await client.plain(base, stop_token_ids=[END_THINK])
    assert (first["token_ids"], first["finish_reason"], first["stop_reason"]) == ([*THINKING[:2], EOS], "stop", None)
    assert (await client.plain([*base, *THINKING[:2], *WRAP_UP]))["text"] == "it is 42"
    chat = (await client.post("/v1/chat/completions", json=ASK)).json()["choices"][0]
    assert (chat["message"]["content"], chat["message"]["reasoning"], chat["finish_reason"]) == (None, "a b", "stop")


async def test_logprobs_have_the_shape_of_completions(scripted: ScriptedBackend, client: Client) -> None:
    """Offsets go on over the events, markers and the end of sequence have names, and alternatives are as many."""
    scripted.default = Script(say=[THINKS], tokens_per_event=2)
    base = await client.prompt()
    found = [event["choices"][0]["logprobs"] for event in await client.streamed([*base, *WRAP_UP], logprobs=2)]
    assert [offset for one in found for offset in one["text_offset"]] == [0, 2, 5, 8]
    assert [name for one in found for name in one["tokens"]] == ["it", " is", " 42", "<|im_end|>"]
    assert found[0]["top_logprobs"][0] == {"it": -0.5, " alternative1": -1.5}
    assert (await client.plain(base, logprobs=0))["logprobs"]["top_logprobs"][0] == {"a": -0.5}
    assert (await client.plain(base))["logprobs"] is None
    chat = {**ASK, "logprobs": True, "top_logprobs": 2}
    entry = (await client.post("/v1/chat/completions", json=chat)).json()["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], [top["token"] for top in entry["top_logprobs"]]) == ("a", ["a", " alternative1"])


async def test_prefix_cache_holds_whole_blocks_that_were_computed(scripted: ScriptedBackend, client: Client) -> None:
    """Cached is what stands in full blocks of earlier prompts and outputs, and never the whole prompt."""
    scripted.default = Script(say=[Say(thinking=tokens("well " * 70), answer=tokens("x"))])
    base = await client.prompt(messages=[{"role": "user", "content": "word " * 40}])
    fresh = await client.plain(base, max_tokens=40)
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert (await client.plain(base[:33]))["usage"]["prompt_tokens_details"]["cached_tokens"] == 32
    assert (await client.plain(base[:32]))["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    prompt = [*base, *fresh["token_ids"], *WRAP_UP]
    cached = (await client.plain(prompt))["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == (len(base) + 39) // 32 * 32 == scripted.calls[-1].cached
    assert (await client.plain([5, *prompt]))["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_lies_about_limits_and_ids(scripted: ScriptedBackend, client: Client) -> None:
    """A server can ignore stops and limits, keep its ids, and refuse prompts of ids or the tokenizer."""
    base = await client.prompt()
    stops: Json = {"stop_token_ids": [END_THINK], "stop": [" c"]}
    scripted.queue(Script(say=[THINKS], model=Model(honours_stop=False)))
    assert (await client.plain(base, **stops))["token_ids"] == WHOLE
    await client.prompt()
    scripted.queue(Script(say=[THINKS], model=Model(honours_limit=False)))
    assert (await client.plain(base, max_tokens=2))["finish_reason"] == "stop"
    scripted.model = Model(gives_ids=False)
    assert "token_ids" not in await client.plain(await client.prompt())
    scripted.model = Model(takes_ids=False)
    refused = await client.post("/v1/completions", json={"model": "scripted", "prompt": base})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400)
    scripted.model = Model(tokenizes=False)
    assert (await client.post("/tokenize", json=ASK)).status_code == 404
    assert (await client.post("/detokenize", json={"tokens": [1]})).status_code == 404


async def test_tool_calls_are_parsed_by_chat_only(scripted: ScriptedBackend, client: Client) -> None:
    """The same tokens are a parsed call on the chat endpoint and markup on the other."""
    call = tool_call_tokens("get_weather", '{"city": "Paris"}')
    scripted.default = Script(say=[Say(answer=[*tokens("ok"), *call], finish_reason="tool_calls")])
    base = await client.prompt()
    raw = await client.plain([*base, *WRAP_UP])
    markup = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert (raw["text"], raw["finish_reason"]) == ("ok" + markup, "stop")
    for stream in (False, True):
        answer = await client.post("/v1/chat/completions", json={**ASK, "stream": stream})
        assert "<tool_call>" not in answer.text
    chat = (await client.post("/v1/chat/completions", json=ASK)).json()["choices"][0]
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert [one["function"] for one in chat["message"]["tool_calls"]] == [function]
    assert (chat["message"]["content"], chat["finish_reason"]) == ("ok", "tool_calls")


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"choice": ["{}"]}}]
)
async def test_structured_output_is_another_answer(
    scripted: ScriptedBackend, client: Client, fields: dict[str, Any]
) -> None:
    """Where the request asks for structure the answer is the JSON of the script; the thinking stays."""
    scripted.default = Script(say=[Say(thinking=tokens("a"), answer=tokens("no"), json=tokens('{"x": 1}'))])
    base = await client.prompt()
    assert (await client.plain(base, **fields))["text"] == 'a</think>{"x": 1}'
    assert (await client.plain(base, response_format={"type": "text"}))["text"] == "a</think>no"


@pytest.mark.parametrize("phase", [0, 1])
async def test_gates_and_deaths_are_for_one_phase_of_one_chain(
    scripted: ScriptedBackend, client: Client, phase: int
) -> None:
    """A chain can stand still, die or be refused in either of its calls, while those of other choices go on."""
    gate = Gate()
    bad = Script(say=[THINKS], gates={1: gate}, dies_after=2, only=1)
    scripted.queue(bad if phase == 0 else Script(say=[THINKS], then=bad))
    base = await client.prompt()
    gate.open()
    for i in range(2):
        for number, prompt in enumerate((base, [*base, *THINKING[:3], *WRAP_UP])):
            if (i, number) == (1, phase):
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.streamed(prompt, max_tokens=3, seed=i)
            else:
                assert len(await client.streamed(prompt, max_tokens=3, seed=i)) == 3
    assert gate.reached.is_set()


async def test_second_phase_can_be_refused(scripted: ScriptedBackend, client: Client) -> None:
    """What follows the first call of a chain may be a plain answer, and after that it goes on undisturbed."""
    scripted.queue(Script(say=[THINKS], then=lambda exchange: refusal(500, f"no {exchange.phase}")))
    base = await client.prompt()
    await client.plain(base, max_tokens=3)
    prompt = [*base, *THINKING[:3], *WRAP_UP]
    assert (await client.post("/v1/completions", json={"prompt": prompt})).json()["error"]["message"] == "no 1"
    assert (await client.plain(prompt))["text"] == "it is 42"


async def test_model_that_does_not_think_thinks_in_an_opened_block(scripted: ScriptedBackend, client: Client) -> None:
    """Its template knows no thinking; with the start marker prefilled it thinks and answers."""
    scripted.model = Model(native=False)
    scripted.default = Script(say=[THINKS])
    base = await client.prompt()
    assert base == await client.prompt(chat_template_kwargs={"enable_thinking": False})
    assert not {THINK, END_THINK} & set(base)
    assert (await client.plain(base))["text"] == "it is 42"
    opened = [*base, THINK, NEWLINE]
    assert (await client.plain(opened))["token_ids"] == WHOLE
    assert (await client.plain([*opened, *THINKING[:2], *WRAP_UP]))["text"] == "it is 42"


async def test_template_may_know_no_switch(scripted: ScriptedBackend, client: Client) -> None:
    """Such a template opens the thinking whatever is asked; an empty block in the prompt brings the answer."""
    scripted.model = Model(template_switches=False)
    scripted.default = Script(say=[THINKS])
    base = await client.prompt(chat_template_kwargs={"enable_thinking": False})
    assert base == await client.prompt()
    assert (await client.plain([*base, NEWLINE, END_THINK, NEWLINE]))["text"] == "it is 42"


async def test_model_that_opens_itself_samples_the_start_marker(scripted: ScriptedBackend, client: Client) -> None:
    """Where the template does not open the thinking, the model does, on both endpoints and in text."""
    scripted.model = Model(template_opens=False)
    scripted.default = Script(say=[THINKS])
    base = await client.prompt()
    assert base[-1] == NEWLINE
    assert THINK not in base
    assert (await client.plain(base))["token_ids"] == [THINK, *WHOLE]
    chat = (await client.post("/v1/chat/completions", json={**ASK, "return_token_ids": True})).json()
    assert chat["choices"][0]["token_ids"] == [THINK, *WHOLE]
    assert (await client.plain("six"))["text"].startswith("<think>a b")
