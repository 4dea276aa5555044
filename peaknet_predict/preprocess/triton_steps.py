"""Outliers and `LocalNorm` on a GPU; imported where there is one, and Triton.

The functions replace pixel-wise parts of `outliers.py` and `norms.py`, and have their names.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from peaknet_predict.preprocess import triton_kernels as kernels

_PIXELS = 1024
_BLOCKS = 32
_BLOCK_PIXELS = 2048


def outliers(
    images_BPHW: Tensor,
    valid_BPHW: Tensor,
    median_B: Tensor,
    typical_B: Tensor,
    widest: float,
    alone_from: float,
    of_neighbours: float,
) -> Tensor:
    """Return which pixels are outliers, (B, P, H, W) bool; see `find_outliers`.

    Parameters
    ----------
    images_BPHW, valid_BPHW
        As for `find_outliers`.
    median_B, typical_B
        (B,) float32: each event's median and typical distance from it.
    widest, alone_from
        Typical distances from which a pixel is an outlier, and from which it is one if alone.
    of_neighbours
        Share of its distance that the mean of the nine pixels around a lone one stays below.
    """
    images_BPHW, valid_BPHW = images_BPHW.contiguous(), valid_BPHW.contiguous()
    events, panels, height, width = images_BPHW.shape
    flags_BPHW = torch.empty_like(valid_BPHW, dtype=torch.uint8)
    tiles = triton.cdiv(height * width, _PIXELS)
    sums = images_BPHW.new_empty(events, panels * tiles)
    with torch.cuda.device(images_BPHW.device):
        kernels.outlier_kernel[(events * panels * tiles,)](
            images_BPHW,
            valid_BPHW.view(torch.uint8),
            median_B,
            typical_B,
            flags_BPHW,
            sums,
            height,
            width,
            panels,
            tiles,
            widest,
            alone_from,
            of_neighbours,
            PIXELS=_PIXELS,
            num_warps=4,
        )
        pixels = panels * height * width
        tiles = triton.cdiv(pixels, _PIXELS)
        out_BPHW = torch.empty_like(flags_BPHW)
        kernels.judge_kernel[(events * tiles,)](
            images_BPHW,
            median_B,
            sums.sum(1),
            flags_BPHW,
            out_BPHW,
            pixels,
            tiles,
            PIXELS=_PIXELS,
            num_warps=4,
        )
    return out_BPHW.view(torch.bool)


def block_statistics(
    images_BPHW: Tensor, valid_BPHW: Tensor, block: int, least: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, variance, step of the counts and whether they are known, of each block.

    All are (N, h, w); see `LocalNorm`. ``least`` is how many usable pixels make a block known.
    """
    _, _, height, width = images_BPHW.shape
    rows, columns = -(-height // block), -(-width // block)
    panels = images_BPHW.shape[0] * images_BPHW.shape[1]
    mean, variance, step = (images_BPHW.new_empty(panels, rows, columns) for _ in range(3))
    known = torch.empty_like(mean, dtype=torch.uint8)
    area = triton.next_power_of_2(block * block)
    at_once = max(1, _BLOCK_PIXELS // area)
    with torch.cuda.device(images_BPHW.device):
        kernels.block_kernel[(panels * triton.cdiv(rows * columns, at_once),)](
            images_BPHW.contiguous(),
            valid_BPHW.contiguous().view(torch.uint8),
            mean,
            variance,
            step,
            known,
            height,
            width,
            rows,
            columns,
            least,
            BLOCK=block,
            AREA_P=area,
            BLOCKS=at_once,
            num_warps=4,
        )
    return mean, variance, step, known.view(torch.bool)


def background(
    mean_Nhw: Tensor,
    variance_Nhw: Tensor,
    known_Nhw: Tensor,
    panel_mean_N: Tensor,
    panel_sigma_N: Tensor,
    floor_N: Tensor,
    step_share: float,
) -> Tensor:
    """Return mean and sigma of the background at each block's centre, (N, 2, h, w)."""
    panels, rows, columns = mean_Nhw.shape
    out_N2hw = mean_Nhw.new_empty(panels, 2, rows, columns)
    with torch.cuda.device(mean_Nhw.device):
        kernels.background_kernel[(panels * triton.cdiv(rows * columns, _BLOCKS),)](
            mean_Nhw,
            variance_Nhw,
            known_Nhw.view(torch.uint8),
            panel_mean_N,
            panel_sigma_N,
            floor_N,
            out_N2hw,
            rows,
            columns,
            step_share,
            BLOCKS=_BLOCKS,
            num_warps=4,
        )
    return out_N2hw


def normalise(
    images_BPHW: Tensor,
    valid_BPHW: Tensor,
    background_N2hw: Tensor,
    block: int,
    linear_sigmas: float,
) -> Tensor:
    """Return the pixels' compressed excess over the background, (B, P, H, W) float32."""
    height, width = images_BPHW.shape[-2:]
    panels, _, rows, columns = background_N2hw.shape
    images_BPHW, valid_BPHW = images_BPHW.contiguous(), valid_BPHW.contiguous()
    out_BPHW = torch.empty_like(images_BPHW)
    with torch.cuda.device(images_BPHW.device):
        kernels.normalise_kernel[(panels * triton.cdiv(height * width, _PIXELS),)](
            images_BPHW,
            valid_BPHW.view(torch.uint8),
            background_N2hw,
            out_BPHW,
            height,
            width,
            rows,
            columns,
            linear_sigmas,
            BLOCK=block,
            PIXELS=_PIXELS,
            num_warps=4,
        )
    return out_BPHW
