"""What the ledger's benchmark puts on a ledger, and how it tells."""

import asyncio

import pytest

from bench import ledger
from bench.ledger_worker import Load, Worker, opened


def test_every_scope_has_one_limit_out_of_reach():
    """A request falls under as many limits as it has scopes, whatever key it comes from."""
    limits = Load(scopes=5, keys=3, seconds=0, tasks=1).limits()
    assert [limit.scope for limit in limits] == ["tag:1", "tag:2", "tag:3", "tag:4", "key:0", "key:1", "key:2"]
    assert {limit.unit for limit in limits} == {"tokens", "usd", "thinking_tokens", "requests"}
    assert all(limit.amount == 10**15 for limit in limits)


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_load_ends_settled(kind, tmp_path):
    """Requests are held and settled one after the other, with every key once before; nothing is left behind."""

    async def story():
        store = opened(kind, str(tmp_path / "a.db"))
        found = await Worker(store).carry_out(Load(scopes=3, keys=7, seconds=0, tasks=2, fill=True))
        health, held = await store.health(), store.held()
        await store.close()
        return found, health.holds, held.tokens

    found, holds, held = asyncio.run(story())
    assert (found["waited_ns"], holds, held) == ([], 0, 0)
    assert found["elapsed_s"] > 0


def test_a_store_that_is_not_installed_is_skipped_and_told(capsys, monkeypatch):
    """A ledger without its module has no figures; the others are measured, and the table shows those."""
    figures = {"p50_us": 1.0, "p99_us": 2.0, "ops_per_s": 3.0, "cpu_us_per_op": 4.0, "saturated_p99_us": 5.0}
    grown = {"p50_us_by_scopes": {1: 1.0}, "p50_us_by_keys": {10: 1.0}, "ratio_most_to_fewest_keys": 1.0}

    def measured(kind, seconds):
        if kind == "valkey":
            raise ImportError("no such module")
        return {**figures, "processes": 1}

    monkeypatch.setattr(ledger, "measured", measured)
    monkeypatch.setattr(ledger, "growth", lambda kind, seconds, steps: grown)
    monkeypatch.setattr("sys.argv", ["ledger", "--quick", "--json"])
    assert ledger.main() == 0
    said = capsys.readouterr()
    assert "valkey: skipped, no such module" in said.err
    assert '"valkey": null' in said.out
    assert '"growth_is_flat": true' in said.out
