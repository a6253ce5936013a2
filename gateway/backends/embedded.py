"""The backend in this process: a small engine on a thread of its own, behind the port.

Owns: the way between the event loop and the engine's thread, and the translation of the engine's errors.
torch is imported when the model is loaded, not before. The engine reads all requests together and queues
by priority those that its cache does not hold.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Self

import msgspec

from budget.chain import Forcing
from gateway.ask.fields import thinking_on
from gateway.backends.embedded_fields import read_call, read_segment
from gateway.backends.embedded_shapes import DeltaShaper, SegmentShaper
from gateway.backends.port import Call, Capabilities, Delta, Express, Thinking
from gateway.backends.segments import WAIT
from gateway.backends.tool_text import tool_format_of
from gateway.errors import GatewayError, InvalidRequest, Overloaded, UpstreamError
from kernels.errors import EngineClosed, KernelError, ModelUnusable, QueueFull, RequestRefused
from kernels.params import Failed, Finished, Output
from kernels.toolcalls import OPENING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from gateway.backends.port import Segment
    from gateway.config.schema import ThinkingConfig
    from kernels.engine import Engine
    from kernels.params import ChatInput, CompletionInput, Event, GenerationRequest, Json, Options
    from kernels.tokens import Tokens

    Read = Callable[[Json], tuple[ChatInput | CompletionInput, Options]]
    Shaper = DeltaShaper | SegmentShaper

PROBE_CAP = 4
PROBE_MESSAGES = [{"role": "user", "content": "Think step by step: how much is 17 + 25?"}]
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "ping", "parameters": {"type": "object", "additionalProperties": False}},
}


class EmbeddedBackend:
    """One model in this process.

    Nothing is loaded before the first `probe`; until then `generate` answers Overloaded.

    Args:
        id: what clients and metrics may see.
        path: a Hugging Face folder or id.
        thinking: the model's markers and whether it thinks by itself, for the probe.
        on_progress: takes a line per step of loading, on another thread.
        max_waiting: requests that may wait for those that run.
        device: a torch device; `auto` takes a GPU if there is one.
        max_model_len: context window in tokens; None for the model's own.
        engine: a ready engine; then `path` is only a name.
    """

    kind = "embedded"

    def __init__(
        self,
        *,
        id: str,
        path: str,
        thinking: ThinkingConfig | Thinking | None = None,
        on_progress: Callable[[str], None] | None = None,
        max_waiting: int = 64,
        device: str = "auto",
        max_model_len: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.id = id
        self._path = path
        self._thinking = thinking or Thinking(enabled=True, cap=PROBE_CAP)
        self._on_progress = on_progress or _say_nothing
        self._max_waiting = max_waiting
        self._device = device
        self._max_model_len = max_model_len
        self._engine = engine
        self._loading = asyncio.Lock()
        self._is_closed = False

    @classmethod
    async def load(
        cls,
        *,
        id: str,
        path: str,
        on_progress: Callable[[str], None] | None = None,
        thinking: ThinkingConfig | Thinking | None = None,
        max_waiting: int = 64,
        device: str = "auto",
        max_model_len: int | None = None,
    ) -> Self:
        """A backend whose model is in memory. Raises: UpstreamError if it cannot be loaded."""
        backend = cls(
            id=id,
            path=path,
            thinking=thinking,
            on_progress=on_progress,
            max_waiting=max_waiting,
            device=device,
            max_model_len=max_model_len,
        )
        await backend._ready()
        return backend

    def generate(
        self,
        call: Call,
        express: Express | None = None,  # noqa: ARG002  # the task that waits for a token makes its delta
    ) -> AsyncGenerator[list[Delta]]:
        """Run `call`; closing the iterator frees the engine at the next token, or the place in the queue.

        Raises: InvalidRequest, Overloaded, UpstreamError.
        """

        def shaper(engine: Engine, request: GenerationRequest) -> DeltaShaper:
            return DeltaShaper(
                call.surface,
                engine.model.tokens.bytes_of,
                [prompt.token_ids for prompt in request.prompts],
                n=call.n,
                wants_token_ids=call.wants_token_ids,
            )

        return self._stream(partial(read_call, call), shaper)

    def extend(self, call: Call, segment: Segment) -> AsyncGenerator[list[Delta]]:
        """Sample on from `segment.prompt`, with no thinking rules; closing the iterator frees the engine as above.

        A character whose first bytes the prompt ends with comes whole. Each segment queues anew.

        Raises: as `generate`.
        """

        def shaper(engine: Engine, request: GenerationRequest) -> SegmentShaper:  # noqa: ARG001 - as generate's
            return SegmentShaper(engine.model.tokens.bytes_of)

        return self._stream(partial(read_segment, call, segment), shaper)

    async def tokenize(self, call: Call) -> list[int]:
        """The ids of a chat's messages and tools in the model's template, with every check `generate` makes.

        A chain that the template itself does not open is not opened here: whoever continues the ids does it.

        Raises: InvalidRequest, Overloaded.
        """
        assert call.surface == "chat"
        unopened = msgspec.structs.replace(call, thinking=Thinking(enabled=False, cap=0))
        request = await asyncio.to_thread(self._compose, self._loaded(), partial(read_call, unopened))
        return list(request.prompts[0].token_ids)

    async def encode(self, text: str) -> list[int]:
        """See the port."""
        return list(self._loaded().model.tokens.marker(text).ids)

    async def _stream(
        self, read: Read, shaper_of: Callable[[Engine, GenerationRequest], Shaper]
    ) -> AsyncGenerator[list[Delta]]:
        """Compose, submit and shape what comes of it."""
        engine = self._loaded()
        request = await asyncio.to_thread(self._compose, engine, read)
        shaper = shaper_of(engine, request)
        async with aclosing(_events(engine, request)) as batches:
            async for events in batches:
                deltas = [shaper.delta(event) for event in events if isinstance(event, Output)]
                last = events[-1]
                if isinstance(last, Finished):
                    deltas.append(shaper.last(last))
                if deltas:
                    yield deltas
                if isinstance(last, Failed):
                    raise _as_gateway_error(last.error) from last.error

    async def probe(self) -> Capabilities:
        """Load the model if that was not done, then measure with short calls.

        Raises: UpstreamError when the model cannot be loaded or does not generate.
        """
        engine = await self._ready()
        thinking = self._thinking
        rules = Thinking(
            enabled=True,
            cap=PROBE_CAP,
            start=thinking.start,
            end=thinking.end,
            native=thinking.native,
        )
        quiet = Thinking(enabled=False, cap=0, start=rules.start, end=rules.end, native=rules.native)
        ask = {"messages": PROBE_MESSAGES, "temperature": 0}
        with_tools = {**ask, "tools": [PROBE_TOOL], "tool_choice": "required", "parallel_tool_calls": False}
        try:
            plain = await self._collect("chat", ask, rules, max_tokens=16)
            tools = await self._collect("chat", with_tools, rules, max_tokens=96)
            ids = next((delta.token_ids for delta in plain if delta.token_ids), [0])
            instant = await self._collect("chat", {**ask, "logprobs": True, **self._off()}, quiet, max_tokens=8)
            taken = await self._collect("completions", {"prompt": ids}, quiet, max_tokens=1)
            rendered = await self._rendered({**ask, **self._on()})
            taught = await self._rendered({**ask, **self._on(), "tools": [PROBE_TOOL]})
        except GatewayError as exc:
            raise UpstreamError(f"The embedded model does not generate: {exc.message}") from exc
        thought = sum(delta.thinking for delta in plain)
        calls = any(delta.tool_calls is not None for delta in tools)
        return Capabilities(
            cap_binds=_binds(plain),
            cap_binds_with_tools=_binds(tools),
            thinking_field="reasoning" if thought else None,
            token_ids_in=any(delta.token_ids for delta in taken),
            token_ids_out=any(delta.token_ids for delta in plain),
            cached_tokens=any(delta.usage is not None for delta in plain),
            tools=calls,
            instant_is_quiet=not any(delta.thinking for delta in instant) and any(d.text for d in instant),
            max_model_len=engine.model.max_len,
            forcing=self._forcing(engine.model.tokens),
            template_opens=rendered.rstrip().endswith(rules.start.rstrip()),
            tool_format=tool_format_of(taught),
            tool_opener=engine.model.tokens.marker(OPENING).single,
            logprobs=any(delta.logprobs is not None for delta in instant),
            detail={
                "cap_binds": f"{thought} thinking tokens under a cap of {PROBE_CAP}",
                "tools": "a required call came back" if calls else "no call came back",
                "cached_tokens": "counted in full blocks of the prefix cache",
            },
        )

    async def close(self) -> None:
        """Abort what runs and end the engine's thread."""
        self._is_closed = True
        async with self._loading:
            if self._engine is not None:
                await asyncio.to_thread(self._engine.close)

    def _forcing(self, tokens: Tokens) -> Forcing:
        """What a chain of segments may have to force, as `generate` itself would."""
        thinking = self._thinking
        start, end = tokens.marker(thinking.start.strip()).single, tokens.marker(thinking.end).single
        has_ids = start is not None and end is not None
        return Forcing(
            opening=tokens.marker(f"{thinking.start}\n").ids,
            closing=tokens.marker(thinking.end).ids,
            after=tokens.marker("" if thinking.native else "\n\n").ids,
            wrap_up=tokens.marker(thinking.wrap_up).ids,
            wait=tokens.marker(WAIT).ids,
            # One without the other is of no use: a chain is followed by ids or by its text.
            start_id=start if has_ids else None,
            end_id=end if has_ids else None,
        )

    def _on(self) -> dict[str, object]:
        """The fields that switch the model's own thinking on."""
        return {"chat_template_kwargs": thinking_on(self._off(), native=self._thinking.native)}

    def _off(self) -> dict[str, object]:
        """The fields that switch the model's own thinking off."""
        off = getattr(self._thinking, "off", None)
        return dict(off) if isinstance(off, dict) else {}

    def _loaded(self) -> Engine:
        """The engine. Raises: Overloaded while there is none."""
        if self._engine is None:
            raise Overloaded("The model is still being loaded: try again soon.", retry_after_s=5.0)
        return self._engine

    async def _ready(self) -> Engine:
        """The engine, loaded once. Raises: UpstreamError."""
        async with self._loading:
            if self._is_closed:
                raise UpstreamError("The embedded backend is closed.")
            if self._engine is None:
                try:
                    self._engine = await asyncio.to_thread(self._load)
                except (ModelUnusable, ImportError) as exc:
                    raise UpstreamError(f"The embedded model cannot be loaded: {exc}") from exc
            return self._engine

    def _load(self) -> Engine:
        """Blocking part of loading: seconds to minutes."""
        from kernels.engine import Engine  # noqa: PLC0415 - torch only where a model is served from here

        return Engine.load(
            self._path,
            say=self._on_progress,
            device=self._device,
            max_len=self._max_model_len,
            max_waiting=self._max_waiting,
        )

    @staticmethod
    def _compose(engine: Engine, read: Read) -> GenerationRequest:
        """Fields to a request: renders and tokenises, so it runs off the event loop."""
        try:
            return engine.compose(*read(engine.defaults))
        except RequestRefused as exc:
            raise _as_gateway_error(exc) from exc
        except RecursionError as exc:
            raise InvalidRequest("The request is nested too deeply.") from exc

    async def _collect(
        self, surface: str, fields: dict[str, object], thinking: Thinking, *, max_tokens: int
    ) -> list[Delta]:
        """All deltas of a probing call."""
        call = self._probing(surface, fields, thinking, max_tokens=max_tokens)
        return [delta async for deltas in self.generate(call) for delta in deltas]

    async def _rendered(self, fields: dict[str, object]) -> str:
        """The text of a probing chat's prompt."""
        call = self._probing("chat", fields, Thinking(enabled=False, cap=0), max_tokens=1)
        return self._loaded().model.tokens.decode(await self.tokenize(call))

    def _probing(self, surface: str, fields: dict[str, object], thinking: Thinking, *, max_tokens: int) -> Call:
        return Call(
            surface="chat" if surface == "chat" else "completions",
            request_id=f"probe-{self.id}",
            model=self._path,
            fields={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()},
            thinking=thinking,
            max_tokens=max_tokens,
        )


