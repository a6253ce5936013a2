"""Segments on the embedded backend: a chain that is continued from exact token ids."""

import json
from contextlib import aclosing

import msgspec
import pytest

from budget.chain import Forcing
from gateway.backends.embedded import EmbeddedBackend
from gateway.backends.port import Delta, Segment, Thinking
from gateway.errors import InvalidRequest, Overloaded
from tests.gateway.test_embedded import HI, OFF, TOOL, Served, call
from tests.gateway.test_embedded_fields import raw
from tests.kernels.tiny import CHATML, END, HERMES, OPENED, START, says, scripted, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.anyio


def segment(prompt, *, max_tokens=24, stop_token_ids=(), stop=(), top_logprobs=None, **fields):
    return Segment(
        prompt=prompt,
        max_tokens=max_tokens,
        fields=raw({"temperature": 0, **fields}),
        stop_token_ids=stop_token_ids,
        stop=stop,
        top_logprobs=top_logprobs,
    )


class Piece:
    """What came of a segment."""

    def __init__(self, deltas):
        *self.body, last = deltas
        self.usage = last.usage
        self.text = "".join(d.text for d in self.body)
        self.ids = [i for d in self.body for i in d.token_ids]
        self.end = (self.body[-1].finish_reason, self.body[-1].stop_reason)
        self.entries = [entry for d in self.body if d.logprobs for entry in d.logprobs["content"]]


class Chained(Served):
    """A backend over a tiny model whose chains are driven segment by segment."""

    async def extend(self, asked, **of_call):
        stream = self.backend.extend(call(**of_call), asked)
        return Piece([delta async for deltas in stream for delta in deltas])

    def ids(self, text):
        return self.model.tokens.encode(text)


@pytest.fixture
async def serve():
    made: list[Chained] = []

    def start(model, **options):
        made.append(Chained(model, **options))
        return made[-1]

    yield start
    for served in made:
        await served.close()


@pytest.fixture
def saying(serve):
    """A backend whose model says a text and ends its turn."""

    def start(text, **options):
        tokenizer = tiny_tokenizer(**options)
        return serve(scripted(tokenizer, says(tokenizer.encode(text), then=tokenizer.eos_token_id)))

    return start


@pytest.fixture
def endless(serve):
    """A backend whose model never ends."""
    tokenizer = tiny_tokenizer()
    return serve(scripted(tokenizer, lambda so_far: tokenizer.encode("a")[0]))


async def test_a_segment_is_text_and_ids_and_then_usage(saying):
    """The end of the sequence is the last id and has no text, and no delta counts or labels anything."""
    served = saying(f"Hello{END}\n")
    piece = await served.extend(segment([3, 4, 5]))
    assert piece.text == f"Hello{END}\n"
    assert piece.ids == [*served.ids(f"Hello{END}\n"), served.model.tokens.eos[0]]
    assert piece.end == ("stop", None)
    assert msgspec.structs.asdict(piece.usage) == {
        "prompt_tokens": 3,
        "completion_tokens": len(piece.ids),
        "cached_tokens": 0,
        "reasoning_tokens": None,
    }
    kept = {"text", "token_ids", "finish_reason", "stop_reason"}
    plain = msgspec.structs.asdict(Delta())
    for delta in piece.body:
        assert {k: v for k, v in msgspec.structs.asdict(delta).items() if k not in kept} == {
            k: v for k, v in plain.items() if k not in kept
        }
    assert [delta.finish_reason for delta in piece.body[:-1]] == [None] * (len(piece.body) - 1)


@pytest.mark.parametrize("rules", [OFF, Thinking(enabled=True, cap=1, wrap_up="!"), Thinking(enabled=False, cap=0)])
async def test_markers_are_plain_text_in_a_segment(saying, rules):
    """Whatever the call says about thinking, a segment forces and hides nothing."""
    said = f"\n{START}\nhm{END}\nok"
    piece = await saying(said).extend(segment([3]), thinking=rules, n=3)
    assert (piece.text, len(piece.body)) == (said, len(piece.ids))


async def test_a_stop_token_ends_a_segment_unseen(saying):
    """The id that stopped it is the last one and the reason; its text is absent."""
    served = saying(f"hm{END}ok")
    (end,) = served.ids(END)
    piece = await served.extend(segment([3], stop_token_ids=(end,)))
    assert (piece.text, piece.ids, piece.end) == ("hm", served.ids(f"hm{END}"), ("stop", end))


