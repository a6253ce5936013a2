"""Training and evaluating a network of a few thousand weights."""

import dataclasses
import math

import pytest

pytest.importorskip("torch", reason="needs the extra `embedded`")

import torch

from bench.tinythinker.__main__ import main
from bench.tinythinker.evaluate import Examiner, Outcome, summary, table, wilson
from bench.tinythinker.lessons import IGNORED, Lesson
from bench.tinythinker.model import Shape, load_folder
from bench.tinythinker.task import questions
from bench.tinythinker.train import Recipe, Training, export, tensors_of, train

SHAPE = Shape(width=16, layers=1, heads=2, head_width=8, feed_forward=16)
MICRO = Recipe(seed=1, blocks=3, batches=2, batch_tokens=600, shape=SHAPE)


@pytest.fixture(autouse=True)
def threads():
    """Leave torch as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights(training):
    return torch.cat([each.flatten() for each in training.model.parameters()])


def interrupt(recipe, folder, *, after):
    """Train until some blocks are done."""

    class Interrupted(Exception):
        pass

    lines = []

    def say(line):
        lines.append(line)
        if len(lines) == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(recipe, folder, threads=1, say=say)


def test_an_interrupted_training_ends_where_the_other_does(tmp_path):
    """Broken off after a block and started again, training comes to the same weights to the last bit."""
    straight = train(MICRO, tmp_path / "straight", threads=1, say=print)
    interrupt(MICRO, tmp_path / "broken", after=1)
    resumed = train(MICRO, tmp_path / "broken", threads=1, say=print)
    assert torch.equal(weights(straight), weights(resumed))
    assert (straight.block, straight.tokens) == (resumed.block, resumed.tokens)
    assert not torch.equal(weights(straight), weights(Training(MICRO)))


def test_another_recipe_is_refused(tmp_path):
    """A checkpoint of one recipe is not continued by another."""
    train(dataclasses.replace(MICRO, blocks=1), tmp_path, threads=1, say=print)
    with pytest.raises(ValueError, match="another recipe"):
        train(dataclasses.replace(MICRO, blocks=2), tmp_path, threads=1, say=print)


def test_training_lowers_the_loss(tmp_path):
    """Even a micro model learns how a chain looks."""
    losses = []
    recipe = dataclasses.replace(MICRO, blocks=6, batches=4)
    train(recipe, tmp_path, threads=1, say=lambda line: losses.append(float(line.split("loss ")[1].split()[0])))
    assert losses[-1] < losses[0] - 0.5


def test_the_rate_rises_stays_and_falls():
    """The learning rate warms up, holds, and ends near zero."""
    rates = [Recipe().rate_at(done / 100) for done in range(101)]
    assert rates[0] < 0.1
    assert set(rates[2:61]) == {1.0}
    assert rates[61:] == sorted(rates[61:], reverse=True)
    assert rates[100] == 0


def test_padding_and_prompts_are_not_learned():
    """Labels are there for what is learned, and for nothing else."""
    ids, labels = tensors_of([Lesson((5, 6, 7), (IGNORED, IGNORED, 7)), Lesson((8, 9), (IGNORED, 9))], pad=0)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert labels.tolist() == [[IGNORED, IGNORED, 7], [IGNORED, 9, IGNORED]]


def test_an_exported_folder_is_examined(tmp_path, capsys):
    """A checkpoint becomes a folder that loads, and its figures are those of every arm."""
    train(MICRO, tmp_path / "run", threads=1, say=print)
    export(tmp_path / "run", tmp_path / "model")
    assert load_folder(tmp_path / "model").config.head_dim == 8
    command = ["eval", "--folder", str(tmp_path / "model"), "--count", "8", "--json", str(tmp_path / "figures.json")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in said.splitlines()[-10:-8]] == ["| instant", "| full"]
    assert (tmp_path / "figures.json").is_file()


def test_caps_cut_what_was_thought(tmp_path):
    """No arm thinks beyond its cap, and one that cuts nothing answers as the whole chain does."""
    train(MICRO, tmp_path / "run", threads=1, say=print)
    export(tmp_path / "run", tmp_path / "model")
    asked = list(questions("tune", 8, seed=0))
    found = Examiner(load_folder(tmp_path / "model")).examine(asked, caps=(3, 10_000))
    arms = {arm: [each for each in found if each.arm == arm] for arm in ("full", "cap 3", "cap 10000")}
    assert all(each.thinking_tokens <= 3 for each in arms["cap 3"])
    assert [dataclasses.replace(each, arm="full") for each in arms["cap 10000"]] == arms["full"]


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"), [(0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (81, 263, 0.255, 0.366)]
)
def test_wilson_gives_the_published_intervals(right, asked, low, high):
    """The interval of a share is Wilson's."""
    assert wilson(right, asked) == pytest.approx((low, high), abs=5e-4)


def test_an_interval_of_nothing_is_everything():
    """Without a question nothing is known."""
    assert wilson(0, 0) == (0.0, 1.0)


def test_figures_are_by_arm_and_level():
    """Accuracy and tokens are averaged over an arm, and over each of its levels."""
    outcomes = [Outcome("full", 1, True, 10, 3), Outcome("full", 2, False, 30, 3, capped=True)]
    found = summary(outcomes)["full"]
    assert (found["accuracy"], found["thinking_tokens"], found["capped"]) == (0.5, 20, 0.5)
    assert found["by_level"]["2"]["accuracy"] == 0
    assert math.isclose(found["interval"][0], wilson(1, 2)[0])
    assert "| full | 50.0 | 9.5-90.5 | 20.0 | 50 % | 100 | 0 |" in table(summary(outcomes))
