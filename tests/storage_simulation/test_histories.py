from __future__ import annotations

import pytest

from tests.storage_simulation.mutations import PLANTED
from tests.storage_simulation.run import Failure, run_many, shrink


def test_no_history_loses_doubles_or_damages_an_event() -> None:
    """The first of those that `benchmarks.reliability.storage_simulation` goes through."""
    outcome = run_many(range(10), steps=500)
    assert outcome.failure is None
    assert outcome.seen["events confirmed"] > 50


def test_a_planted_fault_is_found_and_its_history_shortened() -> None:
    with PLANTED["filtered_in_memory"]():
        failure = run_many(range(20), steps=150).failure
        assert failure is not None
        shortest = shrink(failure)
    assert isinstance(shortest, Failure)
    assert shortest.steps <= failure.steps


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_fault_is_found(name: str) -> None:
    with PLANTED[name]():
        assert run_many(range(500), steps=500).failure is not None
