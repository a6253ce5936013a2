"""The fake vLLM and the load generator, against the bytes a real vLLM 0.32 was recorded to send."""

import json
import subprocess
import time

import pytest

from bench import scenarios
from bench.compiled import compiled

CHAT = "/v1/chat/completions"
THINK_END = 151668
STOP = 151645


def stream(client, path=CHAT, **fields):
    """The decoded events of one stream, and whether it ended with [DONE]."""
    body = {"model": "bench-model", "messages": [], "stream": True, **fields}
    lines = [line for line in client.post(path, json=body).text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def ids(events):
    return [i for e in events for c in e["choices"] for i in c.get("token_ids") or []]


def kinds(events):
    return [key for e in events for c in e["choices"] for key in c.get("delta", {}) if key != "role"]


def test_a_stream_has_vllms_shape(client):
    """Role, thinking, a marker with an empty delta, the answer, the finish, the usage: field by field."""
    events = stream(client, thinking_token_budget=3, return_token_ids=True, stream_options={"include_usage": True})
    role, thought, _, marker, answer, *_, finish, usage = events
    assert list(role) == ["id", "object", "created", "model", "choices", "prompt_token_ids", "prompt_text"]
    assert len(role["prompt_token_ids"]) == usage["usage"]["prompt_tokens"] == 212
    assert role["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert list(thought["choices"][0]) == ["index", "delta", "logprobs", "finish_reason", "token_ids"]
    assert thought["choices"][0]["delta"]["reasoning"].startswith(" tok@t")
    assert marker["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None, "token_ids": [THINK_END]}
    ]
    assert list(answer["choices"][0]["delta"]) == ["content"]
    assert finish["choices"] == [
        {
            "index": 0,
            "delta": {},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": [STOP],
        }
    ]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(ids(events)) == 2 + 1 + 4 + 1
    assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 192


@pytest.mark.parametrize("budget", [0, 5, 20, 40])
def test_a_budget_puts_the_end_marker_where_vllm_puts_it(client, budget):
    """Budgets 0, 5, 20 and 40 end the thinking with output token 0, 4, 19 and 39."""
    events = stream(client, thinking_token_budget=budget, return_token_ids=True)
    assert ids(events).index(THINK_END) == max(budget - 1, 0)
    assert len(events[0]["prompt_token_ids"]) == 212


def test_a_budget_that_is_not_reached_changes_nothing(client):
    """The upstream thinks 50 tokens by itself, and a larger budget leaves it at that."""
    assert kinds(stream(client, thinking_token_budget=500)).count("reasoning") == 50


def test_without_ids_markers_and_ids_are_not_sent(client):
    """Ids that nobody asked for are null, and vLLM has no chunk for the marker then."""
    events = stream(client, thinking_token_budget=3)
    assert ids(events) == []
    assert all(c["delta"] for e in events for c in e["choices"] if c["finish_reason"] is None)
    assert events[0]["prompt_token_ids"] is None
    assert "usage" not in events[-1]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_model_that_does_not_think_has_no_marker(client):
    """Neither reasoning nor marker, in the output or at the end of the prompt."""
    client.get("/__cfg?think=0")
    events = stream(client, thinking_token_budget=9, return_token_ids=True)
    assert set(kinds(events)) == {"content"}
    assert THINK_END not in ids(events)
    assert 151667 not in events[0]["prompt_token_ids"]


def test_thinking_can_be_switched_off(client):
    """enable_thinking=false answers at once, whatever the budget."""
    off = stream(client, thinking_token_budget=9, chat_template_kwargs={"enable_thinking": False})
    assert set(kinds(off)) == {"content"}


def test_the_template_opens_the_thinking(client):
    """The start marker is the last but one of the prompt's ids, as with a recorded vLLM."""
    role = stream(client, return_token_ids=True)[0]
    assert role["prompt_token_ids"][-2] == 151667


def test_the_knob_decides_what_it_would_think(client):
    """think=N thinks N tokens, and a budget shortens them."""
    client.get("/__cfg?think=7&answer=2")
    assert kinds(stream(client)).count("reasoning") == 7
    assert kinds(stream(client, thinking_token_budget=4)).count("reasoning") == 3


def test_the_output_limit_cuts_and_its_last_token_carries_the_reason(client):
    """The finish by length has text on it and no end-of-sequence token."""
    events = stream(client, thinking_token_budget=3, max_tokens=5, return_token_ids=True)
    assert len(ids(events)) == 5
    last = events[-1]["choices"][0]
    assert last["finish_reason"] == "length"
    assert last["delta"]["content"].startswith(" tok@t")
    all_thinking = stream(client, thinking_token_budget=9, max_completion_tokens=5, max_tokens=99)
    assert kinds(all_thinking)[1:] == ["reasoning"] * 5


def test_a_plain_answer_tells_thinking_from_answer(client):
    """Reasoning, content, ids and usage are those of one generation."""
    body = {"model": "m", "messages": [], "thinking_token_budget": 5, "return_token_ids": True}
    answer = client.post(CHAT, json=body).json()
    choice = answer["choices"][0]
    assert choice["message"]["reasoning"] == " think" * 4
    assert choice["message"]["content"].startswith("The capital of France")
    assert choice["token_ids"].index(THINK_END) == 4
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert answer["usage"]["total_tokens"] == 212 + len(choice["token_ids"])
    assert len(answer["prompt_token_ids"]) == 212
    client.get("/__cfg?think=0")
    bare = client.post(CHAT, json={"model": "m", "messages": []}).json()
    assert bare["choices"][0]["message"]["reasoning"] is None
    assert bare["choices"][0]["token_ids"] is bare["prompt_token_ids"] is None


def test_a_stream_interval_groups_tokens(client):
    """After the first, a chunk carries as many tokens as asked for, of one kind, with all their ids."""
    events = stream(client, thinking_token_budget=9, return_token_ids=True, stream_interval=4)
    sizes = [len(c["token_ids"]) for e in events[1:] for c in e["choices"]]
    assert sizes == [1, 4, 3, 1, 4, 1]
    assert events[2]["choices"][0]["delta"]["reasoning"].count("@t") == 4
    assert ids(events)[:9] == [*range(1000, 1008), THINK_END]


def test_a_text_completion_keeps_the_prompt_ids_in_its_choice(client):
    """The completions surface has no role, no reasoning, and its own place for ids."""
    first, *_, last = stream(client, "/v1/completions", prompt=[1, 2], return_token_ids=True)
    assert first["object"] == "text_completion"
    assert len(first["choices"][0]["prompt_token_ids"]) == 212
    assert (last["choices"][0]["text"], last["choices"][0]["token_ids"]) == ("", [STOP])
    plain = client.post("/v1/completions", json={"prompt": "x", "return_token_ids": True}).json()
    assert len(plain["choices"][0]["token_ids"]) == plain["usage"]["completion_tokens"]


def test_continuous_usage_counts_up(client):
    """A gateway may ask for usage on every chunk."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(client, thinking_token_budget=3, return_token_ids=True, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("</think>", [151668]),
        ("<think>", [151667]),
        ("abcd<think>x</think>", [100, 151667, 102, 151668]),
        ("", []),
    ],
)
def test_markers_are_single_tokens(client, prompt, tokens):
    """A gateway learns the ids of the markers by asking for them."""
    answer = client.post("/tokenize", json={"model": "m", "prompt": prompt, "add_special_tokens": False}).json()
    assert answer == {"count": len(tokens), "max_model_len": 32768, "tokens": tokens, "token_strs": None}


def test_what_a_gateway_probes_is_there(client):
    """Health, version, models, metrics, tokenise and its inverse answer as a vLLM's do."""
    assert (client.get("/health").status_code, client.get("/health").content) == (200, b"")
    assert client.get("/version").json() == {"version": "0.32.0"}
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 32768
    assert "vllm:num_requests_running{" in client.get("/metrics").text
    assert client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()["count"] == 212
    assert client.post("/detokenize", json={"tokens": [151667, 5]}).json() == {"prompt": "<think> tok"}
    assert client.post("/v1/chat/completions/render", json={}).status_code == 403
    assert client.post("/v1/nothing", json={}).status_code == 404


def test_a_chunked_request_body_is_read_whole(client):
    """Some gateways forward bodies without a length."""
    parts = iter([b'{"prompt": "</th', b'ink>"}'])
    assert client.post("/tokenize", content=parts).json()["tokens"] == [THINK_END]


def test_a_stream_keeps_time(client):
    """With a gap the tokens leave at its pace, the first one at once."""
    client.get("/__cfg?think=0&answer=5&gap_us=10000")
    events = stream(client)
    texts = [c["delta"]["content"] for e in events for c in e["choices"] if c["delta"].get("content")]
    sent = [int(text.partition("@t")[2].rstrip(";")) for text in texts]
    assert len(sent) == 5
    assert 0.039 <= (sent[-1] - sent[0]) / 1e9 < 1


def test_a_closed_stream_is_counted_as_abandoned(client):
    """The upstream sees who hangs up, and has nothing open afterwards."""
    client.get("/__cfg?think=0&answer=1000&gap_us=1000")
    before = client.get("/__stats").json()["abandoned_streams"]
    with client.stream("POST", CHAT, json={"model": "m", "messages": [], "stream": True}) as answer:
        chunks = answer.iter_raw()  # kept: httpx closes a stream whose iterator is gone
        assert next(chunks)
        assert client.get("/__stats").json()["open_streams"] == 1
    end = time.monotonic() + 5
    while client.get("/__stats").json()["open_streams"]:
        assert time.monotonic() < end
    assert client.get("/__stats").json()["abandoned_streams"] == before + 1


@pytest.fixture
def load(client, upstream, tmp_path):
    """Run the load generator against the upstream; its object."""
    scenarios.write_bodies(tmp_path)
    port = upstream.rpartition(":")[2]

    def run(body, *options):
        command = [
            compiled("load"),
            "-p",
            port,
            "-f",
            tmp_path / f"{body}.json",
            "-w",
            "0",
            "-d",
            "10",
            *options,
        ]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    return run


def test_the_load_generator_makes_exactly_as_many_requests_as_asked(load):
    """-n waits for the last answer, so that nothing is left under way."""
    found = load("plain", "-c", "4", "-n", "50")
    assert (found["ok"], found["bad"], found["errors"], found["unfinished"]) == (50, 0, 0, 0)
    assert found["latency_us"]["n"] == 50


def test_the_load_generator_counts_stamped_tokens_of_both_kinds(load, client):
    """Thinking and answer tokens count; role, marker, finish and usage chunks do not."""
    client.get("/__cfg?think=200&answer=50")
    found = load("capped", "-c", "2", "-n", "6", "-t", "100")
    assert (found["ok"], found["short"], found["tokens"]) == (6, 0, 600)
    assert found["token_delay_us"]["n"] == 600


def test_a_stream_with_tokens_missing_is_short(load, client):
    """Fewer stamps than expected are noticed."""
    client.get("/__cfg?think=0&answer=9")
    assert load("stream", "-n", "3", "-t", "10")["short"] == 3


def test_the_load_generator_hangs_up_in_mid_stream(load, client):
    """-x closes after so many tokens; the upstream sees every one of them go."""
    client.get("/__cfg?think=0&answer=1000&gap_us=1000")
    before = client.get("/__stats").json()["abandoned_streams"]
    found = load("stream", "-c", "3", "-n", "12", "-x", "5")
    assert (found["hangups"], found["ok"], found["errors"], found["unfinished"]) == (12, 0, 0, 0)
    end = time.monotonic() + 5
    while client.get("/__stats").json()["abandoned_streams"] < before + 12:
        assert time.monotonic() < end
