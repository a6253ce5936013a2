"""The engine's queue and thread: order, cancellation, and failures that stay with their request.

The scripted network stops at a gate before every step, so a test decides when a token comes; nothing
here waits for time to pass.
"""

import queue
import threading
from typing import Any

import pytest

from kernels.engine import Engine
from kernels.errors import EngineClosed, GenerationFailed, ModelUnusable, QueueFull, RequestRefused
from kernels.model import load_model
from kernels.params import CompletionInput, Finished, Options, Output, Stopping
from tests.kernels.tiny import scripted, tiny_llama, tiny_tokenizer

WAIT_S = 10


class Caller:
    """Somebody who submits requests and hears the events."""

    def __init__(self, engine, deliver=None):
        self.engine = engine
        self.heard: queue.Queue[Any] = queue.Queue()
        self.deliver = deliver or self.heard.put

    def ask(self, *, max_tokens=3, priority=0, prompt="go"):
        asked = Options(request_id="r", priority=priority, stopping=Stopping(max_tokens=max_tokens, ignore_eos=True))
        request = self.engine.compose(CompletionInput(prompts=(prompt,)), asked)
        self.ticket = self.engine.submit(request, self.deliver)
        return self

    def next(self):
        return self.heard.get(timeout=WAIT_S)

    def all(self):
        """Every event up to the last."""
        events = [self.next()]
        while isinstance(events[-1], Output):
            events.append(self.next())
        return events


@pytest.fixture
def model():
    tokenizer = tiny_tokenizer()
    letters = tokenizer.encode("abc")
    return scripted(tokenizer, lambda so_far: letters[len(so_far) % 3])


@pytest.fixture
def engine(model):
    engine = Engine(model, max_waiting=2, max_running=1)
    yield engine
    if model.network.gate is not None:
        model.network.gate.release(1000)
    engine.close()


@pytest.fixture
def gate(model, engine):
    """A closed gate: each permit lets one step of the network pass."""
    model.network.gate = threading.Semaphore(0)
    return model.network.gate


def reached(model):
    """Wait until the network stands at the gate once more."""
    assert model.network.at_gate.acquire(timeout=WAIT_S)


def test_a_request_is_answered(engine):
    """Outputs arrive, then the usage."""
    *outputs, last = Caller(engine).ask().all()
    assert "".join(out.text for out in outputs) == "abc"
    assert last == Finished(prompt_tokens=2, completion_tokens=3, reasoning_tokens=0)
    assert engine.wait_until_idle(WAIT_S)


def test_the_queue_goes_by_priority_and_then_by_arrival(engine, gate, model):
    """Lower priority values go first, equal ones in order of arrival, whatever already runs."""
    done: list[tuple[str, object]] = []
    first = Caller(engine).ask()
    reached(model)
    Caller(engine, lambda event: done.append(("late", event))).ask(priority=5)
    Caller(engine, lambda event: done.append(("early", event))).ask(priority=1)
    gate.release(1000)
    assert isinstance(first.all()[-1], Finished)
    assert engine.wait_until_idle(WAIT_S)
    assert [name for name, event in done if isinstance(event, Finished)] == ["early", "late"]


def test_equal_priorities_keep_their_order(engine, gate, model):
    """Requests of one class are served first come, first served."""
    done: list[tuple[str, object]] = []
    Caller(engine).ask()
    reached(model)
    Caller(engine, lambda event: done.append(("a", event))).ask()
    Caller(engine, lambda event: done.append(("b", event))).ask()
    gate.release(1000)
    assert engine.wait_until_idle(WAIT_S)
    assert [name for name, event in done if isinstance(event, Finished)] == ["a", "b"]


def test_a_full_queue_refuses(engine, gate, model):
    """Beyond the bound a request is refused at once, and the ones before it are served."""
    callers = [Caller(engine).ask()]
    reached(model)
    callers += [Caller(engine).ask(), Caller(engine).ask()]
    assert engine.waiting == 2
    with pytest.raises(QueueFull):
        Caller(engine).ask()
    gate.release(1000)
    assert all(isinstance(caller.all()[-1], Finished) for caller in callers)


def test_cancelling_in_the_queue_frees_the_place(engine, gate, model):
    """A request that is cancelled while it waits never runs and makes room at once."""
    Caller(engine).ask()
    reached(model)
    waiting = Caller(engine).ask(prompt="cancelled while waiting")
    Caller(engine).ask()
    waiting.ticket.cancel()
    assert engine.waiting == 1
    Caller(engine).ask()
    gate.release(1000)
    assert engine.wait_until_idle(WAIT_S)
    assert waiting.heard.empty()
    assert len("cancelled while waiting") not in model.network.fed


def test_cancelling_a_running_request_ends_it_at_the_next_token(engine, gate, model):
    """A running request that is cancelled delivers nothing more and lets the next one in."""
    running = Caller(engine).ask(max_tokens=500)
    reached(model)
    gate.release(2)
    assert isinstance(running.next(), Output)
    reached(model)
    reached(model)
    running.ticket.cancel()
    running.ticket.cancel()
    steps = len(model.network.fed)
    gate.release(1)
    assert engine.wait_until_idle(WAIT_S)
    assert len(model.network.fed) == steps
    gate.release(1000)
    assert isinstance(Caller(engine).ask().all()[-1], Finished)


def test_cancelling_during_the_prefill_stops_before_the_first_token(engine, gate, model):
    """A request that is cancelled while its prompt is read never yields a token."""
    running = Caller(engine).ask()
    reached(model)
    running.ticket.cancel()
    gate.release(1)
    assert engine.wait_until_idle(WAIT_S)
    assert running.heard.empty()


