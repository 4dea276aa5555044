"""The producers of a queue, and when its stream has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peaknet_predict.keys import KeySet
from peaknet_predict.process.text import printable
from peaknet_predict.queues.foreign_streams import FOREIGN, ForeignStreams
from peaknet_predict.queues.groups import ConsumerGroups
from peaknet_predict.queues.journal import Journal


class StreamBook:
    """The producers of a queue, and the end of its stream as a state.

    Producers open the stream and close it. It has ended when all announced producers have opened
    and closed it. Programs that know only ``put`` open it with their first item and close it with
    an end item: see `ForeignStreams`.

    Parameters
    ----------
    uid
        Identifies the queue among all others, past and future.
    is_empty
        Says whether every record in the queue has been settled.
    journal
        Where changes are written down.

    Attributes
    ----------
    foreign
        The streams of programs that know only ``put``.
    groups
        The consumer groups that read.
    failures
        Producers that ended their part of the stream early, and why.
    """

    def __init__(
        self,
        uid: str,
        is_empty: Callable[[], bool] = lambda: True,
        journal: Journal | None = None,
    ) -> None:
        self.uid = uid
        self.foreign = ForeignStreams(uid)
        self.groups = ConsumerGroups()
        self.failures: dict[str, str] = {}
        self._is_empty = is_empty
        self._journal = journal
        self._heard: dict[str, float] = {}  # open producers, and when each was last heard from
        self._closed: set[str] = set()
        self._silenced: set[str] = set()
        self._expected = 0
        self._end_markers = 0
        self._foreign_due: float | None = None  # by when a foreign producer must be heard from

    @property
    def ended(self) -> bool:
        """Whether every announced producer has closed the stream."""
        if self._heard or self.foreign.is_open or len(self._closed) < self._expected:
            return False
        return bool(self._closed) or self.foreign.is_closed

    @property
    def drained(self) -> bool:
        """Whether the stream has ended and everything in it has been settled."""
        return self.ended and self._is_empty()

    @property
    def open_producers(self) -> list[str]:
        """Producers that have opened the stream and not closed it."""
        return sorted(self._heard) + ([FOREIGN] if self.foreign.is_open else [])

    def open(self, producer: str, of: int, now: float) -> None:
        """Announce a producer; one that comes back to its stream goes on where it was.

        It has not ended early then, whatever it or its silence has said before. Until a reader has
        been told the end of a stream, such a producer opens that stream again and no new one.
        """
        if not producer.isprintable():
            raise ValueError(f"a producer's name must be printable text, not {producer!r}")
        if producer not in self._heard:
            if producer not in self._closed or self.groups.end_seen:
                self._begin_if_ended()
            self._closed.discard(producer)
            self._silenced.discard(producer)
            self.failures.pop(producer, None)
        self._heard[producer] = now
        self._expected = max(self._expected, of)
        self._save()

    def check_open(self, producer: str, now: float) -> None:
        """Raise ValueError if a producer may not put; one that only paused is open again."""
        if producer in self._silenced:
            self.open(producer, 1, now)
        if producer not in self._heard:
            raise ValueError(
                f"producer {producer!r} has not opened this queue, or its part is closed"
            )

    def hear(self, producer: str, now: float) -> None:
        """Note that a producer is alive."""
        if producer in self._heard:
            self._heard[producer] = now

    def close(self, producer: str, failure: str | None, end_markers: int) -> None:
        """End a producer's part, if it is open.

        ``end_markers`` is how many readers that know only ``get`` are handed an end item.
        """
        if self._heard.pop(producer, None) is None:
            return
        self._closed.add(producer)
        self._end_markers = end_markers
        if failure is not None:
            self.failures[producer] = printable(failure)
        self._save()

    def close_group(self, prefix: str, failure: str | None, end_markers: int) -> None:
        """End the part of each producer whose name has a prefix; forget those producers' failures.

        A producer that has seen the end of the previous stage calls it: the others have done what
        one of them left undone. ``failure`` says what is wrong with the stream as a whole.
        """
        for name in [name for name in self._heard if name.startswith(prefix)]:
            self.close(name, None, end_markers)
        # A failure of the whole stream, reported by another member, stays.
        members = (name for name in self.failures if name.startswith(prefix) and name != prefix)
        for name in list(members):
            self._silenced.discard(name)
            del self.failures[name]
        # A producer that died before it opened is not waited for either.
        self._expected = min(self._expected, len(self._closed) + len(self._heard))
        if failure is not None:
            self.failures[printable(prefix)] = printable(failure)
        self._save()

    def close_silent(self, now: float, timeout_s: float) -> None:
        """Close the parts of producers that have been silent for too long."""
        for name in [name for name, heard in self._heard.items() if now - heard > timeout_s]:
            reason = f"silent for {timeout_s:g} s: killed or cut off"
            self._silenced.add(name)
            self.close(name, reason, self._end_markers or 1)
        if self._foreign_due is not None and now > self._foreign_due:
            self._foreign_due = None
            self.foreign.give_up()
            self.failures[FOREIGN] = (
                f"nothing came from it in the {timeout_s:g} s since this queue was restarted, and "
                "psana-ray's producers end, without an error, when their queue dies. The last "
                f"events it put: {self.foreign.last_events()}. Start it again for the rest"
            )
            self._save()

    def open_foreign(self) -> None:
        """Note that a program that knows only ``put`` offers an item, so it is alive."""
        self._foreign_due = None
        self._begin_if_ended()
        if self.foreign.open():
            self._save()

    def accept_foreign(self, identity: tuple[int, int] | None, keys: KeySet) -> None:
        """Note that an item of such a program has been accepted.

        ``keys`` forgets the streams that ended with it; otherwise it would grow with every start of
        such a program.
        """
        if self.foreign.follows(identity):
            self.failures.pop(FOREIGN, None)  # the program had only paused
        for stream, rank in self.foreign.accept(identity):
            keys.forget(stream, rank)

    def close_foreign(self) -> None:
        """End the stream of programs that know only ``put``."""
        self._foreign_due = None
        incomplete = self.foreign.why_incomplete()
        if incomplete is not None:
            self.failures[FOREIGN] = incomplete
        self.foreign.close()
        self._save()

    def join(self, group: str, resumes: bool) -> str:
        """Note a consumer group; return a name of the stream it reads, which no other stream has.

        A group that resumes does not wait for another stream.
        """
        if self.groups.join(group, self.drained, resumes):
            self._save()
        return f"{self.uid}.{self.groups.generation_of(group)}"

    def end_for(self, group: str) -> bool:
        """Tell a group the end of the stream if it has come; True if it has."""
        if self.groups.is_at_end(group):
            return True
        if not self.drained or not self.groups.tell_end(group):
            return False
        # Left over, they would end the readers of the next run.
        self._end_markers = 0
        self._save()
        return True

    def take_end_marker(self) -> bool:
        """Take one of the end items for readers that know only ``get``; False if none is left."""
        if not self.drained or self._end_markers < 1:
            return False
        self._end_markers -= 1
        self.groups.end_seen = True
        self._save()
        return True

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, for a spool."""
        return {
            "uid": self.uid,
            "foreign": self.foreign.to_json(),
            "groups": self.groups.to_json(),
            "failures": self.failures,
            "open": sorted(self._heard),
            "closed": sorted(self._closed),
            "silenced": sorted(self._silenced),
            "expected": self._expected,
            "end_markers": self._end_markers,
        }

    def restore(self, saved: dict[str, Any], keys: KeySet, now: float, timeout_s: float) -> None:
        """Take over what `to_json` returned; producers have ``timeout_s`` to be heard from.

        ``keys`` are all keys ever accepted, including those accepted after that was written.
        """
        self.uid = saved["uid"]
        self.foreign.restore(self.uid, saved["foreign"], keys)
        self.groups.restore(saved["groups"])
        self.failures = dict(saved["failures"])
        self._heard = dict.fromkeys(saved["open"], now)
        self._closed = set(saved["closed"])
        self._silenced = set(saved["silenced"])
        self._expected = saved["expected"]
        self._end_markers = saved["end_markers"]
        # Nothing reports that such a program is alive, and most end with the queue's process.
        self._foreign_due = now + timeout_s if self.foreign.is_open else None

    def _begin_if_ended(self) -> None:
        """Begin a new stream if the last one has ended."""
        if not self.ended:
            return
        if self._is_empty():
            self.groups.begin_generation()
            self.failures.clear()
        self._closed.clear()
        self._expected = 0
        self._end_markers = 0
        self.foreign.forget_end()

    def _save(self) -> None:
        if self._journal is not None:
            self._journal.books(self.to_json())
