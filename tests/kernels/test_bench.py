"""The benchmark of sharing measures what it says, on a model small enough for a test."""

import json

import pytest
import torch

from kernels import bench
from tests.kernels.tiny import tiny_llama, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    """A tiny model on disk."""
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).network.module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_the_keys_of_the_result_are_there(folder, monkeypatch, capsys):
    """One command prints, as its last line, the ratios that are promised, and sharing reads what it should."""
    monkeypatch.setattr(bench, "LONG", bench.Shape(6, 256, 9))
    monkeypatch.setattr(bench, "SHORT", bench.Shape(6, 64, 9))
    monkeypatch.setattr(bench, "UNRELATED", bench.Shape(3, 0, 40))
    assert bench.main([str(folder), "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    ratios = ("attention_ratio_vs_no_sharing", "attention_ratio_vs_sdpa", "step_ratio_vs_no_sharing", "ratio_unrelated")
    assert all(found[name] > 0 for name in ratios)
    assert found["engine"]["6x256+9"]["kv_ratio"] > 4
    assert found["engine"]["3x0+40"]["kv_ratio"] <= 1
    assert found["attention"]["float32"]["6x256+9"]["bytes_ratio"] == round(6 * 265 / (256 + 6 * 9), 2)
