from __future__ import annotations

import logging
import os
import pwd
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from peaknet_predict.doctor import doctor
from peaknet_predict.queues import (
    ClusterError,
    Queue,
    QueueAddress,
    QueueError,
    connect_queue,
    run_in_cluster,
)
from peaknet_predict.queues.cluster import connect, ensure_private_token, token_path
from peaknet_predict.queues.clusters_here import (
    NoClusterError,
    cluster_of_mine,
    clusters_here,
    why_silent,
)
from peaknet_predict.queues.native import NativeProducer
from peaknet_predict.types import Event, EventId, Refusal, Result
from tests.helpers.commands import HANGS_S, wait_until
from tests.helpers.foreign import make_three_method_queue
from tests.helpers.queues import statistics, take
from tests.helpers.queues import take_all as reader_takes_all


def event(idx: int) -> Event:
    return Event(EventId("s", 0, idx), np.full((2, 8, 8), idx, np.float32), 9000.0 + idx)


def result(idx: int) -> Result:
    peaks = np.array([[1.0, 2.5, idx]])
    return Result(EventId("s", 0, idx), event(idx).image, peaks, 9000.0 + idx)


def take_all(queue: Queue) -> list[Any]:
    return reader_takes_all(queue.reader)


def test_events_arrive_with_identity_pixels_and_energy(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    queue.producer.open("p")
    queue.producer.put("p", [event(i) for i in range(20)])
    queue.producer.close("p")
    taken = take_all(queue)
    assert [e.id for e in taken] == [EventId("s", 0, i) for i in range(20)]
    for i, got in enumerate(taken):
        np.testing.assert_array_equal(got.image, event(i).image)
        assert got.image.dtype == np.float32
        assert got.photon_energy == 9000.0 + i


def test_put_waits_for_room_and_get_for_events(address: QueueAddress) -> None:
    queue = connect_queue(replace(address, max_events=3), "events")
    queue.producer.open("p")

    def produce() -> None:
        queue.producer.put("p", [event(i) for i in range(30)])
        queue.producer.close("p")

    producer = threading.Thread(target=produce)
    producer.start()
    wait_until(lambda: queue.admin.size() == 3)
    assert [e.id.idx for e in take_all(queue)] == list(range(30))
    producer.join()
    now = statistics(queue)
    assert (now.accepted, now.acknowledged, now.largest) == (30, 30, 3)


def test_an_empty_queue_is_waited_on_inside_the_actor(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    queue.producer.open("p")
    started = time.monotonic()
    assert queue.reader.get("r", 5, 0.4) == ([], False)
    assert time.monotonic() - started >= 0.4


def _produce_and_exit(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    queue.producer.open("p")
    queue.producer.put("p", [event(i) for i in range(5)])
    queue.producer.close("p")


def test_events_outlive_the_process_that_put_them(address: QueueAddress, cluster: str) -> None:
    code = (
        f"from peaknet_predict.queues.cluster import connect; connect({cluster!r})\n"
        "from peaknet_predict.queues import QueueAddress\n"
        "from tests.ray.test_queues import _produce_and_exit\n"
        f"_produce_and_exit(QueueAddress({address.name!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS_S)
    assert [int(e.image[0, 0, 0]) for e in take_all(connect_queue(address, "events"))] == list(
        range(5)
    )


def test_our_actor_serves_programs_that_know_three_methods(address: QueueAddress) -> None:
    queue = connect_queue(replace(address, max_events=2), "events")
    handle = ray.get_actor(address.name, namespace=address.namespace)
    image = np.arange(8.0).reshape(2, 2, 2)
    assert ray.get(handle.put.remote([3, 17, image, 9500.0])) is True
    assert ray.get(handle.put.remote("nonsense")) is True
    assert ray.get(handle.put.remote([3, 18, image, 9500.0])) is False
    assert ray.get(handle.size.remote()) == 2
    ray.get(handle.put.remote(None))
    good, bad = take_all(queue)
    assert (good.id.rank, good.id.idx, good.photon_energy) == (3, 17, 9500.0)
    np.testing.assert_array_equal(good.image, image)
    assert isinstance(bad, Refusal)
    assert "nonsense" in bad.reason

    queue.producer.open("p")
    queue.producer.put("p", [event(4)])
    queue.producer.close("p")
    rank, idx, image, energy = ray.get(handle.get.remote())
    assert (rank, idx, energy) == (0, 4, 9004.0)
    assert ray.get(handle.get.remote()) is None


def test_our_output_gives_an_old_reader_tuples_and_its_end(address: QueueAddress) -> None:
    queue = connect_queue(address, "results")
    queue.producer.open("p")
    queue.producer.put("p", [result(5)])
    queue.producer.close("p", end_markers=2)
    handle = ray.get_actor(address.name, namespace=address.namespace)
    ((image, peaks, energy),) = ray.get(handle.get.remote())
    np.testing.assert_array_equal(image, result(5).image)
    assert (peaks, energy) == ([[1.0, 2.5, 5.0]], 9005.0)
    assert [ray.get(handle.get.remote()) for _ in range(3)] == ["END", "END", None]


def test_a_foreign_queue_that_pauses_is_read_to_its_end(address: QueueAddress) -> None:
    handle = make_three_method_queue(address.name, address.namespace, 1000, 11, 2.0)
    for i in range(30):
        assert ray.get(handle.put.remote([2, i, event(i).image, 9000.0]))
    queue = connect_queue(replace(address, idle_timeout_s=3.0), "events")
    assert queue.admin.statistics() is None
    assert not queue.admin.leases
    taken = take_all(queue)
    assert [(e.id.rank, e.id.idx) for e in taken] == [(2, i) for i in range(30)]


def test_a_foreign_queue_that_is_full_is_retried_and_gets_its_ends(address: QueueAddress) -> None:
    handle = make_three_method_queue(address.name, address.namespace, 1)
    queue = connect_queue(address, "results")

    def produce() -> None:
        for i in range(4):
            queue.producer.put("p", [result(i)])
        queue.producer.close("p", end_markers=2)

    producer = threading.Thread(target=produce)
    producer.start()
    items: list[Any] = []
    while len(items) < 6:
        item = ray.get(handle.get.remote())
        if item is not None:
            items.append(item)
    producer.join()
    assert [item[0][2] for item in items[:4]] == [9000.0, 9001.0, 9002.0, 9003.0]
    assert items[4:] == ["END", "END"]


def test_wrong_queues_are_refused_with_what_to_do(address: QueueAddress) -> None:
    with pytest.raises(QueueError, match=r"there is no queue.*set create to true"):
        connect_queue(replace(address, create=False), "events")
    connect_queue(address, "events")
    with pytest.raises(QueueError, match="holds events, but results are expected"):
        connect_queue(address, "results")

    class NotAQueue:
        def get(self) -> None: ...

    other = replace(address, name=address.name + "-other")
    actor = ray.remote(NotAQueue).options(name=other.name, namespace=other.namespace).remote()
    with pytest.raises(QueueError, match="is not a queue: it has no method put and no size"):
        connect_queue(other, "events")
    del actor


def test_a_dead_queue_says_that_what_it_held_is_lost(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    ray.kill(ray.get_actor(address.name, namespace=address.namespace))
    with pytest.raises(QueueError, match="is gone, and what was still in it is lost"):
        queue.admin.size()


def pid_of_actor(address: QueueAddress) -> int:
    handle = ray.get_actor(address.name, namespace=address.namespace)
    return int(ray.get(handle.__ray_call__.remote(lambda actor: os.getpid())))


def test_a_queue_that_was_stopped_takes_nobodys_silence_for_death(address: QueueAddress) -> None:
    address = replace(address, lease_s=2.0, producer_timeout_s=2.0)
    producer, reader = connect_queue(address, "events"), connect_queue(address, "events")
    producer.producer.open("p")
    producer.producer.put("p", [event(0), event(1)])
    assert len(reader.reader.get("r", 2, 5.0)[0]) == 2
    pid = pid_of_actor(address)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(5.0)  # longer than both may be silent; they go on saying that they are alive
    os.kill(pid, signal.SIGCONT)
    # Whatever the queue does first when it wakes up is judged by what it hears then.
    for _ in range(10):
        taken, ended = connect_queue(address, "events").reader.get("r", 2, 0.2)
        assert (taken, ended) == ([], False)
    assert reader.reader.still_held([event(0).id]) == {event(0).id}
    now = statistics(producer)
    assert (now.open_producers, now.failures, now.redeliveries) == (["p"], {}, 0)
    reader.reader.ack([event(0).id, event(1).id])
    producer.producer.close("p")
    assert take_all(reader) == []
    assert reader.reader.failures == {}


def test_a_queue_that_is_being_restarted_is_waited_for(
    address: QueueAddress, tmp_path: Path
) -> None:
    address = replace(address, spool=str(tmp_path / "spool"))
    connect_queue(address, "events").producer.open("p")
    for _ in range(2):
        os.kill(pid_of_actor(address), signal.SIGKILL)
        for _ in range(20):
            queue = connect_queue(address, "events")
            time.sleep(0.02)
        assert statistics(queue).open_producers == ["p"]


def test_a_stream_of_three_methods_ends_with_a_reason_if_its_producer_died_with_the_queue(
    address: QueueAddress, tmp_path: Path
) -> None:
    settings = {"spool": str(tmp_path / "spool"), "producer_timeout_s": 3.0}
    address = replace(address, **settings)  # type: ignore[arg-type]
    queue = connect_queue(address, "events")
    handle = ray.get_actor(address.name, namespace=address.namespace)
    for idx in range(4):
        assert ray.get(handle.put.remote([7, idx, event(idx).image, 9000.0]))
    assert len(take(queue.reader, "r", 2, 5.0)[0]) == 2
    while statistics(queue).acknowledged < 2:
        time.sleep(0.01)
    os.kill(pid_of_actor(address), signal.SIGKILL)
    # psana-ray's producer would end here, with exit code 0.
    assert statistics(queue).open_producers == ["a program that knows only put"]
    assert [one.id.idx for one in take_all(queue)] == [2, 3]
    (why,) = queue.reader.failures.values()
    assert "since this queue was restarted" in why
    assert "rank 7 idx 3. Start it again for the rest" in why


def test_the_embedded_cluster_listens_on_loopback_and_its_token_is_private(cluster: str) -> None:
    assert cluster.startswith("127.0.0.1:")
    assert stat.S_IMODE(token_path().stat().st_mode) == 0o600


def _connect_in_a_process(address: str, **environment: str) -> str:
    code = f"""
from peaknet_predict.queues.cluster import ClusterError, connect
try:
    connect({address!r})
except ClusterError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k[:4] != "RAY_"} | environment,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    return done.stdout


@pytest.mark.slow
def test_a_cluster_that_cannot_be_joined_says_what_to_do(cluster: str) -> None:
    assert "nothing answers at 127.0.0.1:1" in _connect_in_a_process("127.0.0.1:1")
    assert "refused our token" in _connect_in_a_process(cluster, RAY_AUTH_TOKEN="0" * 64)
    assert connect("auto") == cluster, "once joined, a process stays"


def _fail() -> None:
    raise RuntimeError("the producer is on fire")


def test_a_function_run_in_the_cluster_raises_here() -> None:
    task = run_in_cluster(_fail)
    with pytest.raises(RuntimeError, match="on fire"):
        task.result(timeout_s=60)
    assert task.done()


def test_every_event_crosses_once_however_full_the_queue(address: QueueAddress) -> None:
    queue = connect_queue(replace(address, max_events=2), "events")
    sent = 0
    assert isinstance(queue.producer, NativeProducer)
    calls = queue.producer._calls
    call = calls.call

    def counting(method: str, *args: Any, **limit: Any) -> Any:
        nonlocal sent
        sent += len(args[0][1]) if method == "put_many" else 0
        return call(method, *args, **limit)

    calls.call = counting  # type: ignore[method-assign]
    queue.producer.open("p")

    def produce() -> None:
        queue.producer.put("p", [event(i) for i in range(40)])
        queue.producer.close("p")

    producer = threading.Thread(target=produce)
    producer.start()
    reader = connect_queue(address, "events")
    taken: list[Any] = []
    ended = False
    while not ended:
        items, ended = take(reader.reader, "r", 1, 1.0)
        taken += items
        time.sleep(0.01)
    producer.join()
    assert [e.id.idx for e in taken] == list(range(40))
    assert sent == 40


def test_a_foreign_stream_is_not_idle_while_nobody_asks(address: QueueAddress) -> None:
    handle = make_three_method_queue(address.name, address.namespace, 10)
    queue = connect_queue(replace(address, idle_timeout_s=1.0), "events")
    time.sleep(1.5)  # compiling, or waiting for room at the output
    assert queue.reader.get("r", 4, 0.1) == ([], False)
    ray.get(handle.put.remote([0, 5, event(5).image, 9000.0]))
    assert [e.id.idx for e in take_all(queue)] == [5]


def test_the_end_names_producers_that_failed(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    queue.producer.open("p")
    queue.producer.close("p", failure="no beam")
    assert queue.reader.get("r", 1, 1.0) == ([], True)
    assert queue.reader.failures == {"p": "no beam"}


def test_a_foreign_queue_cannot_be_fed_by_several(address: QueueAddress) -> None:
    make_three_method_queue(address.name, address.namespace, 10)
    with pytest.raises(QueueError, match="cannot tell 2 producers apart"):
        connect_queue(address, "events").producer.open("p", of=2)


def test_ranks_that_share_a_reader_all_end_with_their_own_run(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    queue.producer.open("p")
    queue.producer.close("p")
    assert queue.reader.get("run 1", 1, 1.0) == ([], True), "rank 0"
    queue.producer.open("q")
    queue.producer.put("q", [event(1)])
    assert queue.reader.get("run 1", 1, 1.0) == ([], True), "rank 1, after the next run has begun"


def test_another_ray_version_gets_a_sentence(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with: Ray: 2.48.0")

    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # connect sets it; here it must not stay
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match="another version of Ray or Python.*2.48.0"):
        connect(cluster)


def test_a_cluster_of_a_run_is_seen_and_answers_but_is_not_joined_by_chance(cluster: str) -> None:
    (own,) = (one for one in clusters_here() if one.address == cluster)
    assert own.mine
    assert own.embedded
    assert own.user == pwd.getpwuid(os.getuid()).pw_name
    assert 0 <= time.time() - own.started_at < 86400
    assert why_silent(cluster) is None
    with pytest.raises(NoClusterError, match="a run's own, which ends with it, is at " + cluster):
        cluster_of_mine([own])


def test_long_waits_say_what_to_look_at(
    address: QueueAddress, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("peaknet_predict.queues.waiting_notice._REPORT_S", 0.0)
    monkeypatch.setattr(logging.getLogger("peaknet_predict"), "propagate", True)

    def reason() -> str:
        text = str(caplog.records[-1].message)
        caplog.clear()
        return text

    misspelt = connect_queue(replace(address, name=f"{address.name}x"), "events")
    misspelt.producer.open("p")
    queue = connect_queue(replace(address, max_events=2), "events")
    queue.reader.get("r", 1, 0.1)
    said = reason()
    assert "no producer has opened it" in said
    assert f"peaknet/{address.name}x" in said
    queue.producer.open("p")
    queue.reader.get("r", 1, 0.1)
    assert "open producers: p" in reason()
    stop = threading.Event()
    putting = threading.Thread(
        target=queue.producer.put, args=("p", [event(i) for i in range(3)], stop)
    )
    putting.start()
    wait_until(lambda: "nobody has read from it" in caplog.text)
    stop.set()
    putting.join()
    caplog.clear()
    queue.producer.close("p")
    take_all(queue)
    queue.reader.get("another", 1, 0.1)
    assert "read to the end" in reason()


def test_doctor_looks_at_the_cluster_and_its_queues(
    address: QueueAddress, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = connect_queue(address, "events")
    queue.producer.open("feed:7")
    make_three_method_queue(address.name + "-foreign", address.namespace, 10)
    names = [address.name, address.name + "-foreign", "gone"]
    queue.producer.put("feed:7", [event(0)])
    queue.reader.get("r", 1, 1.0)
    queue.reader.reject([Refusal(event(0).id, "it is bad")])
    assert doctor(address=cluster, queues=names) == 1
    said = capsys.readouterr().out
    assert "open producers: feed:7" in said
    assert "1 in quarantine; loses nothing if a reader or producer dies" in said
    assert "s:0:0: it is bad" in said
    assert "three methods only" in said
    assert "hands each out once" in said
    assert "there is no queue 'gone'" in said
    assert f"{cluster} admits nobody without its token" in said


def test_doctor_finds_a_token_that_others_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert doctor() == 1
    assert f"chmod 600 {token}" in capsys.readouterr().out
    assert ensure_private_token() == token
    assert doctor() == 0
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor() == 1
    assert "lets everyone who reaches it run code" in capsys.readouterr().out
