"""The log of a run: one line for all ranks, and how far the run is."""

from __future__ import annotations

from typing import Any

import pytest

from peaknet_predict.callbacks.ledger import Counts, _left_over
from peaknet_predict.callbacks.rate_log import _progress
from peaknet_predict.callbacks.sign_off import SignOff
from peaknet_predict.queues.roster import RosterState, Standing
from tests.helpers.memory_cluster import MemoryRoster

NOBODY: Any = None


class Rank:
    """A rank with its place in the roster, and what it has counted."""

    def __init__(self, state: RosterState, rank: int, counts: Counts) -> None:
        self.counts = counts
        self.place = MemoryRoster(state, rank, lambda: self.counts)
        self.sign_off = SignOff(NOBODY, self.place, "g", f"g:{rank}", rank, 3)

    def shown(self) -> Counts | None:
        return self.sign_off.counts_of_all(self.counts)


def test_the_lowest_rank_alive_shows_the_counts_of_all() -> None:
    now = [0.0]
    state = RosterState(3, 30.0, lambda: now[0])
    ranks = [Rank(state, k, Counts(10**k, k, 5, 1)) for k in range(3)]
    assert ranks[0].shown() == ranks[0].counts, "nothing is heard of the others yet"
    assert ranks[1].shown() is None
    for rank in [*ranks, *ranks]:
        rank.place.report()
    assert ranks[0].shown() == Counts(111, 3, 15, 3)
    assert [rank.shown() for rank in ranks[1:]] == [None, None]
    # Its own counts are those of this moment.
    ranks[0].counts = Counts(5, 0, 0, 0)
    assert ranks[0].shown() == Counts(115, 3, 10, 2)
    # Rank 0 is silent; the next one takes over, with what rank 0 said last.
    now[0] = 31.0
    for rank in [*ranks[1:], *ranks[1:]]:
        rank.place.report()
    assert ranks[1].shown() == Counts(111, 3, 15, 3)
    assert ranks[2].shown() is None
    ranks[1].place.report(standing=Standing.GONE)
    ranks[2].place.report()
    assert ranks[2].shown() == Counts(111, 3, 15, 3)


@pytest.mark.parametrize(
    ("length", "counts", "rate_hz", "line"),
    [
        (None, Counts(312, 9, 99, 0), 12.0, "312 events"),
        (4000, Counts(990, 9, 99, 10), 12.5, "1000 of 4000 events (25 %, 4 min left)"),
        (4000, Counts(0, 0, 0, 0), 0.0, "0 of 4000 events (0 %)"),
        (40, Counts(40, 9, 99, 0), 12.0, "40 of 40 events (100 %)"),
        # Events of a rank that died have been predicted twice.
        (40, Counts(44, 9, 99, 0), 12.0, "40 of 40 events (100 %)"),
        (10**6, Counts(10, 9, 99, 0), 10.0, "10 of 1000000 events (0 %, 27 h 47 min left)"),
    ],
)
def test_progress(length: int | None, counts: Counts, rate_hz: float, line: str) -> None:
    assert _progress(length, counts, rate_hz) == line


def test_what_is_left_over_is_a_sentence() -> None:
    assert _left_over({"input": {"ready": 0, "leased": 0}, "output": {}}) == "nothing left over"
    assert _left_over({"input": {"ready": 3}, "output": {"leased": 11}}) == (
        "3 events wait in the input queue; readers of the output queue are at work on 11 results"
    )
