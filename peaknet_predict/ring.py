"""What one batch under way on a GPU occupies: its pixels there, its peaks' table, its events.

A ring of such slots is what bounds the work in flight. Each has memory of its own, so that the copy
of one batch, the network on the next and the peaks of a third never wait for each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from peaknet_predict.peaks import PeakTable
from peaknet_predict.preprocess import Prepared

if TYPE_CHECKING:
    from peaknet_predict.peaks.finder import PeakFinder, PendingTable

_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


class Slot:
    """Memory of one batch on one GPU; used by one batch after another.

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
        self._form: tuple[int, ...] = ()
        self._pending: PendingTable | None = None

    def upload(self, images_BPHW: Tensor) -> Tensor:
        """Copy pixels (B, P, H, W) to the GPU beside whatever it computes; the copy's tensor.

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

    def find(self, logits_NCHW: Tensor, stride: Literal[1, 4], prepared: Prepared) -> None:
        """Enqueue peak finding on logits at ``1 / stride`` of the resolution, and its way back."""
        from peaknet_predict.peaks.finder import PeakFinder

        panels, _, height, width = prepared.images_N1HW.shape
        if self._finder is None or self._form != (panels, height, width):
            self._finder = PeakFinder(panels, height, width, device=self._device)
            self._form = (panels, height, width)
        if len(self._bad_pixels_B) != len(prepared.bad_pixels_B):
            self._bad_pixels_B = torch.empty_like(
                prepared.bad_pixels_B, device="cpu", pin_memory=True
            )
        # Before the table's own copy, whose event then covers both.
        self._bad_pixels_B.copy_(prepared.bad_pixels_B, non_blocking=True)
        self._pending = self._finder.enqueue(
            logits=logits_NCHW, upsampling=stride, valid=prepared.valid_N1HW[:, 0]
        )

    def done(self) -> bool:
        """Whether the batch's peaks are on the host."""
        return self._pending is None or self._pending.done()

    def result(self) -> tuple[PeakTable, list[int]]:
        """Wait for this slot's batch and return its peaks, and the bad pixels of each event."""
        assert self._pending is not None
        table = self._pending.table()
        self._pending = None
        return table, self._bad_pixels_B.tolist()
