"""From runs to figures: medians, ratios, slopes, tables. Pure.

Owns: how every number in a result is computed. Does not own: measuring (harness.py).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.scenarios import Scenario

QUIET_PERCENT = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Time during one measurement.

    Attributes:
        cpu_s: the gateway's own.
        elapsed_s: on the wall.
        others_s: what strangers took of the gateway's core or of the clients', whichever is more; a
            starved client is as misleading as a starved gateway.
    """

    cpu_s: float
    elapsed_s: float
    others_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One scenario, one gateway, once.

    Attributes:
        us_per_unit: processor time of the gateway per answer (plain) or per token (streams), warm-up
            included on both sides of the division; None if it answered nothing.
        units_per_s: answers or tokens per second the client received.
        delivered: fraction of the tokens offered that arrived; None without an offered rate.
        added_p50_us: what a client waits: latency of an answer, delay of a token.
        added_p99_us: the same at the 99th percentile.
        bad: answers refused, failed, cut, or short of tokens.
        cpu_percent: of the gateway's core, by the gateway.
        noise_percent: of a core, by others (Spent.others_s).
        sample: what it said instead of an answer, if anything.
    """

    us_per_unit: float | None
    units_per_s: float
    delivered: float | None
    added_p50_us: float | None
    added_p99_us: float | None
    bad: int
    cpu_percent: float
    noise_percent: float
    sample: str = ""

    @classmethod
    def of(cls, client: dict[str, Any], scenario: Scenario, spent: Spent) -> Run:
        """From what the load generator printed and what the scheduler counted."""
        units = client["all_tokens"] if scenario.is_stream else client["all_ok"]
        waited = client.get("token_delay_us" if scenario.is_stream else "latency_us", {})
        bad = client["bad"] + client["errors"] + client["short"]
        return cls(
            us_per_unit=spent.cpu_s * 1e6 / units if units else None,
            units_per_s=client["tokens_per_s"] if scenario.is_stream else client["requests_per_s"],
            delivered=delivered(client, scenario.offered_tokens_per_s),
            added_p50_us=waited.get("p50"),
            added_p99_us=waited.get("p99"),
            bad=bad,
            cpu_percent=100 * spent.cpu_s / spent.elapsed_s,
            noise_percent=100 * spent.others_s / spent.elapsed_s,
            sample=client.get("sample", ""),
        )


def delivered(client: dict[str, Any], offered_tokens_per_s: float | None) -> float | None:
    """Tokens that arrived over tokens offered, and no more than the share of streams that were complete.

    A stream of k tokens takes k - 1 gaps and the next begins at once, so a gateway that keeps up
    delivers slightly more than connections / gap: hence the ceiling of 1.
    """
    if offered_tokens_per_s is None:
        return None
    broken = client["bad"] + client["errors"] + client["short"]
    streams = client["ok"] + client["bad"] + client["errors"]
    complete = 1 - broken / streams if streams else 0.0
    arrived: float = client["tokens_per_s"] / offered_tokens_per_s
    return max(0.0, min(1.0, arrived, complete))


def usable(runs: Sequence[Run]) -> list[Run]:
    """Runs that answered at all; of these the quiet ones, if there are any."""
    alive = [run for run in runs if run.us_per_unit is not None]
    return [run for run in alive if run.noise_percent <= QUIET_PERCENT] or alive


def median(runs: Sequence[Run], pick: Callable[[Run], float | None]) -> float | None:
    """Median of one figure over the usable runs; None without any."""
    values = [value for run in usable(runs) if (value := pick(run)) is not None]
    return statistics.median(values) if values else None


def summary(runs: Sequence[Run], scenario: Scenario) -> dict[str, Any]:
    """One gateway in one scenario, units in the keys."""
    unit = "token" if scenario.is_stream else "request"
    figures: dict[str, Any] = {
        f"us_per_{unit}": rounded(median(runs, lambda r: r.us_per_unit)),
        f"{unit}s_per_s": rounded(median(runs, lambda r: r.units_per_s), 0),
        "p50_us": rounded(median(runs, lambda r: r.added_p50_us), 0),
        "p99_us": rounded(median(runs, lambda r: r.added_p99_us), 0),
    }
    if scenario.gap_us:
        figures["delivered"] = rounded(median(runs, lambda r: r.delivered), 4)
    return figures | {
        "bad": sum(run.bad for run in runs),
        "cpu_percent": rounded(median(runs, lambda r: r.cpu_percent), 0),
        "noise_percent": rounded(median(runs, lambda r: r.noise_percent), 0),
        "runs": len(runs),
        "quiet_runs": sum(run.noise_percent <= QUIET_PERCENT for run in runs),
    }


def rounded(value: float | None, digits: int = 2) -> float | None:
    """`value` without digits that mean nothing."""
    return None if value is None else round(value, digits)


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Ours over theirs; below 1 we are cheaper. None when either is missing."""
    return round(ours / theirs, 3) if ours and theirs else None


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of ys over xs; 0 when there is nothing to fit."""
    if len(xs) < 2 or len(set(xs)) < 2:
        return 0.0
    return statistics.linear_regression(xs, ys).slope


def shown(value: float | str | None, digits: int = 0) -> str:
    """A table cell."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    widths = [max(2, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]
    rule = [":".ljust(widths[0], "-"), *(":".rjust(width, "-") for width in widths[1:])]
    lines = []
    for row in [head, rule, *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
