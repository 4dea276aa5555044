from __future__ import annotations

from tests.storage_simulation.run import run_many


def test_no_history_loses_doubles_or_damages_an_event() -> None:
    """The first of those that `benchmarks.reliability.storage_simulation` goes through."""
    outcome = run_many(range(10), steps=500)
    assert outcome.failure is None
    assert outcome.confirmed > 100
