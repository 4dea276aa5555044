"""What must hold at the end of a history, whatever happened in it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import h5py

from peaknet_predict.cxi.journal import read_journal
from peaknet_predict.cxi.layout import DATA, ENERGY_EV, OWN
from peaknet_predict.queues.quarantine import read_index
from peaknet_predict.types import EventId
from tests.storage_simulation import cxi_on_disk
from tests.storage_simulation.disk import ProcessDisk
from tests.storage_simulation.events import (
    energy_of,
    is_bad,
    is_filtered,
    serial_in_text,
    shown_in,
)

if TYPE_CHECKING:
    from tests.storage_simulation.world import World


def check_all_places(world: World) -> None:
    """Every confirmed event is in exactly one place, with its bytes; no other in more than one."""
    disk = ProcessDisk(world.disk, lambda call: None)
    cxi_on_disk.run_as(disk)
    in_files = Counter(_events_in_files(world))
    in_quarantine = Counter(_events_in_quarantine(world, disk))
    filtered = _events_filtered(world)
    for serial in world.ledger.confirmed | set(in_files) | set(in_quarantine) | filtered:
        places = in_files[serial] + in_quarantine[serial] + (serial in filtered)
        if serial in world.ledger.confirmed:
            assert places > 0, f"lost: event {serial}, confirmed, is nowhere"
        assert places < 2, (
            f"twice: event {serial} is in {in_files[serial]} files, {in_quarantine[serial]} times "
            f"in the quarantine, and {'' if serial in filtered else 'not '}among the filtered ones"
        )
    seen = world.ledger.seen
    seen["events in files"] += in_files.total()
    seen["events in quarantine"] += in_quarantine.total()
    seen["filtered events"] += len(filtered)


def _events_in_files(world: World) -> Iterator[int]:
    for path in cxi_on_disk.SimulatedPath("/cxi").glob("*.cxi"):
        with h5py.File(io.BytesIO(path.read_bytes()), "r") as file:
            own = file[OWN]
            columns = own["stream"].asstr()[:], own["rank"][:], own["idx"][:]
            images, energies = file[DATA][:], file[ENERGY_EV][:]
        for image, energy, *key in zip(images, energies, *columns, strict=True):
            serial = shown_in(image)
            world.ledger.identify(EventId(str(key[0]), int(key[1]), int(key[2])), serial)
            assert energy == energy_of(serial), f"damaged: event {serial} in {path}"
            assert not is_bad(serial), f"event {serial} should have been rejected"
            yield serial


def _events_filtered(world: World) -> set[int]:
    found: set[int] = set()
    for path in cxi_on_disk.SimulatedPath("/cxi").glob("*_journal_*.jsonl"):
        journal = read_journal(path.read_bytes())
        found |= {world.ledger.serials[key] for key in journal.filtered}
    assert all(is_filtered(serial) for serial in found)
    return found


def _events_in_quarantine(world: World, disk: ProcessDisk) -> Iterator[int]:
    for line in read_index("/quarantine", disk):
        key = EventId(line["stream"], line["rank"], line["idx"])
        if line["file"] is None:
            assert world.quarantine_bytes < 10**9, f"lost: the data of event {key}"
            serial = world.ledger.serials[key]
        else:
            path = cxi_on_disk.SimulatedPath("/quarantine") / line["file"]
            with h5py.File(io.BytesIO(path.read_bytes()), "r") as file:
                serial = _serial_in(file)
                assert EventId(*(file.attrs[name] for name in EventId._fields)) == key
                assert file.attrs["reason"] == line["reason"]
            world.ledger.identify(key, serial)
        assert is_bad(serial) or line["reason"].startswith("cost "), line["reason"]
        yield serial


def _serial_in(file: h5py.File) -> int:
    """Return which event a file of the quarantine holds; its bytes must be right."""
    name = next((name for name in ("image", "item_2") if name in file), None)
    if name is None:
        return serial_in_text(file.attrs.get("item", file.attrs.get("item_2")))
    serial = shown_in(file[name][()])
    energy = file.attrs["photon_energy" if name == "image" else "item_3"]
    assert float(energy) in (energy_of(serial), -1.0 * is_bad(serial)), f"damaged: event {serial}"
    return serial
