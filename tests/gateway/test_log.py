"""Logs: one JSON line per request, off the event loop, and never a prompt or a key in any of them."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import threading
from typing import Any

import pytest

from budget.tokens import TokenCounts
from gateway.log import MAX_PENDING, JsonFormatter, LineWriter, RequestLine, configure
from tests.gateway.asgi import ask, gateway_of
from tests.gateway.still import CHAT, TEXT, config_of

Json = dict[str, Any]
SECRET = "hunter2-do-not-log"


def line(**changes: Any) -> RequestLine:
    """A request line."""
    plain: Json = {
        "event": "request",
        "time": 1.5,
        "request_id": "req-1",
        "route": "/v1/chat/completions",
        "status": 200,
        "key": "ada",
        "model": "qwen",
        "mode": "instant",
        "mode_reason": "asked by model",
        "backend": "a",
        "stream": False,
        "seconds": 0.1,
        "overhead_ms": 0.2,
        "tokens": TokenCounts(prompt=3, answer=4),
    }
    return RequestLine(**{**plain, **changes})


class Broken(io.StringIO):
    """A stream that fails a few times, as a pipe without a reader does."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures
        self.failed = threading.Event()

    def write(self, text: str) -> int:
        """Fail, or write."""
        if self.failures:
            self.failures -= 1
            self.failed.set()
            raise BrokenPipeError
        return super().write(text)


def test_each_request_is_one_line_of_json() -> None:
    """Lines come out in order, complete, as soon as the writer is closed."""
    out = io.StringIO()
    writer = LineWriter(out)
    for i in range(3):
        writer.write(line(request_id=f"req-{i}"))
    writer.close()
    lines = [json.loads(text) for text in out.getvalue().splitlines()]
    assert [each["request_id"] for each in lines] == ["req-0", "req-1", "req-2"]
    assert lines[0]["tokens"] == {
        **dict.fromkeys(("cached", "thinking", "planner", "probe", "injected", "wasted"), 0),
        "prompt": 3,
        "answer": 4,
    }


def test_what_did_not_happen_is_left_out() -> None:
    """A plain success has no error, no cap and no early end in its line; a line break in a field stays in it."""
    out = io.StringIO()
    writer = LineWriter(out)
    writer.write(line(mode_reason="a\nb"))
    writer.write(line(error="rate", ended_by="cap", capped=True, cap=5, cost_nano_usd=9))
    writer.close()
    plain, eventful = map(json.loads, out.getvalue().splitlines())
    assert not {"error", "ended_by", "capped", "cap", "cost_nano_usd"} & plain.keys()
    assert (eventful["error"], eventful["ended_by"], eventful["cap"]) == ("rate", "cap", 5)


def test_a_line_can_hold_nothing_but_facts() -> None:
    """The line's fields are a closed list: none of them is for a prompt, an answer, a header or a secret."""
    assert RequestLine.__struct_fields__ == (
        "event",
        "time",
        "request_id",
        "route",
        "status",
        "key",
        "model",
        "mode",
        "mode_reason",
        "backend",
        "stream",
        "seconds",
        "overhead_ms",
        "tokens",
        "cap",
        "capped",
        "ended_by",
        "cost_nano_usd",
        "offline",
        "error",
        "degraded",
        "replayed",
        "decision",
        "cascade",
        "target",
    )


def test_writing_while_lines_are_flushed_loses_and_doubles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are written while the writer flushes are neither lost nor written twice."""
    monkeypatch.setattr("gateway.log.FLUSH_EVERY_S", 0.0)
    out = io.StringIO()
    writer = LineWriter(out)

    def work(number: int) -> None:
        for i in range(500):
            writer.write(line(request_id=f"{number}-{i}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    ids = [json.loads(text)["request_id"] for text in out.getvalue().splitlines()]
    assert sorted(ids) == sorted(f"{number}-{i}" for number in range(4) for i in range(500))


def test_a_writer_that_cannot_keep_up_says_how_many_lines_it_dropped() -> None:
    """Memory is bounded: beyond the limit lines are dropped and counted, never waited for."""
    out = io.StringIO()
    writer = LineWriter(out)
    writer.close()  # its thread is gone: nothing is written any more
    one = line()
    for _ in range(MAX_PENDING + 7):
        writer.write(one)
    writer._flush()
    *_, last = out.getvalue().splitlines()
    assert json.loads(last) == {"level": "warning", "event": "log lines dropped", "count": 7}
    assert len(out.getvalue().splitlines()) == MAX_PENDING + 1


def test_a_broken_pipe_does_not_end_the_logging() -> None:
    """When nobody reads the log for a while, serving goes on, and later lines come with the number of lost ones."""
    out = Broken(failures=1)
    writer = LineWriter(out)
    writer.write(line(request_id="lost"))
    assert out.failed.wait(timeout=5)
    writer.write(line(request_id="kept"))
    writer.close()
    lines = [json.loads(text) for text in out.getvalue().splitlines()]
    assert [each.get("request_id") for each in lines] == ["kept", None]
    assert lines[1]["count"] == 1


def test_other_records_are_lines_of_json_too() -> None:
    """Level, event, logger and extra fields; what is no JSON is shown by its repr; exceptions are in the line."""
    record = logging.LogRecord("thinkgate.models", logging.WARNING, "", 1, "backend %s", ("lost",), None)
    record.backend, record.reason = "a", ValueError("x")
    shown = json.loads(JsonFormatter().format(record))
    assert shown.pop("time").endswith("Z")
    assert shown == {
        "level": "warning",
        "event": "backend lost",
        "logger": "thinkgate.models",
        "backend": "a",
        "reason": "ValueError('x')",
    }
    record.exc_info = (KeyError, KeyError("gone"), None)
    assert "KeyError: 'gone'" in json.loads(JsonFormatter().format(record))["exception"]


def test_configure_sends_everything_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """After `configure` the whole process logs JSON, and httpx's own chatter is off."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        configure()
        logging.getLogger("thinkgate").info("backend up", extra={"backend": "a"})
        logging.getLogger("httpx").info("HTTP Request")
        (text,) = capsys.readouterr().err.splitlines()
        assert json.loads(text)["event"] == "backend up"
    finally:
        root.handlers[:], root.level = before