async def test_a_stop_text_ends_a_segment_and_belongs_to_it(saying):
    """The text ends behind it, even inside a token, and no text lags behind its tokens."""
    served = saying(f"hm.{END}ok", single_markers=False)
    piece = await served.extend(segment([3], stop=(END,)))
    assert (piece.text, piece.end) == (f"hm.{END}", ("stop", END))
    assert served.model.tokens.decode(piece.ids) == piece.text
    assert [d.text for d in piece.body] == [served.model.tokens.decode(d.token_ids) for d in piece.body]
    served = saying("hm.<b")
    inside = await served.extend(segment([3], stop=(".",)))
    assert (inside.text, inside.end) == ("hm.", ("stop", "."))
    assert served.model.tokens.decode(inside.ids) == "hm.<"


async def test_a_segment_ends_at_its_limit(saying):
    """With max_tokens sampled it ends with `length`, whatever the call's own limit is."""
    piece = await saying("Hello").extend(segment([3], max_tokens=2), max_tokens=9)
    assert (piece.text, len(piece.ids), piece.end) == ("He", 2, ("length", None))
    assert piece.usage.completion_tokens == 2


@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_chain_cut_anywhere_goes_on_as_if_never_cut(serve, temperature):
    """Continued from its exact ids, a chain has the text and, greedy, the tokens of the uninterrupted one."""
    served = serve(tiny_llama(tiny_tokenizer()))
    prompt = served.ids("the thin")
    options = {"temperature": temperature, "ignore_eos": True, "skip_special_tokens": False, "seed": 5}
    whole = await served.extend(segment(prompt, **options))
    assert "\ufffd" in whole.text
    for k in range(1, 24):
        first = await served.extend(segment(prompt, max_tokens=k, **options))
        assert first.ids == whole.ids[:k]
        assert whole.text.startswith(first.text)
        rest = await served.extend(segment([*prompt, *first.ids], max_tokens=24 - k, **options))
        decoded = served.model.tokens.decode([*first.ids, *rest.ids])
        assert decoded.startswith(first.text + rest.text)
        if temperature == 0:
            assert (first.ids + rest.ids, first.text + rest.text) == (whole.ids, whole.text)


async def test_a_character_over_the_seam_comes_whole(saying):
    """A segment that begins in the middle of a character shows it when its last byte has come."""
    served = saying("a😀b")
    first = await served.extend(segment([3], max_tokens=3))
    served.model.network._reply = says(served.ids("a😀b")[3:], then=served.model.tokens.eos[0])
    second = await served.extend(segment([3, *first.ids]))
    assert (first.text, second.text) == ("a", "😀b")


async def test_logprobs_come_in_chat_shape(saying):
    """Each token, the one that ended the segment included, has its entry, with as many alternatives as asked."""
    served = saying("é!")
    piece = await served.extend(segment([3], top_logprobs=2))
    assert bytes(b for entry in piece.entries for b in entry["bytes"]).decode() == "é!<|im_end|>"
    assert [len(entry["top_logprobs"]) for entry in piece.entries] == [2] * len(piece.ids)
    assert all(len(d.token_ids) == len(d.logprobs["content"]) for d in piece.body)
    alone = await served.extend(segment([3], top_logprobs=0))
    assert [entry["top_logprobs"] for entry in alone.entries] == [[]] * len(piece.ids)
    assert (await served.extend(segment([3]))).entries == []


@pytest.mark.parametrize(
    ("asked", "is_right"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: text in {"yes", "no"}),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, lambda text: len(text) == 3 and text.isdigit()),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, lambda text: isinstance(json.loads(text), bool)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x", 4]}}}},
            lambda text: json.loads(text) in {"x", 4},
        ),
    ],
)
async def test_a_format_holds_from_the_first_token_on(serve, asked, is_right):
    """A segment with a format is all answer, and its last token says that it is over."""
    served = serve(tiny_llama(tiny_tokenizer()))
    piece = await served.extend(
        segment([3], temperature=1, seed=1, max_tokens=64, **asked), thinking=Thinking(enabled=True, cap=9)
    )
    assert is_right(piece.text)
    assert piece.end == ("stop", None)
    assert piece.body[-1].token_ids


async def test_sampling_fields_act_on_a_segment(saying):
    """A seed repeats, a bias bans, and min_tokens keeps the end away."""
    served = saying("ab")
    a, _ = served.ids("ab")
    banned = await served.extend(segment([3], logit_bias={str(a): -100}, max_tokens=1))
    assert banned.ids != [a]
    longer = await served.extend(segment([3], min_tokens=5))
    assert len(longer.ids) >= 5
    twice = [await served.extend(segment([3], temperature=3, seed=8)) for _ in range(2)]
    assert twice[0].ids == twice[1].ids


