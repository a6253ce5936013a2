"""Measure what a backend does when it comes up, instead of believing what it says.

Owns: the questions asked and how answers become `Capabilities`. Slow path: httpx, a handful of small
calls, once per start or come-back of a backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from budget.cap import ThinkingMeter
from budget.chain import Forcing
from gateway.ask.fields import thinking_on
from gateway.backends.port import Capabilities
from gateway.backends.reader import MarkerIds
from gateway.backends.segments import CONTINUES, WAIT
from gateway.backends.tool_calls import OPENING
from gateway.backends.tool_text import tool_format_of
from gateway.errors import UpstreamError

if TYPE_CHECKING:
    from gateway.backends.http_backend import HttpBackend

PROBE_CAP = 4
PROBE_MIN_TOKENS = 12
PROBE_MAX_TOKENS = 24
TIMEOUT_S = 60.0
QUESTION = "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Think step by step."
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuing:
    """What continuing from exact token ids takes; see Capabilities."""

    ids_in: bool = False
    forcing: Forcing | None = None
    template_opens: bool = False
    tool_format: str | None = None
    tool_opener: int | None = None
    tool_opener_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class _Answer:
    """What one probing call returned."""

    status: int
    body: dict[str, Any]

    def choice(self) -> dict[str, Any]:
        choices = self.body.get("choices")
        return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}

    def message(self) -> dict[str, Any]:
        message = self.choice().get("message")
        return message if isinstance(message, dict) else {}

    def error(self) -> str:
        error = self.body.get("error")
        text = error.get("message") if isinstance(error, dict) else None
        return f"status {self.status}: {str(text or 'no reason given')[:160]}"


class _Prober:
    """The questions, over one HTTP client."""

    def __init__(self, backend: HttpBackend, client: httpx.AsyncClient) -> None:
        self._backend = backend
        self._client = client
        self.detail: dict[str, str] = {}

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> _Answer:
        """One call. Raises: UpstreamError when the backend does not answer."""
        try:
            response = await self._client.request(method, path, json=body)
        except (httpx.HTTPError, AttributeError) as exc:
            # AttributeError: anyio, of a socket that was reset the moment it was connected.
            raise UpstreamError(f"The backend does not answer: {exc!r}") from exc
        try:
            parsed = response.json() if response.content else {}
        except ValueError:
            parsed = {}
        return _Answer(response.status_code, parsed if isinstance(parsed, dict) else {})

    async def models(self) -> int | None:
        """The model's context window. Raises: UpstreamError when the backend does not serve it."""
        answer = await self.ask("GET", "/v1/models")
        if answer.status != 200:
            raise UpstreamError(f"The backend does not list its models ({answer.error()}).")
        entries = answer.body.get("data")
        names = {str(e.get("id")): e for e in _list(entries) if isinstance(e, dict)}
        wanted = self._backend.upstream_model
        if names and wanted not in names:
            raise UpstreamError(f"The backend serves {sorted(names)}, not {wanted!r}: set upstream_model.")
        length = names.get(wanted, {}).get("max_model_len")
        return length if isinstance(length, int) else None

    async def marker_ids(self) -> MarkerIds | None:
        """Ids of the thinking markers, where each is one token of the vocabulary."""
        ids = [await self._single_token(text) for text in (self._backend.thinking.start, self._backend.thinking.end)]
        if ids[0] is None or ids[1] is None:
            self.detail["markers"] = "not single tokens here: split by text"
            return None
        return MarkerIds(ids[0], ids[1])

    async def _single_token(self, text: str) -> int | None:
        tokens = await self.tokens(prompt=text, add_special_tokens=False)
        return tokens[0] if tokens is not None and len(tokens) == 1 else None

    async def tokens(self, **what: object) -> list[int] | None:
        """Ids of a text or of a rendered chat; None if the backend does not tell."""
        answer = await self.ask("POST", "/tokenize", {"model": self._backend.upstream_model, **what})
        tokens = answer.body.get("tokens")
        is_list = answer.status == 200 and isinstance(tokens, list) and all(isinstance(t, int) for t in tokens)
        return tokens if is_list else None

    async def text(self, tokens: list[int]) -> str:
        """The text of some ids; empty if the backend does not tell."""
        answer = await self.ask("POST", "/detokenize", {"model": self._backend.upstream_model, "tokens": tokens})
        return str(answer.body.get("prompt") or "") if answer.status == 200 else ""

    async def ids_in_and_out(self, prompt: list[int]) -> tuple[bool, bool]:
        """Whether `/v1/completions` takes a prompt of token ids, and whether it returns ids for it."""
        body = {"model": self._backend.upstream_model, "prompt": prompt, "max_tokens": 1, "return_token_ids": True}
        answer = await self.ask("POST", "/v1/completions", body)
        return answer.status == 200, isinstance(answer.choice().get("token_ids"), list)

    async def continuing(self, free: _Answer, markers: MarkerIds | None) -> Continuing:
        """Whether choices can be continued from exact token ids, and what may have to be forced then.

        Args:
            free: a thinking answer, which may tell its prompt where nothing else does.
            markers: ids of the thinking markers.
        """
        thinking = self._backend.thinking
        prompt = await self.chat_tokens()
        template_opens = await self.is_open(prompt or _list(free.body.get("prompt_token_ids")))
        if not prompt:
            self.detail["two_phase"] = "does not render chats as token ids (/tokenize)"
            return Continuing(template_opens=template_opens)
        ids_in, ids_out = await self.ids_in_and_out(prompt)
        if not (ids_in and ids_out):
            self.detail["two_phase"] = "takes no token ids" if not ids_in else "returns no token ids"
            return Continuing(ids_in=ids_in, template_opens=template_opens)
        after = "" if thinking.native else "\n\n"
        texts = (f"{thinking.start}\n", thinking.end, after, thinking.wrap_up, WAIT)
        ids = [tuple(await self.tokens(prompt=text, add_special_tokens=False) or ()) if text else () for text in texts]
        if not ids[0] or not ids[1]:
            self.detail["two_phase"] = "does not tokenise the thinking markers"
            return Continuing(ids_in=ids_in, template_opens=template_opens)
        with_tools = await self.chat_tokens(tools=[TOOL])
        opener = tuple(await self.tokens(prompt=OPENING, add_special_tokens=False) or ())
        return Continuing(
            ids_in=True,
            forcing=Forcing(
                opening=ids[0],
                closing=ids[1],
                after=ids[2],
                wrap_up=ids[3],
                wait=ids[4],
                start_id=None if markers is None else markers.start,
                end_id=None if markers is None else markers.end,
            ),
            template_opens=template_opens,
            tool_format=tool_format_of(await self.text(with_tools)) if with_tools else None,
            tool_opener=opener[0] if len(opener) == 1 else None,
            tool_opener_ids=opener if len(opener) > 1 else (),
        )

    async def chat_tokens(self, **more: object) -> list[int] | None:
        """Ids of the probing question, rendered for thinking."""
        return await self.tokens(messages=MESSAGES, chat_template_kwargs=self.switches_on(), **more)

    def switches_on(self) -> dict[str, object]:
        """The template's switches for thinking."""
        thinking = self._backend.thinking
        return thinking_on(thinking.off, native=thinking.native)

    async def is_thinking(self, answer: _Answer, markers: MarkerIds | None) -> bool:
        """Whether an answer ended before the thinking that its template had opened did."""
        ids = _list(answer.choice().get("token_ids"))
        if markers is not None:
            return not count_thinking(answer, markers)[1]
        said = await self.text(ids)
        return bool(said) and self._backend.thinking.end not in said

    async def takes_effort(self) -> bool:
        """Whether `reasoning_effort` is accepted."""
        return (await self.chat(reasoning_effort="low", max_tokens=PROBE_CAP)).status == 200

    async def gives_logprobs(self) -> bool:
        """Whether a chat's answer comes with log probabilities when they are asked for."""
        answer = await self.chat(logprobs=True, max_tokens=PROBE_MIN_TOKENS, **self._backend.thinking.off)
        logprobs = answer.choice().get("logprobs")
        return answer.status == 200 and isinstance(logprobs, dict) and bool(logprobs.get("content"))

    async def continues_assistant(self) -> bool:
        """Whether an assistant message with closed thinking is gone on from: a fresh turn would begin differently."""
        thinking = self._backend.thinking
        said = f"{thinking.start}\nI count.\n{thinking.end}\n\n1, 2, 3, 4, 5, 6, 7, 8, 9, 10,"
        messages = [{"role": "user", "content": "Count to 20."}, {"role": "assistant", "content": said}]
        answer = await self.chat(messages=messages, temperature=0, max_tokens=PROBE_MIN_TOKENS, **CONTINUES)
        message = answer.message()
        texts = [message.get(field) for field in ("content", "reasoning", "reasoning_content")]
        return answer.status == 200 and any(str(text or "").lstrip().startswith("11") for text in texts)

    async def is_quiet(self, markers: MarkerIds | None) -> bool:
        """Whether the no-think switch is obeyed and the answer then lands in the content."""
        answer = await self.chat(**self._backend.thinking.off)
        message = answer.message()
        if answer.status != 200 or message.get("reasoning") or message.get("reasoning_content"):
            return False
        if markers is not None:
            return count_thinking(answer, markers) == (0, True)
        thinking, content = self._backend.thinking, str(message.get("content") or "")
        if thinking.start in content or thinking.end in content:
            return False
        if self._backend.kind != "vllm":
            return True
        prompt = await self.tokens(messages=MESSAGES, **thinking.off) or []
        return not (await self.is_open(prompt) and await self.is_thinking(answer, None))

    async def is_open(self, prompt: list[int]) -> bool:
        """Whether a rendered prompt ends inside the thinking."""
        said = await self.text(prompt[-12:]) if prompt else ""
        return said.rstrip().endswith(self._backend.thinking.start.rstrip())

    async def chat(self, **more: object) -> _Answer:
        """A short thinking call."""
        body: dict[str, Any] = {
            "model": self._backend.upstream_model,
            "messages": MESSAGES,
            "max_tokens": PROBE_MAX_TOKENS,
        }
        if self._backend.kind == "vllm":
            body |= {"temperature": 0, "min_tokens": PROBE_MIN_TOKENS, "return_token_ids": True}
            if on := self.switches_on():
                body["chat_template_kwargs"] = on
        body |= more
        return await self.ask("POST", "/v1/chat/completions", body)


