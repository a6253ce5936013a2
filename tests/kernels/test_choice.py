"""One choice: phases, the exact cap, counting and stopping, without any model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.choice import Choice, Phase
from kernels.params import Kind, Stopping, Token
from kernels.thinking import Marker, ThinkingPlan
from tests.kernels.test_detokenize import cut

EOS = 0
START, END, WRAP_UP = "<t>", "</t>", "\nup\n"
BORDERS = st.lists(st.integers(min_value=0, max_value=10_000), max_size=12)


class Script:
    """A vocabulary that is made up as a test goes: every different piece of bytes is a token."""

    def __init__(self):
        self.pieces = [b""]

    def id_of(self, piece):
        piece = piece.encode() if isinstance(piece, str) else piece
        if piece not in self.pieces[1:]:
            self.pieces.append(piece)
        return self.pieces.index(piece, 1)

    def shown(self, token_id):
        return self.pieces[token_id]

    def marker(self, text, *, single):
        pieces = [text] if single else [text[:2], text[2:]] if text else []
        return Marker(text, tuple(self.id_of(piece) for piece in pieces if piece))

    def plan(self, cap, *, single=True, opens=True, reports=True, after=""):
        return ThinkingPlan(
            cap=cap,
            start=self.marker(START, single=single) if opens else None,
            end=self.marker(END, single=single),
            wrap_up=self.marker(WRAP_UP, single=False),
            after=self.marker(after, single=True) if after else Marker("", ()),
            reports_cap=reports,
        )

    def choice(self, plan=None, *, chain_open=False, tools=False, before=b"", **stopping):
        stopping.setdefault("max_tokens", 10_000)
        return Choice(
            0,
            plan=plan,
            stopping=Stopping(**stopping),
            shown=self.shown,
            eos=[EOS],
            chain_open=chain_open,
            parses_tools=tools,
            before=before,
        )


class Heard:
    """Everything a client hears of a choice."""

    def __init__(self, outputs):
        self.outputs = outputs
        self.thinking = "".join(o.text for o in outputs if o.kind is Kind.THINKING)
        self.answer = "".join(o.text for o in outputs if o.kind is Kind.ANSWER)
        self.counts = tuple(sum(getattr(o, kind) for o in outputs) for kind in ("thinking", "answer", "injected"))
        self.ids = [token.id for o in outputs for token in o.tokens]
        self.capped = sum(o.capped for o in outputs)
        self.finish = [o.finish_reason for o in outputs if o.finish_reason is not None]
        self.stop_reason = next((o.stop_reason for o in outputs if o.stop_reason is not None), None)


def drive(choice, sampled):
    """Feed sampled token ids, and what is forced in between, until the choice ends or they run out."""
    outputs = []
    for token_id in sampled:
        while choice.finish_reason is None and choice.forced():
            outputs += choice.accept_forced([Token(each) for each in choice.forced()])
        if choice.finish_reason is not None:
            break
        if not choice.replaces(token_id):
            outputs += choice.accept(Token(token_id))
    while choice.finish_reason is None and choice.forced():
        outputs += choice.accept_forced([Token(each) for each in choice.forced()])
    return Heard(outputs)


def letters(script, count):
    """Ids of that many one-letter tokens."""
    return [script.id_of("abcdefghij"[i % 10]) for i in range(count)]


@pytest.mark.parametrize("single", [True, False], ids=["one-token marker", "text marker"])
@pytest.mark.parametrize("cap", [0, 1, 5, 40])
def test_the_cap_ends_thinking_exactly(cap, single):
    """A model that would think on gets exactly `cap` tokens, then wrap-up and end marker, then it answers."""
    script = Script()
    choice = script.choice(script.plan(cap, single=single, opens=False), chain_open=True)
    heard = drive(choice, [*letters(script, cap), script.id_of("!"), EOS])
    wrap = WRAP_UP if cap else ""
    assert heard.thinking == "".join("abcdefghij"[i % 10] for i in range(cap)) + wrap
    assert heard.answer == "!"
    assert heard.counts == (cap, 2, (2 if cap else 0) + (1 if single else 2))
    assert (heard.capped, heard.finish) == (1, ["stop"])


@pytest.mark.parametrize("single", [True, False], ids=["one-token marker", "text marker"])
@pytest.mark.parametrize("cap", [5, 40, None])
def test_a_model_that_stops_thinking_by_itself_is_not_capped(cap, single):
    """The end marker within the cap is the model's own: injected by kind, never shown, not capped."""
    script = Script()
    choice = script.choice(script.plan(cap, single=single), chain_open=True)
    marker = script.marker(END, single=single).ids
    heard = drive(choice, [*letters(script, 3), *marker, script.id_of("ok"), EOS])
    assert (heard.thinking, heard.answer) == ("abc", "ok")
    assert heard.counts == (3, 2, len(marker))
    assert (heard.capped, heard.finish) == (0, ["stop"])


