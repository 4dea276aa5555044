"""What survives the death of processes, with real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import ray

from benchmarks.reliability.chaos.run import chaos
from benchmarks.reliability.chaos.scene import Plan, SceneKind
from peaknet_predict.cxi.file import read_cxi
from peaknet_predict.feed import push
from peaknet_predict.queues import QueueAddress, QueueError, connect_queue
from peaknet_predict.queues.quarantine import read_index
from peaknet_predict.sources import Simulator
from peaknet_predict.types import ANYONE, Event, EventId, Refusal
from tests.helpers.chain import chain, ranks_of, written
from tests.helpers.commands import finish, start, wait_until
from tests.helpers.queues import event, kill_actor, statistics, take
from tests.helpers.sockets import LOOPBACK, listening


def _take_and_sleep(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    print(len(queue.reader.get("r", 3, 10.0)[0]), flush=True)
    time.sleep(600)


def test_what_a_killed_reader_held_goes_to_another_and_a_living_one_keeps_its_own(
    address: QueueAddress, cluster: str
) -> None:
    address = replace(address, lease_s=4.0)
    queue = connect_queue(address, "events")
    queue.producer.open("p")
    queue.producer.put("p", [event(i) for i in range(5)])
    queue.producer.close("p")
    code = (
        f"from peaknet_predict.queues.cluster import connect; connect({cluster!r})\n"
        "from peaknet_predict.queues import QueueAddress\n"
        "from tests.system.test_reliability import _take_and_sleep\n"
        f"_take_and_sleep(QueueAddress({address.name!r}, lease_s=4.0))"
    )
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "3\n"
    mine, _ = queue.reader.get("r", 9, 1.0)
    assert [one.id.idx for one in mine if one.id] == [3, 4]
    time.sleep(5.0)
    assert queue.reader.get("r", 9, 0.1)[0] == [], "it is alive and says so, though it sleeps"
    reader.kill()
    reader.wait()
    reader.stdout.close()
    again: list[Any] = []
    # The stream has ended and we hold some of it: that is told at once, without waiting.
    while not again:
        again, _ = queue.reader.get("r", 9, 1.0)
        time.sleep(0.1)
    assert [one.id for one in again] == [EventId("s", 0, i) for i in range(3)]
    assert queue.reader.lost_by(EventId("s", 0, 0))
    assert queue.reader.unsettled == 5
    queue.reader.ack([EventId("s", 0, i) for i in range(5)])
    # Nobody waits for an acknowledgement's answer, so that a call made after it may overtake it.
    wait_until(lambda: queue.reader.get("r", 9, 1.0) == ([], True))


def test_with_a_spool_the_death_of_the_queue_costs_nothing(
    address: QueueAddress, tmp_path: Path
) -> None:
    address = replace(address, spool=str(tmp_path / "spool"))
    queue = connect_queue(address, "events")
    queue.producer.open("p")
    queue.producer.put("p", [event(i) for i in range(6)])
    taken, _ = queue.reader.get("r", 3, 1.0)
    queue.reader.ack([EventId("s", 0, 0)])
    kill_actor(address)
    queue.producer.put(
        "p", [event(i) for i in range(4, 8)]
    )  # the answer of some earlier put was lost
    queue.reader.ack([one.id for one in taken if one.id])  # of a lease that died with the queue
    queue.producer.close("p")
    idx, ended = [], False
    before: set[tuple[str, ...]] = set()
    while not ended:
        more, ended = queue.reader.get("r", 4, 1.0)
        idx += [one.id.idx for one in more if one.id]
        before |= {queue.reader.lost_by(one.id) for one in more if one.id and one.id.idx < 6}
        queue.reader.ack([one.id for one in more if one.id])
    assert idx == [1, 2, 3, 4, 5, 6, 7], "what was acknowledged stays so"
    assert before == {(ANYONE,)}, "a writer has to look whether it is in a file already"
    now = statistics(queue)
    assert (now.accepted, now.acknowledged, now.duplicates) == (8, 8, 2)
    assert "on disk" in queue.admin.promise


def test_a_queue_made_again_with_the_spool_goes_on_after_its_cluster(
    address: QueueAddress, tmp_path: Path
) -> None:
    first = replace(address, spool=str(tmp_path))
    queue = connect_queue(first, "events")
    queue.producer.open("p")
    queue.producer.put("p", [event(i) for i in range(3)])
    take(queue.reader, "r", 1, 1.0)
    wait_until(lambda: statistics(queue).acknowledged == 1)
    ray.kill(ray.get_actor(address.name, namespace=address.namespace))
    wait_until(lambda: _is_gone(address))
    with pytest.raises(QueueError, match="is in its spool.*made with that spool goes on"):
        queue.admin.size()
    again = connect_queue(replace(first, name=address.name + "-again"), "events")
    assert [one.id.idx for one in again.reader.get("r", 9, 1.0)[0] if one.id] == [1, 2]
    assert again.admin.uid == queue.admin.uid
    with pytest.raises(QueueError, match="belongs to a queue that is alive"):
        connect_queue(replace(first, name=address.name + "-third"), "events")


def _is_gone(address: QueueAddress) -> bool:
    try:
        ray.get_actor(address.name, namespace=address.namespace)
    except ValueError:
        return True
    return False


def test_a_spool_is_not_silently_done_without(address: QueueAddress, tmp_path: Path) -> None:
    assert "in memory only" in connect_queue(address, "events").admin.promise
    with pytest.raises(QueueError, match="has no spool, but one is configured"):
        connect_queue(replace(address, spool=str(tmp_path)), "events")


def test_what_is_refused_is_in_the_quarantine(address: QueueAddress, tmp_path: Path) -> None:
    queue = connect_queue(replace(address, quarantine=str(tmp_path / "q")), "events")
    queue.producer.open("p")
    queue.producer.put("p", [event(7)])
    queue.reader.get("r", 1, 1.0)
    queue.reader.reject([Refusal(event(7).id, "it smells")])
    (line,) = read_index(tmp_path / "q")
    assert (line["idx"], line["reason"]) == (7, "it smells")
    with h5py.File(tmp_path / "q" / line["file"]) as file:
        np.testing.assert_array_equal(file["image"][:], event(7).image)
    assert statistics(queue).quarantined == 1


def test_a_producer_goes_on_where_the_queue_has_it(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    source = Simulator(num_events=10, panels=1, height=8, width=8)
    push(source, queue, num_events=4, stream="run7")
    report = push(source, queue, stream="run7")
    assert report.events == 6
    assert [one.id.idx for one in queue.reader.get("r", 99, 1.0)[0] if one.id] == list(range(10))
    looped = push(source, queue, num_events=25, loop=True, stream="run7")
    assert looped.events == 15
    got = [one for one in queue.reader.get("r", 99, 1.0)[0] if isinstance(one, Event)]
    assert [one.id.idx for one in got] == list(range(10, 25))
    np.testing.assert_array_equal(got[12].image, source.event(2)[0])


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGSTOP]
)
def test_a_rank_that_dies_or_stops_leaves_its_events_to_the_others(
    cluster: str, address: QueueAddress, tmp_path: Path, how: signal.Signals
) -> None:
    """Until then, they listen on loopback only, and never start MPI."""
    mpi = tmp_path / "site" / "mpi4py"
    mpi.mkdir(parents=True)
    (mpi / "__init__.py").touch()
    (mpi / "MPI.py").write_text(f"open({str(tmp_path / 'mpi_was_started')!r}, 'w')\n")
    names = f"{address.name}-in", f"{address.name}-out"
    words = chain(tmp_path, cluster, names, "two_cpus.yaml")
    process = start(*words, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    queue = connect_queue(QueueAddress(names[0], lease_s=2.0), "events")
    results = connect_queue(QueueAddress(names[1], lease_s=2.0), "results")
    queue.producer.open("p")
    idx = 0
    # Both ranks have worked once the output has seen them both; then one of them goes.
    while statistics(results).accepted < 40:
        assert process.poll() is None, process.communicate()[0]
        idx += queue.producer.put("p", [event(idx, side=32)])
        time.sleep(0.01)
    found = listening([process.pid, *ranks_of(process)])
    assert found
    assert found <= LOOPBACK
    # Rank 0 may be stopped before its consumer of results has begun: another has to begin then, for
    # the queue has room for 400.
    os.kill(ranks_of(process)[0 if how is signal.SIGSTOP else 1], how)
    more = 460 if how is signal.SIGSTOP else 60
    queue.producer.put("p", [event(i, side=32) for i in range(idx, idx + more)])
    queue.producer.close("p")
    said = finish(process, expected=4)
    assert not (tmp_path / "mpi_was_started").exists()
    assert written(tmp_path / "cxi") == list(range(idx + more)), said
    assert how is signal.SIGSTOP or "rank 1 was ended by SIGKILL; the others take over" in said
    rank = ".rank1" if how is signal.SIGSTOP else ""
    balance = json.loads((tmp_path / f"predict_balance{rank}.json").read_text())
    assert balance["stages"]["input"]["acknowledged"] == idx + more
    assert balance["stages"]["output"]["accepted"] == idx + more
    assert balance["stages"]["output"]["failures"] == {}, "the results are complete"
    assert statistics(results).failures == {}


def malformed(image: Any) -> list[tuple[str, Callable[[int], Any]]]:
    """Return kinds of bad items: what its reason says, and the item for an idx."""

    class Unheard:
        pass

    def items(value: Any) -> Callable[[int], Any]:
        return lambda idx: value

    def pictured(picture: Any, energy: Any = 9500.0) -> Callable[[int], Any]:
        return lambda idx: [5, idx, picture, energy]

    nothing = np.full_like(image, np.nan)
    bad_energies = [np.nan, np.inf, -np.inf, 0.0, -9500.0, None, "hard", [9500.0]]
    bad_pictures: list[tuple[str, Any]] = [
        ("not an ndarray", None),
        ("not an ndarray", image.tolist()),
        ("not an ndarray", "a picture"),
        ("not an ndarray", Unheard()),
        ("has shape", image[0, 0]),
        ("has shape", image[None]),
        ("has shape", np.array(3.0, np.float32)),
        ("is empty", image[:, :0]),
        ("is empty", image[:0]),
        ("complex64", image.astype(np.complex64)),
        ("bool", image > 0),
        ("<U", image.astype(str)),
        ("not an ndarray", image.astype(object)),
        ("larger than max_event_bytes", np.zeros((4, 200, 200), np.float32)),
        ("no pixel of the image is finite", nothing),
        ("no pixel of the image is finite", np.where(np.isnan(nothing), np.inf, nothing)),
    ]
    return [
        *(("photon energy", pictured(image, energy)) for energy in bad_energies),
        *((reason, pictured(picture)) for reason, picture in bad_pictures),
        *(
            ("expected [rank, idx, image, photon_energy]", items(item))
            for item in ("text", 42, 3.5, b"bytes", [], [1, 2, image], {"rank": 5}, {1, 2})
        ),
        ("expected [rank", items(Unheard())),
        ("must be integers", lambda idx: ["five", idx, image, 9500.0]),
        ("must be integers", lambda idx: [5, idx + 0.5, image, 9500.0]),
        ("must be integers", lambda idx: [5, None, image, 9500.0]),
        ("must be integers", lambda idx: [True, idx, image, 9500.0]),
    ]


@pytest.mark.slow
def test_a_thousand_malformed_events_among_a_thousand_good_ones(
    cluster: str, address: QueueAddress, tmp_path: Path
) -> None:
    names = f"{address.name}-in", f"{address.name}-out"
    words = chain(tmp_path, cluster, names, "cpu.yaml", max_event_bytes=500_000)
    process = start(*words, cwd=tmp_path)
    quarantine = str(tmp_path / "q")
    inputs = QueueAddress(names[0], max_events=400, lease_s=2.0, quarantine=quarantine)
    connect_queue(inputs, "events")
    handle = ray.get_actor(names[0], namespace="peaknet")
    image = Simulator(num_events=1, panels=1, height=32, width=32).event(0)[0].astype(np.float32)
    kinds = malformed(image)
    assert len(kinds) >= 20
    expected: dict[str, int] = {}
    for k in range(1000):
        reason, make = kinds[k % len(kinds)]
        expected[reason] = expected.get(reason, 0) + 1
        for item in ([0, k, image, 9500.0], make(k)):
            while not ray.get(handle.put.remote(item)):
                time.sleep(0.01)
    ray.get(handle.put.remote(None))
    said = finish(process)
    assert "received 2000 = predicted 1000 + refused 1000" in said
    assert written(tmp_path / "cxi") == list(range(1000))
    index = read_index(tmp_path / "q")
    assert len({(line["stream"], line["rank"], line["idx"]) for line in index}) == 1000
    reasons = [line["reason"] for line in index]
    for reason, count in expected.items():
        assert sum(reason in other for other in reasons) >= count, reason
    assert all(any(reason in other for reason in expected) for other in reasons)
    event = next(read_cxi(next((tmp_path / "cxi").glob("*.cxi"))))
    np.testing.assert_array_equal(event.image, image)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spool", "memory", "peer", "foreign"])
def test_a_short_chaos(tmp_path: Path, kind: SceneKind) -> None:
    plan = Plan(3, kind, 240, ranks=1, rate_hz=40, fragility=0.01, quarantine_bytes=2**30)
    found = chaos(plan, tmp_path, faults=4, every_s=2.5)
    assert found["problems"] == [], found
    assert found["fed"] >= found["written"] + found["filtered"] + found["quarantined"] > 0
