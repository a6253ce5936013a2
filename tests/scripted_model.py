"""The model behind the scripted upstream: what it would say, where a prompt leaves it, and how it lies.

Owns: `Say` and `Model`, the rendered prompt, and the playing of one choice from any prompt on. A prompt that
already holds part of what the model says is continued where it ends: see `Model.play`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from typing import Literal

from tests.scripted_tokens import (
    BOS,
    END_MARKER,
    END_OF_SEQUENCE,
    EOS,
    SPECIAL,
    START_MARKER,
    Json,
    Token,
    encode,
    starts_with,
    tokens,
)

Field = Literal["reasoning", "reasoning_content", "inline"]
Kind = Literal["thinking", "marker", "answer", "eos"]
Surface = Literal["chat", "completions"]
WINDOW = 4096
BANNED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Say:
    """What the model would say for one choice if nothing stopped it.

    Attributes:
        thinking: tokens between the markers; the end marker follows when the model thinks. An
            END_OF_SEQUENCE in here ends the choice in the middle of its thinking.
        answer: tokens after it; see `tool_call_tokens` for tool calls.
        json: the answer instead, where the request has a `response_format` or `structured_outputs`.
        again: what it thinks further, each time when text is forced on it after all its thinking ("Wait").
        reopens: thoughts it falls back into in the middle of the answer, in markers of their own.
        reopens_at: number of answer tokens before those.
        ends: False: the answer repeats until a limit; without an answer, so does the thinking.
        finish_reason: how it ends when no limit ends it.
        stop_reason: the stop string or token id, as vLLM reports it.
    """

    thinking: Sequence[Token] = ()
    answer: Sequence[Token] = ()
    json: Sequence[Token] = ()
    again: Sequence[Sequence[Token]] = ()
    reopens: Sequence[Token] = ()
    reopens_at: int = 1
    ends: bool = True
    finish_reason: str = "stop"
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Choice:
    """One choice as it was in fact generated.

    Attributes:
        visible: how much of the text of all tokens the completions endpoint shows; None: all of it.
    """

    index: int
    parts: list[tuple[Kind, Token]] = field(default_factory=list)
    finish_reason: str = "stop"
    stop_reason: int | str | None = None
    visible: int | None = None

    def ids(self) -> list[int]:
        """Every output token."""
        return [token.id for _, token in self.parts]

    def text(self, kind: str) -> str:
        """The text of one kind of token."""
        return "".join(token.text for what, token in self.parts if what == kind)

    def raw(self) -> str:
        """The text of all tokens, markers included, as the completions endpoint shows it."""
        return "".join(token.text for _, token in self.parts)[: self.visible]


@dataclass(slots=True)
class _Story:
    """All that one choice would sample, from its start marker to its end, and where it stands in it.

    Attributes:
        blocks: of each stretch of thinking: start marker, first thought, end marker, behind it.
        at: the part that comes next.
        unlocked: how many of `Say.again` are in it.
    """

    parts: list[tuple[Kind, Token]]
    blocks: list[tuple[int, int, int, int]]
    at: int = 0
    unlocked: int = 0

    def block(self) -> tuple[int, int, int, int] | None:
        """The thinking that it stands in."""
        return next((block for block in self.blocks if block[0] < self.at < block[3]), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """How the scripted model behaves, whatever it says.

    Attributes:
        honours_cap: `thinking_token_budget` ends the thinking; False: it is silently ignored.
        honours_off: `enable_thinking: false` keeps it from thinking.
        honours_stop: `stop_token_ids` and (completions) `stop` end it; False: silently ignored.
        honours_limit: `max_tokens` ends it; False: silently ignored.
        honours_bias: a `logit_bias` of -100 keeps it from sampling a token; False: silently ignored.
        native: it thinks by itself; False: only in a prompt that ends inside an opened block, and its
            template knows no thinking.
        template_opens: the rendered prompt ends with the start marker and a newline; False: the model
            samples the start marker itself; None: where no `start_marker` is given.
        template_switches: `enable_thinking: false` renders a closed empty block; False: it changes nothing.
        field: where thinking text arrives.
        start_marker: one token or several; none: `<think>` as one.
        end_marker: one token, or several.
        gives_ids: knows `return_token_ids`.
        takes_ids: prompts may be token ids; False: they are a 400.
        tokenizes: has /tokenize and /detokenize; False: they are a 404.
        gives_usage: knows `stream_options.include_usage`.
        gives_reasoning_tokens: puts them into the usage of the chat endpoint.
        gives_logprobs: tells log probabilities of a chat when asked.
        cached_tokens: reported as cached; "measured": what a prefix cache would hold; None: not reported.
    """

    honours_cap: bool = True
    honours_off: bool = True
    honours_stop: bool = True
    honours_limit: bool = True
    honours_bias: bool = True
    native: bool = True
    template_opens: bool | None = None
    template_switches: bool = True
    field: Field = "reasoning"
    start_marker: Sequence[Token] = ()
    end_marker: Sequence[Token] = END_MARKER
    gives_ids: bool = True
    takes_ids: bool = True
    tokenizes: bool = True
    gives_usage: bool = True
    gives_reasoning_tokens: bool = True
    gives_logprobs: bool = True
    cached_tokens: int | Literal["measured"] | None = "measured"

    # -- the prompt
    @property
    def opening(self) -> Sequence[Token]:
        """The start marker."""
        return self.start_marker or START_MARKER

    @property
    def opens(self) -> bool:
        """Whether the template opens the thinking."""
        return self.native and (not self.start_marker if self.template_opens is None else self.template_opens)

    def encode(self, text: str) -> list[Token]:
        """The tokens of a text, the markers as this model has them."""
        return encode(text, {"".join(t.text for t in m): m for m in (self.opening, self.end_marker)})

    def prompts_of(self, request: Json) -> list[list[int]]:
        """Every rendered prompt; only text completions can have several."""
        prompt = request.get("prompt")
        if isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt):
            return [self.prompt_ids({"prompt": item}) for item in prompt]
        return [self.prompt_ids(request)]

    def prompt_ids(self, request: Json) -> list[int]:
        """The ids of the rendered prompt, or those of `prompt`."""
        prompt = request.get("prompt")
        if isinstance(prompt, list):
            return [int(token) for token in prompt]
        return [token.id for token in self.prompt_tokens(request)]

    def prompt_tokens(self, request: Json) -> list[Token]:
        """The rendered prompt: a token per word, then the opened (or closed) thinking of the template."""
        if request.get("prompt") is not None:
            return self.encode(str(request["prompt"]))
        newline = SPECIAL["\n"]
        rendered = [Token(BOS, "")]
        for message in [*filter(None, [request.get("tools")]), *request.get("messages", [])]:
            said = message if isinstance(message, list) else [message.get("content"), message.get("tool_calls")]
            for one in filter(None, said):
                rendered += tokens(one if isinstance(one, str) else json.dumps(one))
            rendered += [END_OF_SEQUENCE, *newline]
        if not self.native:
            return rendered
        if self.template_switches and not wants_thinking(request):
            return [*rendered, *self.opening, *newline, *self.end_marker, *newline]
        return [*rendered, *self.opening, *newline] if self.opens else rendered

    def where(self, ids: Sequence[int]) -> tuple[Literal["open", "closed", "none"], int]:
        """What the last marker in a prompt did to the thinking, and how many ids stand behind it."""
        for at in range(len(ids) - 1, -1, -1):
            for state, marker in (("open", self.opening), ("closed", self.end_marker)):
                if starts_with(ids, at, marker):
                    return ("open" if state == "open" else "closed"), len(ids) - at - len(marker)
        return "none", 0

    # -- what it says
    def generate(self, request: Json, index: int, say: Say, *, thinks: bool | None = None) -> Choice:
        """Play one choice from the rendered prompt of the request."""
        return self.play(request, index, say, self.prompts_of(request)[0], thinks=thinks)

    def play(
        self,
        request: Json,
        index: int,
        say: Say,
        base: Sequence[int],
        tail: Sequence[int] = (),
        *,
        thinks: bool | None = None,
    ) -> Choice:
        """Play one choice from a prompt on: `base` is the rendered prompt, `tail` what came after it.

        Ids of the tail that come next in what the model says are its own; an end marker ends its thinking
        wherever that was; a start marker begins it; all others were forced on it, and are skipped.
        Then cap, stop tokens and strings, the total limit and the end of sequence end it. Whether it `thinks`
        the prompt and the model's habits say, unless it is given.
        """
        limit = self._limit(request)
        story = self._place(request, say, base, tail, thinks=thinks, room=len(tail) + limit)
        choice = Choice(index, finish_reason=say.finish_reason, stop_reason=say.stop_reason)
        if "prompt" in request and say.finish_reason == "tool_calls":
            choice.finish_reason = "stop"  # nobody parses there
        for kind, token in self._said(request, story, self.where([*base, *tail])[1]):
            if len(choice.parts) == limit:
                choice.finish_reason, choice.stop_reason = "length", None
                break
            choice.parts.append(("eos" if token.id == EOS else kind, token))
            if token.id == EOS or self._stops(request, choice):
                break
        if not choice.parts:
            choice.parts.append(("eos", END_OF_SEQUENCE))
        if choice.parts[-1][0] == "eos" and story.at < len(story.parts):
            choice.finish_reason, choice.stop_reason = "stop", None  # it broke off
        return choice

    def _said(self, request: Json, story: _Story, thought: int) -> Iterator[tuple[Kind, Token]]:
        """What it samples from where it stands, the cap applied; `thought` tokens are in the block already."""
        budget, no = request.get("thinking_token_budget"), self._banned(request)
        while story.at < len(story.parts):
            block = story.block()
            if block and block[1] <= story.at < block[2] and self.honours_cap and budget is not None:
                story.at = block[2] if thought >= budget else story.at
            kind, token = story.parts[story.at]
            story.at += 1
            if kind in {"marker", "eos"} or token.id not in no:
                thought = thought + 1 if kind == "thinking" else 0 if kind == "marker" else thought
                yield kind, token

    def _banned(self, request: Json) -> set[int]:
        """Token ids that `logit_bias` forbids."""
        bias = request.get("logit_bias") or {}
        return {int(token) for token, value in bias.items() if value <= BANNED} if self.honours_bias else set()

    def _limit(self, request: Json) -> int:
        if not self.honours_limit:
            return WINDOW
        default = 16 if "prompt" in request else 256
        return int(request.get("max_completion_tokens") or request.get("max_tokens") or default)

    def _stops(self, request: Json, choice: Choice) -> bool:
        """Whether its last token stops it."""
        token = choice.parts[-1][1]
        if self.honours_stop and token.id in (request.get("stop_token_ids") or ()):
            choice.finish_reason, choice.stop_reason = "stop", token.id
            if not request.get("include_stop_str_in_output"):
                choice.visible = sum(len(before.text) for _, before in choice.parts[:-1])
            return True
        if not self.honours_stop or "prompt" not in request:
            return False  # a chat script says itself what stopped it
        stops = stop_strings(request)
        text = choice.raw() if stops else ""
        for stop in stops:
            found = text.find(stop, max(0, len(text) - len(token.text) - len(stop) + 1))
            if found >= 0:
                choice.finish_reason, choice.stop_reason = "stop", stop
                choice.visible = found + (len(stop) if request.get("include_stop_str_in_output") else 0)
                return True
        return False

    # -- where it stands
    def _place(
        self, request: Json, say: Say, base: Sequence[int], tail: Sequence[int], *, thinks: bool | None, room: int
    ) -> _Story:
        """Read base and tail. Returns: the story, standing where the prompt ends."""
        story = self._story(request, say, room)
        first = story.blocks[0]
        state = self.where(base)[0]
        if thinks is None:
            by_habit = not self.honours_off if state == "closed" else self.native and not self.opens
            may_open = self.opening[0].id not in self._banned(request)
            thinks = state == "open" or (by_habit and may_open)
        story.at = first[3] if not thinks else first[1] if state == "open" else first[0]
        position = 0
        while position < len(tail):
            position += self._read(request, say, story, tail, position, room)
        return story

    def _read(self, request: Json, say: Say, story: _Story, tail: Sequence[int], position: int, room: int) -> int:
        """Read one token (or marker) of the tail. Returns: how many ids that was."""
        block = story.block()
        if story.at < len(story.parts) and story.parts[story.at][1].id == tail[position]:
            story.at += 1
            return 1
        if block and starts_with(tail, position, self.end_marker):
            story.at = block[3]
            return len(self.end_marker)
        if not block and starts_with(tail, position, self.opening):
            is_before_the_answer = story.at == story.blocks[0][3]
            ahead = [b for b in story.blocks if b[0] >= story.at or is_before_the_answer]
            story.at = ahead[0][1] if ahead else story.at
            return len(self.opening)
        if block and story.at == block[2] and story.unlocked < len(say.again):
            longer = self._story(request, say, room, story.unlocked + 1)
            story.parts, story.blocks, story.unlocked = longer.parts, longer.blocks, longer.unlocked
        return 1

    def _story(self, request: Json, say: Say, room: int, unlocked: int = 0) -> _Story:
        """Everything it would sample, as far as `room` can show it."""
        no = self._banned(request)
        answer = say.json if say.json and wants_json(request) else say.answer
        thinking: Iterable[Token] = [*say.thinking, *chain.from_iterable(say.again[:unlocked])]
        ends = say.ends and EOS not in no
        if self.end_marker[0].id in no or (not ends and not answer):
            thinking = _forever(thinking, room)
        if not ends:
            answer = _forever(answer or thinking, room)
        parts: list[tuple[Kind, Token]] = []
        blocks: list[tuple[int, int, int, int]] = []

        def think(thoughts: Iterable[Token]) -> None:
            bounds = [len(parts)]
            for kind, some in (("marker", self.opening), ("thinking", thoughts), ("marker", self.end_marker)):
                parts.extend(("marker" if kind == "marker" else "thinking", token) for token in some)
                bounds.append(len(parts))
            blocks.append((bounds[0], bounds[1], bounds[2], bounds[3]))

        think(thinking)
        does_reopen = say.reopens and self.opening[0].id not in no
        cut = say.reopens_at if does_reopen else len(answer)
        parts.extend(("answer", token) for token in answer[:cut])
        if does_reopen:
            think(say.reopens)
            parts.extend(("answer", token) for token in answer[cut:])
        if ends and say.finish_reason in {"stop", "tool_calls"} and say.stop_reason is None:
            parts.append(("eos", END_OF_SEQUENCE))
        return _Story(parts, blocks, unlocked=unlocked)


def _forever(some: Iterable[Token], room: int) -> list[Token]:
    return list(islice(cycle(some), room))


def stop_strings(request: Json) -> list[str]:
    """`stop`, always as a list."""
    stop = request.get("stop") or []
    return [stop] if isinstance(stop, str) else [one for one in stop if one]


def wants_json(request: Json) -> bool:
    """Whether the request asks for structured output."""
    kind = (request.get("response_format") or {}).get("type", "text")
    return kind != "text" or bool(request.get("structured_outputs"))


def wants_thinking(request: Json) -> bool:
    """Whether the request asks its template for thinking."""
    kwargs = request.get("chat_template_kwargs") or {}
    return kwargs.get("enable_thinking", request.get("reasoning_effort") != "none") is not False
