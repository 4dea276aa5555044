"""Peak finding on a CUDA device without waiting: from logits to a table on its way to the host.

Two or three kernels and one copy for a batch, whatever it holds; no label image exists, and the
host decides nothing in between:

1. a bit mask, one bit for each pixel, from logits, low-resolution logits or a class map;
2. components of the mask and their sums, one block for each panel, in shared memory (`label.cu`);
3. where panels are larger than 512 x 512 or so, the same in global memory for those too crowded
   for shared memory, which ends at once if there is none;
4. the copy, on a stream of its own, so that the next batch's kernels do not queue behind it.

Every number is an integer sum, hence the same in any order, and a centroid is one float64 division
on the host: tables equal those of `oracle` bit for bit.

Shape legend: N panels of a batch, C classes, H rows and W columns of a panel, M peaks, K peaks of a
panel for which the table has room.
"""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peaknet_predict.peaks.finder_input import FinderInput
from peaknet_predict.peaks.labeller import GEOMETRY, WITH_INTENSITY, Labeller
from peaknet_predict.peaks.table import PeakTable

log = logging.getLogger(__name__)

RECOVERY_BYTES = 256 * 2**20
"""Most device memory for the tables of panels with more than K peaks, at a time."""


class PendingTable:
    """A table of peaks on its way to the host, as `PeakFinder.enqueue` returns it."""

    def __init__(self, finder: PeakFinder, num_panels: int, pixels_NHW: Tensor | None) -> None:
        self._finder = finder
        self._num_panels = num_panels
        self._pixels_NHW = pixels_NHW  # kept for `table`, which may have to read them again
        self._table: PeakTable | None = None

    def done(self) -> bool:
        """Whether `table` will return without waiting (unless it has to recover peaks)."""
        return self._table is not None or self._finder._is_copied()

    def table(self) -> PeakTable:
        """Wait for this batch alone and return its peaks, in host memory.

        A panel with more peaks than `PeakFinder` keeps room for is labelled again with enough room:
        rare, slow and complete.
        """
        if self._table is None:
            self._table = self._finder._collect(self._num_panels, self._pixels_NHW)
            self._pixels_NHW = None
            self._finder._pending = None
        return self._table


