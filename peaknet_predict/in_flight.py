"""Batches under way on a device: a handle to each one's peaks, and the memory that it occupies.

A ring of slots bounds the work in flight. On a GPU each slot has memory of its own, so that the
copy of one batch, the network on the next and the peaks of a third never wait for each other.

Shape legend: B events, P panels of an event, N = B*P panels of a batch, H rows, W columns, K bytes
of a mask as bits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peaknet_predict.forward import NetworkOutput, stage
from peaknet_predict.peaks import PeakTable, find_peaks
from peaknet_predict.pixels import Bits
from peaknet_predict.preprocess import Preprocess, pack_masks
from peaknet_predict.types import EventBatch, PeakBatch, Peaks, Refusal, Result

if TYPE_CHECKING:
    from peaknet_predict.peaks.finder import PeakFinder, PendingTable


class Found(NamedTuple):
    """What the device found in a batch.

    Attributes
    ----------
    table
        Its peaks.
    bad_pixels, outliers
        How many pixels of each event were left out, and how many of them as outliers.
    bad_bits_BK
        (B, K) uint8, which ones; the memory is used again for the next batch.
    """

    table: PeakTable
    bad_pixels: list[int]
    outliers: list[int]
    bad_bits_BK: Bits


class Slot(Protocol):
    """What one batch under way occupies; used by one batch after another."""

    def upload(self, batch: EventBatch) -> tuple[Tensor, Tensor | None]:
        """Bring pixels (B, P, H, W), and those declared bad as bits (B, K), to the device."""

    def find(self, output: NetworkOutput) -> None:
        """Begin to find the peaks in what the network gave."""

    def done(self) -> bool:
        """Whether `result` will return without waiting."""

    def result(self) -> Found:
        """Wait for this slot's batch and return what was found in it."""


class CpuSlot:
    """A batch on the CPU, which has computed everything by the time it is asked for peaks."""

    def __init__(self) -> None:
        self._is_peak_NHW = torch.zeros(0, 0, 0, dtype=torch.bool)
        self._counts_2B = torch.zeros(2, 0, dtype=torch.int64)
        self._bad_bits_BK = torch.zeros(0, 0, dtype=torch.uint8)

    def upload(self, batch: EventBatch) -> tuple[Tensor, Tensor | None]:
        """Return pixels and bits: they are where they are needed."""
        return batch.images_BPHW, _declared_bits(batch)

    def find(self, output: NetworkOutput) -> None:
        """Keep the class map; peaks are found when somebody asks for them."""
        prepared = output.prepared
        class_map_NHW = output.logits_NCHW.softmax(1).argmax(1)
        self._is_peak_NHW = (class_map_NHW != 0) & prepared.valid_N1HW[:, 0]
        self._counts_2B = torch.stack([prepared.bad_pixels_B, prepared.outliers_B])
        self._bad_bits_BK = pack_masks(prepared.bad_BPHW)

    def done(self) -> bool:
        """Whether `result` will return without waiting: always."""
        return True

    def result(self) -> Found:
        """Return what was found in this slot's batch."""
        bad_pixels, outliers = self._counts_2B.tolist()
        table = find_peaks(self._is_peak_NHW)
        return Found(table, bad_pixels, outliers, self._bad_bits_BK.numpy())


_NO_BITS: Bits = np.empty(0, np.uint8)

_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


