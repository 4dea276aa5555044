"""Peak finders as users configure them, run over images that lie in memory.

A finder is a model configuration, made and run by Lightning as `peaknet-predict predict` does it:
the same preprocessing, network, fast PeakNet, precision and peak finding, and the same refusals.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser

from peaknet_predict.in_flight import PendingPeaks
from peaknet_predict.models import LocalSnr
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import InstanceNorm, MergeBatchChannelDims
from peaknet_predict.types import Event, EventBatch, EventId, Image, Peaks


def make_module(config: str, **init_args: Any) -> PeakNetModule:
    """Make the module that a configuration file describes.

    Parameters
    ----------
    config
        ``PATH`` or ``PATH@WEIGHTS``: a YAML file with a ``model``, and a weight file to be used
        instead of the one that it names. Everything else in the file is left alone.
    **init_args
        Arguments of the module that take the place of the file's.

    Raises
    ------
    ValueError
        If the file has no model, the model is not a `PeakNetModule`, or it cannot be made.
    """
    path, _, weights = config.partition("@")
    content = yaml.safe_load(Path(path).read_text())
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{path} has no `model`: give one of configs/models/")
    model: dict[str, Any] = content["model"]
    # The class comes from the configuration; what the benchmark chooses goes over it.
    if weights:
        model["init_args"]["net"].setdefault("init_args", {})["weights"] = weights
    # Compilation changes no peak and takes longer than these few events.
    model["init_args"] |= {"compile": False} | init_args
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PeakNetModule, "model", required=True)
    module = parser.instantiate(parser.parse_object({"model": model})).model
    if not isinstance(module, PeakNetModule):
        raise ValueError(f"{path}: {type(module).__name__} is not a PeakNetModule")
    return module


def local_snr(**parameters: float) -> PeakNetModule:
    """Make the finder of configs/models/snr.yaml with other thresholds."""
    return PeakNetModule(LocalSnr(**parameters), [InstanceNorm(), MergeBatchChannelDims()])  # type: ignore[arg-type]


class _Batches:
    """Images as the batches of a stream."""

    def __init__(self, images: Sequence[Image], batch_size: int) -> None:
        self._images, self._batch_size = images, batch_size

    def __iter__(self) -> Iterator[EventBatch]:
        for first in range(0, len(self._images), self._batch_size):
            images = self._images[first : first + self._batch_size]
            events = [
                Event(EventId("memory", 0, first + k), image, 9500.0)
                for k, image in enumerate(images)
            ]
            yield EventBatch(torch.from_numpy(np.stack(images)), events, [])


class _Collect(L.Callback):
    """Keeps the peaks and lets go of everything else."""

    def __init__(self, num_images: int) -> None:
        self.peaks: list[Peaks | None] = [None] * num_images
        self.reasons: set[str] = set()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: PendingPeaks,
        batch: EventBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        results = outputs.result()
        for result in results.results:
            self.peaks[result.id.idx] = result.peaks
        self.reasons |= {refusal.reason for refusal in results.refused}


def find(
    module: PeakNetModule,
    images: Sequence[Image],
    device: str = "cpu",
    precision: str | None = None,
    batch_size: int = 4,
) -> list[Peaks | None]:
    """Find the peaks of images of one shape.

    Parameters
    ----------
    module
        The finder.
    images
        (P, H, W) each, detector counts.
    device
        'cpu' or 'cuda'.
    precision
        Lightning's; by default that of configs/topology/cpu.yaml or one_gpu.yaml.
    batch_size
        Events that the network sees at once.

    Returns
    -------
    list of Peaks
        For each image; None for one that was refused, whose reason is in the log.
    """
    if precision is None:
        precision = "bf16-mixed" if device == "cuda" else "32-true"
    collect = _Collect(len(images))
    # What Lightning says about GPUs and loaders is of no use in a table.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="gpu" if device == "cuda" else device,
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            callbacks=[collect],
            limit_predict_batches=10**9,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.predict(module, _Batches(images, batch_size), return_predictions=False)
    for reason in sorted(collect.reasons):
        logging.getLogger(__name__).error("refused: %s", reason)
    return collect.peaks
