"""What a decision of the mode costs: by structure alone, and where the text is read.

    python -m bench.route [--quick] [--json]

`p50_us` and `p99_us` are over requests that reach the text scorer, each from the parsed messages to the verdict;
`structure_p50_us` and `structure_p99_us` over requests that structure decides. `by_chars` shows how the text's length
matters, and `prepare_*` the whole of steps three to five, remembered by shape, for both kinds. The texts are made here,
from fixed sentences: their length is what counts, up to the 2,000 characters that are read.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench import figures, harness, result
from gateway.ask.request import Message
from gateway.auth import ANYONE
from gateway.backends.port import Capabilities
from gateway.config.schema import Config
from gateway.judge import Judge, load_scorer, priors_of
from gateway.models import build_models
from gateway.shapes import Decisions
from router.mode import ModeFacts, decide_mode
from router.utility import Statistics

SENTENCES = (
    "Hi, how are you today?",
    "Could you write me a short email to my landlord about the heating?",
    "What is the capital of France, and since when?",
    "Prove that for all positive integers n the number n^2 + n is even.",
    "def longest(text: str) -> int: return max(len(word) for word in text.split())",
    "I think the meeting went well, but let us talk about the budget again.",
    "Given a grid of 4 x 4 cells, in how many ways can you place 3 tokens so that no row holds two?",
    "Explain photosynthesis to a child of ten years in a few words, please.",
)
# Mostly short, some pasted documents: about what chats hold.
LENGTHS = (20, 40, 60, 80, 120, 160, 240, 400, 800, 2000, 6000)
CAPABLE = Capabilities(cap_binds=True, cap_binds_with_tools=True, token_ids_out=True, thinking_field="reasoning")


def texts(count: int) -> list[str]:
    """Texts of the lengths above, each as often."""
    chosen = random.Random(5)
    made = []
    for i in range(count):
        text = ""
        while len(text) < LENGTHS[i % len(LENGTHS)]:
            text += chosen.choice(SENTENCES) + " "
        made.append(text[: LENGTHS[i % len(LENGTHS)]])
    return made


def timed(each: Sequence[Any], work: Callable[[Any], object]) -> list[float]:
    """Microseconds of each call, the least disturbed of three rounds, sorted."""
    found = [float("inf")] * len(each)
    for _ in range(3):
        for i, given in enumerate(each):
            began = time.perf_counter_ns()
            work(given)
            found[i] = min(found[i], (time.perf_counter_ns() - began) / 1000)
    return sorted(found)


def percentiles(found: Sequence[float], name: str) -> dict[str, float]:
    """Median and the slowest hundredth."""
    return {
        f"{name}p50_us": round(statistics.median(found), 1),
        f"{name}p99_us": round(found[len(found) * 99 // 100], 1),
    }


def measured(count: int) -> dict[str, Any]:
    """All figures over so many requests."""
    entry = {"backends": [{"id": "a", "url": "http://127.0.0.1:1"}]}
    config = Config.model_validate({"models": {"m": entry}})
    models = build_models(config)
    for slot in models["m"].slots:
        slot.capabilities = CAPABLE
    judge = Judge(config.routing, Statistics(priors_of(config.routing.priors)), load_scorer("builtin"))
    decisions = Decisions(config, models, judge)
    plain = ModeFacts("auto", None, None, "auto", "reasoning", 1000)
    by_structure = [
        plain._replace(asked="instant", asked_by="thinkgate.mode"),
        plain._replace(allowed=frozenset({"instant"})),
        plain._replace(default_mode="reasoning"),
        plain._replace(thinking_room=0),
        plain._replace(continues=True),
    ] * (count // 5)
    said = texts(count)
    messages = [[Message(role="user", content=text)] for text in said]

    def by_text(given: list[Message]) -> object:
        return decide_mode(plain._replace(read=lambda: judge.read(given, 0, ANYONE, models["m"])))

    def whole(body: bytes) -> object:
        return decisions.prepare(body, "chat", ANYONE, request_id="r", trace=())

    bodies = [json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode() for text in said]
    named = [body[:-1] + b', "thinkgate": {"mode": "instant"}}' for body in bodies]
    found = {
        **percentiles(timed(messages, by_text), ""),
        **percentiles(timed(by_structure, decide_mode), "structure_"),
        **percentiles(timed(bodies, whole), "prepare_text_"),
        **percentiles(timed(named, whole), "prepare_structure_"),
    }
    found["by_chars"] = {  # type: ignore[assignment]  # a table in the table
        length: round(statistics.median(timed(messages[i :: len(LENGTHS)], by_text)), 1)
        for i, length in enumerate(LENGTHS)
    }
    return found


def main() -> int:
    """Measure, print, and fail above the goals."""
    given = result.parser(__doc__ or "").parse_args()
    found = result.envelope("route", quick=given.quick)
    found.update(measured(1_100 if given.quick else 11_000))
    harness.say(f"  by characters: {found['by_chars']}")
    kinds = {"reads the text": "", "structure": "structure_", "prepare, text": "prepare_text_"}
    kinds["prepare, structure"] = "prepare_structure_"
    rows = [[kind, *(figures.shown(found[f"{key}{p}_us"], 1) for p in ("p50", "p99"))] for kind, key in kinds.items()]
    print(figures.table(["decision", "p50_us", "p99_us"], rows))
    result.emit(found, as_json=given.json)
    return 0 if found["p50_us"] <= 300 and found["p99_us"] <= 3000 and found["structure_p50_us"] <= 20 else 1


if __name__ == "__main__":
    raise SystemExit(main())
