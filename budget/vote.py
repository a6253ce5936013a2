"""One answer out of several: answers made comparable, the majority among them, and the bias of the first finished.

Owns: normalising (numbers, fractions, LaTeX, multiple choice, JSON), the vote with its tie-breaks, and the correction
for samples that were cancelled because others finished before them. Pure; O(text). Does not own: when to stop
sampling (stopping.py).

Sources: Think Deep, Think Fast (arXiv 2504.14047) for the tie-breaks; APRIL (over-launch and cancel) and the bias that
it brings, corrected by redistribution to the right (Efron 1967).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import msgspec

HEDGES = re.compile(r"\b(wait|alternatively|maybe|perhaps|hmm|might)\b", re.IGNORECASE)
_ANSWER = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)\s*:?\s*([^\n]+)", re.IGNORECASE)
_CHOICE = re.compile(r"(?:(?:option|choice)\s+)?\(?([A-Za-z])\)?[.:)]?", re.IGNORECASE)
_WRAPS = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_SHORT_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\s*(\d)\s*(\d)")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?", re.IGNORECASE)
_NOISE = re.compile(r"\\[,;!: ]|\\left|\\right|\\displaystyle|\$|\\\(|\\\)|\\\[|\\\]|\*\*|`")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?=(?:\d{3}(?:,|\{,\}))*\d{3}(?!\d))")


def normalised(text: str) -> str:
    r"""An answer in the form in which equal ones are equal texts; empty where there is none.

    The last `\boxed{}` counts, else what stands behind "answer is", else the whole. Numbers, fractions and percentages
    become one fraction, options their capital letter, JSON is sorted, other text loses case and spaces.
    """
    said = _said(text)
    as_json = _json(said)
    if as_json is not None:
        return as_json
    plain = _plain(said)
    number = _number(plain)
    if number is not None:
        return str(number)
    choice = _CHOICE.fullmatch(plain)
    if choice is not None:
        return choice.group(1).upper()
    return " ".join(plain.casefold().split())


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` of a text holds, inner braces included; None where there is none, or it has no end."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return text[start:at]
    return None


class Vote(msgspec.Struct, frozen=True, kw_only=True):
    """One sample's.

    Attributes:
        answer: as it was said.
        tokens: of the sample.
        text: what it thought, for its hedges.
        weight: of the vote, 1 for a plain one.
    """

    answer: str
    tokens: int = 0
    text: str = ""
    weight: float = 1


class Verdict(msgspec.Struct, frozen=True):
    """What a vote says.

    Attributes:
        answer: the winner, normalised; empty where nobody has answered.
        share: its part of all weight.
        sample: the place of the sample whose words to give.
    """

    answer: str
    share: float
    sample: int | None


def majority(votes: Sequence[Vote]) -> Verdict:
    """The answer with the most weight; among equals the one with fewer hedges, then with shorter samples.

    Right answers are shorter and hedge less. The sample to quote is the shortest of the winning ones that hedges least.
    """
    sides: dict[str, list[int]] = defaultdict(list)
    for at, vote in enumerate(votes):
        answer = normalised(vote.answer)
        if answer:
            sides[answer].append(at)
    if not sides:
        return Verdict("", 0.0, None)

    def rank(answer: str) -> tuple[float, float, float]:
        members = sides[answer]
        hedging = sum(hedge_rate(votes[at].text) for at in members) / len(members)
        length = sum(votes[at].tokens for at in members) / len(members)
        return -sum(votes[at].weight for at in members), hedging, length

    winner = min(sides, key=rank)
    best = min(sides[winner], key=lambda at: (hedge_rate(votes[at].text), votes[at].tokens))
    total = sum(vote.weight for vote in votes)
    return Verdict(winner, -rank(winner)[0] / total if total else 0.0, best)


def hedge_rate(text: str) -> float:
    """Hedging words per 100 words."""
    words = len(text.split())
    return 100 * len(HEDGES.findall(text)) / words if words else 0.0


def race_weights(lengths: Sequence[int], cancelled: int) -> list[float]:
    """The weight of each sample that finished, where others were cancelled because these had finished first.

    The first to finish are the short ones, and short answers are not the same answers. What the cancelled ones, all of
    them longer, would have said is read off the trend from the shortest to the longest that finished, continued: so the
    longest weigh most, the shortest least. Weights add up to all samples that were launched. Clipped at 0, which
    leaves about half of the bias, but far less noise than the whole trend.

    Args:
        lengths: of the finished samples, in tokens.
        cancelled: how many did not finish.
    """
    count = len(lengths)
    if count < 2:
        return [1.0 + cancelled] * count
    order = sorted(range(count), key=lambda at: lengths[at])
    middle = (count - 1) / 2
    reach = count + (cancelled - 1) / 2 - middle  # from the middle of the finished to that of the cancelled
    spread = sum((rank - middle) ** 2 for rank in range(count))
    weights = [0.0] * count
    for rank, at in enumerate(order):
        weights[at] = max(0.0, 1 + cancelled * (1 / count + (rank - middle) * reach / spread))
    scale = (count + cancelled) / sum(weights)
    return [weight * scale for weight in weights]


def _said(text: str) -> str:
    """The part of a text that is the answer."""
    inner = boxed(text)
    if inner is not None:
        return inner.strip()
    found = _ANSWER.findall(text)
    return (found[-1] if found else text).strip()


def _json(text: str) -> str | None:
    """An object or array, sorted."""
    if text[:1] not in {"{", "["} or text[-1:] not in {"}", "]"}:
        return None
    try:
        value = json.loads(text, parse_float=_exact, parse_int=_exact)
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return None


def _exact(said: str) -> str:
    """A number of JSON as a fraction: 1.0 is 1."""
    return str(Fraction(said))


def _plain(text: str) -> str:
    """A text without the marks that mean nothing."""
    text = _NOISE.sub("", text)
    while (unwrapped := _WRAPS.sub(r"\1", text)) != text:
        text = unwrapped
    text = _SHORT_FRACTION.sub(r"\1\2/\3", _FRACTION.sub(r"\1(\2)/(\3)", text))
    return _THOUSANDS.sub("", text).strip().rstrip(".").strip().replace("−", "-")


def _number(text: str) -> Fraction | None:
    """A number, a fraction of two, or a percentage."""
    text = text.replace(" ", "").removesuffix("\\%").rstrip("%") + ("%" if text.rstrip().endswith("%") else "")
    if text.endswith("%"):
        part = _number(text[:-1])
        return None if part is None else part / 100
    above, slash, below = text.partition("/")
    sign = -1 if above.startswith("-(") else 1
    parts = [_NUMBER.fullmatch(one.removeprefix("-" if sign < 0 else "").strip("()")) for one in (above, below)]
    if parts[0] is None:
        return None
    number = sign * Fraction(parts[0].group())
    if not slash:
        return number
    return None if parts[1] is None or not Fraction(parts[1].group()) else number / Fraction(parts[1].group())
