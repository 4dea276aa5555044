"""Work under way on the device, as a handle."""

from __future__ import annotations

from collections.abc import Callable

from peaknet_predict.peaks import PeakTable
from peaknet_predict.preprocess import Preprocess
from peaknet_predict.types import EventBatch, PeakBatch, Refusal, Result


class PendingPeaks:
    """What `PeakNetModule.predict_step` returns: work under way on the device.

    Asking for the result waits for this batch alone, not for batches enqueued after it.
    """

    def __init__(self, batch: EventBatch, refused: list[Refusal]) -> None:
        self._batch = batch
        self._refused = refused
        self._preprocess: Preprocess | None = None
        self._is_done: Callable[[], bool] = lambda: True
        self._find: Callable[[], tuple[PeakTable, list[int]]] | None = None
        self._result: PeakBatch | None = None

    def expect(
        self,
        preprocess: Preprocess,
        find: Callable[[], tuple[PeakTable, list[int]]],
        is_done: Callable[[], bool] = lambda: True,
    ) -> None:
        """Say where the result will come from: ``find`` returns peaks and bad pixels per event."""
        self._preprocess, self._find, self._is_done = preprocess, find, is_done

    def done(self) -> bool:
        """Whether the device has finished this batch, so that `result` will not wait for it."""
        return self._result is not None or self._is_done()

    def result(self) -> PeakBatch:
        """Wait for this batch and return what became of each of its events."""
        if self._result is None:
            self._result = PeakBatch(self._results(), self._refused)
            self._find = None  # lets go of the device's buffers
        return self._result

    def _results(self) -> list[Result]:
        if self._find is None or self._preprocess is None:
            return []
        table, bad_pixels = self._find()
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