async def test_tokenising_a_chat_gives_the_prompt_that_generate_reads(serve):
    """Messages, tools and the template's variables are rendered alike."""
    served = serve(scripted(tiny_tokenizer(template=HERMES), lambda so_far: 0))
    opened = serve(scripted(tiny_tokenizer(template=OPENED), lambda so_far: 0))
    for backend, fields in (
        (served, {}),
        (served, {"tools": [TOOL]}),
        (served, {"tools": [TOOL], "tool_choice": "none"}),
        (opened, {}),
        (opened, {"chat_template_kwargs": {"enable_thinking": False}}),
    ):
        asked = call(wants_token_ids=True, max_tokens=1, thinking=Thinking(enabled=True, cap=5), **fields)
        first, *_ = await backend.all(asked)
        assert await backend.backend.tokenize(asked) == first.prompt_token_ids


async def test_tokenising_opens_no_chain(saying):
    """For a model that does not think by itself the chain is its caller's to open, with the ids of the marker."""
    served = saying("x")
    asked = call(thinking=Thinking(enabled=True, cap=5, native=False), wants_token_ids=True)
    prompt = await served.backend.tokenize(asked)
    first, *_ = await served.all(asked)
    assert [*prompt, *await served.backend.encode(f"{START}\n")] == first.prompt_token_ids


async def test_tokenising_refuses_what_generate_would(saying):
    """A call that could not be generated is refused before its first segment, by the field at fault."""
    backend = saying("x").backend
    for asked, param in (
        (call(max_tokens=10**6), "max_completion_tokens"),
        (call(frobnicate=1), "frobnicate"),
        (call(messages=[]), "messages"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await backend.tokenize(asked)
        assert refused.value.param == param


async def test_markers_have_ids(saying):
    """A text becomes its own tokens and no others, and no text none."""
    served = saying("x")
    assert await served.backend.encode(END) == served.ids(END)
    assert len(await served.backend.encode(END)) == 1
    assert await served.backend.encode("\nWait") == served.ids("\nWait")
    assert await served.backend.encode("") == []


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("native", [True, False])
async def test_the_probe_says_what_continuing_takes(serve, single, native):
    """Markers, wrap-up and Wait come as ids, and the template is read for an open chain and for tools."""
    rules = Thinking(enabled=True, cap=None, native=native, wrap_up="so.\n")
    model = tiny_llama(tiny_tokenizer(single_markers=single, template=OPENED if native else CHATML))
    served = serve(model, thinking=rules)
    found = await served.backend.probe()
    assert found.forcing == Forcing(
        opening=tuple(served.ids(f"{START}\n")),
        closing=tuple(served.ids(END)),
        after=() if native else tuple(served.ids("\n\n")),
        wrap_up=tuple(served.ids("so.\n")),
        wait=tuple(served.ids("Wait")),
        start_id=served.ids(START)[0] if single else None,
        end_id=served.ids(END)[0] if single else None,
    )
    assert found.template_opens is native
    assert (found.tool_format, found.tool_opener) == ("hermes", None)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (segment([]), "prompt"),
        (segment([10**6]), "prompt"),
        (segment([3], max_tokens=10**6), "max_tokens"),
        (segment([3], stop_token_ids=(10**6,)), "stop_token_ids"),
        (segment([3], min_tokens=25), "min_tokens"),
        (segment([3], bad_words=["x"]), "bad_words"),
    ],
)
async def test_a_segment_that_cannot_be_honoured_is_refused_by_name(saying, asked, param):
    """Ids that do not exist, limits that do not fit and fields that are not honoured are named."""
    served = saying("x")
    with pytest.raises(InvalidRequest) as refused:
        await served.extend(asked)
    assert refused.value.param == param
    assert served.model.network.fed == []


async def test_closing_a_segment_frees_the_engine(endless):
    """A caller that closes its iterator amid a segment lets the next one in at the next token."""
    gate = endless.close_gate()
    async with aclosing(endless.backend.extend(call(), segment([3], max_tokens=1000))) as batches:
        gate.release(3)
        assert await anext(batches)
    gate.release(1)
    assert await endless.idle()
    assert len(endless.model.network.fed) < 10
    gate.release(100)
    assert (await endless.extend(segment([3], max_tokens=2))).text == "aa"


async def test_a_segment_that_is_never_started_costs_nothing(endless):
    """A generator that nobody iterates submits nothing."""
    await endless.backend.extend(call(), segment([3])).aclose()
    assert endless.engine.is_idle


async def test_a_backend_that_is_not_loaded_is_overloaded():
    """Before the first probe there is no tokenizer and no engine to go on with."""
    backend = EmbeddedBackend(id="e", path="/nowhere")
    with pytest.raises(Overloaded):
        await backend.tokenize(call(messages=HI))
    with pytest.raises(Overloaded):
        await backend.encode(END)
    with pytest.raises(Overloaded):
        await anext(backend.extend(call(), segment([3])))
    await backend.close()
