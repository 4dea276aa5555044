"""The device side of `PeakFinder`: its memory, and the kernels of a batch in order.

Shape legend: N panels of a batch, H rows and W columns of a panel, K peaks of a panel for which a
table has room.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from peaknet_predict.peaks.finder_input import FinderInput
from peaknet_predict.peaks.kernels import variants

MAX_SIDE = 65535
"""Most rows and columns of a panel: 32 bits number its pixels."""

THREADS_TO_PACK = 256
THREADS_TO_LABEL = 1024  # kThreads of label.cu

# Memory for every 32 pieces, struct Panel of label.cu: one word of `roots`, one of `ranks`, and
# parents of 16 bits in shared memory, of 32 in global memory.
GROUP = 32
SHARED_GROUP_BYTES = 4 * 2 + 2 * GROUP
LARGE_GROUP_WORDS = 2 + GROUP

ROOM_BYTES = 192 * 2**20
"""Most device memory for panels with too many pieces; panels without room wait for it."""

GEOMETRY, WITH_INTENSITY = 3, 5
"""Columns of a table: num_pixels, sum_y, sum_x; then intensity_sum and intensity_max."""


class Labeller:
    """Bit masks of a batch of panels, and room to label them; see `PeakFinder` for parameters."""

    def __init__(
        self, max_panels: int, height: int, width: int, device: torch.device, max_pieces: int | None
    ) -> None:
        # Imported here: CuPy may not be installed where peaks are found on the CPU.
        from peaknet_predict import cuda

        self._cuda = cuda
        self._kernels = variants.load(device.index)
        self.height, self.width = height, width
        self._row_words = -(-width // 32)
        if max(height, width) > MAX_SIDE:
            raise ValueError(f"panels of {height} x {width} are larger than {MAX_SIDE} a side")
        if max_panels * height * self._row_words * 4 >= 2**32 - THREADS_TO_PACK:
            raise ValueError(f"{max_panels} panels of {height} x {width} are too many at once")

        self._strips = -(-height // 2)
        self._most_pieces = self._strips * -(-width // 2)
        fitting = min(2**16, self._kernels.shared_bytes // SHARED_GROUP_BYTES * GROUP)
        wanted = fitting if max_pieces is None else max(1, max_pieces)
        self._max_pieces = min(fitting, wanted, self._most_pieces)
        room_words = LARGE_GROUP_WORDS * -(-self._most_pieces // GROUP)
        self._rooms = min(max_panels, max(1, ROOM_BYTES // (4 * room_words)))
        if self._max_pieces == self._most_pieces:
            self._rooms = 0  # no panel can have too many

        def memory(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        # 32 pixels a word, words of two rows side by side; the row below an odd height stays zero.
        self.mask_N = memory(max_panels, self._strips, self._row_words, 2)
        self._room = memory(self._rooms, room_words)
        self._too_large_N = memory(max_panels)
        cells = self._strips * self._row_words
        self._scratch = memory(max_panels, 3 * cells + 2 + cells % 2)  # for each slot

    def pack(self, given: FinderInput, stream: torch.cuda.Stream) -> None:
        """Enqueue what makes the mask."""
        cuda, source, valid = self._cuda, given.source, given.valid
        row_bytes = 4 * self._row_words
        num_panels = source.shape[0]
        arguments = [cuda.pointer(source), *map(np.int64, source.stride())]
        rows = num_panels * self.height
        if given.class_map is not None:
            name = f"classes_{source.element_size()}_{variants.layout_of(source)}"
        elif given.upsampling == 4:
            name = f"upsampled_{variants.FLOATS[source.dtype]}"
            rows //= 4  # a thread makes four rows
        else:
            name = f"logits_{variants.FLOATS[source.dtype]}_{variants.layout_of(source)}"
            arguments.append(np.int32(source.shape[1]))
        arguments += map(np.uint32, (num_panels, self.height, self.width, row_bytes))
        strides = (0, 0, 0) if valid is None else valid.stride()
        arguments += [cuda.pointer(valid), *map(np.int64, strides), cuda.pointer(self.mask_N)]
        blocks = -(-rows * row_bytes // THREADS_TO_PACK)
        kernel = self._kernels.by_name[f"peaknet_pack_{name}"]
        cuda.launch(kernel, (blocks,), THREADS_TO_PACK, arguments, stream)

    def label(
        self,
        stream: torch.cuda.Stream,
        num_slots: int,
        *,
        max_peaks: int,
        counts: Tensor,
        table: Tensor,
        largest: Tensor,
        pixels_NHW: Tensor | None,
        panel_of_slot: Tensor | None = None,
    ) -> None:
        """Enqueue what makes the table of the mask's panels.

        Parameters
        ----------
        stream
            Where to enqueue it.
        num_slots, panel_of_slot
            How many panels to label into as many slots, and (int32) which; by default all in order.
        max_peaks
            K: how many peaks a slot has room for.
        counts
            Memory for one int32 a slot: gets the true number of peaks.
        table
            Memory for (slots, columns, K) int64: gets the columns of `GEOMETRY`, or those of
            `WITH_INTENSITY` if there are pixels, the last two as the bits of float64. Rows beyond
            the number of peaks are left as they are, and so is a slot with more than K peaks.
        largest
            Scratch memory for (slots, K) int64.
        pixels_NHW
            Raw pixels or None.
        """
        cuda = self._cuda

        def arguments(max_pieces: int) -> list[Any]:
            pixel_dtype = 0 if pixels_NHW is None else variants.PIXEL_DTYPES[pixels_NHW.dtype]
            strides = (0, 0, 0) if pixels_NHW is None else pixels_NHW.stride()
            return [
                cuda.pointer(self.mask_N),
                *map(np.uint32, (self._strips, self._row_words)),
                cuda.pointer(panel_of_slot),
                *map(np.uint32, (max_peaks, max_pieces)),
                *cuda.pointers(counts, table, largest, self._too_large_N, self._scratch),
                cuda.pointer(pixels_NHW),
                np.int32(pixel_dtype),
                *map(np.int64, strides),
            ]

        cuda.launch(
            self._kernels.by_name["peaknet_label"],
            (num_slots,),
            THREADS_TO_LABEL,
            arguments(self._max_pieces),
            stream,
            SHARED_GROUP_BYTES * -(-self._max_pieces // GROUP),
        )
        if self._rooms:
            cuda.launch(
                self._kernels.by_name["peaknet_label_large"],
                (min(num_slots, self._rooms),),
                THREADS_TO_LABEL,
                [*arguments(self._most_pieces), np.uint32(num_slots), cuda.pointer(self._room)],
                stream,
            )