async def measure(backend: HttpBackend) -> tuple[Capabilities, MarkerIds | None]:
    """Ask everything. Raises: UpstreamError when the backend is not up or does not serve the model."""
    pool = backend.pool  # with its TLS context: httpx would load all certificates again, 30 ms of a standing loop
    async with httpx.AsyncClient(
        base_url=pool.base_url, headers=pool.headers, timeout=TIMEOUT_S, trust_env=False, verify=pool.tls or False
    ) as client:
        prober = _Prober(backend, client)
        max_len = await prober.models()
        is_vllm = backend.kind == "vllm"
        markers = await prober.marker_ids() if is_vllm else None
        free = await prober.chat()
        if free.status != 200:
            raise UpstreamError(f"The backend refused a plain chat completion: {free.error()}")
        ids_out = isinstance(free.choice().get("token_ids"), list)
        can_count = markers is not None and ids_out
        cap_binds = cap_binds_with_tools = tools = None
        if is_vllm and can_count and markers is not None:
            free_thinking, _ = count_thinking(free, markers)
            cap_binds = await _cap_binds(prober, markers, free_thinking, "cap")
            with_tools = await prober.chat(tools=[TOOL])
            tools = with_tools.status == 200
            if not tools:
                prober.detail["tools"] = with_tools.error()
            elif cap_binds:
                thinking, _ = count_thinking(with_tools, markers)
                cap_binds_with_tools = await _cap_binds(prober, markers, thinking, "cap + tools", tools=[TOOL])
        elif is_vllm:
            prober.detail["cap"] = "cannot be measured without token ids and single-token markers"
        else:
            prober.detail["cap"] = "an OpenAI-compatible server gives nothing to measure it by"
        quiet = await prober.is_quiet(markers)
        continuing = await prober.continuing(free, markers) if is_vllm else Continuing()
        field = _thinking_field(free, backend)
        if field is None and free.message().get("content") and continuing.template_opens:
            # It thought on to the limit, so no marker shows that this content is thinking.
            field = "inline_opened" if await prober.is_thinking(free, markers) else None
        usage = free.body.get("usage")
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        return Capabilities(
            cap_binds=cap_binds if is_vllm else False,
            cap_binds_with_tools=cap_binds_with_tools,
            thinking_field=field,
            token_ids_in=continuing.ids_in,
            token_ids_out=ids_out,
            cached_tokens=isinstance(details, dict) and details.get("cached_tokens") is not None,
            tools=tools,
            instant_is_quiet=quiet,
            max_model_len=max_len,
            forcing=continuing.forcing,
            template_opens=continuing.template_opens,
            tool_format=continuing.tool_format,
            tool_opener=continuing.tool_opener,
            tool_opener_ids=continuing.tool_opener_ids,
            takes_effort=not is_vllm and await prober.takes_effort(),
            continues_assistant=continuing.forcing is None and await prober.continues_assistant(),
            logprobs=await prober.gives_logprobs(),
            limit_binds=not isinstance(usage, dict) or _int(usage.get("completion_tokens")) <= PROBE_MAX_TOKENS,
            detail=prober.detail,
        ), markers


