"""Many histories; and of a history that fails, the shortest beginning that still does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.storage_simulation.world import run_history


@dataclass(slots=True)
class Failure:
    """A history that did not end as it must.

    Attributes
    ----------
    seed, steps
        Which one, and how many steps of it are enough.
    what
        What is wrong.
    """

    seed: int
    steps: int
    what: str


@dataclass(slots=True)
class Outcome:
    """What many histories showed.

    Attributes
    ----------
    histories, steps, seconds
        How many, of how many steps before their ends, and how long a processor took for them.
    seen
        How often what happened in them.
    failure
        The first that failed; None if none did.
    """

    histories: int = 0
    steps: int = 0
    seconds: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)
    failure: Failure | None = None


def run_many(seeds: Iterable[int], steps: int, until_s: float = float("inf")) -> Outcome:
    """Let histories of so many steps happen, until one fails or the time is over."""
    outcome = Outcome()
    begin = time.process_time()
    for seed in seeds:
        failure = failure_of(seed, steps)
        if isinstance(failure, Failure):
            outcome.failure = failure
        else:
            outcome.seen += failure
        outcome.histories += 1
        outcome.steps += steps
        outcome.seconds = time.process_time() - begin
        if outcome.failure is not None or outcome.seconds > until_s:
            break
    return outcome


def failure_of(seed: int, steps: int) -> Failure | Counter[str]:
    """Let one history happen; return how it fails, or what was seen in it."""
    try:
        return run_history(seed, steps).ledger.seen
    except Exception as error:
        return Failure(seed, steps, f"{type(error).__name__}: {error}"[:500])


def shrink(failure: Failure) -> Failure:
    """Return the same history with as few steps as bisection finds enough.

    A history of fewer steps is the beginning of a longer one, after which all is mended and brought
    to its end.
    """
    shortest, enough = failure, 0
    while enough < shortest.steps - 1:
        middle = (enough + shortest.steps) // 2
        shorter = failure_of(failure.seed, middle)
        if isinstance(shorter, Failure):
            shortest = shorter
        else:
            enough = middle
    return shortest
