"""The eight ways to look at a panel: rotated by quarter turns, and mirrored.

Shape legend: B events, P panels of an event, H rows, W columns.
"""

from __future__ import annotations

import random

from torch import Tensor


def turned(images: list[Tensor], seed: int) -> list[Tensor]:
    """Return images (B, P, H, W), all turned in the same way, one of eight.

    A batch is turned as a whole, so only its strides change. Panels that are not square keep their
    orientation: they are mirrored along either axis or both.

    Parameters
    ----------
    images
        Tensors of the same H and W: pixels, and labels.
    seed
        Decides which way.
    """
    height, width = images[0].shape[-2:]
    draw = random.Random(seed)
    axes = [axis for axis in (-2, -1) if draw.random() < 0.5]
    transpose = draw.random() < 0.5 and height == width
    out = [image.flip(axes) if axes else image for image in images]
    return [image.transpose(-2, -1) for image in out] if transpose else out
