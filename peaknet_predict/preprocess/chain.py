"""The whole preprocessing: the steps in order, and the peaks' way back through them.

Shape legend: B events, P panels of an event, N = B*P, H rows, W columns, M peaks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from peaknet_predict.preprocess.base import Shape, Transform, event_shape
from peaknet_predict.preprocess.norms import InstanceNorm, LocalNorm
from peaknet_predict.preprocess.outliers import OutlierReport, find_outliers
from peaknet_predict.preprocess.panels import Patchify
from peaknet_predict.preprocess.saturation import SaturationReport
from peaknet_predict.preprocess.validity import Validity
from peaknet_predict.types import Peaks


class Prepared(NamedTuple):
    """The network's input.

    Attributes
    ----------
    images_N1HW
        (N, 1, H, W) float32, finite.
    valid_N1HW
        (N, 1, H, W) bool; False where the pixel is bad or padding.
    bad_BPHW
        (B, P, H, W) bool; True where a pixel of the original frame is bad.
    bad_pixels_B, outliers_B
        (B,) int64: how many bad pixels each event has, and how many of them were found only by
        comparison with the rest of the event (`find_outliers`).
    """

    images_N1HW: Tensor
    valid_N1HW: Tensor
    bad_BPHW: Tensor
    bad_pixels_B: Tensor
    outliers_B: Tensor


class Preprocess(nn.Module):
    """All steps from raw frames to the network's input: which pixels count, then the transforms.

    Parameters
    ----------
    transforms
        In order, as the network's weights were trained: `Crop` or `Pad`, `InstanceNorm`,
        `MergeBatchChannelDims` for published ones, `LocalNorm`, `PadToMultiple`,
        `MergeBatchChannelDims` for those shipped here. There is one norm at most, and the last is
        always `MergeBatchChannelDims`; `Crop`, `Pad` and `PadToMultiple` stand before
        `InstanceNorm` but anywhere with `LocalNorm`, which leaves padding out; `Patchify` stands
        anywhere before the end.
    validity
        Which pixels are measurements; by default those whose values do not mark bad ones.

    Attributes
    ----------
    cuts
        Whether panels are cut into patches, so that peaks are to be found in what `join` returns: a
        peak on a seam would be one in each patch.
    outlier_report
        Told how many outliers each event has.
    saturation_report
        Told which of an event's pixels are bad.

    Raises
    ------
    ValueError
        If the order of the transforms gives the network something else.
    """

    def __init__(self, transforms: list[Transform], validity: Validity | None = None) -> None:
        super().__init__()
        _check_order(transforms)
        self.validity = Validity() if validity is None else validity
        self.transforms = nn.ModuleList(transforms)
        self.cuts = any(isinstance(transform, Patchify) for transform in transforms)
        self._sources: dict[tuple[Shape, torch.device], Tensor] = {}
        self.outlier_report = OutlierReport()
        self.saturation_report = SaturationReport()

    def forward(self, counts_BPHW: Tensor, bad_bits_BK: Tensor | None = None) -> Prepared:
        """Prepare a batch: `widen`, then `transform`.

        Parameters
        ----------
        counts_BPHW
            (B, P, H, W) of any real dtype, detector counts.
        bad_bits_BK
            Pixels that the producers declare bad, see `Validity.forward`.

        Raises
        ------
        ValueError
            If a transform cannot take the panels' size, or the mask is of another detector.
        """
        return self.transform(*self.widen(counts_BPHW, bad_bits_BK))

    def widen(
        self, counts_BPHW: Tensor, bad_bits_BK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return float32 images and the mask of their valid pixels, see `Validity.forward`.

        This is the only step that depends on the dtype. The compiled part begins after it;
        otherwise it would be compiled again for every dtype. Raw counts of 2 or 4 bytes travel to
        the device as they are.
        """
        if counts_BPHW.ndim != 4:
            raise ValueError(
                f"a batch of events has the shape (B, P, H, W), not {tuple(counts_BPHW.shape)}"
            )
        self.validity.check_shape(event_shape(counts_BPHW))
        images_BPHW, valid_BPHW = self.validity(counts_BPHW, bad_bits_BK)
        return images_BPHW, valid_BPHW

    def transform(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> Prepared:
        """Leave out outliers and run the transforms on what `widen` returned."""
        outlier_BPHW = find_outliers(images_BPHW, valid_BPHW)
        bad_BPHW = outlier_BPHW | ~valid_BPHW
        # What the norms leave out of their statistics.
        images_BPHW = images_BPHW.masked_fill(bad_BPHW, torch.nan)
        valid_BPHW = ~bad_BPHW
        for transform in self.transforms:
            images_BPHW, valid_BPHW = transform(images_BPHW, valid_BPHW)
        # Without a norm, bad pixels are still NaN.
        images_N1HW = torch.where(images_BPHW.isnan(), 0.0, images_BPHW)
        over = (1, 2, 3)
        return Prepared(
            images_N1HW, valid_BPHW, bad_BPHW, bad_BPHW.sum(over), outlier_BPHW.sum(over)
        )

    def move(self, values_BPHW: Tensor, fill: int) -> Tensor:
        """Move values that belong to pixels, such as labels, to where the pixels go.

        Parameters
        ----------
        values_BPHW
            (B, P, H, W) of any dtype.
        fill
            Value of the padding.

        Returns
        -------
        Tensor
            (N, 1, H', W') of the same dtype.
        """
        real_BPHW = torch.ones_like(values_BPHW, dtype=torch.bool)
        for transform in self.transforms:
            if not isinstance(transform, InstanceNorm | LocalNorm):
                values_BPHW, real_BPHW = transform(values_BPHW, real_BPHW)
        return torch.where(real_BPHW, values_BPHW, fill)

    def join(self, values_NHW: Tensor, shape_PHW: Shape) -> Tensor:
        """Put values that belong to pixels of prepared panels back to where the pixels were.

        Parameters
        ----------
        values_NHW
            (N, H', W') bool.
        shape_PHW
            Shape of the original events.

        Returns
        -------
        Tensor
            (B*P, H, W) bool; False where a pixel was cut off.
        """
        size = math.prod(shape_PHW)
        key = shape_PHW, values_NHW.device
        if key not in self._sources:
            self._sources.clear()
            indices = torch.arange(size, device=values_NHW.device).view(1, *shape_PHW)
            # What is padding goes into one more place, behind the last pixel.
            self._sources[key] = self.move(indices, fill=size).flatten()
        source_S = self._sources[key]
        values_BS = values_NHW.reshape(-1, len(source_S))
        joined_BS = values_BS.new_zeros(len(values_BS), size + 1)
        joined_BS.index_copy_(1, source_S, values_BS)
        return joined_BS[:, :size].reshape(-1, *shape_PHW[1:])

    def output_shape(self, shape_PHW: Shape) -> Shape:
        """Return the shape of a prepared event, (panels, height, width), without making one.

        Raises
        ------
        ValueError
            If the mask or a transform cannot take the shape; the message names the remedy.
        """
        self.validity.check_shape(shape_PHW)
        return self._shapes(shape_PHW)[-1]

    def to_original(
        self, peaks_M3: Peaks, input_shape_PHW: Shape
    ) -> tuple[Peaks, npt.NDArray[np.bool_]]:
        """Move the peaks of one event from prepared panels back to its original frame.

        Parameters
        ----------
        peaks_M3
            (M, 3) float64: panel of the prepared event, y, x.
        input_shape_PHW
            Shape of the original event.

        Returns
        -------
        peaks, keep_M
            The peaks of the original frame, (sum of keep_M, 3) float64; and (M,) bool, which of the
            given ones they are. Peaks whose centre lies in the padding are left out.
        """
        peaks_M3 = np.asarray(peaks_M3, dtype=np.float64).reshape(-1, 3)
        input_shapes = self._shapes(input_shape_PHW)[:-1]
        keep_M = np.ones(len(peaks_M3), dtype=np.bool_)
        for transform, shape_PHW in reversed(list(zip(self.transforms, input_shapes, strict=True))):
            assert isinstance(transform, Transform)
            peaks_M3 = transform.to_original(peaks_M3, shape_PHW)
            # A pixel reaches half its size to each side of its centre. Checked at every step:
            # beyond the border of one patch, `Patchify` would find pixels of the next.
            upper_3 = np.array(shape_PHW) - 0.5
            keep_M &= np.all((peaks_M3 >= -0.5) & (peaks_M3 < upper_3), axis=1)
        return peaks_M3[keep_M], keep_M

    def _shapes(self, shape_PHW: Shape) -> list[Shape]:
        """Return the event's shape before the first transform and after each."""
        shapes = [shape_PHW]
        for transform in self.transforms:
            assert isinstance(transform, Transform)
            shapes.append(transform.output_shape(shapes[-1]))
        return shapes


def _check_order(transforms: list[Transform]) -> None:
    names = [type(transform).__name__ for transform in transforms]
    chain = " -> ".join(names) or "nothing"
    for transform, name in zip(transforms, names, strict=True):
        if not isinstance(transform, Transform):
            raise ValueError(f"{name} is not a Transform of peaknet_predict.preprocess")
    if names.count("MergeBatchChannelDims") != 1 or names[-1] != "MergeBatchChannelDims":
        raise ValueError(
            f"transforms must end with MergeBatchChannelDims, and have no other; got {chain}"
        )
    norms = [name for name in names if name in ("InstanceNorm", "LocalNorm")]
    if len(norms) > 1:
        raise ValueError(f"one {norms[0]} is enough: remove {', '.join(norms[1:])} from {chain}")
    if "InstanceNorm" in names:
        for name in names[names.index("InstanceNorm") + 1 :]:
            if name in ("Crop", "Pad", "PadToMultiple"):
                raise ValueError(
                    f"{name} stands after InstanceNorm, whose statistics must be those of the "
                    f"network's input: move {name} before it in {chain}"
                )
