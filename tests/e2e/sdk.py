"""Asking the gateway through the real OpenAI SDK, streamed or not, and checking its accounts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI

from budget.chain import TRIAL_TOKENS
from tests.e2e.servers import PRICES, Gateway

MODEL = "smollm2"
EOS, END_THINK = 2, 16  # in the vocabulary of the thinking SmolLM2
NO_END = {str(EOS): -100, "1": -100}  # untrained to think, the model would end or begin a turn at once
KINDS = {"prompt", "cached", "thinking", "answer", "planner", "probe", "injected", "wasted"}
OUTPUT_KINDS = ("thinking", "answer", "injected")


@dataclass(slots=True)
class Choice:
    """One choice, put together."""

    thinking: str = ""
    content: str = ""
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    calls: dict[int, dict[str, str]] = field(default_factory=dict)

    def add(self, part: Any) -> None:
        """Take a message or a delta."""
        extra = part.model_extra or {}
        self.thinking += extra.get("reasoning") or ""
        self.content += part.content or ""
        for position, call in enumerate(part.tool_calls or []):
            index = getattr(call, "index", position)
            known = self.calls.setdefault(index, {"id": "", "name": "", "arguments": ""})
            known["id"] += call.id or ""
            known["name"] += call.function.name or ""
            known["arguments"] += call.function.arguments or ""


@dataclass(slots=True)
class Answer:
    """What one request gave, however it came."""

    choices: dict[int, Choice]
    usage: dict[str, Any] | None
    thinkgate: dict[str, Any]

    @property
    def first(self) -> Choice:
        """Choice 0."""
        return self.choices[0]

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens by kind."""
        tokens: dict[str, int] = self.thinkgate["tokens"]
        return tokens


def client_of(gateway: Gateway) -> OpenAI:
    """The SDK, pointed at a gateway; it never retries, so that a test sees what happened."""
    return OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: OpenAI, prompt: str, *, stream: bool = False, usage: bool = True, **fields: Any) -> Answer:
    """One chat request; `thinkgate`, `logit_bias` and other extras go where the SDK wants them."""
    extra = {name: fields.pop(name) for name in list(fields) if name in _EXTRA}
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "extra_body": extra,
        **fields,
    }
    if not stream:
        return fold_whole(client.chat.completions.create(**request))
    if usage:
        request["stream_options"] = {"include_usage": True}
    create: Any = client.chat.completions.create
    with create(stream=True, **request) as chunks:
        return fold_stream(list(chunks), usage=usage)


_EXTRA = {
    "thinkgate",
    "return_token_ids",
    "chat_template_kwargs",
    "ignore_eos",
    "min_tokens",
    "reasoning",
    "structured_outputs",
}


def fold_whole(completion: Any) -> Answer:
    """An answer that came in one piece."""
    choices = {choice.index: Choice() for choice in completion.choices}
    for choice in completion.choices:
        whole = choices[choice.index]
        whole.add(choice.message)
        whole.finish_reason = choice.finish_reason
        whole.token_ids = (choice.model_extra or {}).get("token_ids") or []
        whole.logprobs = list(choice.logprobs.content) if choice.logprobs else []
    return Answer(choices, completion.usage.model_dump(), completion.model_extra["thinkgate"])


def fold_stream(chunks: list[Any], *, usage: bool) -> Answer:
    """An answer that came in chunks; asserts the rules about which chunk carries what."""
    choices: dict[int, Choice] = {}
    for chunk in chunks:
        for part in chunk.choices:
            choice = choices.setdefault(part.index, Choice())
            choice.add(part.delta)
            choice.finish_reason = part.finish_reason or choice.finish_reason
            choice.token_ids += (part.model_extra or {}).get("token_ids") or []
            choice.logprobs += part.logprobs.content if part.logprobs else []
    reports = [i for i, chunk in enumerate(chunks) if (chunk.model_extra or {}).get("thinkgate")]
    finishes = [i for i, chunk in enumerate(chunks) if any(part.finish_reason for part in chunk.choices)]
    assert len(finishes) == len(choices), "each choice finishes once"
    assert reports == finishes[-1:], "the extension rides on the last chunk with a finish_reason"
    bare = [chunk for chunk in chunks if not chunk.choices]
    assert len(bare) == (1 if usage else 0), "one chunk without choices if usage was asked for, else none"
    assert all(chunk.usage is None for chunk in chunks if chunk.choices)
    total = bare[0].usage.model_dump() if usage else None
    return Answer(choices, total, chunks[reports[0]].model_extra["thinkgate"])


def check_accounts(answer: Answer, *, cap: int | None = None, may_waste: bool = False) -> None:
    """Tokens by kind, usage, hold and money agree, as docs/api.md, "Counting" defines them."""
    tokens, report = answer.tokens, answer.thinkgate
    assert set(tokens) == KINDS
    assert tokens["planner"] == 0
    assert tokens["probe"] in {0, TRIAL_TOKENS}
    assert may_waste or tokens["wasted"] == 0
    output = sum(tokens[kind] for kind in OUTPUT_KINDS)
    if answer.usage is not None:
        assert answer.usage["prompt_tokens"] == tokens["prompt"] + tokens["cached"]
        assert answer.usage["completion_tokens"] == output
        assert answer.usage["total_tokens"] == answer.usage["prompt_tokens"] + output
        assert answer.usage["completion_tokens_details"]["reasoning_tokens"] == tokens["thinking"]
        assert answer.usage["prompt_tokens_details"]["cached_tokens"] == tokens["cached"]
    if cap is not None:
        assert tokens["thinking"] <= cap * len(answer.choices)
    assert report["settled"]["tokens"] == sum(tokens.values()) <= report["hold"]["tokens"]
    price = {
        **PRICES,
        "injected": PRICES["answer"],
        "planner": 0.0,
        "probe": PRICES["answer"],
        "wasted": PRICES["answer"],
    }
    nano_usd = round(sum(count * price[kind] * 1000 for kind, count in tokens.items()))
    assert report["settled"]["nano_usd"] == nano_usd <= report["hold"]["nano_usd"]
    assert abs(report["cost_usd"] - nano_usd / 1e9) < 1e-12
    assert report["capped"] == report["cap"]["hit"]


def check_token_ids(answer: Answer) -> None:
    """The counts are those of the delivered ids: thinking and wrap-up, the end marker, the answer."""
    ends = {index: choice.token_ids.index(END_THINK) for index, choice in answer.choices.items()}
    before = sum(ends.values())
    after = sum(len(choice.token_ids) - ends[index] - 1 for index, choice in answer.choices.items())
    assert before == answer.tokens["thinking"] + answer.tokens["injected"] - len(answer.choices)
    assert after == answer.tokens["answer"]
