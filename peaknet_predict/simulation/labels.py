"""From spots to labels: which spots count as one, and the discs that stand for them.

This package's peak finders take the 8-connected components of the class map and their unweighted
centroids. So each spot becomes a disc of pixels whose centroid is at the spot's centre, and the
discs of two spots never touch.

Shape legend: M spots or peaks, B events, P panels of an event, N = B*P, H rows, W columns, K rows
and columns of a window, F radii to try.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BACKGROUND, PEAK, IGNORED = 0, 1, 255
"""Labels of pixels. Ignored ones do not enter the loss."""

MIN_RADIUS, MAX_RADIUS = 1.55, 3.6
"""Smallest and largest radius of a disc, pixels. The smallest disc has six to nine pixels."""

RADIUS_SIGMAS = 1.25
"""Radius of a disc, in widths of the spot. There the spot has about half of its height."""

MIN_DISTANCE = 2.85
"""Spots nearer than this count as one, pixels. From 2 sqrt(2) on, a pixel lies between any two."""

MERGE_SIGMAS = 3.0
"""Spots nearer than so many widths of the wider one count as one. The dip between two equal
Gaussians vanishes at a distance of 2 widths and is 35 % deep at 3."""

_MERGE_REACH = 9
"""Largest distance at which spots are merged, pixels."""

_TOUCH = 2.0**0.5 + 0.01
"""Distance of diagonal neighbours, pixels."""

_REACH = 11
"""Largest distance at which two discs can touch, pixels."""

_TRIED, _SMALLEST, _LARGEST = 16, 0.75, 1.25
"""How many radii are tried for a disc, and the first and last in units of the wanted radius. The
best one has the centroid of its pixels nearest to the centre: at most 0.16 pixels off where there
is room, 0.06 on average."""


@dataclass(slots=True)
class Merged:
    """M spots after those that cannot be told apart have become one.

    Attributes
    ----------
    image_M
        (M,) int64, panel of the batch.
    y_M, x_M, photons_M, sigma_M
        (M,) centre of gravity, photons, and rms width along one axis.
    ignored_M
        (M,) bool: whether a part of it was to be ignored.
    """

    image_M: Tensor
    y_M: Tensor
    x_M: Tensor
    photons_M: Tensor
    sigma_M: Tensor
    ignored_M: Tensor


def disc_radius(sigma_M: Tensor) -> Tensor:
    """Return the radius of the disc that stands for a spot of rms width sigma, pixels."""
    return (RADIUS_SIGMAS * sigma_M).clamp(MIN_RADIUS, MAX_RADIUS)


def merge_spots(spots: Merged, num_images: int, height: int, width: int) -> Merged:
    """Merge spots that are too near to tell apart, each with the brightest one near it.

    Parameters
    ----------
    spots
        The spots.
    num_images, height, width
        Shape of the images. Spots may lie up to 11 pixels outside of them.

    Returns
    -------
    Merged
        Ordered by the brightness of each one's brightest part, brightest first.
    """
    order = torch.argsort(spots.photons_M, descending=True, stable=True)
    image, y, x, photons, sigma, ignored = (
        value[order]
        for value in (
            spots.image_M,
            spots.y_M,
            spots.x_M,
            spots.photons_M,
            spots.sigma_M,
            spots.ignored_M,
        )
    )
    M = len(order)
    number_M = torch.arange(M, device=order.device)
    # Brighter spots have smaller numbers, so the smallest number nearby is the brightest spot.
    near = _Neighbours(image, y, x, num_images, height, width, _MERGE_REACH)
    limit = torch.maximum(sigma[:, None], sigma[near.number_MK])
    limit = (MERGE_SIGMAS * limit).clamp(MIN_DISTANCE, float(_MERGE_REACH))
    joins = near.exists_MK & (near.distance_MK < limit) & (near.number_MK < number_M[:, None])
    parent = torch.where(joins, near.number_MK, M).amin(dim=1)
    parent = torch.minimum(parent, number_M)
    # Each round doubles the length of the chains that are followed.
    for _ in range(5):
        parent = parent[parent]

    def total(value: Tensor) -> Tensor:
        return torch.zeros(M, device=order.device).index_add_(0, parent, value)

    # Relative to the brightest, so that squares lose no digits.
    dy, dx = y - y[parent], x - x[parent]
    weight = total(photons).clamp(min=1e-12)
    mean_y, mean_x = total(photons * dy) / weight, total(photons * dx) / weight
    square = total(photons * (sigma.square() + 0.5 * (dy.square() + dx.square()))) / weight
    variance = square - 0.5 * (mean_y.square() + mean_x.square())
    any_ignored = total(ignored * photons) > 0.3 * weight
    kept = torch.nonzero(parent == number_M).squeeze(1)
    return Merged(
        image_M=image[kept],
        y_M=(y + mean_y)[kept],
        x_M=(x + mean_x)[kept],
        photons_M=weight[kept],
        sigma_M=variance.clamp(min=0.05).sqrt()[kept],
        ignored_M=any_ignored[kept],
    )


def draw_labels(
    peaks_M4: Tensor, radius_M: Tensor, shape_BPHW: tuple[int, int, int, int]
) -> Tensor:
    """Draw a disc for each peak; discs whose peaks are far enough apart do not touch.

    Where two would touch, both become smaller, so that their centroids stay. Peaks at least
    `MIN_DISTANCE` apart always remain separate.

    Parameters
    ----------
    peaks_M4
        (M, 4) float32: event, panel, y, x.
    radius_M
        (M,) float32, pixels, at most `MAX_RADIUS`; see `disc_radius`.
    shape_BPHW
        Shape of the result.

    Returns
    -------
    Tensor
        (B, P, H, W) uint8, `PEAK` or `BACKGROUND`.
    """
    B, P, H, W = shape_BPHW
    event_M, panel_M = peaks_M4[:, 0].long(), peaks_M4[:, 1].long()
    image_M = event_M * P + panel_M
    y_M, x_M = peaks_M4[:, 2], peaks_M4[:, 3]
    labels = torch.zeros(B * P, H, W, dtype=torch.uint8, device=peaks_M4.device)
    return paint(labels, image_M, y_M, x_M, radius_M, PEAK).view(B, P, H, W)


def paint(
    labels_NHW: Tensor, image_M: Tensor, y_M: Tensor, x_M: Tensor, radius_M: Tensor, value: int
) -> Tensor:
    """Draw discs with a label over existing labels; return new labels, (N, H, W) uint8."""
    N, H, W = labels_NHW.shape
    near = _Neighbours(image_M, y_M, x_M, N, H, W, _REACH)
    room_MK = (near.distance_MK - _TOUCH).clamp(min=0.0)
    share_MK = radius_M[:, None] / (radius_M[:, None] + radius_M[near.number_MK])
    room_M = torch.where(near.exists_MK, room_MK * share_MK, torch.inf).amin(dim=1)
    wanted_M = torch.minimum(radius_M, room_M / _LARGEST)

    reach = math.ceil(_LARGEST * MAX_RADIUS)
    offset_K = torch.arange(-reach, reach + 1, device=labels_NHW.device)
    middle_y, middle_x = y_M.round(), x_M.round()
    off_y_MK1 = (offset_K - (y_M - middle_y)[:, None])[:, :, None]
    off_x_M1K = (offset_K - (x_M - middle_x)[:, None])[:, None, :]
    distance2_MKK = off_y_MK1.square() + off_x_M1K.square()
    # The pixel that holds the centre belongs to the disc, however small that is.
    holds_KK = (offset_K[:, None] == 0) & (offset_K == 0)
    factor_F = torch.linspace(_SMALLEST, _LARGEST, _TRIED, device=y_M.device)
    radius2_MF = (wanted_M[:, None] * factor_F).square()
    tried_MFKK = (distance2_MKK[:, None] <= radius2_MF[..., None, None]) | holds_KK
    # The number of pixels, and the sum of their offsets, by rows and by columns.
    rows_MFK, columns_MFK = tried_MFKK.sum(dim=3), tried_MFKK.sum(dim=2)
    count_MF = rows_MFK.sum(dim=2)
    error_y_MF = (rows_MFK * off_y_MK1.transpose(1, 2)).sum(dim=2) / count_MF
    error_x_MF = (columns_MFK * off_x_M1K).sum(dim=2) / count_MF
    # Among near equals, the one of the wanted size.
    error_MF = error_y_MF.square() + error_x_MF.square() + 0.02 * (factor_F - 1.0).square()
    best_M = error_MF.argmin(dim=1)
    number_M = torch.arange(len(y_M), device=y_M.device)
    disc_MKK = tried_MFKK[number_M, best_M]

    pixel_MKK = window_pixels(image_M, y_M, x_M, offset_K, (N, H, W))
    pixel_MKK = torch.where(disc_MKK, pixel_MKK, N * H * W)
    flat = torch.cat([labels_NHW.flatten(), labels_NHW.new_zeros(1)])
    flat.index_fill_(0, pixel_MKK.flatten(), value)
    return flat[:-1].view(N, H, W)


def window_pixels(
    image_M: Tensor, y_M: Tensor, x_M: Tensor, offset_K: Tensor, shape_NHW: tuple[int, int, int]
) -> Tensor:
    """Return the flat indices of the pixels of a window around each point, (M, K, K) int64.

    Pixels outside of the image get the index behind the last pixel.
    """
    N, H, W = shape_NHW
    row_MK1 = (y_M.round().long()[:, None] + offset_K)[:, :, None]
    column_M1K = (x_M.round().long()[:, None] + offset_K)[:, None, :]
    inside = (row_MK1 >= 0) & (row_MK1 < H) & (column_M1K >= 0) & (column_M1K < W)
    pixel_MKK = (image_M[:, None, None] * H + row_MK1) * W + column_M1K
    return torch.where(inside, pixel_MKK, N * H * W)


class _Neighbours:
    """For each of M points, the points in the window around it.

    Each pixel remembers the point that it holds (if there are several, the one with the smallest
    number), and each point looks at the pixels around its own.

    Attributes
    ----------
    number_MK
        (M, K) int64, number of the point in each pixel of the window; 0 where there is none.
    exists_MK
        (M, K) bool: whether there is a point, other than the point itself.
    distance_MK
        (M, K) float32, pixels.
    """

    def __init__(
        self, image_M: Tensor, y_M: Tensor, x_M: Tensor, N: int, H: int, W: int, reach: int
    ) -> None:
        M, device = len(image_M), image_M.device
        # Points outside of the images lie on a border, with one more window around it.
        border = 12
        edge = border + reach
        rows, columns = H + 2 * edge, W + 2 * edge
        y = y_M.round().long().clamp(-border, H - 1 + border) + edge
        x = x_M.round().long().clamp(-border, W - 1 + border) + edge
        pixel_M = (image_M * rows + y) * columns + x
        number_M = torch.arange(M, device=device)
        holder = torch.full((N * rows * columns,), M, dtype=torch.int64, device=device)
        holder.scatter_reduce_(0, pixel_M, number_M, "amin")
        offset = torch.arange(-reach, reach + 1, device=device)
        window_K = (offset[:, None] * columns + offset).flatten()
        number_MK = holder[pixel_M[:, None] + window_K]
        self.exists_MK = (number_MK < M) & (number_MK != number_M[:, None])
        self.number_MK = torch.where(self.exists_MK, number_MK, 0)
        dy = y_M[:, None] - y_M[self.number_MK]
        dx = x_M[:, None] - x_M[self.number_MK]
        self.distance_MK = (dy.square() + dx.square()).sqrt()
