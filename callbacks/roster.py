"""Where the ranks of a run sign off, so that the last one to leave knows what became of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from peaknet_predict.queues import Queue, QueueAddress, QueueError, connect_queue
from peaknet_predict.queues.statistics import QueueStatistics

log = logging.getLogger(__name__)

_LOOK_S = 0.2  # between two looks at the other ranks
_NOTICE_S = 2.0  # between two lines that say who is waited for
_LAST_RANK_S = 600.0  # how long rank 0 waits for silent ranks after its own last result


class Roster:
    """A queue without events, whose producers are the ranks.

    Rank 0 leaves last, when all others have pushed their last result, whatever kind of queue the
    output is and whoever else writes to it. The roster is rank 0's and goes with it.

    Parameters
    ----------
    name
        Names the roster in the cluster; another for every run.
    ranks
        The names of all ranks, in their order.
    rank
        This rank's number. Rank 0 makes the roster; the others may come when it has.
    silence_s
        A rank that is silent for as long has lost what it held.

    Attributes
    ----------
    rank_zero_is_gone
        Whether rank 0 was found dead or silent at this rank's end.
    """

    def __init__(self, name: str, ranks: Sequence[str], rank: int, silence_s: float) -> None:
        address = QueueAddress(name, producer_timeout_s=silence_s)
        self.rank_zero_is_gone = False
        self._queue: Queue = connect_queue(address, "results", outlives_us=False)
        self._ranks = list(ranks)
        self._rank = rank
        self._silence_s = silence_s
        if rank == 0:
            # All of them by rank 0: a rank that dies before it gets here is missed, too.
            for one in ranks:
                self._queue.producer.open(one, of=len(ranks), here=False)

    def sign_on(self) -> None:
        """Say from now on that this rank is alive."""
        self._queue.producer.open(self._ranks[self._rank], of=len(self._ranks))

    def sign_off(
        self, failure: str | None, wait: bool, may_wait_for_room: Callable[[], bool]
    ) -> str | None:
        """Leave; rank 0, if it is to ``wait``, as the last.

        Parameters
        ----------
        failure
            What went wrong with this rank.
        wait
            Whether rank 0 waits for the others.
        may_wait_for_room
            Says whether others may be waiting for room in the output queue, which takes its time.

        Returns
        -------
        str or None
            What is wrong with other ranks, as far as this one knows.
        """
        try:
            self._queue.producer.close(self._ranks[self._rank], failure)
            if self._rank == 0 and wait:
                return self._wait_for_others(may_wait_for_room)
        except QueueError:
            self.rank_zero_is_gone = True
            return "rank 0, which is to leave last, is gone"
        return None

    def rank_zero_is_lost(self) -> bool:
        """Whether rank 0 has died or fallen silent while this rank, another, is at work."""
        try:
            return "silent" in self._statistics().failures.get(self._ranks[0], "")
        except QueueError:
            return True

    def look_at_rank_zero(self) -> str | None:
        """Say whether rank 0 is gone: what it was to do at the end is then another's."""
        deadline = time.monotonic() + 2 * self._silence_s
        try:
            while time.monotonic() < deadline:
                statistics = self._statistics()
                failure = statistics.failures.get(self._ranks[0])
                if failure is not None:
                    self.rank_zero_is_gone = "silent" in failure
                    return f"rank 0: {failure}"
                if self._ranks[0] not in statistics.open_producers:
                    return None
                time.sleep(_LOOK_S)
        except QueueError:
            pass  # the roster goes with rank 0, also when all is well
        return None

    def _statistics(self) -> QueueStatistics:
        statistics = self._queue.admin.statistics()
        assert statistics is not None, "the roster is a queue of ours"
        return statistics

    def _wait_for_others(self, may_wait_for_room: Callable[[], bool]) -> str | None:
        """Wait until every rank has signed off or fallen silent; return what went wrong."""
        deadline = time.monotonic() + _LAST_RANK_S
        notice_at = time.monotonic()
        while not (now := self._statistics()).ended:
            missing = now.open_producers
            if may_wait_for_room():
                # They may be waiting for room, which is the consumer's to make.
                deadline = time.monotonic() + _LAST_RANK_S
            if time.monotonic() > deadline:
                log.error("gave up waiting for %s", ", ".join(missing))
                return f"{', '.join(missing)} did not end"
            if time.monotonic() > notice_at:
                notice_at = time.monotonic() + _NOTICE_S
                log.info("waiting for %s to push its last results", ", ".join(missing))
            time.sleep(_LOOK_S)
        failures = now.failures
        failures.pop(self._ranks[self._rank], None)
        return "; ".join(f"{who}: {what}" for who, what in failures.items()) or None
