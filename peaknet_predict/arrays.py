"""Peaks of images in memory, in one call: for scripts and notebooks.

Shape legend: P panels, H rows and W columns of a panel, M peaks.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.utils.data import DataLoader

from peaknet_predict.batching import Batcher, check_image
from peaknet_predict.config_files import refuse_duplicate_keys
from peaknet_predict.cxi.integrate import integrate_peaks
from peaknet_predict.files_data import HARMLESS_WARNINGS, EventBatches
from peaknet_predict.in_flight import PendingPeaks
from peaknet_predict.module import PeakNetModule
from peaknet_predict.pixels import MAX_BAD, Bits, pack_mask
from peaknet_predict.preprocess.validity import StaticMask, Validity
from peaknet_predict.process.files import expanded
from peaknet_predict.types import Event, EventId, Result

MODELS = Path(__file__).parent / "configs" / "models"
"""The configurations of networks that come with this program."""

PEAK = np.dtype(
    [
        ("panel", np.int64),
        ("y", np.float64),
        ("x", np.float64),
        ("intensity", np.float64),
        ("snr", np.float64),
    ]
)
"""The columns of a table of peaks, see `find_peaks`."""

PeakRows = npt.NDArray[np.void]
"""(M,) of dtype `PEAK`."""


class RefusedEventsError(ValueError):
    """Some images cannot be processed; the message names each of them, and why.

    Attributes
    ----------
    tables
        As `find_peaks` returns them; None for each event that is refused.
    reasons
        Why, by the number of the event.
    """

    def __init__(self, tables: list[PeakRows | None], reasons: dict[int, str]) -> None:
        shown = [f"event {number}: {reason}" for number, reason in sorted(reasons.items())]
        more = f"; and {len(shown) - 5} more" if len(shown) > 5 else ""
        super().__init__(
            f"{len(reasons)} of {len(tables)} events are refused: {'; '.join(shown[:5])}{more}"
        )
        self.tables = tables
        self.reasons = reasons


def find_peaks(
    images: npt.ArrayLike,
    model: str | PeakNetModule = "peaknet_small",
    mask: str | npt.ArrayLike | None = None,
    threshold: float | None = None,
    device: str = "auto",
    batch_size: int = 4,
) -> list[PeakRows]:
    """Find the peaks of images in memory.

    It runs what ``peaknet-predict predict`` runs, and finds the same peaks.

    Parameters
    ----------
    images
        (H, W), (P, H, W) or (events, P, H, W), of any real dtype: detector counts, as they come
        from the detector. Frames of a detector with one panel are ``frames[:, np.newaxis]``. In a
        masked array, masked pixels are bad.
    model
        The name of a network that comes with this program, or the path of a configuration, see
        `load_model`; or what `load_model` has returned, which saves loading it in each call.
    mask
        The detector's bad pixels: an array (P, H, W), (H, W) or (P*H, W), in which everything but 0
        (False) is bad; or a file, as for `PeakNetModule`. Bad pixels of the images' dtype and NaN
        count in any case.
    threshold
        The operating point: log odds above which a pixel is peak. By default the model's.
    device
        ``auto`` takes a GPU if there is one; or ``cpu``, ``cuda``, ``cuda:1``.
    batch_size
        Events that are computed at once. Larger batches are faster on a GPU, and take more memory.

    Returns
    -------
    list of ndarray
        A table for each event (one for (H, W) and (P, H, W)), a structured array (M,) with the
        columns `PEAK`:

        - ``panel``, int, from 0;
        - ``y``, ``x``, the centroid in pixels: 0-based, row and column of the panel, pixel centres
          on integers;
        - ``intensity``, detector counts, and ``snr``, its signal-to-noise ratio: the background-
          subtracted sum over a disc, as in CXI files (`peaknet_predict.cxi.integrate`).

        ``pandas.DataFrame(table)`` makes a data frame of it.

    Raises
    ------
    RefusedEventsError
        If some of the images cannot be processed. It has the tables of all others.
    ValueError
        If an argument makes no sense.
    OSError
        If a file is missing.

    Examples
    --------
    ::

        table, = peaknet_predict.find_peaks(image)
        table["x"], table["y"]
    """
    stack = _as_events(images)
    place = _device(device)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch needs at least one event")
    mask_file = mask if isinstance(mask, str | os.PathLike) else None
    if isinstance(model, PeakNetModule):
        if mask_file is not None:
            raise ValueError(
                f"the model is loaded already, so {mask_file} comes too late: give it to "
                "load_model, or give the mask as an array"
            )
        module = model
    else:
        module = load_model(model, **({} if mask_file is None else {"mask": mask_file}))
    bits = None
    if mask is not None and mask_file is None and len(stack):
        bits = _mask_bits(np.asarray(mask), stack[0].shape)
    events = [Event(EventId("", 0, k), image, np.nan) for k, image in enumerate(stack)]
    if bits is not None:
        for event in events:
            event.bad_bits = bits if event.bad_bits is None else event.bad_bits | bits
    with _operating_point(module, threshold):
        pending = _predict(module, events, batch_size, place)
    return _tables(pending, len(events))


def load_model(name: str, **settings: Any) -> PeakNetModule:
    """Load a network with its weights and its preprocessing.

    Parameters
    ----------
    name
        The name of one that comes with this program: ``peaknet_small``, ``snr`` (without weights),
        ``peaknet`` (needs ``weights``). Or the path of a configuration like those in
        ``configs/models``.
    **settings
        Parameters of `PeakNetModule` that override those of the configuration: ``threshold``,
        ``mask``, ``bad_values``, ``saturation``, ``weights``, ...

    Raises
    ------
    ValueError
        If there is no such model, or if a setting makes no sense.
    OSError
        If a file is missing.
    """
    path = _configuration(name)
    refuse_duplicate_keys([str(path)])
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    section = content.get("model") if isinstance(content, dict) else None
    if not isinstance(section, dict) or not isinstance(section.get("init_args"), dict):
        raise ValueError(f"{path} is no configuration of a network: it has no model.init_args")
    given = {key: _plain(value) for key, value in settings.items()}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PeakNetModule, "model")
    try:
        parsed = parser.parse_object({"model": section["init_args"] | given})
    except ArgumentError as error:
        raise ValueError(f"model {name!r}: {error}") from error
    module: PeakNetModule = parser.instantiate(parsed).model
    return module.eval()


def _configuration(name: str) -> Path:
    """Return the file that a model's name or path stands for."""
    path = expanded(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no configuration {path}: check the path")
        return path
    shipped = MODELS / f"{name}.yaml"
    if len(path.parts) == 1 and not path.suffix and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in MODELS.glob("*.yaml")))
    hint = f"give one of {names}, or the path of a configuration (.yaml)"
    if path.suffix in (".safetensors", ".pt", ".pth"):
        hint = f"a weight file needs its network: load_model('peaknet_small', weights={name!r})"
    raise ValueError(f"there is no model {name!r}: {hint}")