def test_requests_are_read_together(model):
    """Requests that run at once take one step for a token of each."""
    engine = Engine(model)
    model.network.gate = threading.Semaphore(0)
    callers = [Caller(engine).ask(max_tokens=8) for _ in range(4)]
    reached(model)
    model.network.gate.release(9)  # the first may have been alone in the first step
    assert [isinstance(caller.all()[-1], Finished) for caller in callers] == [True] * 4
    assert engine.wait_until_idle(WAIT_S)
    assert engine.stats.steps <= 9
    assert engine.stats.read == sum(model.network.fed)
    engine.close()


def test_choices_are_forked_and_pruned_through_the_ticket(engine, gate, model):
    """A fork answers under its own number, a pruned choice falls silent, and both are over with the request."""
    caller = Caller(engine).ask(max_tokens=4)
    reached(model)
    assert caller.ticket.fork(0) == 1
    assert caller.ticket.fork(0) == 2
    caller.ticket.prune(2)
    gate.release(1000)
    *outputs, last = caller.all()
    texts = ["".join(out.text for out in outputs if out.index == index) for index in range(3)]
    assert (texts[0][-3:], texts[1][-3:], texts[2]) == ("bca", "bca", "")
    assert isinstance(last, Finished)
    with pytest.raises(RequestRefused, match="over"):
        caller.ticket.fork(0)
    caller.ticket.prune(0)
    with pytest.raises(RequestRefused, match="no choice 7"):
        caller.ticket.prune(7)


def test_a_fork_of_a_choice_that_has_ended_ends_at_once(engine, gate, model):
    """Whoever asks too late hears so under the number that was promised."""
    caller = Caller(engine).ask(max_tokens=3)
    reached(model)
    assert caller.ticket.fork(0) == 1
    caller.ticket.prune(0)
    assert caller.ticket.fork(0) == 2
    gate.release(1000)
    outputs = caller.all()[:-1]
    late = [out for out in outputs if out.index == 2]
    assert [(out.tokens, out.finish_reason) for out in late] == [([], "stop")]


def test_a_failing_request_does_not_take_the_engine_along(engine, model, caplog):
    """What one request breaks is its own error, and the next request is served."""
    good = model.network._reply
    model.network._reply = lambda so_far: 10**9
    (failed,) = Caller(engine).ask().all()
    assert isinstance(failed.error, GenerationFailed)
    assert "generation_failed" in caplog.text
    model.network._reply = good
    assert isinstance(Caller(engine).ask().all()[-1], Finished)


def test_a_broken_step_ends_who_is_there_and_no_more(engine, monkeypatch):
    """If scheduling itself fails, all requests that are there are told, and the next one is served."""
    with monkeypatch.context() as broken:
        broken.setattr(engine._scheduler, "_admit", lambda: 1 / 0)
        (failed,) = Caller(engine).ask().all()
        assert isinstance(failed.error, GenerationFailed)
        assert engine.wait_until_idle(WAIT_S)
    assert isinstance(Caller(engine).ask().all()[-1], Finished)


def test_a_caller_that_is_gone_does_not_take_the_engine_along(engine):
    """When delivery fails because the caller's loop is closed, its request ends and the next is served."""

    def gone(event):
        raise RuntimeError("Event loop is closed")

    asked = Options(request_id="r", stopping=Stopping(max_tokens=400, ignore_eos=True))
    engine.submit(engine.compose(CompletionInput(prompts=("go",)), asked), gone)
    assert engine.wait_until_idle(WAIT_S)
    assert isinstance(Caller(engine).ask().all()[-1], Finished)


def test_closing_ends_what_runs_and_what_waits(engine, gate, model):
    """Closing tells the running and the waiting request, and refuses new ones."""
    running = Caller(engine).ask(max_tokens=500)
    reached(model)
    waiting = Caller(engine).ask()
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert isinstance(waiting.all()[-1].error, EngineClosed)
    gate.release(1000)
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert isinstance(running.all()[-1].error, EngineClosed)
    with pytest.raises(EngineClosed):
        Caller(engine).ask()
    engine.close()


def test_a_folder_is_loaded_and_served(tmp_path):
    """A model folder on disk loads with its defaults and its own context window, and answers."""
    tokenizer = tiny_tokenizer()
    made = tiny_llama(tokenizer, max_len=128)
    module = made.network.module
    module.generation_config.temperature = 0.25
    module.generation_config.top_k = 7
    module.generation_config.do_sample = True
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said: list[str] = []
    engine = Engine.load(str(tmp_path), say=said.append, device="cpu")
    try:
        assert (engine.defaults, engine.model.max_len) == ({"temperature": 0.25, "top_k": 7}, 128)
        assert engine.model.tokens.eos == (tokenizer.eos_token_id,)
        assert isinstance(Caller(engine).ask().all()[-1], Finished)
    finally:
        engine.close()
    assert len(said) == 3


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing"])
def test_a_missing_folder_is_unusable(path):
    """A path without a model is said to be missing, without a look at the hub."""
    with pytest.raises(ModelUnusable, match="there is no model folder"):
        load_model(path, say=lambda line: None)


def test_a_broken_folder_is_unusable(tmp_path):
    """A folder that transformers cannot load is an error that names it."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelUnusable, match="cannot load"):
        load_model(str(tmp_path), say=lambda line: None)
