"""Batches under way on a device: the ring of slots that bounds them, and a handle to each.

Shape legend: B events, P panels of an event, N = B*P panels of a batch, H rows, W columns, K bytes
of a mask as bits, M peaks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peaknet_predict.first_refusals import ALIKE, BlamelessError, FirstRefusals
from peaknet_predict.forward import stage
from peaknet_predict.network_output import NetworkOutput, NetworkOutputError
from peaknet_predict.pixels import Bits, count_unmarked_gaps
from peaknet_predict.preprocess import Preprocess
from peaknet_predict.preprocess.base import event_shape
from peaknet_predict.slots import CpuSlot, Found, GpuSlot, Slot
from peaknet_predict.types import Event, EventBatch, PeakBatch, Peaks, Refusal, Result

log = logging.getLogger(__name__)

_OVERFLOWED = "the network's logits are NaN or infinite"
_FLOODED = "the network calls nearly all of its pixels peak"
_FLOOD = 0.97  # of an event's pixels; Bragg peaks cover a few in a hundred, at most
_BLIND = "no pixel of the image is finite"
_NO_BITS: Bits = np.empty(0, np.uint8)


class PendingPeaks:
    """A handle to the peaks of one batch, as `PeakNetModule.predict_step` returns it.

    Asking for the result waits for this batch alone, not for batches enqueued after it.

    Parameters
    ----------
    batch
        The batch.
    refused
        Its items that were refused so far.
    first
        Whether they are theirs to answer for: until that is settled, this handle is not done.
    slot
        Where the peaks of the batch's events will be; None if they are all refused.
    collect
        Makes results and refusals of what is found.
    """

    def __init__(
        self,
        batch: EventBatch,
        refused: list[Refusal],
        first: FirstRefusals,
        slot: Slot | None = None,
        collect: Callable[[EventBatch, Found], PeakBatch] | None = None,
    ) -> None:
        # Without events to find peaks in, its pixels need not be kept.
        self._batch = None if slot is None else batch
        self._refused = refused
        self._first = first
        self._slot = slot
        self._collect = collect
        self._result: PeakBatch | None = None

    def done(self) -> bool:
        """Whether the device has finished this batch, so that `result` will not wait for it."""
        if self._refused and self._first.holds:
            return False
        return self._result is not None or self._slot is None or self._slot.done()

    def result(self) -> PeakBatch:
        """Wait for this batch and return what became of each of its events.

        Raises
        ------
        NetworkOutputError
            If the network has given no sound logits so far: NaN, infinite, or peak everywhere.
        UnfitStreamError
            If every event so far is refused the same way.
        """
        if self._refused:
            self._first.decide()
        if self._result is None:
            found = PeakBatch([])
            if self._slot is not None and self._collect is not None and self._batch is not None:
                found = self._collect(self._batch, self._slot.result())
            self._result = PeakBatch(found.results, self._refused + found.refused)
            self._slot = None  # it belongs to another batch now
            self._batch = None  # with its copy of the pixels
        return self._result


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
    first
        Is told that an event can be processed.
    provenance
        Of all results, see `Result.provenance`.
    """

    def __init__(
        self,
        device: torch.device,
        size: int,
        forward: Callable[[Tensor, Tensor | None], NetworkOutput],
        preprocess: Preprocess,
        first: FirstRefusals,
        provenance: str,
    ) -> None:
        self._forward, self._preprocess, self._first = forward, preprocess, first
        self._provenance = provenance
        self._were_sound, self._num_unsound, self._num_blind = False, 0, 0
        self._looked_for_gaps = False
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
            joined_NHW = None
            if self._preprocess.cuts:
                joined_NHW = self._preprocess.join(output.is_peak(), event_shape(counts_BPHW))
            slot.find(output, joined_NHW)
        if batch.events:
            self._first.settle()
        pending = PendingPeaks(batch, list(batch.refused), self._first, slot, self._collect)
        self._slots.rotate(-1)
        self._slots[-1] = slot, pending
        return pending

    def _collect(self, batch: EventBatch, found: Found) -> PeakBatch:
        """Bring the peaks of a batch back to its events' original frames."""
        events = batch.events
        _, panels, height, width = batch.images_BPHW.shape
        shape_PHW = (panels, height, width)
        cuts = self._preprocess.cuts
        found_panels = panels if cuts else self._preprocess.output_shape(shape_PHW)[0]
        peaks_of_events = found.table.split(found_panels, len(events))
        event_M = found.table.panel // found_panels
        peak_pixels = np.bincount(event_M, found.table.num_pixels, minlength=len(events))
        collected = PeakBatch([])
        if events and not self._looked_for_gaps:
            self._looked_for_gaps = True
            self._warn_of_gaps(events[0])
        blind: list[Refusal] = []
        last: Bits | None = None
        for k, (event, peaks) in enumerate(zip(events, peaks_of_events, strict=True)):
            if found.overflowed[k]:
                collected.refused.append(Refusal(event.id, _OVERFLOWED))
                continue
            if found.bad_pixels[k] >= event.image.size:
                blind.append(Refusal(event.id, _BLIND))
                continue
            if peak_pixels[k] > _FLOOD * (event.image.size - found.bad_pixels[k]):
                collected.refused.append(Refusal(event.id, _FLOODED))
                continue
            # Of patches put together, peaks are found in the original frame.
            original = peaks if cuts else self._preprocess.to_original(peaks, shape_PHW)[0]
            if found.bad_pixels[k]:
                # Wings around a masked core have their centroid on it.
                original = original[~_on_bad(original, found.bad_bits_BK[k], shape_PHW)]
            if found.outliers[k]:
                self._preprocess.outlier_report.add(event.id, found.outliers[k])
            bits = found.bad_bits_BK[k].copy() if found.bad_pixels[k] else _NO_BITS
            # Most masks are those of the event before: kept and pickled once.
            if last is not None and np.array_equal(bits, last):
                bits = last
            elif bits.size:
                self._preprocess.saturation_report.add(event, bits, self._marks(event))
            last = bits
            collected.results.append(
                Result(
                    event.id,
                    event.image,
                    original,
                    event.photon_energy,
                    found.bad_pixels[k],
                    event.put_at,
                    bits,
                    self._preprocess.validity.saturation,
                    self._provenance,
                    event.taken_at,
                )
            )
        self._check_sound(collected)
        self._check_sighted(blind)
        collected.refused += blind  # no fault of the network's
        return collected

    def _marks(self, event: Event) -> tuple[float, ...]:
        dtype = event.image.dtype.newbyteorder("=")
        return self._preprocess.validity.marks(torch.from_numpy(np.empty(0, dtype)).dtype)

    def _warn_of_gaps(self, event: Event) -> None:
        gaps = (
            0
            if event.bad_bits is not None
            else count_unmarked_gaps(event.image, self._marks(event))
        )
        if gaps:
            log.warning(
                "event %s has %d pixels of -1 or -2, and nothing below: gaps and bad pixels of a "
                "photon counter? They count as measured. If they are not, set "
                "model.init_args.bad_values: [-1, -2], or give a mask",
                *(event.id, gaps),
            )

    def _check_sound(self, collected: PeakBatch) -> None:
        """Raise if no event so far has sound logits: it is the network's fault, not the events'."""
        self._were_sound |= bool(collected.results)
        self._num_unsound += len(collected.refused)
        if collected.refused and self._num_unsound > 1 and not self._were_sound:
            raise NetworkOutputError(
                f"{collected.refused[-1].reason}, for each of the first {self._num_unsound} "
                "events: are these the weights for this network and preprocessing, is class 0 "
                "background, and do threshold and trainer.precision suit it?"
            )

    def _check_sighted(self, blind: list[Refusal]) -> None:
        """Raise if no event so far has had a good pixel: the masks are at fault."""
        self._num_blind += len(blind)
        if blind and self._num_blind >= ALIKE and not self._were_sound:
            raise BlamelessError(
                f"{_BLIND}, for each of the first {self._num_blind} events: are good and bad the "
                "wrong way round in a mask, or do bad_values or a geometry's limits call every "
                "pixel bad? Correct that, and start again; these events go back"
            )


def _on_bad(peaks_M3: Peaks, bits: Bits, shape_PHW: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    """Return which peaks have their centroid on a bad pixel, (M,) bool."""
    pixels_3M = np.rint(peaks_M3).astype(np.int64).T
    flat_M = np.ravel_multi_index(tuple(pixels_3M), shape_PHW)
    on_bad_M: npt.NDArray[np.bool_] = (bits[flat_M // 8] >> (flat_M % 8) & 1) != 0
    return on_bad_M
