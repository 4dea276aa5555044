"""The roster as an actor: found by name, alive after its own death, gone when no rank is left."""

from __future__ import annotations

import os
import signal

import ray

from peaknet_predict.queues import QueueAddress
from peaknet_predict.queues.roster import Report, Roster, RosterActor, Standing, connect_roster
from tests.helpers.commands import wait_until


def join(address: QueueAddress, rank: int, silence_s: float = 60.0) -> Roster:
    return connect_roster(address.name, address.namespace, 2, rank, silence_s, lambda: False)


def test_ranks_meet_and_one_of_them_closes_the_run(address: QueueAddress) -> None:
    first, second = join(address, 0), join(address, 1)
    assert first.report().standings == (Standing.WORKING, Standing.WORKING)
    assert second.report(standing=Standing.DONE, failure="it hurts").closer is None
    roll = first.report(standing=Standing.DONE)
    assert (roll.closer, roll.failures) == (0, {1: "it hurts"})
    first.report(standing=Standing.GONE, closed=True)
    assert second.report().closed

    handle = ray.get_actor(address.name, namespace=address.namespace)
    pid = ray.get(handle.__ray_call__.remote(lambda actor: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    # Made anew, it hears from those who are there; a rank that has left is silent.
    roll = second.report()
    assert roll.standings[1] is Standing.DONE


def test_a_heartbeat_keeps_a_rank_that_says_nothing_new(address: QueueAddress) -> None:
    first, second = join(address, 0, silence_s=1.0), join(address, 1, silence_s=1.0)
    first.report()
    second.report()
    del second  # and with it its heartbeat
    wait_until(lambda: first.report().standings[1] is Standing.LOST)
    assert first.report().standings[0] is Standing.WORKING


def test_it_ends_when_no_rank_is_left(address: QueueAddress) -> None:
    handle = (
        ray.remote(RosterActor)
        .options(name=address.name, namespace=address.namespace, lifetime="detached", num_cpus=0)
        .remote(1, 60.0, 0.5)
    )
    ray.get(handle.report.remote(Report(0)))
    ray.get(handle.report.remote(Report(0, Standing.GONE)))
    wait_until(lambda: not is_there(address))


def is_there(address: QueueAddress) -> bool:
    try:
        ray.get_actor(address.name, namespace=address.namespace)
    except ValueError:
        return False
    return True
