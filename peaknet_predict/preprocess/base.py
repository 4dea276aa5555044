"""The base of all preprocessing steps.

Shape legend: B events, P panels of an event, H rows, W columns, M peaks.
"""

from __future__ import annotations

from torch import Tensor, nn

from peaknet_predict.types import Peaks

Shape = tuple[int, int, int]
"""(P, H, W) of an event."""


class Transform(nn.Module):
    """One step of the preprocessing. This one changes nothing.

    Subclasses override what they change.
    """

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Transform float32 images and the bool mask of their valid pixels."""
        return images_BPHW, valid_BPHW

    def output_shape(self, shape_PHW: Shape) -> Shape:
        """Return the output shape for an event of this shape.

        Raises
        ------
        ValueError
            If the step cannot take the shape.
        """
        return shape_PHW

    def to_original(self, peaks_M3: Peaks, input_shape_PHW: Shape) -> Peaks:
        """Move peaks (panel, y, x) from this step's output back to its input of that shape."""
        return peaks_M3


def event_shape(images_BPHW: Tensor) -> Shape:
    """Return (P, H, W) of a batch's events."""
    _, panels, height, width = images_BPHW.shape
    return panels, height, width
