"""The soft fallback: a cap on servers that take neither a cap nor token ids.

Owns: asking for less thinking by effort, and going on in a second chat call when the thinking was cut off: from the
assistant's own message where the server was measured to do that, else by asking for the answer now. It is announced
as `soft`: the cut comes when more than the cap has arrived, tokens are counted by events, and a server that is asked
may think again before it answers; that thinking is dropped and counted as wasted.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec

from budget.cap import effort_within
from gateway.backends.port import Call, Capabilities, Delta, Kind, Thinking, Usage
from gateway.backends.segments import CONTINUES
from gateway.errors import UpstreamError, UpstreamRejected
from gateway.modes.guard import GRACE_TOKENS
from gateway.modes.merge import merged

if TYPE_CHECKING:
    from gateway.backends.port import Backend
    from gateway.modes.flow import Batches, Run

ANSWER_NOW = "Time is up. Answer my question now, from the thoughts above, without thinking any further."
LEAST_EFFORT = "low"


def with_effort(run: Run, found: Capabilities) -> Call:
    """The call, with the effort whose share of the model's thinking the cap allows, unless the client named one."""
    call = run.call
    if not found.takes_effort or "reasoning_effort" in call.fields or call.thinking.cap is None:
        return call
    effort = effort_within(call.thinking.cap, run.model.bounds(None, None, None))
    return msgspec.structs.replace(call, fields={**call.fields, "reasoning_effort": _raw(effort)})


async def soft_answers(
    run: Run, backend: Backend, found: Capabilities, thoughts: dict[int, str], thinking: dict[int, int]
) -> Batches:
    """Answers to choices whose thinking was cut off.

    Args:
        run: the request.
        backend: that cut them off.
        found: what it was measured to do.
        thoughts: by choice, the thinking that the client has seen.
        thinking: by choice, about how many tokens that was.

    Raises: as `Backend.generate`.
    """
    usages: list[Usage] = []
    streams = [
        _answer(run, backend, _second_call(run, found, text, thinking[index]), index, usages)
        for index, text in sorted(thoughts.items())
    ]
    received = run.tally.output()
    async with aclosing(merged(streams)) as batches:
        async for batch in batches:
            yield batch
    run.tally.is_guess = True  # the first call was cut before it told its usage
    if usages:
        # The second prompt repeats the first and the thoughts, which are counted already.
        repeated = max(thinking.values(), default=0)
        yield [
            Delta(
                usage=Usage(
                    prompt_tokens=max(0, usages[0].prompt_tokens - repeated),
                    completion_tokens=received + sum(usage.completion_tokens for usage in usages),
                    cached_tokens=None,
                    reasoning_tokens=run.tally.thinking + run.tally.wasted_thinking,
                )
            )
        ]


async def _answer(run: Run, backend: Backend, call: Call, index: int, usages: list[Usage]) -> Batches:
    """One choice's answer. Thinking in it is dropped, and bounded by the call's own limit only.

    Where the server goes on from closed thinking there is none: all text is the answer, whatever a parser calls it.
    """
    goes_on = "continue_final_message" in call.fields
    async with aclosing(_our_own(backend.generate(call))) as batches:
        async for batch in batches:
            out: list[Delta] = []
            for delta in batch:
                delta.index = index
                if delta.usage is not None:
                    usages.append(delta.usage)
                elif goes_on or delta.kind is not Kind.THINKING:
                    delta.kind, delta.answer, delta.thinking = Kind.ANSWER, delta.answer + delta.thinking, 0
                    delta.wire = b""  # it has another id, and perhaps another index
                    out.append(delta)
                else:
                    run.tally.wasted += delta.thinking + delta.answer + delta.injected
                    if delta.finish_reason is not None:
                        out.append(Delta(index=index, finish_reason=delta.finish_reason))
            yield out  # also when empty: what was dropped counts against every bound


async def _our_own(batches: Batches) -> Batches:
    """The same; a refusal of a call that the client did not make is no mistake of the client's."""
    try:
        async with aclosing(batches):
            async for batch in batches:
                yield batch
    except UpstreamRejected as exc:
        raise UpstreamError(
            f"The backend refused to be asked for the answer after its thinking: {exc.message}"
        ) from exc


def _second_call(run: Run, found: Capabilities, thoughts: str, thinking: int) -> Call:
    """The call for the answer, from the thoughts as the assistant's, which it goes on from where the server can."""
    call, marks = run.call, run.call.thinking
    messages: list[object] = msgspec.json.decode(call.fields["messages"])
    said = {"role": "assistant", "content": f"{marks.start}\n{thoughts}{marks.wrap_up}{marks.end}\n\n"}
    fields = dict(call.fields)
    if found.continues_assistant:
        fields |= {name: _raw(value) for name, value in CONTINUES.items()}
        messages = [*messages, said]
    else:
        messages = [*messages, said, {"role": "user", "content": ANSWER_NOW}]
        off = run.model.switches.encoded("instant", call.fields.get("chat_template_kwargs"))
        if off is not None:
            fields["chat_template_kwargs"] = off
        if found.takes_effort:
            fields["reasoning_effort"] = _raw(LEAST_EFFORT)
    fields["messages"] = _raw(messages)
    return msgspec.structs.replace(
        call,
        fields=fields,
        thinking=Thinking(enabled=False, cap=0, start=marks.start, end=marks.end),
        max_tokens=max(1, call.max_tokens - thinking - GRACE_TOKENS - 1),
        n=1,
    )


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
