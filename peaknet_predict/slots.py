"""What one batch under way occupies on a device: pixels, masks, peaks' table.

On a GPU each slot has memory of its own, so that the copy of one batch, the network on the next and
the peaks of a third never wait for each other.

Shape legend: B events, P panels of an event, N = B*P panels of a batch, H rows, W columns, K bytes
of a mask as bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from peaknet_predict.network_output import NetworkOutput
from peaknet_predict.peaks import PeakTable, find_peaks
from peaknet_predict.pixels import Bits
from peaknet_predict.preprocess import pack_masks
from peaknet_predict.types import EventBatch

if TYPE_CHECKING:
    from peaknet_predict.peaks.finder import PeakFinder, PendingTable


class Found(NamedTuple):
    """What the device found in a batch.

    Attributes
    ----------
    table
        Its peaks.
    bad_pixels, outliers, overflowed
        How many pixels of each event were left out, and how many of them as outliers; whether its
        logits are NaN or infinite (1) or not (0).
    bad_bits_BK
        (B, K) uint8, which ones; the memory is used again for the next batch.
    """

    table: PeakTable
    bad_pixels: list[int]
    outliers: list[int]
    overflowed: list[int]
    bad_bits_BK: Bits


class Slot(Protocol):
    """What one batch under way occupies; used by one batch after another."""

    def upload(self, batch: EventBatch) -> tuple[Tensor, Tensor | None]:
        """Bring pixels (B, P, H, W), and those declared bad as bits (B, K), to the device."""

    def find(self, output: NetworkOutput, joined_NHW: Tensor | None = None) -> None:
        """Begin to find the peaks in what the network gave.

        Parameters
        ----------
        output
            What it gave.
        joined_NHW
            Where it was given patches of panels: which pixels of the whole panels are peak, see
            `Preprocess.join`. Peaks are then found in these.
        """

    def done(self) -> bool:
        """Whether `result` will return without waiting."""

    def result(self) -> Found:
        """Wait for this slot's batch and return what was found in it."""


class CpuSlot:
    """A batch on the CPU, where everything has been computed by the time peaks are fetched."""

    def __init__(self) -> None:
        self._is_peak_NHW = torch.zeros(0, 0, 0, dtype=torch.bool)
        self._counts_3B = torch.zeros(3, 0, dtype=torch.int64)
        self._bad_bits_BK = torch.zeros(0, 0, dtype=torch.uint8)

    def upload(self, batch: EventBatch) -> tuple[Tensor, Tensor | None]:
        """Return pixels and bits as they are: they are on the device already."""
        return batch.images_BPHW, _declared_bits(batch)

    def find(self, output: NetworkOutput, joined_NHW: Tensor | None = None) -> None:
        """Keep the class map; peaks are found when somebody asks for them."""
        self._is_peak_NHW = output.is_peak() if joined_NHW is None else joined_NHW
        self._counts_3B = _counts(output)
        self._bad_bits_BK = pack_masks(output.prepared.bad_BPHW)

    def done(self) -> bool:
        """Whether `result` will return without waiting: always."""
        return True

    def result(self) -> Found:
        """Return what was found in this slot's batch."""
        table = find_peaks(self._is_peak_NHW)
        return _found(table, self._counts_3B, self._bad_bits_BK)


_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


class GpuSlot:
    """Memory of one batch on one GPU: its pixels there, its peaks' table, its events.

    The caller may use it again once the previous batch has been fetched with `result`.

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
        self._counts_3B = torch.empty(3, 0, dtype=torch.int64)
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

    def find(self, output: NetworkOutput, joined_NHW: Tensor | None = None) -> None:
        """Enqueue peak finding, and the way of what is found to the host."""
        from peaknet_predict.peaks.finder import PeakFinder

        prepared = output.prepared
        valid_NHW = prepared.valid_N1HW[:, 0]
        panels, height, width = (valid_NHW if joined_NHW is None else joined_NHW).shape
        finder = self._finder
        if finder is None or (finder.max_panels, finder.height, finder.width) != (
            panels,
            height,
            width,
        ):
            finder = self._finder = PeakFinder(panels, height, width, device=self._device)
        # Before the table's own copy, whose event then covers all three.
        self._counts_3B = _copy_to_host(_counts(output), self._counts_3B)
        self._bad_bits_BK = _copy_to_host(pack_masks(prepared.bad_BPHW), self._bad_bits_BK)
        if joined_NHW is None:
            self._pending = finder.enqueue(
                logits=output.logits_NCHW, upsampling=output.stride, valid=valid_NHW
            )
        else:
            self._pending = finder.enqueue(class_map=joined_NHW)

    def done(self) -> bool:
        """Whether the batch's peaks are on the host."""
        return self._pending is None or self._pending.done()

    def result(self) -> Found:
        """Wait for this slot's batch and return what was found in it."""
        assert self._pending is not None
        table = self._pending.table()
        self._pending = None
        return _found(table, self._counts_3B, self._bad_bits_BK)


def _counts(output: NetworkOutput) -> Tensor:
    """Return what `Found` says in numbers for each event, (3, B) int64."""
    prepared = output.prepared
    return torch.stack([prepared.bad_pixels_B, prepared.outliers_B, output.overflowed().long()])


def _found(table: PeakTable, counts_3B: Tensor, bad_bits_BK: Tensor) -> Found:
    bad_pixels, outliers, overflowed = counts_3B.tolist()
    return Found(table, bad_pixels, outliers, overflowed, bad_bits_BK.numpy())


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
