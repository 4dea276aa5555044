"""What a queue counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class QueueStatistics:
    """Counts since the queue was first made, and what it holds now (sizes in events and bytes).

    ``accepted == acknowledged + quarantined + quarantining + ready + leased`` at any time.

    Attributes
    ----------
    accepted, acknowledged, quarantined
        Records that came in, that the next stage has, and that are in the quarantine on disk.
    quarantining
        Rejected records that wait for the quarantine's disk.
    duplicates
        Puts of a record that had been accepted before.
    redeliveries
        Records that were given back, or whose reader was lost.
    ready, ready_bytes, leased, leased_bytes
        Records that wait for a reader, and that readers hold.
    largest
        Most records that were ever ready at once.
    open_producers
        Producers that may still put.
    failures
        Producers that ended their part of the stream early, and why.
    quarantine
        The latest quarantined records, each with its reason.
    ended
        Whether every producer has closed the stream.
    problem
        Why something cannot be written at the moment.
    """

    accepted: int = 0
    acknowledged: int = 0
    quarantined: int = 0
    quarantining: int = 0
    duplicates: int = 0
    redeliveries: int = 0
    ready: int = 0
    ready_bytes: int = 0
    leased: int = 0
    leased_bytes: int = 0
    largest: int = 0
    open_producers: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    quarantine: list[str] = field(default_factory=list)
    ended: bool = False
    problem: str | None = None
