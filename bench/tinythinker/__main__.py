"""The command line: `python -m bench.tinythinker train|eval|export|questions`.

Owns: arguments and printing; docs/tinythinker_card.md says what each command is for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.tinythinker.task import SPLITS, questions

RUNS = Path(".cache/tinythinker")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tinythinker", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, or go on where it was interrupted")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--blocks", type=int, help="default: the recipe's")
    train.add_argument("--threads", type=int, default=2)
    export = commands.add_parser("export", help="write the checkpoint as a model folder")
    export.add_argument("--seed", type=int, default=0)
    for each in (train, export):
        each.add_argument("--run", type=Path, help=f"checkpoint folder (default: {RUNS}/seed-SEED)")
    evaluate = commands.add_parser("eval", help="accuracy and tokens: instant, full, at caps, by level")
    evaluate.add_argument("--count", type=int, default=800)
    evaluate.add_argument("--seed", type=int, default=0, help="of questions and sampling")
    evaluate.add_argument("--temperature", type=float, default=0.6)
    evaluate.add_argument("--json", type=Path, help="file for all figures")
    ask = commands.add_parser("questions", help="questions as JSON lines")
    ask.add_argument("--count", type=int, default=3000)
    ask.add_argument("--seed", type=int, default=0)
    for each in (evaluate, ask):
        each.add_argument("--split", choices=SPLITS, default="tune", help="default: tune; test is for final figures")
    for each in (export, evaluate):
        each.add_argument("--folder", type=Path, help="model folder (default: bench/tinythinker/weights)")
    arguments = parser.parse_args(argv)
    return {"train": _train, "export": _export, "eval": _evaluate, "questions": _questions}[arguments.command](
        arguments
    )


def _train(arguments: argparse.Namespace) -> int:
    """Train and keep the checkpoint."""
    from bench.tinythinker.train import Recipe, train

    chosen = {"blocks": arguments.blocks} if arguments.blocks else {}
    recipe = Recipe(seed=arguments.seed, **chosen)
    train(recipe, _run_folder(arguments), threads=arguments.threads, say=_say)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    """Write a model folder from a checkpoint."""
    from bench.tinythinker.model import WEIGHTS
    from bench.tinythinker.train import export

    export(_run_folder(arguments), arguments.folder or WEIGHTS)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    """Print the table; write the figures where asked."""
    from bench.tinythinker.evaluate import Examiner, summary, table
    from bench.tinythinker.model import WEIGHTS, load_folder

    model = load_folder(arguments.folder or WEIGHTS)
    asked = list(questions(arguments.split, arguments.count, seed=arguments.seed))
    examiner = Examiner(model, seed=arguments.seed, temperature=arguments.temperature)
    figures = summary(examiner.examine(asked))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(table(figures))
    return 0


def _questions(arguments: argparse.Namespace) -> int:
    """Print questions with their answers."""
    for question in questions(arguments.split, arguments.count, seed=arguments.seed):
        answer = f"{question.answer:02}"
        print(json.dumps({"question": question.text, "answer": answer, "level": question.level}))
    return 0


def _run_folder(arguments: argparse.Namespace) -> Path:
    """Where the checkpoint is."""
    folder: Path = arguments.run or RUNS / f"seed-{arguments.seed}"
    return folder


def _say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
