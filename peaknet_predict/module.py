"""From a batch on the host to peaks: the steps on the device, as a Lightning module."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from peaknet_predict.first_refusals import FirstRefusals
from peaknet_predict.forward import ForwardPass
from peaknet_predict.in_flight import PendingPeaks, Ring
from peaknet_predict.models.provenance import Provenance, settings_of
from peaknet_predict.network_output import NetworkOutput
from peaknet_predict.preprocess import Preprocess, Transform, Validity, read_mask
from peaknet_predict.preprocess.validity import BadValues
from peaknet_predict.types import EventBatch, Refusal

log = logging.getLogger(__name__)


class PeakNetModule(L.LightningModule):
    """A segmentation network and what surrounds it, run by `Trainer.predict`.

    `peaknet_predict.training.module.PeakNetTraining` is the same with what `Trainer.fit` needs.

    Parameters
    ----------
    net
        Maps images (N, 1, H, W) to logits (N, C, H, W); class 0 is background, every other class
        is peak. A network whose ``forward`` also takes ``valid_N1HW`` is told which pixels are
        measurements: neither bad nor padding. A network with a method ``coarse_logits``
        that returns logits (N, 2, H/4, W/4), and the attribute ``coarse_stride`` of 4, is spared
        the bilinear enlargement to full resolution on a GPU: the peak finder interpolates.
        Where its ``check_shape(height, width)`` raises ValueError, the events are refused.
    preprocess
        Transforms of `peaknet_predict.preprocess`, in order.
    compile
        Compile preprocessing and network with `torch.compile`. The fast PeakNet is left as it is:
        little lies between its kernels, and compiling that would only delay the start.
    num_overlap
        Batches under way at once; `predict_step` waits only when there would be more.
    warmup_shapes
        (B, P, H, W) of the batches to come, before preprocessing, one for each size that batches
        may have: run on zeros before the first event is taken, so that no event waits for
        compilation. Other shapes are compiled when they first come.
    fast
        Run the fast PeakNet (docs/fast.md) wherever that is possible: for a `PeakNet` on a CUDA
        GPU, with precision ``bf16-mixed`` or ``bf16-true``. The log says which one runs, and why.
        Other networks, subclasses too, run as they are.
    weights
        Weight file for the network, whichever it is, see `peaknet_predict.models.load_weights`.
        Networks that load a file themselves, as `PeakNet` can, need none here; with both, this one
        counts.
    threshold
        The operating point: a pixel is peak where the log odds (the largest logit of a peak class
        minus that of background) exceed it. Higher lists fewer peaks, lower more. By default it is
        what the file given as ``weights`` asks for, else 0, where the largest logit decides.
    random_weights
        Predict although the network's parameters are random, to try something out. Otherwise that
        is an error, for the peaks would be random, too.
    bad_values
        Which values mark bad pixels. ``auto``: those of the images' dtype (docs/formats.md), the
        largest unsigned one, say. ``none``: no finite value. A list: these besides those of
        ``auto``, such as ``[-1, -2]`` for PILATUS.
    saturation
        Counts from which on a pixel is saturated. Its peak is listed all the same, and flagged.
    mask
        File with the detector's bad pixels: .npy, .npz, ``FILE.h5:/DATASET``, or a CrystFEL
        geometry file, whose masks and bad regions count. Masks that come with the events count in
        any case.
    mask_good, mask_bad
        Bits of the mask, as in a geometry file: a pixel is bad if it has any bit of ``mask_bad`` or
        lacks one of ``mask_good``. Without either any value but 0 is bad.

    Attributes
    ----------
    provenance
        Where the parameters come from, and the operating point that counts.

    Raises
    ------
    ValueError
        If an argument makes no sense, the weights do not fit the network, or the mask cannot be
        understood.
    OSError
        If there is no such weight file or mask.
    """

    def __init__(
        self,
        net: nn.Module,
        preprocess: list[Transform],
        compile: bool = False,
        num_overlap: int = 3,
        warmup_shapes: list[tuple[int, int, int, int]] | None = None,
        fast: bool = True,
        weights: str | None = None,
        threshold: float | None = None,
        random_weights: bool = False,
        bad_values: BadValues = "auto",
        saturation: float | None = None,
        mask: str | None = None,
        mask_good: int | None = None,
        mask_bad: int | None = None,
    ) -> None:
        super().__init__()
        if num_overlap < 1:
            raise ValueError(f"num_overlap is {num_overlap}; at least one batch is under way")
        self.net = net
        if mask is None and (mask_good is not None or mask_bad is not None):
            raise ValueError("mask_good and mask_bad are bits of a mask: give the mask, too")
        static = None if mask is None else read_mask(mask, mask_good, mask_bad)
        self.preprocess = Preprocess(preprocess, Validity(bad_values, static, saturation))
        pixels = {
            "preprocess": [{"class": type(one).__name__, **settings_of(one)} for one in preprocess],
            "bad_values": bad_values,
            "saturation": saturation,
            "mask": mask,
            "mask_good": mask_good,
            "mask_bad": mask_bad,
            "mask_sha256": None if static is None else static.sha256(),
        }
        self.provenance = Provenance(net, weights, threshold, random_weights, pixels)
        self.num_overlap = num_overlap
        self.warmup_shapes = warmup_shapes or []
        self._forward_pass = ForwardPass(net, self.preprocess, compile, fast)
        self._ring: Ring | None = None
        self._first = FirstRefusals()
        self._dtypes_seen: set[torch.dtype] = set()

    def setup(self, stage: str) -> None:
        """Make the fast network while the parameters are float32."""
        if stage == "predict":
            self.provenance.check()
            # Before Lightning rounds the parameters for bf16-true.
            self._forward_pass.prepare(
                self.trainer.strategy.root_device, str(self.trainer.precision)
            )

    def on_predict_start(self) -> None:
        """Choose how the network runs on the device, and warm up in the context of the loop."""
        self.provenance.show()
        self._forward_pass.start(self.device, str(self.trainer.precision))
        self._first = FirstRefusals()
        self._ring = self._new_ring()
        with self.trainer.precision_plugin.predict_step_context():
            for shape_BPHW in self.warmup_shapes:
                # Made like the batches to come: the loop is in inference mode, the data are not,
                # and compiled code tells the two apart.
                with torch.inference_mode(False):
                    zeros_BPHW = torch.zeros(shape_BPHW)
                self.predict_step(EventBatch(zeros_BPHW, [], []), 0, warm_up=True)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Leave events alone: `predict_step` moves the pixels itself, without waiting."""
        if isinstance(batch, EventBatch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def predict_step(
        self, batch: EventBatch, batch_idx: int, warm_up: bool = False
    ) -> PendingPeaks:
        """Enqueue one batch on the device and return a handle to its peaks.

        Events whose shape the preprocessing or the network cannot take are refused, each by name.

        Raises
        ------
        UnfitStreamError
            If they are the first ones, and none follows that can be processed.
        """
        if not batch.events and not warm_up:
            self._first.hold(batch.refused)
            if not batch.refused:
                self._first.decide()  # a reminder: a reader waits for what is held here
            return PendingPeaks(batch, list(batch.refused), self._first)
        shape_BPHW = tuple(batch.images_BPHW.shape)
        is_new = not self._forward_pass.has_seen(shape_BPHW)
        misfit = self._misfit(shape_BPHW) if is_new else None
        if misfit is not None:
            reasons = [
                Refusal(event.id, f"image of shape {event.image.shape} does not fit: {misfit}")
                for event in batch.events
            ]
            self._first.hold(batch.refused)
            self._first.hold(reasons, unfit=True)
            return PendingPeaks(batch, batch.refused + reasons, self._first)
        dtype = batch.images_BPHW.dtype
        if dtype not in self._dtypes_seen and not warm_up:
            declares = any(event.bad_bits is not None for event in batch.events)
            self._warn_of_masks(dtype, declares, first=not self._dtypes_seen)
            self._dtypes_seen.add(dtype)
        if self._ring is None:  # called without a Trainer
            self._ring = self._new_ring()
        with self._first_time(shape_BPHW) if is_new else contextlib.nullcontext():
            return self._ring.submit(batch)

    def _new_ring(self) -> Ring:
        return Ring(
            self.device,
            self.num_overlap,
            self._logits,
            self.preprocess,
            self._first,
            json.dumps(self.provenance.record()),
        )

    def _logits(self, counts_BPHW: Tensor, bad_bits_BK: Tensor | None = None) -> NetworkOutput:
        return self._forward_pass(counts_BPHW, bad_bits_BK).at_threshold(self.provenance.threshold)

    def _warn_of_masks(self, dtype: torch.dtype, declares: bool, first: bool) -> None:
        """Warn, before pixels of a dtype are judged, of what they would not be judged by."""
        validity = self.preprocess.validity
        contradiction = validity.contradiction(dtype)
        if contradiction is not None:
            log.warning("%s", contradiction)
        if first and validity.in_images and not declares:
            log.warning(
                "%s takes masks from the image files, and the first events come without one: only "
                "what reads the files can apply it. Give the source of the events {%s}",
                self.provenance.record()["mask"],
                "} or {".join(validity.in_images),
            )

    def _misfit(self, shape_BPHW: tuple[int, ...]) -> str | None:
        """Say why preprocessing or network cannot take events of a shape; None if they can."""
        _, panels, height, width = shape_BPHW
        try:
            _, *size = self.preprocess.output_shape((panels, height, width))
            check_shape = getattr(self.net, "check_shape", None)
            if check_shape is not None:
                check_shape(*size)
        except ValueError as error:
            return str(error)
        return None

    @contextlib.contextmanager
    def _first_time(self, shape_BPHW: tuple[int, ...]) -> Iterator[None]:
        """Show how long a new shape takes."""
        started = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        log.info(
            "the first batch of shape %s took %.1f s, start-up included (network: %s)",
            shape_BPHW,
            time.monotonic() - started,
            self._forward_pass.mode,
        )
