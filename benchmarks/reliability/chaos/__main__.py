"""Faults, seeded, on the real processes; then every event is looked for, in its bytes.

Producers, ranks, their supervisor, writers, queue actors, and Ray itself are killed, stopped and
asked to end, once and twice, at random moments, also between a result's acceptance and its
acknowledgement; disks of queues, quarantine and writers fill up, and directories vanish. Events
that have to be refused or filtered are among the good ones. What a fault has ended is started
again, as a batch system or a person would; what ends in any other way fails the run. In the end
every event that was fed has to be, with the pixels and peaks that it must have, in exactly one CXI
file, the record of filtered events, or the quarantine; and every exit code and every balance has to
say so::

    python -m benchmarks.reliability.chaos --runs 20 --events 2000 --faults 8
        [--seed 1] [--scene spool] [--only kill-rank] [--keep DIRECTORY]

The scene is drawn from the seed too: most have queues with spools; some have none, so that what was
in a killed queue is lost, and has to be said to be; some have programs of psana-ray's kind as
producer and reader of our queues, or queues of that kind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import get_args

from benchmarks.reliability.chaos.faults import KINDS
from benchmarks.reliability.chaos.run import chaos
from benchmarks.reliability.chaos.scene import Plan, SceneKind

_SCENES: dict[SceneKind, float] = {"spool": 6, "memory": 2, "peer": 2, "foreign": 1}
_DIE = "die-before-ack"
_FRAGILITY = 0.03
_COLUMNS = ("fed", "written", "filtered", "quarantined", "lost", "twice", "faults", "starts")


def plan_of(
    seed: int, events: int, ranks: int, rate_hz: float, scene: SceneKind | None, only: list[str]
) -> Plan:
    """Return what a seed's run is to be."""
    chance = random.Random(f"plan {seed}")
    weights = dict(_SCENES)
    for kind in only:
        if kind != _DIE:
            weights = {one: w for one, w in weights.items() if one in KINDS[kind].scenes}
    if not weights:
        raise SystemExit(f"no scene can have all of {', '.join(only)}")
    drawn = chance.choices(list(weights), list(weights.values()))[0]
    quarantine_bytes = chance.choice((2**30, 50_000))
    ranks = chance.choice((1, 1, ranks))
    kind = scene or drawn
    dies = (not only or _DIE in only) and kind not in ("foreign", "peer")
    return Plan(seed, kind, events, ranks, rate_hz, _FRAGILITY if dies else 0.0, quarantine_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--events", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=8)
    parser.add_argument("--every_s", type=float, default=3.0)
    parser.add_argument("--rate_hz", type=float, default=60.0)
    parser.add_argument("--ranks", type=int, default=2, help="of a third of the runs; else one")
    parser.add_argument("--scene", choices=get_args(SceneKind))
    parser.add_argument("--only", nargs="+", choices=[*KINDS, _DIE], default=[], metavar="KIND")
    parser.add_argument("--keep", type=Path, help="keep logs and records of the runs there")
    arguments = parser.parse_args()
    only = {kind: KINDS[kind].weight for kind in arguments.only if kind != _DIE}
    failed = 0
    rows = []
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        plan = plan_of(
            seed,
            *(arguments.events, arguments.ranks, arguments.rate_hz),
            *(arguments.scene, arguments.only),
        )
        with contextlib.ExitStack() as stack:
            if arguments.keep is None:
                temporary = tempfile.TemporaryDirectory(prefix="chaos-")
                directory = Path(stack.enter_context(temporary))
            else:
                directory = arguments.keep / str(seed)
                directory.mkdir(parents=True)
            faults = arguments.faults if only or not arguments.only else 0
            found = chaos(plan, directory, faults, arguments.every_s, only)
        print(json.dumps(found), flush=True)
        failed += bool(found["problems"])
        cells = [found.get(column, "?") for column in _COLUMNS]
        whole = "no" if found["problems"] else "yes"
        rows.append([found["seed"], found["scene"], *cells, whole, found["seconds"]])
    header = ["seed", "queues", *_COLUMNS, "all true", "seconds"]
    for row in [header, ["---"] * len(header), *rows]:
        print("|", " | ".join(map(str, row)), "|")
    print(f"{arguments.runs} runs, {failed} of them failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