def _plain(value: Any) -> Any:
    """Return a setting as a configuration would have it."""
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _as_events(images: npt.ArrayLike) -> Sequence[npt.NDArray[Any]]:
    """Return the images of the events, (P, H, W) or (H, W) each, without copying them."""
    try:
        array = images if isinstance(images, np.ndarray) else np.asarray(images)
    except ValueError as error:
        raise ValueError(
            "images of different shapes make no array: call find_peaks once for each event"
        ) from error
    if array.ndim not in (2, 3, 4):
        raise ValueError(
            f"images have the shape {array.shape}; expected (H, W), (panels, H, W) or "
            "(events, panels, H, W)"
        )
    return list(array) if array.ndim == 4 else [array]


def _mask_bits(mask: npt.NDArray[Any], shape: tuple[int, ...]) -> Bits:
    """Return a mask as bits, if it fits images of this shape."""
    if mask.dtype.kind not in "biu":
        raise ValueError(f"the mask has dtype {mask.dtype}; expected integers or bool")
    bad = np.asarray(mask != 0)
    shape_PHW = (1, *shape) if len(shape) == 2 else shape
    Validity(mask=StaticMask(bad)).check_shape(shape_PHW)  # type: ignore[arg-type]
    if np.count_nonzero(bad) > MAX_BAD * bad.size:
        raise ValueError(
            f"the mask is not 0 at {np.count_nonzero(bad)} of {bad.size} pixels, which usually "
            "marks bad ones. If its 1 marks good pixels, give `mask == 0`"
        )
    return pack_mask(bad)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; give auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; give auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, and torch sees {torch.cuda.device_count()} GPUs here: "
            "`peaknet-predict doctor` says what this machine has; device='cpu' needs no GPU"
        )
    return device


