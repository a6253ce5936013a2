"""The model itself: logistic regression by Newton's method, Platt scaling, and both judged by sources left out.

Every problem solved here is convex and solved to its end, and what is kept is rounded far above the noise of another
processor's arithmetic: so the same data give the same artefact, bit for bit.

Source of the scaling: Platt 1999, "Probabilistic outputs for support vector machines".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from router.features import FEATURES_VERSION, NAMES, features
from router.scorer import FORMAT, LEVELS
from router.train.sources import SOURCES, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RIDGE = 200.0  # on standardised features, against 2000 units of sample weight
LEVEL_RIDGE = 100.0
MASS = 1000.0  # of each label: sources of a label weigh the same, whatever their number of texts
STEPS, DONE = 50, 1e-11
LOW, HIGH = 0.55, 0.75
DIGITS = 4


class Table(NamedTuple):
    """One source's texts as numbers."""

    source: Source
    rows: Floats

    @property
    def label(self) -> float:
        """1 for reasoning."""
        return float(self.source.deserves == "reasoning")


class Linear(NamedTuple):
    """Weights on features as they are."""

    weights: Floats
    bias: float

    def __call__(self, rows: Floats) -> Floats:
        """The logits."""
        return rows @ self.weights + self.bias


class Fitted(NamedTuple):
    """A whole model."""

    logit: Linear
    slope: float
    shift: float
    level: Linear

    def probability(self, rows: Floats) -> Floats:
        """Calibrated."""
        return _sigmoid(self.slope * self.logit(rows) + self.shift)


def tables(texts: Mapping[str, Sequence[str]]) -> list[Table]:
    """The features of every source, rounded as the scorer rounds them."""
    import numpy as np

    return [
        Table(source, np.array([[round(value, 4) for value in features(text)] for text in texts[source.name]]))
        for source in SOURCES
    ]


def fit(known: Sequence[Table]) -> Fitted:
    """A model of these sources, calibrated on what models of all but one say of that one."""
    held_out = [(table, _logit(_without(known, table))(table.rows)) for table in known]
    slope, shift = _platt(held_out)
    return Fitted(_logit(known), slope, shift, _levels(known))


def body_of(model: Fitted) -> dict[str, object]:
    """The artefact's content."""
    return {
        "format": FORMAT,
        "features_version": FEATURES_VERSION,
        "names": list(NAMES),
        "weights": [round(float(weight), DIGITS) for weight in model.logit.weights],
        "bias": round(model.logit.bias, DIGITS),
        "slope": round(model.slope, DIGITS),
        "shift": round(model.shift, DIGITS),
        "low": LOW,
        "high": HIGH,
        "level_weights": [round(float(weight), DIGITS) for weight in model.level.weights],
        "level_bias": round(model.level.bias, DIGITS),
    }


def _without(known: Sequence[Table], one: Table) -> list[Table]:
    return [table for table in known if table is not one]


def _stacked(known: Sequence[Table]) -> tuple[Floats, Floats, Floats]:
    """All rows, their labels, and weights that make labels equal, and sources within a label."""
    import numpy as np

    of_label = {label: sum(table.label == label for table in known) for label in (0.0, 1.0)}
    weights = [np.full(len(t.rows), MASS / of_label[t.label] / len(t.rows)) for t in known]
    labels = [np.full(len(t.rows), t.label) for t in known]
    return np.concatenate([t.rows for t in known]), np.concatenate(labels), np.concatenate(weights)


def _standard(rows: Floats, weights: Floats) -> tuple[Floats, Floats]:
    import numpy as np

    mean = np.average(rows, axis=0, weights=weights)
    return mean, np.sqrt(np.average((rows - mean) ** 2, axis=0, weights=weights)) + 1e-3


def _logit(known: Sequence[Table]) -> Linear:
    import numpy as np

    rows, labels, weights = _stacked(known)
    mean, scale = _standard(rows, weights)
    design = np.column_stack([(rows - mean) / scale, np.ones(len(rows))])
    return _plain(_newton(design, labels, weights, RIDGE), mean, scale)


def _levels(known: Sequence[Table]) -> Linear:
    """Ridge regression on the sources' difficulty."""
    import numpy as np

    rows, _, weights = _stacked(known)
    mean, scale = _standard(rows, weights)
    design = np.column_stack([(rows - mean) / scale, np.ones(len(rows))])
    wanted = np.concatenate([np.full(len(table.rows), float(table.source.level)) for table in known])
    weighted = design * weights[:, None]
    solved = np.linalg.solve(weighted.T @ design + _ridge(design.shape[1], LEVEL_RIDGE), weighted.T @ wanted)
    return _plain(solved, mean, scale)


def _plain(solved: Floats, mean: Floats, scale: Floats) -> Linear:
    """Weights of standardised features as weights of the features themselves."""
    weights = solved[:-1] / scale
    return Linear(weights, float(solved[-1] - mean @ weights))


def _platt(held_out: Sequence[tuple[Table, Floats]]) -> tuple[float, float]:
    import numpy as np

    _, labels, weights = _stacked([table for table, _ in held_out])
    logits = np.concatenate([said for _, said in held_out])
    slope, shift = _newton(np.column_stack([logits, np.ones(len(logits))]), labels, weights, 1e-6)
    return float(slope), float(shift)


def _newton(design: Floats, labels: Floats, weights: Floats, ridge: float) -> Floats:
    import numpy as np

    found = np.zeros(design.shape[1])
    penalty = _ridge(design.shape[1], ridge)
    for _ in range(STEPS):
        said = _sigmoid(design @ found)
        slope = design.T @ (weights * (said - labels)) + penalty @ found
        curve = (design * (weights * said * (1 - said))[:, None]).T @ design + penalty
        step = np.linalg.solve(curve, slope)
        found = found - step
        if float(np.abs(step).max()) < DONE:
            break
    return found


def _ridge(size: int, strength: float) -> Floats:
    """The penalty on every weight but the last, which is the bias."""
    import numpy as np

    penalty = np.eye(size) * strength
    penalty[-1, -1] = 1e-9
    return penalty


def _sigmoid(logits: Floats) -> Floats:
    import numpy as np

    said: Floats = 1 / (1 + np.exp(-logits))
    return said


def levels_of(model: Fitted, rows: Floats) -> Floats:
    """The difficulty, as the scorer says it."""
    import numpy as np

    said: Floats = np.clip(np.round(model.level(rows)), LEVELS[0], LEVELS[-1])
    return said