async def _cap_binds(prober: _Prober, markers: MarkerIds, free_thinking: int, name: str, **more: object) -> bool | None:
    """Whether a cap ends thinking that would have gone on; None when the model did not think that far."""
    capped = await prober.chat(thinking_token_budget=PROBE_CAP, **more)
    if capped.status != 200:
        prober.detail[name] = f"refused, {capped.error()}"
        return False
    thinking, is_closed = count_thinking(capped, markers)
    if thinking > PROBE_CAP or (free_thinking > PROBE_CAP and not is_closed):
        prober.detail[name] = f"ignored: {thinking} thinking tokens under a cap of {PROBE_CAP}"
        return False
    if free_thinking <= PROBE_CAP:
        prober.detail[name] = f"unknown: the model thought only {free_thinking} tokens without a cap"
        return None
    prober.detail[name] = f"{thinking} of {PROBE_CAP} tokens used, {free_thinking}+ without a cap"
    return True


def count_thinking(answer: _Answer, markers: MarkerIds) -> tuple[int, bool]:
    """Thinking tokens of an answer by its ids, and whether the thinking was closed."""
    prompt = _list(answer.body.get("prompt_token_ids"))
    is_open = next(
        (token == markers.start for token in reversed(prompt) if token in (markers.start, markers.end)), False
    )
    meter = ThinkingMeter(markers.start, markers.end, cap=None, is_open=is_open)
    meter.feed(_list(answer.choice().get("token_ids")))
    return meter.thinking, not meter.is_open


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _thinking_field(answer: _Answer, backend: HttpBackend) -> str | None:
    message = answer.message()
    for name in ("reasoning", "reasoning_content"):
        if message.get(name):
            return name
    content = str(message.get("content") or "")
    if content.lstrip().startswith(backend.thinking.start):
        return "inline"
    return "inline_opened" if backend.thinking.end in content else None
