"""Batches under way on a device: a handle to each one's peaks, and the memory that it occupies.

A ring of slots bounds the work in flight. On a GPU each slot has memory of its own, so that the
copy of one batch, the network on the next and the peaks of a third never wait for each other.

Shape legend: B events, P panels of an event, N = B*P panels of a batch, H rows, W columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from peaknet_predict.forward import NetworkOutput, stage
from peaknet_predict.peaks import PeakTable, find_peaks
from peaknet_predict.preprocess import Preprocess
from peaknet_predict.types import EventBatch, PeakBatch, Refusal, Result

if TYPE_CHECKING:
    from peaknet_predict.peaks.finder import PeakFinder, PendingTable


class Slot(Protocol):
    """What one batch under way occupies; used by one batch after another."""

    def upload(self, images_BPHW: Tensor) -> Tensor:
        """Bring pixels (B, P, H, W) to the device."""

    def find(self, output: NetworkOutput) -> None:
        """Begin to find the peaks in what the network gave."""

    def done(self) -> bool:
        """Whether `result` will return without waiting."""

    def result(self) -> tuple[PeakTable, list[int]]:
        """Wait for this slot's batch; its peaks, and the bad pixels of each event."""


class CpuSlot:
    """A batch on the CPU, which has computed everything by the time it is asked for peaks."""

    def __init__(self) -> None:
        self._is_peak_NHW = torch.zeros(0, 0, 0, dtype=torch.bool)
        self._bad_pixels: list[int] = []

    def upload(self, images_BPHW: Tensor) -> Tensor:
        """Return the pixels: they are where they are needed."""
        return images_BPHW

    def find(self, output: NetworkOutput) -> None:
        """Keep the class map; peaks are found when somebody asks for them."""
        class_map_NHW = output.logits_NCHW.softmax(1).argmax(1)
        self._is_peak_NHW = (class_map_NHW != 0) & output.prepared.valid_N1HW[:, 0]
        self._bad_pixels = output.prepared.bad_pixels_B.tolist()

    def done(self) -> bool:
        """Whether `result` will return without waiting: always."""
        return True

    def result(self) -> tuple[PeakTable, list[int]]:
        """Return this slot's peaks, and the bad pixels of each event."""
        return find_peaks(self._is_peak_NHW), self._bad_pixels


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
        self._bad_pixels_B = torch.empty(0, dtype=torch.int64).pin_memory()
        self._finder: PeakFinder | None = None
        self._pending: PendingTable | None = None

    def upload(self, images_BPHW: Tensor) -> Tensor:
        """Copy pixels to the GPU beside whatever it computes; the copy's tensor.

        The current stream waits for the copy, the caller does not, if the pixels are pinned.
        """
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
            self._copied.record(self._copy_stream)
        current.wait_event(self._copied)
        return self._images_BPHW

    def find(self, output: NetworkOutput) -> None:
        """Enqueue peak finding, and the peaks' way to the host."""
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
        if len(self._bad_pixels_B) != len(prepared.bad_pixels_B):
            self._bad_pixels_B = torch.empty_like(
                prepared.bad_pixels_B, device="cpu", pin_memory=True
            )
        # Before the table's own copy, whose event then covers both.
        self._bad_pixels_B.copy_(prepared.bad_pixels_B, non_blocking=True)
        self._pending = finder.enqueue(
            logits=output.logits_NCHW, upsampling=output.stride, valid=prepared.valid_N1HW[:, 0]
        )

    def done(self) -> bool:
        """Whether the batch's peaks are on the host."""
        return self._pending is None or self._pending.done()

    def result(self) -> tuple[PeakTable, list[int]]:
        """Wait for this slot's batch; its peaks, and the bad pixels of each event."""
        assert self._pending is not None
        table = self._pending.table()
        self._pending = None
        return table, self._bad_pixels_B.tolist()


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
        The way back to the original frame.
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
        table, bad_pixels = self._slot.result()
        events = self._batch.events
        _, panels, height, width = self._batch.images_BPHW.shape
        shape_PHW = (panels, height, width)
        prepared_panels = self._preprocess.output_shape(shape_PHW)[0]
        results = []
        for event, peaks, bad in zip(
            events, table.split(prepared_panels, len(events)), bad_pixels, strict=False
        ):
            original, _ = self._preprocess.to_original(peaks, shape_PHW)
            results.append(
                Result(event.id, event.image, original, event.photon_energy, bad, event.put_at)
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
        forward: Callable[[Tensor], NetworkOutput],
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
            images_BPHW = slot.upload(batch.images_BPHW)
        output = self._forward(images_BPHW)
        with stage("peaks"):
            slot.find(output)
        pending = PendingPeaks(batch, list(batch.refused), slot, self._preprocess)
        self._slots.rotate(-1)
        self._slots[-1] = slot, pending
        return pending