def _say_nothing(line: str) -> None:
    """Progress that nobody listens to."""


async def _events(engine: Engine, request: GenerationRequest) -> AsyncGenerator[list[Event]]:
    """The engine's events, those together that arrived together; closing it cancels the request.

    Raises: Overloaded.
    """
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(event: Event) -> None:
        """Runs on the engine's thread."""
        loop.call_soon_threadsafe(inbox.put_nowait, event)

    try:
        ticket = engine.submit(request, deliver)
    except KernelError as exc:
        raise _as_gateway_error(exc) from exc
    try:
        is_over = False
        while not is_over:
            events = [await inbox.get()]
            while not inbox.empty():
                events.append(inbox.get_nowait())
            is_over = not isinstance(events[-1], Output)
            yield events
    finally:
        ticket.cancel()


def _binds(deltas: list[Delta]) -> bool | None:
    """Whether the cap ended the thinking at the cap; None if the model did not think that long."""
    thought = sum(delta.thinking for delta in deltas)
    if thought > PROBE_CAP:
        return False
    return True if any(delta.capped for delta in deltas) else None


def _as_gateway_error(error: KernelError) -> GatewayError:
    """What a client sees of an engine's error."""
    if isinstance(error, RequestRefused):
        return InvalidRequest(error.message, param=error.param, code=error.code)
    if isinstance(error, (QueueFull, EngineClosed)):
        return Overloaded(f"The embedded engine takes no more requests: {error}.")
    return UpstreamError(f"The embedded engine failed: {error}.")
