"""The cap holds everywhere: every way of holding it, against every kind of request, streamed and not."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.matrix import CAPS, COLUMNS, FEATURES, INSTANT_COLUMNS, Cell, Json
from tests.gateway.matrix_benches import Bench, bench
from tests.gateway.matrix_checks import check, read, told

each_feature = pytest.mark.parametrize("feature", FEATURES)
each_n = pytest.mark.parametrize("n", [1, 3], ids=["n1", "n3"])


@pytest.fixture(scope="module")
async def column(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """One gateway for all cells of a column."""
    async with bench(request.param, {**COLUMNS, **INSTANT_COLUMNS}[request.param]) as running:
        yield running


@each_n
@pytest.mark.parametrize("cap", CAPS, ids=[f"cap_{cap}" for cap in CAPS])
@each_feature
@pytest.mark.parametrize("column", COLUMNS, indirect=True)
async def test_cap_holds(column: Bench, feature: str, cap: str, n: int) -> None:
    """Thinking stays within its cap, the answer is whole, the usage is what was processed, a stream says the same."""
    await _hold(column, Cell(column=column.name, feature=feature, cap=cap, n=n))


@each_n
@each_feature
@pytest.mark.parametrize("column", INSTANT_COLUMNS, indirect=True)
async def test_instant_mode_does_not_think(column: Bench, feature: str, n: int) -> None:
    """Where the template's switch is not enough, an instant request has no thinking either, and its answer is whole."""
    await _hold(column, Cell(column=column.name, feature=feature, cap="0", n=n))


async def _hold(column: Bench, cell: Cell) -> None:
    whole, streamed = [await _said(column, cell, stream=stream) for stream in (False, True)]
    # Where exactly an answer ends that may end early depends on how much arrived before the backend was cut.
    assert whole == streamed or cell.may_end_early(), "streamed or not, the answer is the same"


async def _said(column: Bench, cell: Cell, *, stream: bool) -> Json | None:
    """What the answer says, once it is checked; None: refused, as it has to be."""
    try:
        answered = await column.ask(cell, stream=stream)
        refusal = cell.refusal()
        if refusal is not None:
            assert (answered.status, answered.error["param"]) == (400, refusal)
            return None
        answer = read(answered, stream=stream)
        check(cell, column, answer, await column.processed(cell))
    except AssertionError as exc:
        exc.add_note(f"{cell}, {'streamed' if stream else 'whole'}")
        raise
    return told(answer, cell)