def test_an_end_marker_that_meets_the_cap_is_completed():
    """At the cap, an end marker that the model began is completed instead of written a second time."""
    script = Script()
    choice = script.choice(script.plan(4, single=False), chain_open=True)
    began = script.marker(END, single=False).ids[0]
    heard = drive(choice, [*letters(script, 3), began, script.id_of("ok"), EOS])
    assert (heard.thinking, heard.answer, heard.capped) == ("abc", "ok", 0)
    assert heard.counts == (3, 2, 2)


@pytest.mark.parametrize("single", [True, False], ids=["one-token marker", "text marker"])
def test_the_end_of_the_sequence_inside_thinking_closes_it(single):
    """A model that ends its turn while it thinks gets the end marker in place of the end, and answers."""
    script = Script()
    choice = script.choice(script.plan(40, single=single, after="\n\n"), chain_open=True)
    heard = drive(choice, [*letters(script, 2), EOS, script.id_of("ok"), EOS])
    assert (heard.thinking, heard.answer, heard.capped) == ("ab", "ok", 0)
    assert heard.counts == (2, 2, (1 if single else 2) + 1)
    assert EOS not in heard.ids[:-1]


def test_an_answer_is_owed_only_after_a_forced_end():
    """After a forced marker the end of the sequence has to wait for one token; after the model's own not."""
    script = Script()
    forced = script.choice(script.plan(1), chain_open=True)
    drive(forced, letters(script, 1))
    assert forced.owes_answer
    drive(forced, letters(script, 1))
    assert not forced.owes_answer
    own = script.choice(script.plan(9), chain_open=True)
    drive(own, [*letters(script, 1), script.id_of(END)])
    assert not own.owes_answer


@pytest.mark.parametrize("single", [True, False], ids=["one-token marker", "text marker"])
def test_thinking_in_instant_mode_is_cut_at_once(single):
    """A model that opens its chain although thinking is off gets it closed at no thinking token."""
    script = Script()
    choice = script.choice(script.plan(0, single=single, reports=False))
    heard = drive(choice, [*script.marker(START, single=single).ids, script.id_of("ok"), EOS])
    assert (heard.thinking, heard.answer) == ("", "ok")
    assert heard.counts == (0, 2, 2 if single else 4)
    assert heard.capped == 0


def test_a_reopened_chain_counts_on_and_is_capped_once():
    """Thinking that begins again in the answer shares the cap, and the cap is news only once."""
    script = Script()
    choice = script.choice(script.plan(3))
    start, end = script.id_of(START), script.id_of(END)
    said = [start, *letters(script, 2), end, script.id_of("x"), start, *letters(script, 1), script.id_of("y"), start]
    heard = drive(choice, [*said, script.id_of("z"), EOS])
    assert (heard.thinking, heard.answer) == ("aba" + WRAP_UP, "xyz")
    assert heard.counts[0] == 3
    assert heard.capped == 1


@pytest.mark.parametrize("text", ["plain", "<tx", "< t>", "\n<"])
def test_an_answer_that_only_looks_like_a_marker_is_an_answer(text):
    """Text held back for an opening marker of several tokens is shown once it is none."""
    script = Script()
    choice = script.choice(script.plan(9, single=False))
    heard = drive(choice, [*(script.id_of(c) for c in text), EOS])
    assert (heard.thinking, heard.answer) == ("", text.lstrip("\n"))
    assert heard.counts == (0, len(text) + 1, 0)


@given(st.text("</t>ab", max_size=20), st.text("</t>ab", max_size=20), BORDERS, st.booleans())
def test_any_tokens_of_a_text_marker_give_the_same_texts(thought, answer, borders, opened):
    """However a chain and its markers fall into tokens, thinking and answer are those of the whole text."""
    script = Script()
    text = thought + END + answer
    choice = script.choice(script.plan(None, single=False, opens=not opened), chain_open=opened)
    pieces = [piece for piece in cut((("" if opened else START) + text).encode(), borders) if piece]
    heard = drive(choice, [*map(script.id_of, pieces), EOS])
    before, _, after = text.partition(END)
    assert (heard.thinking, heard.answer) == (before, after)
    assert sum(heard.counts) == len(pieces) + 1


