"""Plans of tree attention: every row's tokens once, and what is saved, counted and not timed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.plan import Span, cost, make_plan

SIZE = 4
LLAMA_8B = {"query_heads": 32, "kv_heads": 8, "head_dim": 128, "value_bytes": 2}


@st.composite
def batches(draw):
    """Block tables of a random forest, and lengths; blocks of one prefix have equal numbers, others do not."""
    numbers: dict[tuple[int, ...], int] = {}
    tables, lengths = [], []
    for path in draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), max_size=8)):
        tables.append([numbers.setdefault(tuple(path[: end + 1]), len(numbers)) for end in range(len(path))])
        lengths.append(draw(st.integers(1, len(path) * SIZE)))
    return tables, lengths


def in_order(plan, row):
    """The slots that a row attends, in the order of its tokens if the plan is right."""
    spans = [span for span in (*plan.shared, *plan.alone) if row in span.rows]
    return [
        block * plan.block_tokens + at % plan.block_tokens
        for span in spans
        for at in range(span.tokens)
        for block in [span.blocks[at // plan.block_tokens]]
    ]


@settings(deadline=None)
@given(batch=batches(), share_from=st.integers(1, 30))
def test_every_row_gets_each_of_its_tokens_once(batch, share_from):
    """Whatever is shared, a row's spans together are its own slots, each once."""
    tables, lengths = batch
    plan = make_plan(tables, lengths, block_tokens=SIZE, share_from=share_from)
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        assert sorted(in_order(plan, row)) == sorted(table[at // SIZE] * SIZE + at % SIZE for at in range(length))
    assert all(len(span.rows) > 1 and span.tokens >= share_from for span in plan.shared)
    assert all(len(span.rows) == 1 for span in plan.alone)


@settings(deadline=None)
@given(batch=batches())
def test_every_full_block_is_read_once(batch):
    """Without a threshold, what is read are the distinct full blocks and each row's unfinished one."""
    tables, lengths = batch
    plan = make_plan(tables, lengths, block_tokens=SIZE)
    full = {block for table, length in zip(tables, lengths, strict=True) for block in table[: length // SIZE]}
    assert plan.tokens_read == len(full) * SIZE + sum(length % SIZE for length in lengths)


def test_a_tree_is_planned_level_by_level():
    """The prompt is a span of all rows, a step one of its branches, and the rest is each row's own."""
    plan = make_plan([[7, 3, 1], [7, 3, 2], [7, 9]], [9, 12, 8], block_tokens=SIZE)
    assert set(plan.shared) == {Span((0, 1, 2), (7,), 4), Span((0, 1), (3,), 4)}
    assert set(plan.alone) == {Span((0,), (1,), 1), Span((1,), (2,), 4), Span((2,), (9,), 4)}


def test_what_is_not_worth_a_span_is_shared_further_down():
    """A short common beginning goes to the smaller groups, which share it with what else they share."""
    tables = [[7, 3, 4, 1], [7, 3, 4, 2], [7, 9]]
    plan = make_plan(tables, [13, 13, 8], block_tokens=SIZE, share_from=8)
    assert plan.shared == (Span((0, 1), (7, 3, 4), 12),)
    assert make_plan(tables, [13, 13, 8], block_tokens=SIZE, share_from=99).shared == ()


def test_a_batch_of_nothing_has_a_plan():
    """No rows, no spans, no bytes."""
    plan = make_plan([], [], block_tokens=SIZE)
    assert (plan.shared, plan.alone, cost(plan, **LLAMA_8B).kv_bytes) == ((), (), 0)


def test_a_shared_prompt_is_read_once():
    """64 branches of 64 tokens over a prompt of 8,192 read it once: 42 times fewer bytes, the same operations."""
    prompt = list(range(512))
    tables = [[*prompt, *range(1000 + 4 * row, 1004 + 4 * row)] for row in range(64)]
    lengths = [8192 + 64] * 64
    shared = cost(make_plan(tables, lengths, block_tokens=16), **LLAMA_8B)
    apart = cost(make_plan(tables, lengths, block_tokens=16, share_from=9999), **LLAMA_8B)
    assert shared.kv_bytes == 2 * 8 * 128 * 2 * (8192 + 64 * 64)
    assert 42 < apart.kv_bytes / shared.kv_bytes < 44
    assert apart.flops == shared.flops == 4 * 32 * 128 * 64 * 8256
    assert shared.partial_bytes == 2 * apart.partial_bytes
    assert shared.partial_bytes < 0.1 * shared.kv_bytes
