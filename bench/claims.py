"""The claims of the README, each with the command and the figure that carry it.

Owns: which figure of which benchmark stands for which sentence, and the goal it is held to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

BENCHES = ("overhead", "soak", "ledger", "placement", "route")
"""What `make bench` runs; each is `python -m bench.NAME`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One row of the table.

    Attributes:
        bench: which benchmark measures it.
        key: the figure in its object.
        text: what is claimed, in words.
        at_most: the goal, for figures that should be small.
        at_least: the goal, for figures that should be large; or that a truth should be.
        unit: after the figure; "%" shows a fraction as per cent.
        digits: after the decimal point.
    """

    bench: str
    key: str
    text: str
    at_most: float | None = None
    at_least: float | bool | None = None
    unit: str = ""
    digits: int = 0

    def value(self, results: Mapping[str, Mapping[str, Any]]) -> float | bool | None:
        """The figure measured; None if it was not."""
        found: float | bool | None = results.get(self.bench, {}).get(self.key)
        return found

    def is_met(self, results: Mapping[str, Mapping[str, Any]]) -> bool | None:
        """Whether the goal is reached; None if it was not measured."""
        value = self.value(results)
        if value is None:
            return None
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def shown(self, value: float | bool | None) -> str:
        """`value` in this claim's unit."""
        if value is None:
            return "not measured"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if self.unit == "%":
            return f"{100 * value:.{self.digits}f} %"
        return f"{value:,.{self.digits}f} {self.unit}".rstrip()

    def goal(self) -> str:
        """The goal in words."""
        if isinstance(self.at_least, bool):
            return "yes"
        if self.at_most is not None:
            return f"at most {self.shown(self.at_most)}"
        return "" if self.at_least is None else f"at least {self.shown(self.at_least)}"


CLAIMS = (
    Claim(
        bench="overhead", key="us_per_request", at_most=150, unit="us",
        text="processor time per request, key and limits on (32 connections)",
    ),
    Claim(
        bench="overhead", key="us_per_token", at_most=60, unit="us", digits=1,
        text="processor time per token passed through (200 streams, 50 tokens/s each)",
    ),
    Claim(
        bench="overhead", key="us_per_capped_token", at_most=80, unit="us", digits=1,
        text="processor time per token under a thinking cap (same load)",
    ),
    Claim(
        bench="overhead", key="delivered", at_least=1.0, unit="%", digits=2,
        text="tokens delivered at 200 streams of 50 tokens/s",
    ),
    Claim(
        bench="overhead", key="delivered_capped", at_least=1.0, unit="%", digits=2,
        text="the same under a thinking cap",
    ),
    Claim(
        bench="overhead", key="ratio_vs_smg", at_most=1.0, digits=2,
        text="processor time per request over that of SGLang's smg (Rust), same run",
    ),
    Claim(
        bench="overhead", key="ratio_vs_vllm_router", digits=2,
        text="the same over vllm-router (Rust)",
    ),
    Claim(
        bench="overhead", key="ratio_vs_litellm", digits=3,
        text="the same over LiteLLM",
    ),
    Claim(
        bench="soak", key="flat", at_least=True,
        text="memory flat over 100,000 requests and 10,000 disconnects",
    ),
    Claim(
        bench="soak", key="nothing_left", at_least=True,
        text="no hold, request or upstream stream left after them",
    ),
    Claim(
        bench="ledger", key="growth_is_flat", at_least=True,
        text="hold and settle take as long with 100,000 keys as with 10",
    ),
    Claim(
        bench="route", key="p50_us", at_most=300, unit="us",
        text="time to decide a mode by the text, median",
    ),
    Claim(
        bench="route", key="p99_us", at_most=3000, unit="us",
        text="the same, slowest hundredth",
    ),
    Claim(
        bench="route", key="structure_p50_us", at_most=20, unit="us", digits=1,
        text="time to decide a mode by structure alone, median",
    ),
    Claim(
        bench="placement", key="unbeaten", at_least=True,
        text="no other policy places better on both hits and p99, at any load simulated",
    ),
)  # fmt: skip
