"""From a batch on the host to peaks: transfer, preprocessing, network, peak finding."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections import deque
from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor, nn

from peaknet_predict.peaks import find_peaks
from peaknet_predict.preprocess import Preprocess, Transform
from peaknet_predict.types import EventBatch, PeakBatch, Refusal, Result

log = logging.getLogger(__name__)


class PendingPeaks:
    """What `PeakNetModule.predict_step` returns: work under way on the device.

    Asking for the result waits for this batch alone, not for batches enqueued after it.
    """

    def __init__(self, batch: EventBatch, refused: list[Refusal]) -> None:
        self._batch = batch
        self._refused = refused
        self._class_map_NHW: Tensor | None = None
        self._bad_pixels_B: Tensor | None = None
        self._preprocess: Preprocess | None = None
        self._enqueued: torch.cuda.Event | None = None
        self._result: PeakBatch | None = None

    def _enqueue(self, class_map_NHW: Tensor, bad_pixels_B: Tensor, preprocess: Preprocess) -> None:
        self._class_map_NHW = class_map_NHW
        self._bad_pixels_B = bad_pixels_B
        self._preprocess = preprocess
        if class_map_NHW.is_cuda:
            self._enqueued = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._enqueued.record()

    def done(self) -> bool:
        """Whether the device has finished this batch, so that `result` will not wait for it."""
        if self._result is not None or self._enqueued is None:
            return True
        return bool(self._enqueued.query())  # type: ignore[no-untyped-call]

    def result(self) -> PeakBatch:
        """Wait for this batch and return what became of each of its events."""
        if self._result is None:
            self._result = self._finish()
            # The slot's device memory goes back as soon as its result is on the host.
            self._class_map_NHW = self._bad_pixels_B = self._preprocess = self._enqueued = None
        return self._result

    def _finish(self) -> PeakBatch:
        if self._class_map_NHW is None:
            return PeakBatch([], self._refused)
        assert self._bad_pixels_B is not None
        assert self._preprocess is not None
        with _stage("find_peaks"):
            events = self._batch.events
            _, *shape = self._batch.images_BPHW.shape
            shape_PHW = (shape[0], shape[1], shape[2])
            with _side_stream(self._class_map_NHW.device, self._enqueued):
                panels = self._class_map_NHW.shape[0] // self._batch.images_BPHW.shape[0]
                table = find_peaks(self._class_map_NHW)
                bad_pixels = self._bad_pixels_B.tolist()
            tables = table.split(panels, len(events))
            results = []
            for event, peaks, bad in zip(events, tables, bad_pixels, strict=False):
                peaks, _ = self._preprocess.to_original(peaks, shape_PHW)
                results.append(
                    Result(
                        event.id, event.image, peaks, event.photon_energy, int(bad), event.put_at
                    )
                )
        return PeakBatch(results, self._refused)


class PeakNetModule(L.LightningModule):
    """A segmentation network and what surrounds it, run by `Trainer.predict`.

    Parameters
    ----------
    net
        Maps images (N, 1, H, W) to logits (N, C, H, W); class 0 is background, every other class
        is peak. A network whose ``forward`` also takes ``valid_N1HW`` is told which pixels are
        real: not padding, and neither NaN nor infinite.
    preprocess
        Transforms of `peaknet_predict.preprocess`, in order.
    compile
        Compile the network with `torch.compile`. Without ``warmup_shape`` that happens at the
        first batch.
    num_overlap
        Batches under way at once; `predict_step` waits only when there would be more.
    warmup_shape
        (B, P, H, W) of the batches to come, before preprocessing: run once on zeros before the
        first event is taken, so that no event waits for compilation.
    """

    def __init__(
        self,
        net: nn.Module,
        preprocess: list[Transform],
        compile: bool = False,
        num_overlap: int = 2,
        warmup_shape: tuple[int, int, int, int] | None = None,
    ) -> None:
        super().__init__()
        if num_overlap < 1:
            raise ValueError(f"num_overlap is {num_overlap}; at least one batch is under way")
        self.net = net
        self.preprocess = Preprocess(preprocess)
        self.compile_net = compile
        self.num_overlap = num_overlap
        self.warmup_shape = warmup_shape
        self._takes_valid = "valid_N1HW" in inspect.signature(net.forward).parameters
        self._under_way: deque[PendingPeaks] = deque()
        self._shapes_that_fit: set[tuple[int, ...]] = set()

    def on_predict_start(self) -> None:
        """Compile, and warm up in the very context in which the loop runs."""
        if self.compile_net:
            # Compiles in place: the state dict keeps its names.
            self.net.compile()
        if self.warmup_shape is None:
            return
        started = time.monotonic()
        context = self.trainer.precision_plugin.predict_step_context()
        with context:
            self._forward(torch.zeros(self.warmup_shape))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        log.info(
            "warm-up at batches of %s took %.1f s", self.warmup_shape, time.monotonic() - started
        )

    def transfer_batch_to_device(
        self, batch: EventBatch, device: torch.device, dataloader_idx: int
    ) -> EventBatch:
        """Leave the batch alone: `predict_step` moves the pixels itself, without waiting."""
        return batch

    def predict_step(self, batch: EventBatch, batch_idx: int) -> PendingPeaks:
        """Enqueue one batch on the device and return a handle to its peaks.

        Events whose shape the preprocessing or the network cannot take are refused, each by name.
        """
        while len(self._under_way) >= self.num_overlap:
            self._under_way.popleft().result()
        pending = PendingPeaks(batch, list(batch.refused))
        if not batch.events:
            return pending
        shape_PHW = tuple(batch.images_BPHW.shape[1:])
        try:
            class_map_NHW, bad_pixels_B = self._forward(batch.images_BPHW)
        except ValueError as error:
            if shape_PHW in self._shapes_that_fit:
                raise
            pending._refused += [
                Refusal(event.id, f"image of shape {event.image.shape} does not fit: {error}")
                for event in batch.events
            ]
            return pending
        self._shapes_that_fit.add(shape_PHW)
        pending._enqueue(class_map_NHW, bad_pixels_B, self.preprocess)
        self._under_way.append(pending)
        return pending

    def _forward(self, images_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class map (N, H, W), uint8, 1 for peak, and bad pixels per event (B,)."""
        with _stage("h2d"):
            images_BPHW = images_BPHW.to(self.device, non_blocking=True)
        with _stage("preprocess"):
            prepared = self.preprocess(images_BPHW)
        with _stage("network"):
            images_N1HW = prepared.images_N1HW.to(self._input_dtype())
            if self._takes_valid:
                logits_NCHW = self.net(images_N1HW, valid_N1HW=prepared.valid_N1HW)
            else:
                logits_NCHW = self.net(images_N1HW)
        with _stage("class_map"):
            class_map_NHW = logits_NCHW.softmax(1).argmax(1)
            is_peak_NHW = (class_map_NHW != 0) & prepared.valid_N1HW[:, 0]
        return is_peak_NHW.to(torch.uint8), prepared.bad_pixels_B

    def _input_dtype(self) -> torch.dtype:
        """Return the dtype of the network's own parameters (bf16-true, say), or float32."""
        return next(
            (p.dtype for p in self.net.parameters() if p.dtype.is_floating_point), torch.float32
        )


@contextlib.contextmanager
def _stage(name: str) -> Iterator[None]:
    """Name a stage in profilers' timelines (an NVTX range where there is a GPU)."""
    if not torch.cuda.is_available():
        yield
        return
    with torch.cuda.nvtx.range(name):
        yield


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextlib.contextmanager
def _side_stream(device: torch.device, after: torch.cuda.Event | None) -> Iterator[None]:
    """Run what follows behind the event ``after`` and beside the batches enqueued since."""
    if device.type != "cuda":
        yield
        return
    stream = _side_streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        if after is not None:
            stream.wait_event(after)
        yield
        stream.synchronize()
