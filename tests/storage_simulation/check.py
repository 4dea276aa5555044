"""What must hold at the end of a history, whatever happened in it."""

from __future__ import annotations

import io
from collections import Counter
from typing import TYPE_CHECKING

import h5py
import numpy as np

from peaknet_predict.cxi.file import read_cxi
from peaknet_predict.cxi.journal import read_journal
from peaknet_predict.queues.quarantine import read_index
from tests.storage_simulation import cxi_on_disk
from tests.storage_simulation.disk import ProcessDisk
from tests.storage_simulation.nodes import STREAM, image_of, is_bad, is_filtered

if TYPE_CHECKING:
    from tests.storage_simulation.world import World


def check_all_places(world: World) -> None:
    """Every confirmed event is in exactly one place, with its bytes; no other in more than one."""
    disk = ProcessDisk(world.disk, lambda call: None)
    cxi_on_disk.run_as(disk)
    in_files = Counter(_events_in_files())
    in_quarantine = Counter(_events_in_quarantine(disk))
    filtered = _events_filtered()
    for idx in range(max([world.confirmed, *in_files, *in_quarantine], default=0) + 1):
        places = in_files[idx] + in_quarantine[idx] + (idx in filtered)
        if idx < world.confirmed:
            assert places > 0, f"lost: event {idx}, confirmed, is nowhere"
        assert places < 2, (
            f"twice: event {idx} is in {in_files[idx]} files, {in_quarantine[idx]} times in the "
            f"quarantine, and {'' if idx in filtered else 'not '}among the filtered ones"
        )


def _events_in_files() -> list[int]:
    found = []
    for path in cxi_on_disk.SimulatedPath("/cxi").glob("*.cxi"):
        for event in read_cxi(path):  # type: ignore[arg-type]
            idx = event.id.idx
            assert event.id.stream == STREAM
            assert np.array_equal(event.image, image_of(idx)), f"damaged: event {idx} in {path}"
            assert event.photon_energy == 9000.0 + idx, f"damaged: event {idx} in {path}"
            assert not is_bad(idx), f"event {idx} should have been rejected"
            found.append(idx)
    return found


def _events_filtered() -> set[int]:
    found: set[int] = set()
    for path in cxi_on_disk.SimulatedPath("/cxi").glob("*_journal_*.jsonl"):
        journal = read_journal(path)  # type: ignore[arg-type]
        found |= {key.idx for key in journal.filtered}
    assert all(is_filtered(idx) for idx in found)
    return found


def _events_in_quarantine(disk: ProcessDisk) -> list[int]:
    found = []
    for line in read_index("/quarantine", disk):
        idx = line["idx"]
        if is_bad(idx) and not line["reason"].startswith("cost"):
            assert line["reason"] == "it has no photon energy"
        else:
            assert line["reason"].startswith("cost ")
        path = cxi_on_disk.SimulatedPath("/quarantine") / line["file"]
        with h5py.File(io.BytesIO(path.read_bytes()), "r") as file:
            assert np.array_equal(file["image"], image_of(idx)), f"damaged: event {idx} in {path}"
        found.append(idx)
    return found
