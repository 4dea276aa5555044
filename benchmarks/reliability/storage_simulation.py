"""Queues, spools, quarantine and CXI writer on a simulated disk: many seeds, many steps each.

Producers (our own, and one that knows only ``put``, as psana-ray's), two queues, two predictors and
a writer run in one process, run after run, on a disk in memory that tears, drops and reorders what
is not synced, fails, fills up and flips bits, and with processes that die at any call of the disk,
are stopped for a while, or vanish. In the end every confirmed event must be in exactly one place,
with its bytes; no reader may be told an end before it is one, and each must be told in the end. The
same seed makes the same history; of one that fails, the shortest beginning that still does is
looked for::

    python -m benchmarks.reliability.storage_simulation --seeds 2000 --steps 500
        [--first 0] [--planted]

With ``--planted``, faults that were in the code are put back one by one, and each has to be found.
Seconds are those of the processor, so that they say the same on a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys

from tests.storage_simulation.mutations import PLANTED
from tests.storage_simulation.run import Outcome, run_many, shrink

_PLANTED_S = 60.0  # within which a planted fault has to be found


def main() -> int:
    """Run what the command line says; 1 if an event was lost, or a planted fault not found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2000, help="how many histories")
    parser.add_argument("--steps", type=int, default=500, help="of each history, before its end")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--planted", action="store_true", help="find planted faults")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # of disks that fail, there is much to be said
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    if arguments.planted:
        return _find_planted(seeds, arguments.steps)
    outcome = run_many(seeds, arguments.steps)
    print(_summary(outcome))
    if outcome.failure is None:
        return 0
    shortest = shrink(outcome.failure)
    print(f"seed {shortest.seed}, {shortest.steps} steps: {shortest.what}")
    return 1


def _find_planted(seeds: range, steps: int) -> int:
    missed = 0
    for name, planted in PLANTED.items():
        with planted():
            outcome = run_many(seeds, steps, until_s=_PLANTED_S)
            found = outcome.failure
        searched = f"{outcome.histories} histories, {outcome.seconds:.0f} s"
        if found is None:
            missed += 1
            print(f"{name}: NOT FOUND in {searched}")
        else:
            print(f"{name}: seed {found.seed}; {searched}: {found.what[:80]}", flush=True)
    return 1 if missed else 0


def _summary(outcome: Outcome) -> str:
    failed = 0 if outcome.failure is None else 1
    seen = ", ".join(f"{what}: {number}" for what, number in sorted(outcome.seen.items()))
    return (
        f"{outcome.histories} histories, {outcome.steps} steps and the way to their ends in "
        f"{outcome.seconds:.0f} s, {failed} failed; {seen}"
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
