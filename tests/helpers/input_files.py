"""Small files laid out like those of detectors and facilities: one writer for each kind."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt

WIDTH = 16  # columns: panels are as high as the detectors' own, but narrow

Array = npt.NDArray[Any]


@dataclass
class Written:
    """What a source should make of a file.

    Attributes
    ----------
    path
        The file, or a pattern.
    images
        (N, P, H, W) or (N, H, W).
    energies
        (N,) eV.
    bad
        Bad pixels, of the shape of the images or of one of them; None if there are none.
    """

    path: Path
    images: Array
    energies: list[float]
    bad: Array | None = None


def counts(*shape: int, dtype: str = "float32", high: int = 1000) -> Array:
    return np.random.default_rng(7).integers(0, high, shape).astype(dtype)


def bad_pixels(*shape: int) -> npt.NDArray[np.bool_]:
    """Return a mask with a bad row, a bad column and some single pixels."""
    bad = np.random.default_rng(8).random(shape) < 0.02
    bad[..., shape[-2] // 2, :] = True
    bad[..., :, 3] = True
    return bad


def cxi(path: Path, data: Array, energies: Any, mask: Array | None = None) -> None:
    """Write what Cheetah, OM and psocake write, the peak lists left out."""
    with h5py.File(path, "w") as h5:
        h5["cxi_version"] = 140
        h5.create_dataset("entry_1/data_1/data", data=data, chunks=(1, *data.shape[1:]))
        if mask is not None:
            h5["entry_1/data_1/mask"] = mask
        if energies is not None:
            h5["LCLS/photon_energy_eV"] = energies
        h5["LCLS/detector_1/EncoderValue"] = np.full(len(data), -400.0)


def cspad_cxi(folder: Path) -> Written:
    images, bad = counts(3, 8, 185, WIDTH), bad_pixels(8, 185, WIDTH)
    slab = (8 * 185, WIDTH)
    energies = [9500.0, 9510.0, 9490.0]
    cxi(folder / "r0042.cxi", images.reshape(3, *slab), energies, bad.reshape(slab).astype("u2"))
    return Written(folder / "r0042.cxi", images, energies, bad)


def cspad_npz(folder: Path) -> Written:
    images = counts(2, 32, 185, WIDTH)
    for k, image in enumerate(images):
        np.savez(folder / f"event_{k}.npz", data=image)
    return Written(folder / "event_*.npz", images, [9500.0, 9500.0])


def epix10k2m_cxi(folder: Path) -> Written:
    images, bad = counts(2, 16, 352, WIDTH), bad_pixels(16, 352, WIDTH)
    slab = (16 * 352, WIDTH)
    # psana's masks have 1 for good pixels.
    mask = (~bad).reshape(slab).astype("u2")
    cxi(folder / "mfx_0007.cxi", images.reshape(2, *slab), [[9480.0], [9485.0]], mask)
    return Written(folder / "mfx_0007.cxi", images, [9480.0, 9485.0], bad)


def jungfrau4m_cxi(folder: Path) -> Written:
    images = counts(2, 8, 512, WIDTH)
    cxi(folder / "cxilw_0012.cxi", images.reshape(2, 8 * 512, WIDTH), [11000.0, 11010.0])
    return Written(folder / "cxilw_0012.cxi", images, [11000.0, 11010.0])


def jungfrau16m_swissfel(folder: Path) -> Written:
    images = counts(2, 32, 512, WIDTH)
    with h5py.File(folder / "run_000087.JF07T32V01.h5", "w") as h5:
        h5.create_dataset(
            "data/JF07T32V01/data",
            data=images.reshape(2, 32 * 512, WIDTH),
            chunks=(1, 32 * 512, WIDTH),
            **hdf5plugin.Bitshuffle(),
        )
        h5["data/JF07T32V01/pulse_id"] = np.arange(2)
        h5["data/JF07T32V01/is_good_frame"] = np.ones((2, 1), bool)
    return Written(folder / "run_*.JF07T32V01.h5", images, [9060.0, 9060.0])


def nexus(h5: h5py.File, wavelength: Any, as_bytes: bool = False) -> tuple[Any, Any]:
    """Write the skeleton of an NXmx file; return the groups of data and detector."""

    def group(path: str, nx_class: str) -> Any:
        made = h5.create_group(path)
        made.attrs["NX_class"] = np.bytes_(nx_class) if as_bytes else nx_class
        return made

    group("entry", "NXentry")
    data = group("entry/data", "NXdata")
    group("entry/instrument", "NXinstrument")
    detector = group("entry/instrument/detector", "NXdetector")
    beam = group("entry/instrument/beam", "NXbeam")
    beam["incident_wavelength"] = wavelength
    beam["incident_wavelength"].attrs["units"] = np.bytes_("angstrom") if as_bytes else "angstrom"
    h5["entry/definition"] = "NXmx"
    return data, detector


def jungfrau16m_nxmx(folder: Path) -> Written:
    images, bad = counts(3, 32, 16, WIDTH), bad_pixels(32, 16, WIDTH)
    with h5py.File(folder / "lyso_master.h5", "w") as h5:
        data, detector = nexus(h5, [1.3, 1.31, 1.32])
        data["data"] = images
        data.attrs["signal"] = "data"
        detector["pixel_mask"] = bad.astype("u4") * 256
        for k in range(32):
            detector.create_group(f"ARRAY_D0Q0M{k}").attrs["NX_class"] = "NXdetector_module"
    return Written(
        folder / "lyso_master.h5", images, [12398.4198 / w for w in (1.3, 1.31, 1.32)], bad
    )


def rayonix_cxi(folder: Path) -> Written:
    images = counts(2, 240, 240, dtype="uint16")
    cxi(folder / "rayonix.cxi", images, 9500.0)
    return Written(folder / "rayonix.cxi", images, [9500.0, 9500.0])


def rayonix_mccd(folder: Path) -> Written:
    """TIFF with a header of its own behind the first 1024 bytes; wavelength in femtometres."""
    images = counts(2, 64, 64, dtype="uint16")
    for k, image in enumerate(images):
        height, width = image.shape
        entries = [
            (256, 4, 1, width),
            (257, 4, 1, height),
            (258, 3, 1, 16),
            (259, 3, 1, 1),
            (262, 3, 1, 1),
            (273, 4, 1, 4096),
            (277, 3, 1, 1),
            (278, 4, 1, height),
            (279, 4, 1, image.nbytes),
            (34710, 4, 1, 1024),
        ]
        tiff = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(entries))
        tiff += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
        header = bytearray(3072)
        struct.pack_into("<I16s", header, 0, 2, b"MMX")
        struct.pack_into("<II", header, 28, 1234, 1234)  # little-endian
        struct.pack_into("<II", header, 80, width, height)
        struct.pack_into("<i", header, _OFFSET_OF_WAVELENGTH, 97934)
        raw = tiff.ljust(1024, b"\0") + bytes(header) + image.astype("<u2").tobytes()
        (folder / f"lyso_{k:03d}.mccd").write_bytes(raw)
    return Written(folder / "lyso_*.mccd", images, [12398.4198 / 0.97934] * 2)


_OFFSET_OF_WAVELENGTH = 908


def eiger_master(folder: Path) -> Written:
    """DECTRIS filewriter 1: a master, and data files of some frames each, linked by number."""
    images, bad = counts(7, 32, WIDTH, dtype="uint32"), bad_pixels(32, WIDTH)
    images[:, bad] = 2**16 - 1
    images[4, 5, 7] = 2**16 - 1  # counts of 16 bits in integers of 32
    bad_in_event = np.broadcast_to(bad, images.shape).copy()
    bad_in_event[4, 5, 7] = True
    with h5py.File(folder / "lyso_1_master.h5", "w") as h5:
        data, detector = nexus(h5, 1.0, as_bytes=True)
        detector["pixel_mask"] = bad.astype("u4")
        specific = detector.create_group("detectorSpecific")
        specific["pixel_mask"] = bad.astype("u4")
        specific["bit_depth_image"] = 16
        specific["photon_energy"] = 12398.0
        specific["nimages"], specific["ntrigger"] = 7, 1
        for k, (start, stop) in enumerate(((0, 3), (3, 6), (6, 7)), 1):
            name = f"lyso_1_data_{k:06d}.h5"
            with h5py.File(folder / name, "w") as file:
                file.create_dataset(
                    "entry/data/data",
                    data=images[start:stop],
                    chunks=(1, 32, WIDTH),
                    **hdf5plugin.Bitshuffle(),
                )
            data[f"data_{k:06d}"] = h5py.ExternalLink(name, "/entry/data/data")
    return Written(folder / "*_master.h5", images, [12398.4198] * 7, bad_in_event)


def eiger2_thresholds(folder: Path) -> Written:
    """DECTRIS filewriter 2: a virtual dataset of all frames, with an axis of channels."""
    images, bad = counts(4, 2, 32, WIDTH, dtype="uint16"), bad_pixels(32, WIDTH)
    layout = h5py.VirtualLayout(images.shape, images.dtype)
    for k in range(2):
        name = f"s_data_{k + 1:06d}.h5"
        with h5py.File(folder / name, "w") as file:
            file["entry/data/data"] = images[2 * k : 2 * k + 2]
        layout[2 * k : 2 * k + 2] = h5py.VirtualSource(name, "entry/data/data", (2, 2, 32, WIDTH))
    with h5py.File(folder / "s_master.h5", "w") as h5:
        data, detector = nexus(h5, 0.98)
        data.create_virtual_dataset("data", layout)
        data.attrs["signal"] = "data"
        data.attrs["axes"] = ["image_id", "channel", ".", "."]
        data["channel"] = ["threshold_1", "threshold_2"]
        for k in (1, 2):
            channel = detector.create_group(f"threshold_{k}_channel")
            channel.attrs["NX_class"] = "NXdetector_channel"
            channel["pixel_mask"] = (bad if k == 1 else ~bad).astype("u4")
    return Written(folder / "s_master.h5", images[:, 0], [12398.4198 / 0.98] * 4, bad)


def pilatus_nxmx(folder: Path) -> Written:
    images = counts(3, 40, WIDTH, dtype="int32")
    images[:, 20], images[1, 7, 5] = -1, -2
    with h5py.File(folder / "pilatus.nxs", "w") as h5:
        data, detector = nexus(h5, 0.9)
        data["data"] = images
        data.attrs["signal"] = np.bytes_("data")
        h5.attrs["default"], h5["entry"].attrs["default"] = "entry", "data"
        detector["underload_value"] = 0
    return Written(folder / "pilatus.nxs", images, [12398.4198 / 0.9] * 3, images < 0)


def pilatus_cbf(folder: Path) -> Written:
    import fabio.cbfimage

    images = counts(2, 40, WIDTH, dtype="int32")
    images[:, 20], images[1, 7, 5] = -1, -2
    header = "# Detector: PILATUS 6M, S/N 60-0001\r\n# Wavelength 0.97934 A"
    for k, image in enumerate(images):
        cbf = fabio.cbfimage.CbfImage(data=image, header={"_array_data.header_contents": header})
        cbf.write(str(folder / f"thau_{k:04d}.cbf"))
    return Written(folder / "thau_*.cbf", images, [12398.4198 / 0.97934] * 2, images < 0)


def agipd_virtual_cxi(folder: Path) -> Written:
    """EXtra-data's virtual CXI file: modules in files elsewhere, one of them absent in places."""
    images, bad = counts(4, 16, 32, WIDTH), bad_pixels(16, 32, WIDTH)
    proc, scratch = folder / "proc", folder / "scratch"
    proc.mkdir()
    scratch.mkdir()
    data = h5py.VirtualLayout(images.shape, "f4")
    mask = h5py.VirtualLayout(images.shape, "u4")
    bad_in_event = np.broadcast_to(bad, images.shape).copy()
    for k in range(16):
        path, frames = proc / f"CORR-R0042-AGIPD{k:02d}-S00000.h5", 4 - (k == 3)
        with h5py.File(path, "w") as h5:
            group = h5.create_group(f"INSTRUMENT/SPB_DET_AGIPD1M-1/DET/{k}CH0:xtdf/image")
            group.create_dataset("data", data=images[:frames, k], chunks=(1, 32, WIDTH))
            stored = np.broadcast_to(bad[k], (frames, 32, WIDTH)).astype("u4")
            group.create_dataset("mask", data=stored, chunks=(1, 32, WIDTH))
            for layout, name in ((data, "data"), (mask, "mask")):
                layout[:frames, k] = h5py.VirtualSource(group[name])
    bad_in_event[3, 3] = True  # module 3 has no fourth frame
    with h5py.File(scratch / "r0042.cxi", "w") as h5:
        group = h5.create_group("entry_1/instrument_1/detector_1")
        group.create_virtual_dataset("data", data, fillvalue=np.nan)
        group.create_virtual_dataset("mask", mask, fillvalue=0)
        group["data"].attrs["axes"] = "experiment_identifier:module_identifier:y:x"
        h5["entry_1/data_1"] = h5py.SoftLink("/entry_1/instrument_1/detector_1")
    return Written(scratch / "r0042.cxi", images, [9300.0] * 4, bad_in_event)


