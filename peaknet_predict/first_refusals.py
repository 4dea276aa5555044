"""Refusals at the start of a run: its events may be at fault, or its configuration."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

from peaknet_predict.types import Refusal

ALIKE = 32
"""This many bad events in a row, all for the same reason, are no accident."""

_NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?")


class BlamelessError(ValueError):
    """The run cannot go on, and its events are not to blame: they go back into the queue."""


class UnfitStreamError(BlamelessError):
    """No event of the stream can be processed with this configuration; the events are not at fault.

    Attributes
    ----------
    refusals
        Refusals that were held back: their events go back into the queue, not into quarantine.
    """

    def __init__(self, message: str, refusals: Sequence[Refusal]) -> None:
        super().__init__(message)
        self.refusals = list(refusals)


class FirstRefusals:
    """Holds back refusals until the first event of a run can be processed.

    A crop of the wrong size refuses every event of a detector. A whole beamtime would end in
    quarantine, event by event; so the run ends with the first of them, and they go back. Once an
    event has been processed, each refusal concerns only its own event.

    Attributes
    ----------
    holds
        Whether refusals are held back, because it is not clear yet what is at fault.
    """

    def __init__(self) -> None:
        self.holds = True
        self._processed = False
        self._unfit: list[Refusal] = []
        self._bad: deque[Refusal] = deque(maxlen=ALIKE)

    def settle(self) -> None:
        """Note that an event can be processed: events refused so far are at fault themselves."""
        self._processed, self.holds = True, False

    def hold(self, refusals: Sequence[Refusal], unfit: bool = False) -> None:
        """Hold refusals back; ``unfit`` says that the configuration cannot take their shape.

        Raises
        ------
        UnfitStreamError
            If it is clear by now that all events fail the same way.
        """
        if self._processed or not refusals:
            return
        if unfit:
            self._unfit += refusals
            self.holds = True
        else:
            self._bad.extend(refusals)
        if len(self._unfit) + len(self._bad) >= ALIKE:
            self.decide()

    def decide(self) -> None:
        """Decide now: nothing more may come until these events have been settled.

        Raises
        ------
        UnfitStreamError
            If all events so far fail the same way.
        """
        if self._processed:
            return
        held = [*self._unfit, *self._bad]
        if self._unfit:
            raise UnfitStreamError(
                f"no event fits this configuration: the first {len(held)} were refused, {held[0]}. "
                "They go back into the input queue. Correct the model's configuration and start "
                "again; if only the first events are of another detector, feed them into a queue "
                "of their own",
                held,
            )
        kinds = {_NUMBER.sub("#", refusal.reason) for refusal in held}
        if len(held) >= ALIKE and len(kinds) == 1:
            raise UnfitStreamError(
                f"no event can be processed, each for the same reason: the latest {len(held)} were "
                f"refused, the last one {held[-1]}. Correct what feeds the input queue, or this "
                "configuration, and start again; what has not been refused stays in the queue",
                held,
            )
        self.holds = not held
