"""Rebuild the text scorer and its card.

    python -m router.train [--check] [--data FOLDER] [--out FILE] [--card FILE]

The same packages give the same bytes. What is read is pinned in router/train/requirements.txt, and installed into
`--data` if it is not there. `--check` writes nothing, and fails if anything would change.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from router.features import NAMES
from router.scorer import parse_scorer, render_scorer
from router.train.card import card
from router.train.fit import body_of, fit, tables
from router.train.measure import measure
from router.train.sources import install, read_sources

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Train, measure, write; or compare."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--check", action="store_true", help="write nothing; fail if anything would change")
    flags.add_argument("--data", type=Path, default=ROOT / ".cache" / "router", help="where the packages are put")
    flags.add_argument("--out", type=Path, default=ROOT / "router" / "scorer.json", help="the artefact")
    flags.add_argument("--card", type=Path, default=ROOT / "docs" / "router_card.md", help="the model card")
    given = flags.parse_args()
    install(given.data)
    sys.path.append(str(given.data.resolve()))  # last: what this environment has of its own comes first
    every = tables(read_sources(given.data))
    known = [table for table in every if not table.source.is_outside]
    outside = [table for table in every if table.source.is_outside]
    model = fit(known)
    artefact = render_scorer(body_of(model))
    scorer = parse_scorer(artefact)
    figures = measure(known, outside, model)
    page = card(figures, scorer.digest, len(NAMES))
    sys.stdout.write(page)
    made = {given.out: artefact, given.card: page.encode()}
    if given.check:
        other = [path for path, content in made.items() if not path.is_file() or path.read_bytes() != content]
        sys.stderr.write("".join(f"would change: {path}\n" for path in other))
        return 1 if other else 0
    for path, content in made.items():
        path.write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
