"""How likely a request's text deserves thinking, and how hard it is: a small logistic model over lexical features.

Owns: the format of the trained artefact, its checks, and applying it. Does not own: the features (features.py),
training (router/train/), reading files (gateway/judge.py). Pure; O(features).

The artefact is JSON: weights for each named feature, a calibration and a band. It is used only where its digest, its
version and its names are those of this code: weights for other features would be noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import exp
from typing import Any, NamedTuple

from router.features import FEATURES_VERSION, NAMES, features

FORMAT = "thinkgate-scorer-1"
MOST_BYTES = 1_000_000
MOST_NUMBER = 1e6  # so that no sum of them overflows
LEVELS = (1, 2, 3, 4, 5)


class WrongArtefact(Exception):
    """The artefact is damaged, of another version, or for other features."""


class Score(NamedTuple):
    """What the text says.

    Attributes:
        probability: calibrated, 0 to 1, that thinking pays.
        level: difficulty, 1 to 5.
        features: what it follows from, in the order of NAMES, rounded as they were used.
    """

    probability: float
    level: int
    features: tuple[float, ...]


class Scorer(NamedTuple):
    """A trained model.

    Attributes:
        digest: the first characters of the artefact's SHA-256, to tell which one decided.
        weights: per feature.
        bias: of the logit.
        slope: Platt scaling of the logit, and
        shift: of the same.
        low: below this probability instant is certain enough.
        high: from this probability on reasoning is; between the two the text does not tell.
        level_weights: per feature, for the difficulty.
        level_bias: of the difficulty.
    """

    digest: str
    weights: tuple[float, ...]
    bias: float
    slope: float
    shift: float
    low: float
    high: float
    level_weights: tuple[float, ...]
    level_bias: float

    def read(self, text: str) -> Score:
        """The score of a text's first characters."""
        return self.score([round(value, 4) for value in features(text)])

    def score(self, found: Sequence[float]) -> Score:
        """The score of features that are rounded already; so that a decision can be repeated from its record."""
        logit = self.bias
        level = self.level_bias
        for value, weight, level_weight in zip(found, self.weights, self.level_weights, strict=True):
            logit += value * weight
            level += value * level_weight
        return Score(
            round(sigmoid(self.slope * logit + self.shift), 4),
            min(LEVELS[-1], max(LEVELS[0], round(level))),
            tuple(found),
        )


def sigmoid(logit: float) -> float:
    """The logistic function, without overflow."""
    if logit >= 0:
        return 1 / (1 + exp(-logit))
    odds = exp(logit)
    return odds / (1 + odds)


def parse_scorer(artefact: bytes) -> Scorer:
    """A scorer from its artefact. Raises: WrongArtefact."""
    if len(artefact) > MOST_BYTES:
        raise WrongArtefact(f"larger than {MOST_BYTES} bytes")
    try:
        body: dict[str, Any] = json.loads(artefact)
        told = body.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as exc:
        raise WrongArtefact("not a JSON object with its sha256") from exc
    if told != digest_of(body):
        raise WrongArtefact("its sha256 is not that of its content")
    if (body.get("format"), body.get("features_version")) != (FORMAT, FEATURES_VERSION):
        raise WrongArtefact(f"not {FORMAT} for features of version {FEATURES_VERSION}")
    if body.get("names") != list(NAMES):
        raise WrongArtefact("its features are not those of this version")
    try:
        scorer = Scorer(
            digest=told[:12],
            weights=_numbers(body["weights"]),
            level_weights=_numbers(body["level_weights"]),
            **{name: _number(body[name]) for name in ("bias", "slope", "shift", "low", "high", "level_bias")},
        )
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise WrongArtefact(f"a number is missing or wrong: {exc}") from exc
    if not 0 <= scorer.low <= scorer.high <= 1:
        raise WrongArtefact("its band is not within 0 and 1")
    return scorer


def render_scorer(body: dict[str, Any]) -> bytes:
    """The artefact of a model, with its digest; the same bytes for the same model."""
    return (json.dumps({**body, "sha256": digest_of(body)}, indent=1, sort_keys=True) + "\n").encode()


def digest_of(body: dict[str, Any]) -> str:
    """The SHA-256 of an artefact's content, in hex."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _numbers(values: Sequence[float]) -> tuple[float, ...]:
    if len(values) != len(NAMES):
        raise ValueError(f"not {len(NAMES)} weights")
    return tuple(map(_number, values))


def _number(value: float) -> float:
    number = float(value)
    if not abs(number) <= MOST_NUMBER:
        raise ValueError(f"{number} is not within {MOST_NUMBER}")
    return number
