"""What a source finds in files, through the queue, to where events become batches."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

from peaknet_predict.dataset import QueueDataset
from peaknet_predict.feed import push
from peaknet_predict.pixels import unpack_mask
from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.sources import Hdf5Source
from peaknet_predict.types import Event, Refusal


def test_reasons_masks_and_left_out_files_travel_with_the_events(
    address: QueueAddress, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 100, (4, 6, 8)).astype(np.uint16)
    mask = np.zeros((6, 8), np.uint8)
    mask[2, 3] = 1
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        frames = h5.create_dataset("entry_1/data_1/data", (4, 6, 8), np.uint16, chunks=(1, 6, 8))
        for k in (0, 1, 3):
            frames[k] = images[k]
        h5["entry_1/data_1/mask"] = mask
        h5["LCLS/photon_energy_eV"] = [9500.0, 9.5, 9500.0, 9501.0]
    (tmp_path / "b.h5").write_bytes(b"")
    source = Hdf5Source(str(tmp_path / "*.h5"), skip_unreadable=True)
    queue = connect_queue(address, "events")
    balance = tmp_path / "feed_balance.json"
    assert push(source, queue, balance=str(balance)).events == 4
    (left_out,) = json.loads(balance.read_text())["stages"]["feed"]["skipped_files"]
    assert left_out["path"] == str(tmp_path / "b.h5")
    assert "it is empty" in left_out["reason"]
    assert left_out["events"] is None

    events: list[Event] = []
    refused: list[Refusal] = []
    dataset = QueueDataset(queue, "r", batch_size=4)
    for batch in dataset:
        events += batch.events
        refused += batch.refused
        dataset.ack([event.id for event in batch.events])
        dataset.reject(batch.refused)
    assert [(event.id.idx, event.photon_energy) for event in events] == [(0, 9500.0), (3, 9501.0)]
    for event in events:
        np.testing.assert_array_equal(event.image, images[event.id.idx])
        assert event.bad_bits is not None
        np.testing.assert_array_equal(unpack_mask(event.bad_bits, (6, 8)), mask == 1)
    reasons = {refusal.id.idx: refusal.reason for refusal in refused if refusal.id is not None}
    assert reasons.keys() == {1, 2}
    assert "likely keV (9500 eV)" in reasons[1]
    assert "a.h5: frame 2 is unreadable: /entry_1/data_1/data: it was never written" in reasons[2]
