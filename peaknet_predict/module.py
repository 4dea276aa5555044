"""From a batch on the host to peaks: transfer, preprocessing, network, peak finding."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from peaknet_predict.models.fast import FastForm
from peaknet_predict.peaks import find_peaks
from peaknet_predict.pending import PendingPeaks
from peaknet_predict.preprocess import Prepared, Preprocess, Transform
from peaknet_predict.ring import Slot
from peaknet_predict.training.module import TrainingSteps
from peaknet_predict.types import EventBatch, Refusal

__all__ = ["PeakNetModule", "PendingPeaks"]

log = logging.getLogger(__name__)


class PeakNetModule(TrainingSteps):
    """A segmentation network and what surrounds it, run by `Trainer.predict` and `Trainer.fit`.

    Parameters
    ----------
    net
        Maps images (N, 1, H, W) to logits (N, C, H, W); class 0 is background, every other class
        is peak. A network whose ``forward`` also takes ``valid_N1HW`` is told which pixels are
        real: not padding, and neither NaN nor infinite. A network with a method ``coarse_logits``
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
        Let `PeakNet` run in its fast form (docs/fast.md) wherever that is possible: on a CUDA GPU,
        with precision ``bf16-mixed`` or ``bf16-true``. The log says which form runs, and why.
        Other networks, subclasses too, run as they are.
    learning_rate, weight_decay, warmup_steps
        Of training: AdamW's full rate, its decay of convolution and linear kernels, and the steps
        until the rate is full. From there it falls to a hundredth by the end of the run.

    Attributes
    ----------
    operating_point
        What the last validation found to be the best threshold, and what it achieves; None before.
    """

    def __init__(
        self,
        net: nn.Module,
        preprocess: list[Transform],
        compile: bool = False,
        num_overlap: int = 3,
        warmup_shapes: list[tuple[int, int, int, int]] | None = None,
        fast: bool = True,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 200,
    ) -> None:
        super().__init__(net, Preprocess(preprocess), learning_rate, weight_decay, warmup_steps)
        if num_overlap < 1:
            raise ValueError(f"num_overlap is {num_overlap}; at least one batch is under way")
        self.compile_net = compile
        self.num_overlap = num_overlap
        self.warmup_shapes = warmup_shapes or []
        self._fast = FastForm(net, fast)
        self._takes_valid = "valid_N1HW" in inspect.signature(net.forward).parameters
        self._under_way: deque[PendingPeaks] = deque()
        self._slots: deque[Slot] = deque()
        self._shapes_seen: set[tuple[int, ...]] = set()
        # Functions, not modules: a module held twice would be saved under two names.
        self._prepare: Callable[[Tensor], Prepared] = self.preprocess.forward
        self._stride: Literal[1, 4] = 1
        self._network: Callable[..., Tensor] = net.forward

    def setup(self, stage: str) -> None:
        """Prepare the network: its fast form to predict, its first guess to train."""
        if stage == "predict":
            # Before Lightning rounds the parameters for bf16-true.
            self._fast.prepare(self.trainer.strategy.root_device, str(self.trainer.precision))
        super().setup(stage)

    def on_predict_start(self) -> None:
        """Choose the path for the device, compile, and warm up in the context of the loop."""
        if getattr(self.net, "weights_sha256", "not a network with weights") is None:
            log.warning(
                "%s has no weights: its parameters are random, and so will be the peaks. Set "
                "net.init_args.weights in the configuration",
                type(self.net).__name__,
            )
        if self.device.type == "cuda":
            self._slots = deque(Slot(self.device) for _ in range(self.num_overlap))
        self._fast.start(self.device, str(self.trainer.precision))
        self._choose_path()
        with self.trainer.precision_plugin.predict_step_context():
            for shape_BPHW in self.warmup_shapes:
                # Made like the batches to come: the loop is in inference mode, the data are not,
                # and compiled code tells the two apart.
                with torch.inference_mode(False):
                    zeros_BPHW = torch.zeros(shape_BPHW)
                self.predict_step(EventBatch(zeros_BPHW, [], []), 0, warm_up=True)

    def _choose_path(self) -> None:
        net = self.net if self._fast.network is None else self._fast.network
        # The peak finder interpolates by 4, the stride of ConvNeXt's stem, and by nothing else.
        if self.device.type == "cuda" and getattr(net, "coarse_stride", None) == 4:
            self._stride = 4
            self._network = cast(Callable[..., Tensor], net.coarse_logits)
        else:
            self._stride, self._network = 1, net.forward
        self._prepare = self.preprocess.forward
        if self.compile_net:
            self._prepare = torch.compile(self._prepare, dynamic=False)
        if self.compile_net and self._fast.network is None:
            self._network = torch.compile(self._network, dynamic=False)

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
        """
        while len(self._under_way) >= self.num_overlap:
            self._under_way.popleft().result()
        pending = PendingPeaks(batch, list(batch.refused))
        if not batch.events and not warm_up:
            return pending
        shape_BPHW = tuple(batch.images_BPHW.shape)
        misfit = self._misfit(shape_BPHW)
        if misfit is not None:
            reasons = [
                Refusal(event.id, f"image of shape {event.image.shape} does not fit: {misfit}")
                for event in batch.events
            ]
            return PendingPeaks(batch, batch.refused + reasons)
        is_new = shape_BPHW not in self._shapes_seen
        try:
            with self._first_time(shape_BPHW) if is_new else contextlib.nullcontext():
                self._enqueue(batch, pending)
        except TorchDynamoException as error:
            self._run_eagerly(error)
            return self.predict_step(batch, batch_idx, warm_up)
        self._shapes_seen.add(shape_BPHW)
        self._under_way.append(pending)
        return pending

    def _misfit(self, shape_BPHW: tuple[int, ...]) -> str | None:
        """Say why preprocessing or network cannot take events of a shape; None if they can."""
        if shape_BPHW in self._shapes_seen:
            return None
        _, panels, height, width = shape_BPHW
        try:
            _, *size = self.preprocess.output_shape((panels, height, width))
            check_shape = getattr(self.net, "check_shape", None)
            if check_shape is not None:
                check_shape(*size)
        except ValueError as error:
            return str(error)
        return None

    def _enqueue(self, batch: EventBatch, pending: PendingPeaks) -> None:
        if self.device.type != "cuda":
            logits_NCHW, prepared = self._logits(batch.images_BPHW)
            class_map_NHW = logits_NCHW.softmax(1).argmax(1)
            is_peak_NHW = (class_map_NHW != 0) & prepared.valid_N1HW[:, 0]
            bad_pixels = prepared.bad_pixels_B.tolist()
            pending.expect(self.preprocess, lambda: (find_peaks(is_peak_NHW), bad_pixels))
            return
        slot = self._slots[0]
        with _stage("h2d"):
            images_BPHW = slot.upload(batch.images_BPHW)
        logits_NCHW, prepared = self._logits(images_BPHW)
        with _stage("peaks"):
            slot.find(logits_NCHW, self._stride, prepared)
        pending.expect(self.preprocess, slot.result, slot.done)
        self._slots.rotate(-1)

    def _logits(self, images_BPHW: Tensor) -> tuple[Tensor, Prepared]:
        with _stage("preprocess"):
            # Outside of what is compiled, or every dtype of raw counts would be compiled anew.
            prepared = self._prepare(images_BPHW.to(torch.float32))
        with _stage("network"):
            if self._fast.network is not None:
                try:
                    return self._fast_logits(prepared), prepared
                except (TorchDynamoException, torch.OutOfMemoryError):
                    raise  # not the kernels' fault
                except Exception as error:
                    # Kernels are compiled for a shape when it first comes; later, something else
                    # has gone wrong.
                    if tuple(images_BPHW.shape) in self._shapes_seen:
                        raise
                    self._fast.give_up(error)
                    self._choose_path()
                    self._shapes_seen.clear()
            images_N1HW = prepared.images_N1HW.to(self._input_dtype())
            if self._takes_valid:
                return self._network(images_N1HW, valid_N1HW=prepared.valid_N1HW), prepared
            return self._network(images_N1HW), prepared

    def _fast_logits(self, prepared: Prepared) -> Tensor:
        # Its dtypes are chosen one by one; autocast would change some of them.
        with torch.autocast(self.device.type, enabled=False):
            return self._network(prepared.images_N1HW.to(torch.bfloat16))

    @contextlib.contextmanager
    def _first_time(self, shape_BPHW: tuple[int, ...]) -> Iterator[None]:
        """Show how long a new shape takes."""
        started = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        log.info(
            "first batch of shape %s took %.1f s%s",
            shape_BPHW,
            time.monotonic() - started,
            ", compilation included" if self.compile_net else "",
        )

    def _run_eagerly(self, error: Exception) -> None:
        """Do without compilation where it fails: slower, with the same answer."""
        log.warning(
            "the network does not compile and runs eagerly, which is slower: %s: %s",
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "no reason given",
        )
        self.compile_net = False
        self._choose_path()

    def _input_dtype(self) -> torch.dtype:
        """Return the dtype of the network's own parameters (bf16-true, say), or float32."""
        return next(
            (p.dtype for p in self.net.parameters() if p.dtype.is_floating_point), torch.float32
        )

    def on_fit_start(self) -> None:
        """Choose how the network is run: as it is, at full resolution."""
        self._fast.network = None
        self._prepare, self._stride, self._network = self.preprocess.forward, 1, self.net.forward
        if self.compile_net:
            self._prepare = torch.compile(self._prepare, dynamic=False)
            self._network = torch.compile(self._network, dynamic=False)


@contextlib.contextmanager
def _stage(name: str) -> Iterator[None]:
    """Name a stage in profilers' timelines (an NVTX range where there is a GPU)."""
    if not torch.cuda.is_available():
        yield
        return
    with torch.cuda.nvtx.range(name):
        yield
