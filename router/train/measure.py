"""How well the scorer does on sources it never saw, and on ordinary chat.

Owns: the figures of the card. Does not own: fitting (fit.py), words (card.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from router.train.fit import HIGH, LOW, Fitted, Table, fit, levels_of

if TYPE_CHECKING:
    from router.train.fit import Floats

BINS = 10


class SourceFigures(NamedTuple):
    """One source under a model that did not learn from it.

    Attributes:
        table: the source.
        probability: of each text.
        levels: of each text.
    """

    table: Table
    probability: Floats
    levels: Floats

    def right(self, on_uncertain: str) -> float:
        """Share of texts that get what they deserve, if those in the band get `on_uncertain`."""
        return float((reasons(self.probability, on_uncertain) == self.table.label).mean())

    def uncertain(self) -> float:
        """Share of texts in the band."""
        return float(((self.probability >= LOW) & (self.probability < HIGH)).mean())

    def thinks(self, on_uncertain: str) -> float:
        """Share of texts that reason."""
        return float(reasons(self.probability, on_uncertain).mean())


class Figures(NamedTuple):
    """Everything the card tells.

    Attributes:
        sources: each learnt from, under a model without it.
        outside: the others, under the whole model.
    """

    sources: list[SourceFigures]
    outside: list[SourceFigures]

    def macro_f1(self, on_uncertain: str, *, by_text: bool) -> float:
        """The mean of both modes' F1; over texts, or with equal sources within each mode."""
        import numpy as np

        labels, said, weights = self._pooled(on_uncertain, by_text=by_text)
        scores = []
        for mode in (0.0, 1.0):
            hit = weights[(said == mode) & (labels == mode)].sum()
            scores.append(2 * hit / (weights[said == mode].sum() + weights[labels == mode].sum()))
        return float(np.mean(scores))

    def accuracy(self, on_uncertain: str, *, by_text: bool) -> float:
        """Share that gets what it deserves."""
        labels, said, weights = self._pooled(on_uncertain, by_text=by_text)
        return float(weights[said == labels].sum() / weights.sum())

    def coverage(self) -> float:
        """Share of texts outside the band."""
        texts = sum(len(each.probability) for each in self.sources)
        return 1 - sum(each.uncertain() * len(each.probability) for each in self.sources) / texts

    def decided_macro_f1(self) -> float:
        """Macro-F1 over the texts outside the band only."""
        certain = [
            SourceFigures(Table(each.table.source, each.table.rows[keep]), each.probability[keep], each.levels[keep])
            for each in self.sources
            for keep in [(each.probability < LOW) | (each.probability >= HIGH)]
        ]
        return Figures(certain, []).macro_f1("instant", by_text=True)

    def calibration_error(self) -> float:
        """Expected calibration error, ten bins of equal width, sources equal within each mode."""
        import numpy as np

        labels, _, weights = self._pooled("instant", by_text=False)
        said = np.concatenate([each.probability for each in self.sources])
        bins = np.minimum((said * BINS).astype(int), BINS - 1)
        gaps = [abs((weights * (said - labels))[bins == one].sum()) for one in range(BINS)]
        return float(sum(gaps) / weights.sum())

    def level_error(self) -> float:
        """Mean distance from the difficulty that its source was given, sources equal."""
        errors = [abs(each.levels - each.table.source.level).mean() for each in self.sources]
        return float(sum(errors) / len(errors))

    def _pooled(self, on_uncertain: str, *, by_text: bool) -> tuple[Floats, Floats, Floats]:
        import numpy as np

        of_label = {label: sum(each.table.label == label for each in self.sources) for label in (0.0, 1.0)}
        return (
            np.concatenate([np.full(len(each.probability), each.table.label) for each in self.sources]),
            np.concatenate([reasons(each.probability, on_uncertain) for each in self.sources]),
            np.concatenate(
                [
                    np.full(
                        len(each.probability),
                        1.0 if by_text else 1 / of_label[each.table.label] / len(each.probability),
                    )
                    for each in self.sources
                ]
            ),
        )


def measure(known: Sequence[Table], outside: Sequence[Table], model: Fitted) -> Figures:
    """Every source under a model of the others, calibrated on the others, too."""
    held_out = []
    for table in known:
        rest = fit([other for other in known if other is not table])
        held_out.append(SourceFigures(table, rest.probability(table.rows), levels_of(rest, table.rows)))
    seen = [SourceFigures(table, model.probability(table.rows), levels_of(model, table.rows)) for table in outside]
    return Figures(held_out, seen)


def reasons(probability: Floats, on_uncertain: str) -> Floats:
    """1 where the mode would be reasoning."""
    bound = LOW if on_uncertain == "reasoning" else HIGH
    thinks: Floats = (probability >= bound).astype(float)
    return thinks