def cheetah_cxi(folder: Path) -> Written:
    """A mask for each event, with bits, and energies longer than the frames, never filled in."""
    images = counts(3, 32, WIDTH)
    bad = np.stack([np.roll(bad_pixels(32, WIDTH), k, 0) for k in range(3)])
    mask = bad.astype("u2") * np.random.default_rng(9).integers(1, 2**15, bad.shape).astype("u2")
    cxi(folder / "a-r0001-class1.cxi", images, [9500.0, 9501.0, 9502.0, 0.0, 0.0], mask)
    return Written(folder / "*.cxi", images, [9500.0, 9501.0, 9502.0], bad)


def nxmx_vds(folder: Path) -> Written:
    """A file of facilities whose data acquisition writes modules into their own datasets."""
    images = counts(3, 32, WIDTH, dtype="uint16")
    layout = h5py.VirtualLayout(images.shape, images.dtype)
    with h5py.File(folder / "raw.h5", "w") as h5:
        for k in range(2):
            h5[f"m{k}"] = images[:, 17 * k : 17 * k + 15]
            layout[:, 17 * k : 17 * k + 15] = h5py.VirtualSource("raw.h5", f"m{k}", (3, 15, WIDTH))
    bad = np.zeros((32, WIDTH), bool)
    bad[15:17] = True
    with h5py.File(folder / "scan.nxs", "w") as h5:
        data, _ = nexus(h5, 0.95)
        data.create_virtual_dataset("data", layout, fillvalue=0)
        data.attrs["signal"] = "data"
    return Written(folder / "scan.nxs", images, [12398.4198 / 0.95] * 3, bad)


KINDS: dict[str, Callable[[Path], Written]] = {
    "CSPAD, CXI": cspad_cxi,
    "CSPAD, npz": cspad_npz,
    "ePix10k2M, CXI": epix10k2m_cxi,
    "Jungfrau 4M, CXI": jungfrau4m_cxi,
    "Jungfrau 16M, SwissFEL": jungfrau16m_swissfel,
    "Jungfrau 16M, NXmx": jungfrau16m_nxmx,
    "Rayonix, CXI": rayonix_cxi,
    "Rayonix, mccd": rayonix_mccd,
    "EIGER, DECTRIS master": eiger_master,
    "EIGER2, two thresholds": eiger2_thresholds,
    "PILATUS, NXmx": pilatus_nxmx,
    "PILATUS, CBF": pilatus_cbf,
    "AGIPD, virtual CXI": agipd_virtual_cxi,
    "any, Cheetah or OM": cheetah_cxi,
    "any, NXmx of modules": nxmx_vds,
}
"""By the name of their row in docs/input-data.md."""
