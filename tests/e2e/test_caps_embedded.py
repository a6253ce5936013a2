"""Caps with the engine inside the gateway: the shapes of an answer that the accounting tests leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.caps import SHAPES, Cell, Marks, Vocabulary, ask_cell, check_cell
from tests.e2e.sdk import MODEL, NO_END, client_of
from tests.e2e.servers import Gateway

WRAP_UP = "\n\nTime is up: I answer with what I have.\n"  # the default
# The engine runs one choice after another: a few cells of the matrix, with each value of each axis.
CELLS = [Cell(0, 1, False), Cell(5, 1, True)]
MORE = {
    "plain": Cell(1, 3, True),
    "schema": Cell(1, 3, False),
    "logprobs": Cell(1, 1, False),
    "stop": Cell(1, 1, False),
}


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "auto"])  # no grammar can make it call then
def test_cap_holds_whatever_is_asked_for(embedded_gateway: Gateway, thinking_model: Path, shape: str) -> None:
    """Streamed or not, each choice thinks within the cap by count, and answers whole."""
    vocabulary = Vocabulary(thinking_model)
    marks = Marks(vocabulary.ids("<think>\n"), vocabulary.ids("</think>"), vocabulary.ids(WRAP_UP))
    client = client_of(embedded_gateway)
    for cell in (*CELLS, *([MORE[shape]] if shape in MORE else [])):
        answer = ask_cell(client, SHAPES[shape], cell, marks, vocabulary.compact())
        check_cell(answer, SHAPES[shape], cell, marks)


@pytest.mark.parametrize("phase", ["thinking", "answer"])
def test_client_that_leaves_in_either_phase_stops_the_engine(embedded_gateway: Gateway, phase: str) -> None:
    """Under two-phase enforcement, too, a closed stream frees the engine and settles the hold."""
    embedded_gateway.wait_settled()
    create: Any = client_of(embedded_gateway).chat.completions.create
    # An envelope is what brings the engine to continue from token ids.
    thinkgate = {"thinking_tokens": 900 if phase == "thinking" else 5, "envelope": {"tokens": 3000}}
    messages = [{"role": "user", "content": "Tell me a long story about the sea."}]
    stream = create(
        model=MODEL,
        messages=messages,
        stream=True,
        max_completion_tokens=1500,
        logit_bias=NO_END,
        extra_body={"thinkgate": thinkgate},
    )
    shown = "content" if phase == "answer" else "reasoning"
    next(chunk for chunk in stream if any(getattr(part.delta, shown, None) for part in chunk.choices))
    assert embedded_gateway.metric("thinkgate_backend_calls") == 1
    stream.close()
    embedded_gateway.wait_settled()
    assert embedded_gateway.metric("thinkgate_backend_calls") == 0