# ------------------------------------------------------------------------------------ prompts and keys

BODIES: list[Json | bytes] = [
    {**CHAT, "messages": [{"role": "user", "content": SECRET}], "stream": True},
    {**CHAT, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 300},
    {
        **CHAT,
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"http://{SECRET}"}}]}],
    },
    {**CHAT, "messages": [{"role": SECRET, "content": "x"}]},
    {**CHAT, "user": SECRET, "metadata": {"x": SECRET}, "safety_identifier": SECRET, "stop": [SECRET]},
    {**CHAT, "model": SECRET},
    {**CHAT, "model": f"qwen:{SECRET}"},
    {**CHAT, SECRET: 1, "n": SECRET},
    {**CHAT, "thinkgate": {SECRET: 1}},
    {**CHAT, "reasoning_effort": SECRET},
    {**TEXT, "prompt": SECRET},
    SECRET.encode(),
    b'{"x": "' + SECRET.encode(),
]


@pytest.mark.parametrize("is_up", [True, False])
async def test_no_prompt_and_no_key_ever_reaches_a_log_or_a_metric(
    is_up: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a client sends, and however it ends, neither its texts nor its secret are in any line or series."""
    keys = [{"id": "ada", "secret_sha256": hashlib.sha256(SECRET.encode()).hexdigest()}]
    gateway, lines = gateway_of(config_of(keys=keys), is_up=is_up)
    headers = {"authorization": f"Bearer {SECRET}", "x-request-id": f"{SECRET} {SECRET}", "cookie": SECRET}
    routes = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
    with caplog.at_level(logging.DEBUG):
        asked = [await ask(gateway, body, path, headers=headers) for body in BODIES for path in routes]
        asked += [await ask(gateway, CHAT, headers={"authorization": f"Bearer not-{SECRET}"})]
    gateway.lines.close()
    written = [json.loads(text) for text in lines.getvalue().splitlines()]
    assert len(written) == len(asked)
    statuses = {answered.status for answered in asked}
    assert {400, 401} <= statuses
    assert statuses & ({200} if is_up else {503})
    shown = lines.getvalue() + gateway.metrics.render().decode() + caplog.text
    shown += "".join(JsonFormatter().format(record) for record in caplog.records)
    assert SECRET not in shown


async def test_a_request_that_fails_has_its_line_too() -> None:
    """Refused, unauthenticated and served requests each leave one line with status, key and error."""
    keys = [{"id": "ada", "secret_sha256": hashlib.sha256(b"sk").hexdigest()}]
    gateway, lines = gateway_of(config_of(keys=keys))
    authorized = {"authorization": "Bearer sk", "x-request-id": "mine"}
    await ask(gateway, {**CHAT, "stream": True}, headers=authorized)
    await ask(gateway, {**CHAT, "n": 0}, headers=authorized)
    await ask(gateway, CHAT)
    gateway.lines.close()
    served, refused, unknown = map(json.loads, lines.getvalue().splitlines())
    assert (served["status"], served["key"], served["request_id"], served["mode"]) == (200, "ada", "mine", "reasoning")
    assert (served["backend"], served["stream"], served["tokens"]["thinking"]) == ("a", True, 1)
    assert "error" not in served
    assert (refused["status"], refused["key"], refused["error"]) == (400, "ada", "invalid_value")
    assert (unknown["status"], unknown["key"], unknown["error"]) == (401, "", "invalid_api_key")