class GpuSlot:
    """Memory of one batch on one GPU: its pixels there, its peaks' table, its events.

    The caller uses it again only when the batch before has been fetched with `result`.

    Parameters
    ----------
    device
        The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device not in _copy_streams:
            _copy_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copy_stream = _copy_streams[device]
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._images_BPHW = torch.empty(0, device=device)
        self._counts_2B = torch.empty(2, 0, dtype=torch.int64)
        self._bad_bits_BK = torch.empty(0, 0, dtype=torch.uint8)
        self._finder: PeakFinder | None = None
        self._pending: PendingTable | None = None

    def upload(self, batch: EventBatch) -> tuple[Tensor, Tensor | None]:
        """Copy pixels and bits to the GPU beside whatever it computes.

        The current stream waits for the copy, the caller does not, if the pixels are pinned.
        """
        images_BPHW, bits_BK = batch.images_BPHW, _declared_bits(batch, pin_memory=True)
        current = torch.cuda.current_stream(self._device)
        if (
            self._images_BPHW.shape != images_BPHW.shape
            or self._images_BPHW.dtype != images_BPHW.dtype
        ):
            self._images_BPHW = torch.empty_like(images_BPHW, device=self._device, pin_memory=False)
            # New memory may be old memory that the current stream still works on.
            self._copy_stream.wait_stream(current)
        with torch.cuda.stream(self._copy_stream):
            self._images_BPHW.copy_(images_BPHW, non_blocking=True)
            if bits_BK is not None:
                bits_BK = bits_BK.to(self._device, non_blocking=True)
                bits_BK.record_stream(current)
            self._copied.record(self._copy_stream)
        current.wait_event(self._copied)
        return self._images_BPHW, bits_BK

    def find(self, output: NetworkOutput) -> None:
        """Enqueue peak finding, and the way of what is found to the host."""
        from peaknet_predict.peaks.finder import PeakFinder

        prepared = output.prepared
        panels, _, height, width = prepared.images_N1HW.shape
        finder = self._finder
        if finder is None or (finder.max_panels, finder.height, finder.width) != (
            panels,
            height,
            width,
        ):
            finder = self._finder = PeakFinder(panels, height, width, device=self._device)
        # Before the table's own copy, whose event then covers all three.
        counts_2B = torch.stack([prepared.bad_pixels_B, prepared.outliers_B])
        self._counts_2B = _copy_to_host(counts_2B, self._counts_2B)
        self._bad_bits_BK = _copy_to_host(pack_masks(prepared.bad_BPHW), self._bad_bits_BK)
        self._pending = finder.enqueue(
            logits=output.logits_NCHW, upsampling=output.stride, valid=prepared.valid_N1HW[:, 0]
        )

    def done(self) -> bool:
        """Whether the batch's peaks are on the host."""
        return self._pending is None or self._pending.done()

    def result(self) -> Found:
        """Wait for this slot's batch and return what was found in it."""
        assert self._pending is not None
        table = self._pending.table()
        self._pending = None
        bad_pixels, outliers = self._counts_2B.tolist()
        return Found(table, bad_pixels, outliers, self._bad_bits_BK.numpy())


