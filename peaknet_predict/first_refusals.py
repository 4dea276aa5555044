"""The refusals with which a run begins: to blame are its events, or its configuration."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

from peaknet_predict.types import Refusal

_ALIKE = 32
"""So many bad events in a row, each for the same reason, are no accident."""

_NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?")


class BlamelessError(ValueError):
    """The run cannot go on, and its events are not to blame: they go back into the queue."""


class UnfitStreamError(BlamelessError):
    """No event of the stream can be processed with this configuration; none of them is to blame.

    Attributes
    ----------
    refusals
        What was held back: these events go back into the queue, not into quarantine.
    """

    def __init__(self, message: str, refusals: Sequence[Refusal]) -> None:
        super().__init__(message)
        self.refusals = list(refusals)


class FirstRefusals:
    """Holds back what is refused before the first event of a run can be processed.

    A crop of the wrong size refuses every event of a detector. Put into quarantine one by one, a
    whole beamtime would go there; so the run ends with the first of them, and they go back. Once an
    event has been processed, each refusal is the matter of its own event.

    Attributes
    ----------
    holds
        Whether refusals are held back, because nobody knows yet what is to blame.
    """

    def __init__(self) -> None:
        self.holds = True
        self._processed = False
        self._unfit: list[Refusal] = []
        self._bad: deque[Refusal] = deque(maxlen=_ALIKE)

    def settle(self) -> None:
        """Note that an event can be processed: those refused so far are to blame themselves."""
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
        if len(self._unfit) + len(self._bad) >= _ALIKE:
            self.decide()

    def decide(self) -> None:
        """Decide with what there is: nothing more may come before this has been brought to an end.

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
        if len(held) >= _ALIKE and len(kinds) == 1:
            raise UnfitStreamError(
                f"no event can be processed, each for the same reason: the latest {len(held)} were "
                f"refused, the last one {held[-1]}. Correct what feeds the input queue, or this "
                "configuration, and start again; what has not been refused stays in the queue",
                held,
            )
        self.holds = not held
