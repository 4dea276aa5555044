"""Reading a spool: what a queue's earlier life left, checked against what it had confirmed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from peaknet_predict.keys import KeySet
from peaknet_predict.process.files import FileSystem
from peaknet_predict.queues.codec import decode
from peaknet_predict.queues.framing import FORMAT, Frame, Kind, format_of, read_frames
from peaknet_predict.queues.records import Entry, entry_of
from peaknet_predict.queues.synced_mark import Mark
from peaknet_predict.types import EventId


class SpoolError(RuntimeError):
    """A spool cannot be used; the message says why and what to do."""


@dataclass(slots=True)
class Replay:
    """What a spool knows of the queue's earlier lives."""

    entries: list[Entry] = field(default_factory=list)
    keys: KeySet = field(default_factory=KeySet)
    books: dict[str, Any] | None = None
    accepted: int = 0
    quarantined: int = 0


@dataclass(slots=True)
class Unsettled:
    """A record that has not been settled, and where in the spool it stands.

    Attributes
    ----------
    entry
        The record.
    order
        Its place among all records that the queue ever accepted.
    number, end, size
        Its segment, where it ends there, and how many bytes it takes.
    """

    entry: Entry
    order: int
    number: int = 0
    end: int = 0
    size: int = 0

    @property
    def is_noted(self) -> bool:
        """Whether there is more to say about the record than what it is."""
        return bool(self.entry.losses) or self.entry.reason is not None


class _Head(NamedTuple):
    """A segment's beginning: which segment it follows, and where that one ends."""

    previous: int
    length: int  # how much of the previous segment counts
    end: int  # of the beginning


