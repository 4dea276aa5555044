"""What a reader is handed next."""

from __future__ import annotations

from typing import NamedTuple

from peaknet_predict.queues.leases import LeaseBook
from peaknet_predict.queues.ready import ReadyLines
from peaknet_predict.queues.records import Entry, Record


class Delivery(NamedTuple):
    """The answer to a request for records: leases, or nothing yet, or the end.

    Attributes
    ----------
    tokens
        Tokens of the leases. A lease holds for as long as its holder is heard from.
    records
        What is leased, in the same order.
    lost_by
        For tokens whose records other readers held before and did not settle: those readers, as far
        as they are known. After a restart of the queue it may be `ANYONE`.
    ended
        Whether the stream has ended for this reader.
    flush
        Whether nothing more will come until the reader has settled all it holds.
    failures
        At the end: producers that ended their part of the stream early, and why.
    """

    tokens: list[int]
    records: list[Record]
    lost_by: dict[int, list[str]]
    ended: bool
    flush: bool
    failures: dict[str, str]

    @classmethod
    def of(cls, granted: list[tuple[int, Entry]], flush: bool) -> Delivery:
        """Return the answer that hands out leases."""
        return cls(
            [token for token, _ in granted],
            [entry.record for _, entry in granted],
            {token: list(entry.lost_by) for token, entry in granted if entry.lost_by},
            False,
            flush,
            {},
        )

    @classmethod
    def end(cls, failures: dict[str, str]) -> Delivery:
        """Return the answer that tells the end of the stream."""
        return cls([], [], {}, True, False, dict(failures))


def next_records(
    ready: ReadyLines, leases: LeaseBook, holder: str, max_records: int, ended: bool
) -> tuple[list[Entry], bool]:
    """Take the records that a reader is handed next.

    A record that may be a poison message goes alone to a reader that holds nothing else, and that
    reader gets nothing more until it has settled it.

    Parameters
    ----------
    ready, leases
        The records that wait, and the leases on the others.
    holder
        The reader.
    max_records
        Most records.
    ended
        Whether no producer will put any more.

    Returns
    -------
    list of Entry
        The records.
    bool
        Whether nothing more comes until the reader has settled what it holds.
    """
    holds_nothing = leases.holds_nothing(holder)
    if ready.has_isolated:
        return [ready.take_isolated()] if holds_nothing else [], True
    alone = leases.held_alone(holder)
    if alone is not None and alone.may_be_poison:
        return [], True
    if len(ready):
        taken = ready.take(max_records)
        return taken, ended and not len(ready)
    return [], ended and not holds_nothing