class PeakFinder:
    """Finds the peaks of one batch at a time on a CUDA device; nothing is allocated for a batch.

    One finder serves one slot of a pipeline. Finders share nothing that changes: several may be
    under way on streams of their own.

    Parameters
    ----------
    max_panels
        Most panels of a batch (N).
    height, width
        Size of a panel at full resolution, up to 65535 each.
    max_peaks_per_panel
        K: how many peaks of a panel the table has room for. Panels with more are counted to the end
        and labelled again when the table is fetched.
    device
        A CUDA device.
    max_pieces
        How many pieces of a panel (see `label.cu`) are labelled in shared memory; panels with more
        take global memory. By default as many as fit, 65,536 on a GPU with 227 KiB a block: all
        that a panel of 512 x 512 pixels can have. With 50 peaks it has about 200.
    """

    def __init__(
        self,
        max_panels: int,
        height: int,
        width: int,
        max_peaks_per_panel: int = 256,
        device: torch.device | str | int = "cuda",
        max_pieces: int | None = None,
    ) -> None:
        if min(max_panels, height, width, max_peaks_per_panel) < 1:
            raise ValueError("a finder needs at least one panel, row, column and peak")
        self.device = torch.empty(0, device=device).device  # with its index
        if self.device.type != "cuda":
            raise ValueError(f"PeakFinder works on a CUDA device, not on {self.device}")
        self.max_panels, self.height, self.width = max_panels, height, width
        self.max_peaks_per_panel = max_peaks_per_panel
        self._labeller = Labeller(max_panels, height, width, self.device, max_pieces)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)

        self._largest = zeros(max_panels, max_peaks_per_panel)
        # Counts (int32, two a word), then the table: one piece of memory for one copy.
        self._count_words = (max_panels + 1) // 2
        self._out = zeros(self._count_words + max_panels * WITH_INTENSITY * max_peaks_per_panel)
        self._out_host = torch.zeros(self._out.shape, dtype=torch.int64, pin_memory=True)
        self._copy_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._labelled = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pending: PendingTable | None = None
        # The zeros above were written on this thread's stream, batches may come on any.
        torch.cuda.synchronize(self.device)

    def enqueue(
        self,
        *,
        logits: Tensor | None = None,
        class_map: Tensor | None = None,
        upsampling: Literal[1, 4] = 1,
        valid: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> PendingTable:
        """Enqueue the search for the peaks of a batch on torch's current stream.

        The host does not wait and decides nothing by the data. All tensors are on the finder's
        device, with any strides; contiguous and, for two classes, channels_last logits are fastest.

        Parameters
        ----------
        logits
            (N, C, H, W) bfloat16, float16 or float32, at least two classes: a pixel belongs to a
            peak where ``logits.softmax(1).argmax(1) != 0`` on a CUDA device, with its rounding and
            its ties. Hence pixels with a NaN or +inf in any class do not.
        class_map
            Instead of logits: (N, H, W) integers or booleans; not zero = peak.
        upsampling
            4: the logits are (N, 2, H/4, W/4) and stand for what
            ``F.interpolate(logits, scale_factor=4, mode="bilinear")`` makes of them, rounded to
            their dtype as it does; the large logits are never in memory.
        valid
            (N, H, W) bool or uint8; a pixel that is 0 here belongs to no peak.
        pixels
            (N, H, W) raw pixels, uint8 to int32, float32 or float64: the table gets the sum and the
            maximum of each peak. A view of larger images is fine. Must not be written to before
            `PendingTable.table` has returned.

        Returns
        -------
        PendingTable
            To be fetched before the next batch is enqueued with this finder.

        Raises
        ------
        RuntimeError
            If the table of the batch before has not been fetched.
        TypeError, ValueError
            If a tensor is not as described.
        """
        if self._pending is not None:
            raise RuntimeError(
                "the table of the batch before is not fetched yet: call its table(), or use one "
                "PeakFinder for each batch under way"
            )
        given = FinderInput(logits, class_map, upsampling, valid, pixels)
        given.check(self.max_panels, self.height, self.width, self.device)
        num_panels = given.source.shape[0]
        stream = torch.cuda.current_stream(self.device)
        # Whatever stream the batch before was on, its copy was the last to use this memory.
        stream.wait_event(self._copied)
        if num_panels:
            self._labeller.pack(given, stream)
            self._labeller.label(
                stream,
                num_panels,
                max_peaks=self.max_peaks_per_panel,
                counts=self._out,
                table=self._out[self._count_words :],
                largest=self._largest,
                pixels_NHW=pixels,
            )
        self._labelled.record(stream)
        self._copy_stream.wait_event(self._labelled)
        columns = GEOMETRY if pixels is None else WITH_INTENSITY
        used = self._count_words + num_panels * columns * self.max_peaks_per_panel
        with torch.cuda.stream(self._copy_stream):
            # The copy has a fixed size: copying only what is used would need its size on the host.
            # It takes 15 us for 128 panels, beside the next batch.
            self._out_host[:used].copy_(self._out[:used], non_blocking=True)
            self._copied.record(self._copy_stream)
        self._pending = PendingTable(self, num_panels, pixels)
        return self._pending

    def _is_copied(self) -> bool:
        return bool(self._copied.query())  # type: ignore[no-untyped-call]

    def _collect(self, num_panels: int, pixels_NHW: Tensor | None) -> PeakTable:
        """Wait for the copy and make the table of a batch."""
        self._copied.synchronize()
        capacity = self.max_peaks_per_panel
        columns = GEOMETRY if pixels_NHW is None else WITH_INTENSITY
        host = self._out_host.numpy()
        counts_N = host[: self._count_words].view(np.int32)[:num_panels].astype(np.int64)
        begin, size = self._count_words, num_panels * columns * capacity
        table_NCK = host[begin : begin + size].reshape(num_panels, columns, capacity)

        complete_N = counts_N <= capacity
        kept_NK = (np.arange(capacity) < counts_N[:, np.newaxis]) & complete_N[:, np.newaxis]
        panel_M = np.repeat(np.arange(num_panels), np.where(complete_N, counts_N, 0))
        sums_CM = table_NCK.transpose(1, 0, 2)[:, kept_NK]
        if not complete_N.all():
            crowded = np.flatnonzero(~complete_N)
            log.info(
                "%d of %d panels have more than %d peaks (up to %d): labelling them again",
                crowded.size,
                num_panels,
                capacity,
                counts_N.max(),
            )
            sums_CM = np.concatenate(
                [sums_CM, self._recover(crowded, counts_N[crowded], columns, pixels_NHW)], axis=1
            )
            panel_M = np.concatenate([panel_M, np.repeat(crowded, counts_N[crowded])])
            order = np.argsort(panel_M, kind="stable")
            panel_M, sums_CM = panel_M[order], sums_CM[:, order]
        return _to_table(panel_M, sums_CM)

    def _recover(
        self,
        panels: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        columns: int,
        pixels_NHW: Tensor | None,
    ) -> npt.NDArray[np.int64]:
        """Return the sums of all peaks of some panels, (columns, M); the mask is still there."""
        capacity = int(counts.max())
        at_once = max(1, RECOVERY_BYTES // (8 * (columns + 1) * capacity))
        stream = self._copy_stream  # behind the copy, hence behind the kernels that made the mask
        parts: list[npt.NDArray[np.int64]] = []
        with torch.cuda.stream(stream):
            for begin in range(0, panels.size, at_once):
                chunk = panels[begin : begin + at_once].astype(np.int32)
                panel_of_slot = torch.from_numpy(chunk).to(self.device)
                table = torch.zeros(
                    (chunk.size, columns, capacity), dtype=torch.int64, device=self.device
                )
                self._labeller.label(
                    stream,
                    chunk.size,
                    max_peaks=capacity,
                    counts=torch.zeros_like(panel_of_slot),
                    table=table,
                    largest=torch.zeros_like(table[:, 0]),
                    pixels_NHW=pixels_NHW,
                    panel_of_slot=panel_of_slot,
                )
                parts += [
                    sums[:, :count]
                    for sums, count in zip(table.cpu().numpy(), counts[begin:], strict=False)
                ]
        return np.concatenate(parts, axis=1)


def _to_table(panel_M: npt.NDArray[np.int64], sums_CM: npt.NDArray[np.int64]) -> PeakTable:
    num_pixels, sum_y, sum_x = sums_CM[:GEOMETRY]
    intensity = {}
    if len(sums_CM) == WITH_INTENSITY:
        # The device has written float64 into these columns.
        intensity_sum, intensity_max = sums_CM[GEOMETRY:].view(np.float64)
        intensity = {"intensity_sum": intensity_sum, "intensity_max": intensity_max}
    return PeakTable(
        panel=panel_M,
        y=sum_y / num_pixels,
        x=sum_x / num_pixels,
        num_pixels=num_pixels,
        **intensity,
    )