class SpoolReader:
    """Reads the segments of a spool.

    Each segment says which one it follows, and up to which byte that one counts: anything behind
    was never confirmed, or is repeated in the later segment. The last segment counts as far as it
    is intact; up to the mark it must be.

    Parameters
    ----------
    directory
        Where the segments are.
    mark
        How far they have been synced; None if that is unknown, as in a copy of the segments.
    fs
        Where the directory is.

    Attributes
    ----------
    replay
        What was found.
    unsettled
        The records in it, in the order in which they were accepted.
    order
        How many records the queue had accepted.
    sizes
        Bytes of the segments that count.
    moved_to
        Of segments that records were moved out of: the segment and the byte where the last of them
        ends.
    last, end, synced
        The last of these segments (0 if there is none), where it ends, and up to where it is known
        to be on disk.
    others
        Segments that do not count: their records are all settled, or their beginning was never
        finished.

    Raises
    ------
    SpoolError
        If something is missing or damaged that had been synced.
    """

    def __init__(self, directory: Path, mark: Mark | None, fs: FileSystem) -> None:
        self.replay = Replay()
        self.unsettled: dict[EventId, Unsettled] = {}
        self.order = 0
        self.sizes: dict[int, int] = {}
        self.moved_to: dict[int, tuple[int, int]] = {}
        self.last = self.end = self.synced = 0
        self._directory = directory
        self._mark = mark
        self._fs = fs
        self._lacking: set[EventId] = set()
        numbers = segments(directory, fs)
        chain = self._chain(numbers)
        self.others = [number for number in numbers if number not in chain]
        for number, after in zip_longest(chain, chain[1:]):
            self._read(number, None if after is None else self._heads[after].length)
        if mark is None and self._lacking:
            raise self._error(
                f"{len(self._lacking)} unsettled records are in no segment: one before number "
                f"{chain[0]} is missing"
            )
        self.unsettled = dict(sorted(self.unsettled.items(), key=lambda item: item[1].order))
        self.replay.entries = [one.entry for one in self.unsettled.values()]

    def _chain(self, numbers: list[int]) -> list[int]:
        """Return the segments that count, from the oldest on."""
        self._heads: dict[int, _Head] = {}
        if self._mark is not None:
            # No later segment has confirmed records: the mark is synced first.
            oldest, number = self._mark.oldest, self._mark.number
        else:
            begun = [number for number in numbers if self._head(number) is not None]
            oldest, number = min(numbers, default=1), max(begun, default=0)
        chain = []
        while number >= oldest:
            if number not in numbers:
                raise self._error(f"segment {path_of(self._directory, number)} is missing")
            head = self._head(number)
            if head is None:
                raise self._damage(number, 0)
            self._heads[number] = head
            chain.append(number)
            number = head.previous
        return chain[::-1]

    def _head(self, number: int) -> _Head | None:
        """Return a segment's beginning; None if that is incomplete or damaged."""
        path = path_of(self._directory, number)
        version = format_of(path, self._fs)
        if version is not None and version != FORMAT:
            raise SpoolError(
                f"the spool {self._directory} was written by another version of this program "
                f"(format {version}, ours is {FORMAT}): read it to its end with that one, or move "
                "it away"
            )
        previous = None
        for frame in read_frames(path, self._fs):
            if frame.kind is Kind.BEGIN:
                previous = json.loads(frame.skeleton)["previous"]
            elif frame.kind is Kind.BEGUN and previous is not None:
                return _Head(previous[0], previous[1], frame.end)
            elif previous is None:
                break
        return None

    def _read(self, number: int, until: int | None) -> None:
        """Replay a segment, up to a byte that an intact segment reaches."""
        path = path_of(self._directory, number)
        self.last, self.end, self.synced = number, 0, self._heads[number].end
        if until is None and self._mark is not None:
            self.synced = self._mark.size
        self.sizes[number] = self._fs.stat(str(path)).st_size
        for frame in read_frames(path, self._fs, until):
            self._take(frame, number)
            self.end = frame.end
        if self.end < (self.synced if until is None else until):
            raise self._damage(number, self.end)

    def _take(self, frame: Frame, number: int) -> None:
        replay = self.replay
        if frame.kind is Kind.PUT:
            note, _, skeleton = frame.skeleton.partition(b"\n")
            entry = entry_of(decode(skeleton, frame.data))
            order, entry.losses, entry.lost_by, entry.reason = json.loads(note)
            size = len(frame.skeleton) + len(frame.data)
            earlier = self.unsettled.get(entry.id)
            if earlier is not None and earlier.number != number:
                self.moved_to[earlier.number] = (number, frame.end)
            self.unsettled[entry.id] = Unsettled(entry, order, number, frame.end, size)
            self._lacking.discard(entry.id)
            replay.keys.add(entry.id)
            # One that was accepted before is here again, moved from an earlier segment.
            replay.accepted += order >= self.order
            self.order = max(self.order, order + 1)
            return
        content: Any = json.loads(frame.skeleton) if frame.skeleton else None
        if frame.kind is Kind.SETTLED:
            *key, quarantined = content
            settled = EventId(*key)
            # The segment with the record itself may be gone: all in it has been settled since.
            if self.unsettled.pop(settled, None) is not None or settled in self._lacking:
                replay.quarantined += quarantined
            self._lacking.discard(settled)
        elif frame.kind is Kind.NOTE:
            self._take_note(content)
        elif frame.kind is Kind.BOOKS:
            replay.books = content
        elif frame.kind is Kind.BEGIN:
            self._take_snapshot(content)

    def _take_note(self, note: list[Any]) -> None:
        stream, rank, idx, losses, lost_by, reason = note
        known = self.unsettled.get(EventId(stream, rank, idx))
        if known is not None:
            known.entry.losses, known.entry.lost_by, known.entry.reason = losses, lost_by, reason

    def _take_snapshot(self, snapshot: dict[str, Any]) -> None:
        replay = self.replay
        replay.keys = KeySet.from_json(snapshot["keys"])
        replay.books = snapshot["books"]
        replay.accepted, replay.quarantined = snapshot["accepted"], snapshot["quarantined"]
        self.order = snapshot["order"]
        # Records may have been settled without room to write that down.
        unsettled = set(KeySet.from_json(snapshot["unsettled"]))
        self.unsettled = {key: one for key, one in self.unsettled.items() if key in unsettled}
        self._lacking = unsettled - set(self.unsettled)
        for note in snapshot["notes"]:
            self._take_note(note)

    def _damage(self, number: int, position: int) -> SpoolError:
        return self._error(
            f"{path_of(self._directory, number)} is damaged at byte {position}, which had been "
            "synced to disk: confirmed events are in what follows"
        )

    def _error(self, what: str) -> SpoolError:
        return SpoolError(
            f"{what}. Restore it from a copy; or move {self._directory} away, begin with an empty "
            "spool, and feed again what is in no file yet"
        )


def segments(directory: Path, fs: FileSystem) -> list[int]:
    """Return the numbers of the segments in a directory, in order."""
    names = fs.listdir(str(directory))
    stems = [name.removesuffix(".spool") for name in names if name.endswith(".spool")]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def path_of(directory: Path, number: int) -> Path:
    """Return the path of a segment."""
    return directory / f"{number:08d}.spool"
