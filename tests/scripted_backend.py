"""A scripted upstream server on 127.0.0.1: speaks like vLLM, lies on request, and remembers everything.

    async def test_x(scripted):
        scripted.queue(Script(say=[Say(thinking=tokens("let me see"), answer=tokens("42"))]))
        ...
        assert scripted.calls[0].json["thinking_token_budget"] == 5

What is not scripted is answered by `scripted.default`. No test waits for time: a `Gate` holds a stream at
an event until the test opens it, and every `Exchange` has events for what happened to it.

A completions call with token ids goes on where they end, as a real model does. Its rendered prompt says which
conversation it belongs to, so one queued answer serves a conversation with all its calls; within it, calls that
repeat what a chain sampled (or have its seed) continue this chain, and others begin the next choice. Ids that the
model would not have said are text that was forced on it. The newest conversation gets the calls where two rendered
the same prompt.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Self

from tests.scripted_chains import Chain, Conversations, PrefixCache
from tests.scripted_connection import Connection, Playing
from tests.scripted_script import NOT_FOUND, Exchange, Reply, Script, json_reply, refusal
from tests.scripted_stream import Json, Model, Say, Stream, Token, tokens
from tests.scripted_tokens import NAMES, decode, is_text

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CALLS = frozenset({CHAT, COMPLETIONS})
TOKENIZER = frozenset({"/tokenize", "/detokenize"})


def is_trial(request: Json) -> bool:
    """Whether a call only makes the backend check its fields: one token in, one token out."""
    return request.get("max_tokens") == 1 and isinstance(request.get("prompt"), list) and len(request["prompt"]) == 1


class ScriptedBackend:
    """The server; an async context manager, and the fixture `scripted`.

    Attributes:
        name: the model it serves; another name is refused as vLLM does.
        model: how the model behaves.
        default: answers calls that nothing was queued for.
        routes: answers by path, before anything else, e.g. `{"/v1/embeddings": json_reply(...)}`.
        drops_reused: a second request on a connection is not answered: the connection is closed instead,
            as when the server's keep-alive ended a moment before.
        exchanges: every request, in order of arrival.
    """

    def __init__(self, *, name: str = "scripted", model: Model | None = None, version: str = "0.32.0") -> None:
        self.name = name
        self.model = model or Model()
        self.default: Script | Reply | Callable[[Exchange], Script | Reply] = Script(
            say=[Say(thinking=tokens("well " * 63 + "well"), answer=tokens("the answer is 42"))]
        )
        self.routes: dict[str, Reply] = {
            "/version": json_reply({"version": version}),
            "/health": Reply(),
            "/metrics": Reply(content_type="text/plain"),
            "/v1/models": json_reply({"object": "list", "data": [self._card(name)]}),
        }
        self.drops_reused = False
        self.exchanges: list[Exchange] = []
        self.connections: list[Connection] = []
        self._queue: deque[Script | Reply] = deque()
        self._conversations = Conversations()
        self._cache = PrefixCache()
        self._texts: dict[int, str] = dict(NAMES)
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def url(self) -> str:
        """Where it listens, as a backend's `url`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def calls(self) -> list[Exchange]:
        """The chat and completions calls among the exchanges."""
        return [exchange for exchange in self.exchanges if exchange.path in CALLS]

    def queue(self, *answers: Script | Reply) -> None:
        """Answer the next calls with these, in order."""
        self._queue.extend(answers)

    @property
    def chains(self) -> list[Chain]:
        """The chains of all conversations, oldest first."""
        return self._conversations.chains()

    def forget(self) -> None:
        """Forget what was asked so far, e.g. by a probe at start-up; the prefix cache stays."""
        self.exchanges.clear()
        self._conversations.clear()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def stop(self) -> None:
        """Stop listening and cut every connection, as a killed process does."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for connection in self.connections:
            connection.cut("reset")

    @staticmethod
    def _card(name: str) -> Json:
        card = {"id": name, "object": "model", "created": 1795410662, "owned_by": "vllm"}
        return {**card, "root": name, "parent": None, "max_model_len": 4096}

    # -- called by connections
    def answer(self, exchange: Exchange, connection: Connection) -> None:
        """Start answering one request."""
        self.exchanges.append(exchange)
        task = asyncio.get_running_loop().create_task(connection.play(exchange, self._answer_for(exchange)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _answer_for(self, exchange: Exchange) -> Reply | Playing:
        if exchange.path in self.routes or exchange.path not in CALLS | TOKENIZER:
            return self.routes.get(exchange.path, NOT_FOUND)
        try:
            request = exchange.json
        except ValueError:
            return refusal(400, "1 validation error:\n  JSON decode error", "Bad Request", "body.1")
        if request.get("model") not in {self.name, None}:
            return refusal(404, f"The model `{request['model']}` does not exist.", "NotFoundError", "model")
        return self._model_call(exchange, request)

    def _model_call(self, exchange: Exchange, request: Json) -> Reply | Playing:
        if exchange.path in TOKENIZER:
            return self._tokenizer(exchange.path, request)
        if not all(token.lstrip("-").isdigit() for token in request.get("logit_bias") or {}):
            return refusal(400, "1 validation error:\n  int_parsing", "Bad Request", "body.logit_bias")
        if exchange.path == COMPLETIONS and not is_text(request.get("prompt")):
            return self._chain(exchange, request)
        script = self._next(exchange)
        if isinstance(script, Reply):
            return script
        playing = self._playing(exchange, request, script, script.model or self.model)
        if exchange.path == CHAT:
            self._remember_chat(exchange, request, script, playing[1])
        return playing

    def _remember_chat(self, exchange: Exchange, request: Json, script: Script, stream: Stream) -> None:
        """Begin its conversation: completions calls may go on where a stream is cut."""
        conversation = self._conversations.begin(stream.model.prompt_ids(request), "chat")
        conversation.script = script
        seed = request.get("seed")
        for choice in exchange.choices:
            chain = Chain(choice.index, None if seed is None else seed + choice.index, [exchange])
            chain.sampled = choice.ids()
            conversation.chains.append(chain)

    def _next(self, exchange: Exchange) -> Script | Reply:
        chosen = self._queue.popleft() if self._queue else self.default
        return chosen(exchange) if callable(chosen) else chosen

    def _next_model(self) -> Model:
        """The model that will answer next: its template and its markers are those of the tokenizer."""
        chosen = self._queue[0] if self._queue else self.default
        return (chosen.model if isinstance(chosen, Script) else None) or self.model

    def _tokenizer(self, path: str, request: Json) -> Reply:
        model = self._next_model()
        if not model.tokenizes:
            return NOT_FOUND
        needed = "tokens" if path == "/detokenize" else "prompt" if "messages" not in request else "messages"
        if needed not in request:
            return refusal(400, "1 validation error:\n  Field required", "Bad Request", f"body.{needed}")
        if path == "/detokenize":
            return json_reply({"prompt": decode(request["tokens"], self._texts)})
        self._learn(model.prompt_tokens(request))
        ids = model.prompt_ids(request)
        if needed == "messages":
            self._conversations.begin(ids, path)
        return json_reply({"count": len(ids), "max_model_len": 4096, "tokens": ids, "token_strs": None})

    def _learn(self, some: Iterable[Token]) -> None:
        self._texts |= {token.id: token.text for token in some if token.text and token.id not in self._texts}

    def _chain(self, exchange: Exchange, request: Json) -> Reply | Playing:
        """Answer a completions call whose prompt is token ids: the next call of some chain."""
        prompts, seed = self.model.prompts_of(request), request.get("seed")
        if is_trial(request):
            return self._trial(exchange, request, prompts[0])
        conversation, chain = self._conversations.find(prompts[0], seed, self._next_model())
        if conversation.script is None:
            chosen = self._next(exchange)
            if isinstance(chosen, Reply):
                return chosen
            conversation.script = chosen
        whole = conversation.script
        model = whole.model or self.model
        if not model.takes_ids:
            return refusal(400, "1 validation error:\n  {'loc': 'body.prompt'}", "Bad Request", "body.prompt")
        chain = chain or conversation.new_chain(seed)
        exchange.choice, exchange.phase, exchange.base = chain.index, len(chain.calls), len(conversation.base)
        chain.calls.append(exchange)
        played = whole.for_call(exchange.phase, chain.index, exchange)
        if isinstance(played, Reply):
            return played
        script = replace(played, say=whole.say, thinks=whole.thinks)
        playing = self._playing(exchange, request, script, model, base=conversation.base)
        chain.forced, chain.sampled = exchange.tail, exchange.choices[0].ids()
        return playing

    def _trial(self, exchange: Exchange, request: Json, prompt: Sequence[int]) -> Reply | Playing:
        """Answer a call of one token each way as what comes next would be, which is not used up by it."""
        chosen = self._queue[0] if self._queue else self.default
        chosen = chosen(exchange) if callable(chosen) else chosen
        if isinstance(chosen, Reply):
            return chosen
        script = replace(
            chosen.without_incidents(), say=[Say(answer=tokens("x"))], thinks=False, replace=chosen.replace
        )
        return self._playing(exchange, request, script, chosen.model or self.model, base=prompt)

    def _playing(
        self, exchange: Exchange, request: Json, script: Script, model: Model, base: Sequence[int] = ()
    ) -> Playing:
        """Generate every choice of a call; `base`: the rendered prompt within its prompt ids, if it has some."""
        for say in script.say:
            self._learn((*say.thinking, *say.answer, *say.json, *say.reopens, *(t for more in say.again for t in more)))
        if is_text(request.get("prompt")) or exchange.path == CHAT:
            self._learn(model.prompt_tokens(request))
        prompts = model.prompts_of(request)
        per_prompt = request.get("n") or 1
        for index in range(per_prompt * len(prompts)):
            say = script.say[min(exchange.choice + index, len(script.say) - 1)]
            if exchange.path == CHAT:
                choice = model.generate(request, index, say, thinks=script.thinks)
            else:
                prompt = prompts[index // per_prompt]
                cut = len(base) or len(prompt)
                choice = model.play(request, index, say, prompt[:cut], prompt[cut:], thinks=script.thinks)
            exchange.choices.append(choice)
        exchange.cached = sum(map(self._cache.hits, prompts))
        filling = [self._cache.fill(prompt) for prompt in prompts for _ in range(per_prompt)]
        stream = Stream(
            model=model,
            request=request,
            surface="chat" if exchange.path == CHAT else "completions",
            choices=exchange.choices,
            call_id=f"{'chatcmpl' if exchange.path == CHAT else 'cmpl'}-{len(self.exchanges)}",
            tokens_per_event=script.tokens_per_event,
            cached=exchange.cached,
            on_token=lambda choice, token: filling[choice].add(token),
        )
        return script, stream