@given(st.integers(0, 12), st.text("</t>ab", max_size=30), BORDERS, st.booleans(), st.integers(1, 30))
def test_no_tokens_break_the_cap_or_the_limit(cap, text, borders, single, most):
    """Whatever the model says, thinking stays within the cap, everything within max_tokens, and it adds up."""
    script = Script()
    choice = script.choice(script.plan(cap, single=single), chain_open=True, max_tokens=most)
    pieces = [piece for piece in cut(text.encode(), borders) if piece]
    heard = drive(choice, [*map(script.id_of, pieces), EOS, script.id_of("ok"), EOS])
    thinking, answer, injected = heard.counts
    assert thinking <= cap
    assert thinking + answer + injected == len(heard.ids) <= most
    assert (choice.thinking, choice.answer, choice.injected) == heard.counts
    assert len(heard.finish) <= 1
    assert heard.outputs[-1].finish_reason is not None or choice.finish_reason is None


def test_characters_spread_over_tokens_come_out_whole():
    """Bytes of one character in several tokens appear with the last, in thinking and in the answer."""
    script = Script()
    choice = script.choice(script.plan(None), chain_open=True)
    smile = "😀".encode()
    said = [*(script.id_of(smile[i : i + 1]) for i in range(4)), script.id_of(END)]
    heard = drive(choice, [*said, script.id_of(smile[:3]), script.id_of(smile[3:] + b"!"), EOS])
    assert (heard.thinking, heard.answer) == ("😀", "😀!")
    assert all("\ufffd" not in out.text for out in heard.outputs)


def test_a_character_cut_by_the_cap_is_dropped():
    """The cap in the middle of a character leaves no broken character behind."""
    script = Script()
    choice = script.choice(script.plan(2), chain_open=True)
    smile = "😀".encode()
    heard = drive(choice, [script.id_of("a"), script.id_of(smile[:2]), script.id_of("ok"), EOS])
    assert (heard.thinking, heard.answer) == ("a" + WRAP_UP, "ok")
    assert heard.counts[0] == 2


@pytest.mark.parametrize(("last", "finish"), [(EOS, "stop"), (None, "length")])
def test_a_beginning_of_a_marker_is_answer_if_nothing_follows(last, finish):
    """Text that might have opened the chain is shown when the choice ends there."""
    script = Script()
    choice = script.choice(script.plan(9, single=False), max_tokens=1 if last is None else 9)
    heard = drive(choice, [script.id_of("<"), *([] if last is None else [last])])
    assert (heard.answer, heard.finish) == ("<", [finish])
    assert heard.counts == (0, 1 if last is None else 2, 0)


def test_max_tokens_ends_thinking_without_a_marker():
    """The limit of the whole choice ends it wherever it is, with `length`."""
    script = Script()
    heard = drive(script.choice(script.plan(40), chain_open=True, max_tokens=3), letters(script, 9))
    assert (heard.thinking, heard.counts, heard.finish) == ("abc", (3, 0, 0), ["length"])


def test_forced_tokens_stop_at_max_tokens():
    """Wrap-up and marker that no longer fit are cut at the limit."""
    script = Script()
    heard = drive(script.choice(script.plan(2), chain_open=True, max_tokens=3), letters(script, 9))
    assert heard.counts == (2, 0, 1)
    assert (heard.capped, heard.finish) == (1, ["length"])


def test_a_stop_string_over_token_borders_ends_the_answer():
    """A stop string spread over tokens ends the choice and is not shown, with itself as the reason."""
    script = Script()
    heard = drive(script.choice(strings=("ST OP",)), map(script.id_of, ["go S", "T", " O", "P on", "x"]))
    assert (heard.answer, heard.finish, heard.stop_reason) == ("go ", ["stop"], "ST OP")
    assert heard.counts == (0, 4, 0)


def test_a_stop_string_can_be_kept():
    """With `include` the answer ends behind the stop string."""
    script = Script()
    heard = drive(script.choice(strings=("STOP",), include=True), map(script.id_of, ["go ST", "OP on"]))
    assert heard.answer == "go STOP"


def test_stop_strings_do_not_act_on_thinking():
    """A stop string inside the chain is thought, not obeyed."""
    script = Script()
    choice = script.choice(script.plan(None), chain_open=True, strings=("b",))
    heard = drive(choice, [*letters(script, 3), script.id_of(END), *letters(script, 3)])
    assert (heard.thinking, heard.answer, heard.stop_reason) == ("abc", "a", "b")


