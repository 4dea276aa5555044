"""Who fills a queue, who reads it, and when its stream has ended."""

from __future__ import annotations

from typing import Any

_AT_ITS_END = -1


class StreamBook:
    """Producers and readers of a queue, and the end of its stream as a state.

    Producers open the stream and close it. It has ended when as many as announced have opened and
    closed it. A stream opened after that is a new *generation*: a reader that joins a queue which
    another reader has already seen to its end waits for the next generation instead of ending at
    once, so that a detached queue can serve one run after another.

    Programs that know only ``put`` open the stream with their first item and close it with an end
    item. Their streams get names that no other stream has. Where a rank's idx does not grow, its
    producer has been started anew, and what follows gets a new stream's name.

    Parameters
    ----------
    uid
        Names the queue apart from every other queue, past and future.
    """

    def __init__(self, uid: str) -> None:
        self.uid = uid
        self.generation = 0
        self.end_markers = 0
        self.end_seen = False
        self.failures: dict[str, str] = {}
        self.foreign_items = 0
        self._heard: dict[str, float] = {}  # open producers, and when each was last heard of
        self._closed: set[str] = set()
        self._silenced: set[str] = set()
        self._expected = 0
        self._foreign_streams = 0
        self._foreign_closed = False
        self._foreign_last: dict[int, int] = {}  # the latest idx of each rank
        self._readers: dict[str, int] = {}

    @property
    def ended(self) -> bool:
        """Whether every announced producer has closed the stream."""
        all_closed = bool(self._closed) and len(self._closed) >= self._expected
        return not self._heard and (all_closed or self._foreign_closed)

    @property
    def open_producers(self) -> list[str]:
        """Producers that have opened the stream and not closed it."""
        return sorted(self._heard)

    def open(self, producer: str, of: int, now: float, drained: bool) -> None:
        """Announce a producer; one that fell silent and comes back goes on where it was."""
        if producer not in self._heard:
            self.begin_if_ended(drained)
            self._closed.discard(producer)
            if producer in self._silenced:
                self._silenced.discard(producer)
                self.failures.pop(producer, None)
        self._heard[producer] = now
        self._expected = max(self._expected, of)

    def is_open(self, producer: str) -> bool:
        """Whether a producer may put."""
        return producer in self._heard

    def fell_silent(self, producer: str) -> bool:
        """Whether a producer's part was closed because nothing was heard of it."""
        return producer in self._silenced

    def hear(self, producer: str, now: float) -> None:
        """Note that a producer is alive."""
        if producer in self._heard:
            self._heard[producer] = now

    def close(self, producer: str, failure: str | None, end_markers: int) -> bool:
        """End a producer's part; False if it was not open."""
        if self._heard.pop(producer, None) is None:
            return False
        self._closed.add(producer)
        self.end_markers = end_markers
        if failure is not None:
            self.failures[producer] = failure
        return True

    def close_silent(self, now: float, timeout_s: float) -> list[str]:
        """Close the parts of producers that have been silent for too long; return their names."""
        silent = [name for name, heard in self._heard.items() if now - heard > timeout_s]
        for name in silent:
            self.close(
                name, f"silent for {timeout_s:g} s: killed or cut off", self.end_markers or 1
            )
            self._silenced.add(name)
        return silent

    def close_group(self, prefix: str, failure: str | None, end_markers: int) -> None:
        """Close the parts of all producers of a name, and forget their own failures.

        Said by a reader of the stage before that has seen its end: whatever one of them left
        undone has been done by the others. ``failure`` says what is wrong with all of it.
        """
        for name in [name for name in self._heard if name.startswith(prefix)]:
            self.close(name, None, end_markers)
        for name in [name for name in self.failures if name.startswith(prefix)]:
            self._silenced.discard(name)
            del self.failures[name]
        # One that died before it opened is not waited for either.
        self._expected = min(self._expected, len(self._closed) + len(self._heard))
        if failure is not None:
            self.failures[prefix] = failure

    def begin_if_ended(self, drained: bool) -> None:
        """Begin a new stream if the last one has ended."""
        if not self.ended:
            return
        if drained:
            self.generation += 1
            self.end_seen = False
            self.failures.clear()
            self._silenced.clear()
        self._closed.clear()
        self._expected = 0
        self._foreign_closed = False
        self.end_markers = 0

    def end_foreign(self) -> None:
        """End the stream of programs that know only ``put``."""
        # Once per reader, by psana-ray's rule: one stream ends, however often it is said.
        if not self._foreign_closed:
            self._next_foreign_stream()
        self._foreign_closed = True

    def begin_foreign(self) -> None:
        """Note an item of such a program: its stream has not ended, whatever an earlier one did."""
        self._foreign_closed = False

    def foreign_stream(self, name: tuple[int, int] | None) -> str:
        """Return the name of the stream for an item that states ``name`` as its (rank, idx)."""
        if name is not None:
            rank, idx = name
            if idx <= self._foreign_last.get(rank, idx - 1):
                self._next_foreign_stream()
            self._foreign_last[rank] = idx
        return f"{self.uid}#{self._foreign_streams}"

    def join(self, reader: str, drained: bool, resumes: bool) -> bool:
        """Note a reader; True if it is new. One that resumes does not wait for another stream."""
        if reader in self._readers:
            return False
        over = drained and self.end_seen and not resumes
        self._readers[reader] = self.generation + 1 if over else self.generation
        return True

    def is_at_end(self, reader: str) -> bool:
        """Whether a reader has been told the end.

        The ranks of a run share a name: what one was told holds for all, even if the next run has
        begun meanwhile.
        """
        return self._readers[reader] == _AT_ITS_END

    def end_for(self, reader: str) -> bool:
        """End a drained stream for a reader; False if it waits for a later generation."""
        if not self.ended or self._readers[reader] > self.generation:
            return False
        self._readers[reader] = _AT_ITS_END
        self.end_seen = True
        # Left over, they would end whoever reads the next run.
        self.end_markers = 0
        return True

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, for a spool."""
        return {
            "uid": self.uid,
            "generation": self.generation,
            "end_markers": self.end_markers,
            "end_seen": self.end_seen,
            "failures": self.failures,
            "foreign_items": self.foreign_items,
            "open": self.open_producers,
            "closed": sorted(self._closed),
            "silenced": sorted(self._silenced),
            "expected": self._expected,
            "foreign_streams": self._foreign_streams,
            "foreign_closed": self._foreign_closed,
            "foreign_last": list(self._foreign_last.items()),
            "readers": self._readers,
        }

    def restore(self, saved: dict[str, Any], now: float) -> None:
        """Take over what `to_json` returned; producers have from now on to be heard of."""
        self.uid = saved["uid"]
        self.generation = saved["generation"]
        self.end_markers = saved["end_markers"]
        self.end_seen = saved["end_seen"]
        self.failures = dict(saved["failures"])
        self.foreign_items = saved["foreign_items"]
        self._heard = dict.fromkeys(saved["open"], now)
        self._closed = set(saved["closed"])
        self._silenced = set(saved["silenced"])
        self._expected = saved["expected"]
        self._foreign_streams = saved["foreign_streams"]
        self._foreign_closed = saved["foreign_closed"]
        self._foreign_last = {int(rank): int(idx) for rank, idx in saved["foreign_last"]}
        self._readers = dict(saved["readers"])

    def _next_foreign_stream(self) -> None:
        self._foreign_streams += 1
        self._foreign_last.clear()
