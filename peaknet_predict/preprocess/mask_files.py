"""The static mask of a detector, from a file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peaknet_predict.pixels import MAX_BAD, find_masked
from peaknet_predict.preprocess.crystfel_geometry import read_geometry_mask
from peaknet_predict.preprocess.validity import StaticMask
from peaknet_predict.process.files import expanded

log = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]

_HDF5 = (".h5", ".hdf5", ".cxi", ".nxs")


def read_mask(name: str, good: int | None = None, bad: int | None = None) -> StaticMask:
    """Read a static mask.

    Parameters
    ----------
    name
        A file of NumPy's (.npy; .npz with one array, or one named ``mask``), an HDF5 file and the
        dataset in it (``detector.h5:/entry_1/data_1/mask``), or a CrystFEL geometry file (.geom).
        ``~`` and ``$VARIABLES`` are put in.
    good, bad
        Bits, as in a geometry file: a pixel is bad if it has any bit of ``bad`` or lacks one of
        ``good``. Without either any value but 0 is bad. A geometry file has bits of its own.

    Raises
    ------
    ValueError
        If the file holds no mask, or one that can be understood in two ways.
    OSError
        If it cannot be read.
    """
    file, dataset = _split(str(expanded(name)))
    if file.suffix == ".geom":
        if good is not None or bad is not None:
            raise ValueError(f"{file} has bits of its own: leave out mask_good and mask_bad")
        mask = read_geometry_mask(file, _read_dataset)
    else:
        values = _as_integers(_read(file, dataset), name)
        if good is None and bad is None:
            _check_meaning(values, name)
        mask = StaticMask(find_masked(values, good, bad))
    num_bad = int(np.count_nonzero(mask.bad))
    if num_bad == mask.bad.size:
        raise ValueError(f"mask {name} leaves no pixel: do its bits mean good or bad ones?")
    log.log(
        logging.WARNING if num_bad > MAX_BAD * mask.bad.size else logging.INFO,
        "mask %s: %d of %d pixels are bad",
        *(name, num_bad, mask.bad.size),
    )
    return mask


def _split(name: str) -> tuple[Path, str | None]:
    """Return file and dataset of ``file.h5:/dataset``."""
    for suffix in _HDF5:
        file, found, dataset = name.partition(f"{suffix}:")
        if found:
            return Path(file + suffix), dataset
    return Path(name), None


def _read(file: Path, dataset: str | None) -> npt.NDArray[Any]:
    if file.suffix in _HDF5:
        return _read_dataset(file, dataset)
    if file.suffix not in (".npy", ".npz"):
        raise ValueError(f"mask {file}: expected a file .npy, .npz, .geom or {', '.join(_HDF5)}")
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        names = loaded.files
        if len(names) != 1 and "mask" not in names:
            raise ValueError(f"{file} holds {', '.join(names) or 'nothing'}; name the mask 'mask'")
        return np.asarray(loaded["mask" if "mask" in names else names[0]])


def _read_dataset(file: Path, dataset: str | None) -> npt.NDArray[Any]:
    import h5py

    with h5py.File(file, "r") as opened:
        if not dataset:
            raise ValueError(
                f"mask {file}: add the dataset, as in {file}:/entry_1/data_1/mask; "
                f"it has {', '.join(_datasets(opened)) or 'none'}"
            )
        item = opened.get(dataset)
        if not isinstance(item, h5py.Dataset):
            raise ValueError(
                f"{file} has no dataset {dataset}; it has {', '.join(_datasets(opened)) or 'none'}"
            )
        return np.asarray(item[()])


def _datasets(opened: Any) -> list[str]:
    """Return the names of datasets of at least two dimensions."""
    names: list[str] = []

    def visit(name: str, item: Any) -> None:
        if getattr(item, "ndim", 0) >= 2:
            names.append(f"/{name}")

    opened.visititems(visit)
    return names


def _as_integers(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.integer]:
    """Return a mask's values as integers, without leading axes of one."""
    while values.ndim > 3 or (values.ndim == 3 and values.shape[0] == 1):
        if values.shape[0] != 1:
            break
        values = values[0]
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(f"mask {name} has the shape {values.shape}; expected (P, H, W) or (H, W)")
    if values.dtype.kind in "biu":
        return values.astype(np.int64)
    whole = values.astype(np.int64) if values.dtype.kind == "f" else values
    if values.dtype.kind != "f" or not np.array_equal(whole, values):
        raise ValueError(f"mask {name} has dtype {values.dtype}; expected integers or bool")
    return whole


def _check_meaning(values: npt.NDArray[np.integer], name: str) -> None:
    num_marked = int(np.count_nonzero(values))
    if num_marked > MAX_BAD * values.size:
        raise ValueError(
            f"mask {name} is not 0 at {num_marked} of {values.size} pixels, which usually marks "
            "bad ones. If its 1 marks good pixels, set mask_good: 1; if they are bad, set "
            "mask_bad: 0xffffffff"
        )