@pytest.mark.parametrize(("include", "answer"), [(False, "a"), (True, "ab")])
def test_a_stop_token_ends_the_answer(include, answer):
    """A stop token ends the choice with its id as the reason; its text is shown only with `include`."""
    script = Script()
    a, b = letters(script, 2)
    heard = drive(script.choice(token_ids=frozenset({b}), include=include), [a, b, a])
    assert (heard.answer, heard.finish, heard.stop_reason) == (answer, ["stop"], b)


def test_a_silent_stop_token_never_shows_its_text():
    """Of two kinds of stop tokens, those that are silent end the choice unseen where the others are kept."""
    script = Script()
    a, b = letters(script, 2)
    rules = {"token_ids": frozenset({a, b}), "silent_ids": frozenset({b}), "include": True}
    assert drive(script.choice(**rules), [a]).answer == "a"
    silent = drive(script.choice(**rules), [b])
    assert (silent.answer, silent.ids, silent.stop_reason) == ("", [b], b)


@given(st.text(min_size=1), BORDERS, st.integers(0, 30))
def test_a_text_cut_between_any_two_tokens_goes_on_without_a_seam(text, borders, at):
    """Two choices of which one reads where the other stopped give the whole text, no character broken."""
    script = Script()
    pieces = [piece for piece in cut(text.encode(), borders) if piece]
    first = drive(script.choice(), map(script.id_of, pieces[:at]))
    second = drive(script.choice(before=b"".join(pieces[:at])[-3:]), map(script.id_of, pieces[at:]))
    assert first.answer + second.answer == text
    assert text.startswith(first.answer)


def test_ignoring_the_end_of_the_sequence_goes_on_to_the_limit():
    """With ignore_eos the end of the sequence is a token like any other."""
    script = Script()
    a = script.id_of("a")
    heard = drive(script.choice(ignore_eos=True, max_tokens=4), [a, EOS, a, EOS, a])
    assert (heard.answer, heard.counts, heard.finish) == ("aa", (0, 4, 0), ["length"])


def test_stop_strings_wait_for_min_tokens():
    """A stop string within the first min_tokens is text."""
    script = Script()
    heard = drive(script.choice(strings=("b",), min_tokens=3), letters(script, 2) + letters(script, 3))
    assert (heard.answer, heard.stop_reason) == ("aba", "b")


def test_held_text_comes_out_at_the_end():
    """What might have become a stop string is shown when the choice ends without it."""
    script = Script()
    ended = drive(script.choice(strings=("abX",)), [*letters(script, 2), EOS])
    limited = drive(script.choice(strings=("abX",), max_tokens=2), letters(script, 2))
    assert (ended.answer, limited.answer) == ("ab", "ab")


def test_a_tool_call_changes_the_finish_reason():
    """A choice that made calls and ended by itself ends with tool_calls; a cut one with length."""
    script = Script()
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    ended = drive(script.choice(tools=True), [*map(script.id_of, call), EOS])
    limited = drive(script.choice(tools=True, max_tokens=45), map(script.id_of, call))
    assert (ended.answer, ended.finish, limited.finish) == ("", ["tool_calls"], ["length"])
    assert "".join(part.arguments for out in ended.outputs for part in out.calls) == '{"a": 1}'


def test_a_complete_grammar_ends_the_choice_with_what_was_held():
    """When the grammar allows nothing more, held text is shown and the choice ends."""
    script = Script()
    choice = script.choice(strings=("bX",))
    outputs = drive(choice, letters(script, 2)).outputs
    choice.complete(outputs[-1])
    heard = Heard(outputs)
    assert (heard.answer, heard.finish) == ("ab", ["stop"])


def test_blank_lines_around_a_chain_are_not_answer():
    """Line breaks after the end marker are layout, counted as answer tokens but not shown."""
    script = Script()
    choice = script.choice(script.plan(9), chain_open=True)
    heard = drive(choice, [script.id_of(END), script.id_of("\n"), script.id_of("\nok\n"), EOS])
    assert (heard.answer, heard.counts) == ("ok\n", (0, 3, 1))


def test_an_opening_marker_after_white_space_opens():
    """White space before an opening marker of several tokens belongs to it, and so do its tokens."""
    script = Script()
    choice = script.choice(script.plan(9, single=False))
    heard = drive(choice, [*map(script.id_of, ["\n", "<", "t>x", "y", END]), EOS])
    assert choice.phase is Phase.ANSWER
    assert (heard.thinking, heard.counts) == ("xy", (1, 1, 4))