@contextmanager
def _operating_point(module: PeakNetModule, threshold: float | None) -> Iterator[None]:
    """Predict at another operating point for a while."""
    before = module.provenance.threshold
    if threshold is not None:
        if not np.isfinite(threshold):
            raise ValueError(f"threshold is {threshold}; give a finite number, 0 by default")
        module.provenance.threshold = float(threshold)
    try:
        yield
    finally:
        module.provenance.threshold = before


def _predict(
    module: PeakNetModule, events: list[Event], batch_size: int, device: torch.device
) -> list[PendingPeaks]:
    """Run `Trainer.predict` as the command line does, silently."""
    if not events:
        return []
    size = min(batch_size, len(events))
    # The last batch has as many rows as it has events: nothing is compiled, and zeros take time.
    last = {len(events) % size} - {0}
    on_gpu = device.type == "cuda"
    batches = EventBatches(
        lambda: events, lambda: Batcher(size, tuple(last), pin_memory=on_gpu, check=check_image)
    )
    lightning_log = logging.getLogger("lightning.pytorch")
    level = lightning_log.level
    try:
        lightning_log.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for harmless in HARMLESS_WARNINGS:
                warnings.filterwarnings("ignore", message=harmless)
            trainer = L.Trainer(
                accelerator="gpu" if on_gpu else "cpu",
                devices=[device.index or 0] if on_gpu else 1,
                # As in configs/topology.
                precision="bf16-mixed" if on_gpu else "32-true",
                # Even within a job of SLURM or MPI, this is a single process.
                plugins=[LightningEnvironment()],
                logger=False,
                enable_progress_bar=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                limit_predict_batches=10**9,
            )
            predictions: Any = trainer.predict(module, DataLoader(batches, batch_size=None))
    finally:
        lightning_log.setLevel(level)
    return list(predictions)


def _tables(pending: Sequence[PendingPeaks], num_events: int) -> list[PeakRows]:
    """Return the tables of all events; raise if one was refused."""
    tables: list[PeakRows | None] = [None] * num_events
    reasons: dict[int, str] = {}
    for handle in pending:
        found = handle.result()
        for result in found.results:
            tables[result.id.idx] = _table(result)
            result.drop_pixels()  # the module keeps its latest handles
        for refusal in found.refused:
            assert refusal.id is not None
            reasons[refusal.id.idx] = refusal.reason
    whole = [table for table in tables if table is not None]
    if reasons:
        raise RefusedEventsError(tables, reasons)
    if len(whole) != num_events:
        raise RuntimeError(f"{num_events} events went in, and {len(whole)} came out")
    return whole


def _table(result: Result) -> PeakRows:
    intensities = integrate_peaks(result.image, result.peaks, result.bad_mask(), result.saturation)
    table = np.empty(len(result.peaks), PEAK)
    table["panel"], table["y"], table["x"] = result.peaks.T
    table["intensity"], table["snr"] = intensities.total, intensities.snr
    return table
