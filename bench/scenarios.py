"""What is asked of every gateway.

Owns: the scenarios, their request bodies and the knobs of the fake upstream behind them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MODEL = "bench-model"

CAP = 51
"""The cap of the capped scenarios. vLLM closes the thinking with output token CAP, the end marker, so
50 thinking tokens remain of the 200 that the upstream would think by itself."""

MESSAGES = [
    {"role": "system", "content": "You are a careful assistant. " * 12},
    {"role": "user", "content": "What is the capital of France, and why did it become so? " * 4},
    {"role": "assistant", "content": "Paris, largely because of the river and the court. " * 4},
    {"role": "user", "content": "Say a little more about its size, please."},
]
PLAIN = {"model": MODEL, "messages": MESSAGES, "temperature": 0.7, "max_tokens": 256}
BODIES = {
    "plain": PLAIN,
    "stream": {**PLAIN, "stream": True},
    "capped": {**PLAIN, "stream": True, "thinking_token_budget": CAP},
    "plain_capped": {**PLAIN, "thinking_token_budget": CAP},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One kind of load.

    Attributes:
        body: which of BODIES.
        connections: clients at once, each with one request after the other.
        measured_s: time that counts, after `warm_s`.
        ramp_ms: the first requests are spread over this.
        gap_us: time between two tokens at the upstream; 0: as fast as it can write.
        think: tokens the upstream would think by itself.
        answer: answer tokens of the upstream.
        tokens: what a complete stream delivers.
    """

    body: str
    connections: int
    measured_s: float
    warm_s: float = 0.5
    ramp_ms: int = 0
    gap_us: int = 0
    think: int = 0
    answer: int = 100
    tokens: int = 100

    @property
    def is_stream(self) -> bool:
        """Whether tokens are counted, not answers."""
        return not self.body.startswith("plain")

    @property
    def offered_tokens_per_s(self) -> float | None:
        """What the upstream offers over all streams; None when it has no clock."""
        return self.connections * 1e6 / self.gap_us if self.gap_us else None

    @property
    def knobs(self) -> str:
        """The query that sets up the upstream."""
        return f"think={self.think}&answer={self.answer}&gap_us={self.gap_us}&first_us=0&burst=1"

    @property
    def title(self) -> str:
        """One line for the head of a table."""
        if not self.is_stream:
            kind = "plain answers with capped thinking" if self.think else "plain answers"
            return f"{kind}, {self.connections} connection(s)"
        capped = f"50 thinking tokens under a cap and {self.answer} answer tokens"
        tokens = capped if self.think else f"{self.answer} tokens"
        pace = f", {self.gap_us / 1000:g} ms between tokens" if self.gap_us else ""
        return f"streams of {tokens}, {self.connections} connection(s){pace}"


SCENARIOS = {
    "ns1": Scenario(body="plain", connections=1, measured_s=2, answer=58),
    "ns32": Scenario(body="plain", connections=32, measured_s=3, answer=58),
    "ns128": Scenario(body="plain", connections=128, measured_s=3, answer=58),
    "cap32": Scenario(body="plain_capped", connections=32, measured_s=3, think=200, answer=58),
    "st1": Scenario(body="stream", connections=1, measured_s=2),
    "st64": Scenario(body="stream", connections=64, measured_s=3),
    "gap200": Scenario(body="stream", connections=200, measured_s=5, warm_s=1, ramp_ms=800, gap_us=20_000),
    "capped64": Scenario(body="capped", connections=64, measured_s=3, think=200, answer=50),
    "capped_gap200": Scenario(
        body="capped",
        connections=200,
        measured_s=5,
        warm_s=1,
        ramp_ms=800,
        gap_us=20_000,
        think=200,
        answer=50,
    ),
}  # fmt: skip


def write_bodies(folder: Path) -> None:
    """One JSON file per body, for the load generator."""
    for name, body in BODIES.items():
        (folder / f"{name}.json").write_text(json.dumps(body))
