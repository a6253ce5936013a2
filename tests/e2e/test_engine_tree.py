"""The engine over real SmolLM2 in float32: a tree of 64 branches against 64 forward passes without a cache."""

from pathlib import Path

import pytest

from kernels.model import load_model
from kernels.weights import build_smollm2
from tests.kernels.test_scheduler import Desk
from tests.kernels.tiny import oracle

FOLDER = Path(__file__).parents[2] / ".cache/models/smollm2-135m-instruct"
COUNT = 6
HEAD = "The lighthouse keeper wrote a letter to each of his four sisters, and began every one of them in the same way. "
SISTERS = ("Anna, who was afraid of water", "Berta, who sold fish", "Clara, who read too much", "Dora, who knew")
PLACES = ("by the cold sea", "in a warm town", "on the long road", "under the hill")
WORDS = ("Dear", "My", "I", "Yesterday")


@pytest.fixture(scope="module")
def model():
    build_smollm2(FOLDER, say=print)
    model = load_model(str(FOLDER), say=print, device="cpu")
    model.network.module.float()
    return model


def test_a_greedy_tree_of_64_branches_is_64_forward_passes(model):
    """Every token of every branch is the one that a full forward pass over all before it finds most likely."""
    encode = model.tokens.encode
    prompts = [
        (*encode(HEAD * 3), *encode(f"To {sister}. " * 3), *encode(f"She lives {place}. " * 4), *encode(word))
        for sister in SISTERS
        for place in PLACES
        for word in WORDS
    ]
    desk = Desk(model, share_from=16)
    jobs = [desk.ask(prompt, max_tokens=COUNT) for prompt in prompts]
    desk.run()
    read = oracle(model)
    for job, prompt in zip(jobs, prompts, strict=True):
        said = desk.ids(job)
        rows = read([*prompt, *said[:-1]])[-COUNT:, : model.tokens.size]
        assert rows.argmax(-1).tolist() == said
    stats, trie = desk.scheduler.stats, desk.scheduler.trie
    assert stats.read < sum(map(len, prompts)) / 4
    assert stats.attended < stats.attended_apart / 4
    trie.evict(model.kv_blocks)
    assert trie.free == model.kv_blocks