def _declared_bits(batch: EventBatch, pin_memory: bool = False) -> Tensor | None:
    """Return the masks that events came with, (B, K) uint8; None if none of them has one."""
    if all(event.bad_bits is None for event in batch.events):
        return None
    num_events, *shape_PHW = batch.images_BPHW.shape
    num_bytes = -(-math.prod(shape_PHW) // 8)
    bits_BK = torch.zeros((num_events, num_bytes), dtype=torch.uint8, pin_memory=pin_memory)
    for row, event in zip(bits_BK.numpy(), batch.events, strict=False):
        if event.bad_bits is not None:
            row[:] = event.bad_bits
    return bits_BK


def _copy_to_host(values: Tensor, pinned: Tensor) -> Tensor:
    """Enqueue a copy into pinned memory, and return that memory; another one if it does not fit."""
    if pinned.shape != values.shape:
        pinned = torch.empty_like(values, device="cpu", pin_memory=True)
    return pinned.copy_(values, non_blocking=True)


def _on_bad(peaks_M3: Peaks, bits: Bits, shape_PHW: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    """Return which peaks have their centroid on a bad pixel, (M,) bool."""
    pixels_3M = np.rint(peaks_M3).astype(np.int64).T
    flat_M = np.ravel_multi_index(tuple(pixels_3M), shape_PHW)
    on_bad_M: npt.NDArray[np.bool_] = (bits[flat_M // 8] >> (flat_M % 8) & 1) != 0
    return on_bad_M


class PendingPeaks:
    """A handle to the peaks of one batch, as `PeakNetModule.predict_step` returns it.

    Asking for the result waits for this batch alone, not for batches enqueued after it.

    Parameters
    ----------
    batch
        The batch.
    refused
        Its items that were refused so far.
    slot
        Where the peaks of the batch's events will be; None if they are all refused.
    preprocess
        What its pixels went through, and the peaks' way back.
    """

    def __init__(
        self,
        batch: EventBatch,
        refused: list[Refusal],
        slot: Slot | None = None,
        preprocess: Preprocess | None = None,
    ) -> None:
        self._batch = batch
        self._refused = refused
        self._slot = slot
        self._preprocess = preprocess
        self._result: PeakBatch | None = None

    def done(self) -> bool:
        """Whether the device has finished this batch, so that `result` will not wait for it."""
        return self._result is not None or self._slot is None or self._slot.done()

    def result(self) -> PeakBatch:
        """Wait for this batch and return what became of each of its events."""
        if self._result is None:
            self._result = PeakBatch(self._results(), self._refused)
            self._slot = None  # it belongs to another batch now
        return self._result

    def _results(self) -> list[Result]:
        if self._slot is None or self._preprocess is None:
            return []
        found = self._slot.result()
        events = self._batch.events
        _, panels, height, width = self._batch.images_BPHW.shape
        shape_PHW = (panels, height, width)
        prepared_panels = self._preprocess.output_shape(shape_PHW)[0]
        peaks_of_events = found.table.split(prepared_panels, len(events))
        results = []
        last: Bits | None = None
        for k, (event, peaks) in enumerate(zip(events, peaks_of_events, strict=True)):
            original, _ = self._preprocess.to_original(peaks, shape_PHW)
            if found.bad_pixels[k]:
                # Wings around a masked core have their centroid on it.
                original = original[~_on_bad(original, found.bad_bits_BK[k], shape_PHW)]
            if found.outliers[k]:
                self._preprocess.outlier_report.add(event.id, found.outliers[k])
            bits = found.bad_bits_BK[k].copy() if found.bad_pixels[k] else _NO_BITS
            # Most masks are those of the event before: kept and pickled once.
            if last is not None and np.array_equal(bits, last):
                bits = last
            last = bits
            results.append(
                Result(
                    event.id,
                    event.image,
                    original,
                    event.photon_energy,
                    found.bad_pixels[k],
                    event.put_at,
                    bits,
                    self._preprocess.validity.saturation,
                )
            )
        return results


class Ring:
    """The batches under way on a device, at most so many at once.

    Parameters
    ----------
    device
        Where they are.
    size
        Most batches under way.
    forward
        Enqueues preprocessing and network for pixels on the device.
    preprocess
        The peaks' way back to the original frame.
    """

    def __init__(
        self,
        device: torch.device,
        size: int,
        forward: Callable[[Tensor, Tensor | None], NetworkOutput],
        preprocess: Preprocess,
    ) -> None:
        self._forward, self._preprocess = forward, preprocess
        # In the order in which they are used again.
        self._slots: deque[tuple[Slot, PendingPeaks | None]] = deque(
            (GpuSlot(device) if device.type == "cuda" else CpuSlot(), None) for _ in range(size)
        )

    def submit(self, batch: EventBatch) -> PendingPeaks:
        """Enqueue a batch; waits for the oldest one if all slots are under way."""
        slot, before = self._slots[0]
        if before is not None:
            before.result()
        with stage("h2d"):
            counts_BPHW, bad_bits_BK = slot.upload(batch)
        output = self._forward(counts_BPHW, bad_bits_BK)
        with stage("peaks"):
            slot.find(output)
        pending = PendingPeaks(batch, list(batch.refused), slot, self._preprocess)
        self._slots.rotate(-1)
        self._slots[-1] = slot, pending
        return pending
