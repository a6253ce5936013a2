"""The vocabulary of the enforcement matrix: columns (how a backend holds caps), features of a request, and cells.

Owns: what is asked in a cell, what the backend's model would say there, and what the client has to get. The
benches that run cells are in matrix_benches.py, what is checked of them in matrix_checks.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.scripted_stream import Model, Say, Token, tokens, tool_call_tokens
from tests.scripted_tokens import word

Json = dict[str, Any]
NATURAL = 52  # thinking tokens of every choice that nothing ends
FLOOR, SEED = 16, 7
LIMIT = 120  # tokens in all, where a request has such a limit
DEFAULT = 100  # cap, where a request has none
STOP = "HALT"
WRAP_UP = "\n\nTime is up: I answer with what I have.\n"
MARKUP = ("<think", "</think", "<tool_call", "</tool_call", "think>", "Time is up", "<|", "tool_call>")
CAPS: Mapping[str, int | None] = {"0": 0, "1": 1, "5": 5, "40": 40, "exact": NATURAL, "none": None}
CITY: Json = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Json = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
SCHEMA: Json = {"type": "object", "properties": {"of": {"type": "integer"}}, "required": ["of"]}
TAUGHT = 'Call a function so: <tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'


@dataclass(frozen=True, slots=True, kw_only=True)
class TaughtModel(Model):
    """A model whose template shows tools, and how to call them, as Qwen's does."""

    def prompt_tokens(self, request: Json) -> list[Token]:
        """The rendered prompt; with tools it begins by teaching their calls."""
        rendered = Model.prompt_tokens(self, request)
        return [*self.encode(TAUGHT), *rendered] if request.get("tools") else rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One way in which a cap is held.

    Attributes:
        how: `cap.enforcement` of a request that thinks, once it is over.
        how_instant: the same in instant mode.
        model: how the backend behaves when it is measured; None: the embedded engine.
        serves: how it behaves afterwards; None: the same.
        kind: of the backend.
        thinking: the model's configuration.
        slack: tokens below the cap at which the backend's own cap may end the thinking.
        has_ids: tokens are counted by ids, so all counts are exact.
        is_honest: the backend does what it was measured to do.
        continues: it goes on from an assistant's own message.
        teaches: its template teaches calls, so `tool_choice: auto` can be served in two phases.
    """

    how: str
    how_instant: str
    model: Model | None = field(default_factory=TaughtModel)
    serves: Model | None = None
    kind: str = "vllm"
    thinking: Json = field(default_factory=dict)
    slack: int = 0
    has_ids: bool = True
    is_honest: bool = True
    continues: bool = False
    teaches: bool = True


def _pieces(*texts: str) -> tuple[Token, ...]:
    return tuple(word(text) for text in texts)


INLINE = TaughtModel(field="inline", template_opens=False)
INLINE_OPENED = TaughtModel(field="inline")
MANY = Model(
    field="inline", start_marker=_pieces("<", "think", ">"), end_marker=_pieces("</", "think", ">"), template_opens=True
)
OPENAI = Model(
    honours_cap=False, field="reasoning_content", gives_ids=False, takes_ids=False, tokenizes=False, cached_tokens=None
)
SOFT = Column(
    how="soft",
    how_instant="switch",
    model=OPENAI,
    kind="openai",
    thinking={"off": {"chat_template_kwargs": {"enable_thinking": False}}},
    has_ids=False,
)
COLUMNS: Mapping[str, Column] = {
    "native": Column(how="native", how_instant="native", slack=1),
    "two_phase": Column(how="two_phase", how_instant="native", thinking={"enforce": "two_phase"}),
    "ignores": Column(
        how="two_phase",
        how_instant="native",
        serves=TaughtModel(honours_cap=False),
        is_honest=False,
    ),
    "inline": Column(how="native", how_instant="native", model=INLINE),
    "inline_opened": Column(how="native", how_instant="native", model=INLINE_OPENED, slack=1),
    "many_token_markers": Column(how="two_phase", how_instant="switch", model=MANY, teaches=False),
    "prefilled": Column(
        how="two_phase", how_instant="switch", model=TaughtModel(native=False), thinking={"native": False}
    ),
    "embedded": Column(how="native", how_instant="native", kind="embedded", model=None),
    "soft": SOFT,
    "soft_continued": replace(SOFT, continues=True),
}
INSTANT_COLUMNS: Mapping[str, Column] = {
    "thinks_always": Column(
        how="native", how_instant="two_phase", model=TaughtModel(honours_off=False, template_switches=False)
    ),
    "thinks_always_many": Column(
        how="two_phase",
        how_instant="two_phase",
        model=replace(MANY, honours_off=False, template_switches=False),
        teaches=False,
    ),
    "thinks_though_quiet": Column(
        how="native", how_instant="native", serves=TaughtModel(honours_off=False), is_honest=False
    ),
    "thinks_inline_though_quiet": Column(
        how="native", how_instant="native", model=INLINE, serves=replace(INLINE, honours_off=False), is_honest=False
    ),
    "thinks_and_ignores": Column(
        how="native",
        how_instant="two_phase",
        serves=TaughtModel(honours_off=False, honours_cap=False),
        is_honest=False,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a client has to get of one choice, its thinking aside."""

    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    finish_reason: str = "stop"
    stop_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One kind of request.

    Attributes:
        fields: of the request.
        say: answer tokens of a choice, as a chat and a completions endpoint send them.
        wanted: what becomes of them.
        forced: the answer where a JSON Schema forces it, if that is another one.
        finish_reason: as a chat endpoint says it.
        hermes: the answer is a call, which a backend may also make of Hermes' markup.
    """

    fields: Json
    say: Callable[[int], Sequence[Token]]
    wanted: Callable[[int], Wanted]
    forced: Callable[[int], Sequence[Token]] | None = None
    finish_reason: str = "stop"
    hermes: bool = False

    def says(self, choice: int) -> Say:
        """What the model says for one choice."""
        return Say(
            thinking=thinking_of(choice),
            answer=self.say(choice),
            json=self.forced(choice) if self.forced else (),
            finish_reason=self.finish_reason,
        )


def thinking_of(choice: int) -> tuple[Token, ...]:
    """So many tokens that nothing ends, with the stop string among them."""
    words = [f"t{choice}.{i}" if i != 2 else STOP for i in range(NATURAL)]
    return tokens(" ".join(words))


def sentence(choice: int) -> str:
    """An answer."""
    return f"Choice {choice} says that it is forty two."


def stopped(choice: int) -> str:
    """An answer with a stop string in it."""
    return f"Choice {choice} says: {STOP} and then goes on."


def arguments(choice: int) -> str:
    """The arguments of a call."""
    return json.dumps({"city": f"City{choice}"})


def _called(text: str, before: str, after: str) -> tuple[Token, ...]:
    """Arguments in markup that the chat endpoint does not show."""
    body = tokens(text)
    head = {"id": "chatcmpl-tool-1", "type": "function", "index": 0}
    first = {**head, "function": {"name": "get_weather", "arguments": body[0].text}}
    rest = [word(t.text, {"tool_calls": [{"index": 0, "function": {"arguments": t.text}}]}) for t in body[1:]]
    around = [tuple(word(t.text, {}) for t in tokens(part)) for part in (before, after)]
    return (*around[0], word(body[0].text, {"tool_calls": [first]}), *rest, *around[1])


def _call(choice: int, content: str, finish_reason: str) -> Wanted:
    return Wanted(content=content, calls=(("get_weather", arguments(choice)),), finish_reason=finish_reason)


_PLAIN = Feature(fields={}, say=lambda i: tokens(sentence(i)), wanted=lambda i: Wanted(content=sentence(i)))
FEATURES: Mapping[str, Feature] = {
    "plain": _PLAIN,
    "tools_auto": Feature(
        fields={"tools": [TOOL]},
        say=lambda i: (*tokens("Let me look."), *tool_call_tokens("get_weather", arguments(i))),
        wanted=lambda i: _call(i, "Let me look.", "tool_calls"),
        finish_reason="tool_calls",
    ),
    "tools_named": Feature(
        fields={"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        say=lambda i: _called(arguments(i), "", ""),
        wanted=lambda i: _call(i, "", "stop"),
        hermes=True,
    ),
    "tools_required": Feature(
        fields={"tools": [TOOL], "tool_choice": "required"},
        say=lambda i: _called(arguments(i), '[{"name": "get_weather", "parameters": ', "}]"),
        wanted=lambda i: _call(i, "", "tool_calls"),
        finish_reason="tool_calls",
        hermes=True,
    ),
    "json": Feature(
        fields={"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
        say=lambda i: tokens("no JSON at all"),
        wanted=lambda i: Wanted(content=json.dumps({"of": i})),
        forced=lambda i: tokens(json.dumps({"of": i})),
    ),
    "logprobs": replace(_PLAIN, fields={"logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
    "stop": Feature(
        fields={"stop": STOP},
        say=lambda i: tokens(stopped(i)),
        wanted=lambda i: Wanted(content=stopped(i).partition(STOP)[0], stop_reason=STOP),
    ),
    "limit": Feature(
        fields={"max_completion_tokens": LIMIT},
        say=lambda i: tokens(sentence(i) + " and so on" * LIMIT),
        wanted=lambda i: Wanted(content=sentence(i) + " and so on" * LIMIT, finish_reason="length"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One request in one column."""

    column: str
    feature: str
    cap: str
    n: int

    @property
    def of(self) -> Column:
        """Its column."""
        return COLUMNS.get(self.column) or INSTANT_COLUMNS[self.column]

    @property
    def asks(self) -> Feature:
        """Its feature."""
        return FEATURES[self.feature]

    @property
    def tokens(self) -> int | None:
        """Its cap; None: it names none."""
        return CAPS[self.cap]

    def body(self, *, stream: bool) -> Json:
        """The request."""
        wish: Json = {"mode": "reasoning"} if self.tokens is None else {"thinking_tokens": self.tokens}
        body: Json = {
            "model": "qwen",
            "messages": [{"role": "user", "content": "what is 6 times 7"}],
            "n": self.n,
            "seed": SEED,
            "thinkgate": wish,
            **self.asks.fields,
        }
        return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body

    def how(self) -> str:
        """How its cap is held."""
        column = self.of
        if self.tokens == 0:
            return column.how_instant
        if self.feature in {"tools_named", "tools_required"} and column.kind == "vllm" and column.teaches:
            return "two_phase"  # where a grammar makes the call
        if self.column == "ignores" and self.tokens in {None, NATURAL}:
            return "native"  # there is nothing to take over
        return column.how

    def packing(self) -> tuple[int, int]:
        """Tokens per event and events per write: one choice comes in small pieces, several in large ones."""
        if self.n == 1:
            return 1, 1
        return (3, 2) if self.of.has_ids else (1, 6)

    def slack(self) -> int:
        """Tokens below the cap at which the thinking may end."""
        if not self.tokens:
            return 0
        # What came together is dropped together, if it goes past the cap.
        return self.of.slack if self.of.is_honest else self.packing()[0] - 1

    def may_end_early(self) -> bool:
        """Whether what arrives before a cut may take room from an answer that goes to the limit."""
        return self.feature == "limit" and not (self.of.is_honest and self.of.has_ids)

    def ways(self) -> set[str]:
        """As `how`, where it is not certain: an instant answer that came in one piece cannot be cut."""
        is_uncertain = self.column == "thinks_and_ignores"
        return {self.how(), "native"} if is_uncertain else {self.how()}

    def refusal(self) -> str | None:
        """The field that it is refused for, if it is."""
        is_raw = self.how() == "two_phase" and not self.of.teaches
        return "tools" if is_raw and self.feature == "tools_auto" else None

    def is_exact(self) -> bool:
        """Whether the same tokens arrive each time: none comes after a stop string, or before a cut takes effect."""
        return self.of.is_honest and self.feature != "stop"
