"""The consumer groups of a queue, and which stream each of them reads."""

from __future__ import annotations

from typing import Any

_AT_ITS_END = -1


class ConsumerGroups:
    """Which stream of a queue each consumer group reads: streams are counted as *generations*.

    A stream opened after the end of another is a new generation. A group that joins a queue which
    another group has already read to its end waits for the next generation instead of ending at
    once, so that a detached queue can serve one run after another.

    Attributes
    ----------
    generation
        Number of the present stream.
    end_seen
        Whether anybody has been told its end.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.end_seen = False
        self._groups: dict[str, int] = {}

    def begin_generation(self) -> None:
        """Begin a new stream."""
        self.generation += 1
        self.end_seen = False

    def join(self, group: str, drained: bool, resumes: bool) -> bool:
        """Note a group; True if it is new. A group that resumes does not wait for another stream.

        ``drained`` says whether everything in the present stream has been settled.
        """
        if group in self._groups:
            return False
        over = drained and self.end_seen and not resumes
        self._groups[group] = self.generation + 1 if over else self.generation
        return True

    def generation_of(self, group: str) -> int:
        """Return the number of the stream that a group reads, or has read to its end."""
        number = self._groups[group]
        return self.generation if number == _AT_ITS_END else number

    def is_at_end(self, group: str) -> bool:
        """Whether a group has been told the end.

        What one rank of a run was told holds for all, even if the next run has begun meanwhile.
        """
        return self._groups[group] == _AT_ITS_END

    def tell_end(self, group: str) -> bool:
        """Tell a group the end of the present stream; False if it waits for a later one."""
        if self._groups[group] > self.generation:
            return False
        self._groups[group] = _AT_ITS_END
        self.end_seen = True
        return True

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, for a spool."""
        return {
            "generation": self.generation,
            "end_seen": self.end_seen,
            "groups": self._groups,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `to_json` returned."""
        self.generation = saved["generation"]
        self.end_seen = saved["end_seen"]
        self._groups = dict(saved["groups"])
