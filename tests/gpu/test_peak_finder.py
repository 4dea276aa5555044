"""`PeakFinder` on a GPU, held bit for bit to the per-panel SciPy loop on fresh random input."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from peaknet_predict.peaks import PeakTable
from peaknet_predict.peaks.finder import PeakFinder
from tests.helpers.oracle import find_peaks_reference

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("cupy", reason="CuPy is not installed")

pytestmark = pytest.mark.gpu

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
TIE_LEAD = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-25}
LAYOUTS = [torch.contiguous_format, torch.channels_last]

Mask = npt.NDArray[np.bool_]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


@pytest.fixture
def no_syncs() -> Iterator[None]:
    """Calls of torch that make the host wait raise."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def assert_same(found: PeakTable, expected: PeakTable) -> None:
    for name in ("panel", "y", "x", "num_pixels"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        assert ours.tobytes() == theirs.tobytes(), name


def finder_for(shape_NHW: tuple[int, ...], **options: Any) -> PeakFinder:
    num_panels, height, width = shape_NHW
    return PeakFinder(max(num_panels, 1), height, width, **options)


def check(mask_NHW: Mask, **options: Any) -> PeakTable:
    finder = finder_for(mask_NHW.shape, **options)
    found = finder.enqueue(class_map=torch.from_numpy(mask_NHW).cuda()).table()
    assert_same(found, find_peaks_reference(mask_NHW))
    return found


def blobs(shape_NHW: tuple[int, int, int], count: int, rng: np.random.Generator) -> Mask:
    mask_NHW = np.zeros(shape_NHW, dtype=np.bool_)
    _, height, width = shape_NHW
    for panel_HW in mask_NHW:
        for y, x in zip(rng.integers(0, height, count), rng.integers(0, width, count), strict=True):
            panel_HW[y : y + rng.integers(1, 6), x : x + rng.integers(1, 6)] = True
    return mask_NHW


def spiral(side: int) -> Mask:
    """One component whose runs meet as late as they can."""
    mask_HW = np.zeros((side, side), dtype=np.bool_)
    y = x = 0
    dy, dx = 0, 1
    legs = [side - 1] + [leg for k in range(side - 1, 0, -2) for leg in (k, k)]
    for leg in legs:
        for _ in range(leg):
            mask_HW[y, x] = True
            y, x = min(max(y + dy, 0), side - 1), min(max(x + dx, 0), side - 1)
        dy, dx = dx, -dy
    return mask_HW


def mask_of(finder: PeakFinder, num_panels: int) -> Tensor:
    """Return the finder's own bit mask as bool, to compare millions of pixels with torch."""
    words_NHW = finder._labeller.mask_N[:num_panels].transpose(2, 3).flatten(1, 2)
    bits = words_NHW[..., None] >> torch.arange(32, device="cuda") & 1
    return bits.flatten(2)[:, : finder.height, : finder.width].bool()


# Components


@pytest.mark.parametrize("density", [0.0, 0.001, 0.02, 0.1, 0.3, 0.4, 0.5, 0.6, 0.9, 0.99, 1.0])
def test_any_density(density: float, rng: np.random.Generator) -> None:
    check(rng.random((5, 171, 203)) < density)
    # Some panels in shared memory, most not.
    check(rng.random((5, 171, 203)) < density, max_pieces=1000)


def test_many_small_masks(rng: np.random.Generator) -> None:
    for _ in range(150):
        shape = tuple(rng.integers([0, 1, 1], [131, 40, 100]))
        max_pieces = int(rng.integers(1, 400))
        check(rng.random(shape) < rng.random(), max_pieces=max_pieces, max_peaks_per_panel=20)


@pytest.mark.parametrize(
    "shape",
    [(16, 185, 388), (32, 352, 384), (4, 512, 1024), (2, 1920, 1920), (1, 2048, 2048)],
    ids=str,
)
def test_panels_of_real_size(shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    check(blobs(shape, 150, rng))
    check(rng.random(shape) < 0.2)  # more pieces than fit
    check(np.kron(rng.random((shape[0], 512, 512)) < 0.5, np.ones((1, 4, 4))).astype(np.bool_)[
        :, : shape[1], : shape[2]
    ])  # fmt: skip


@pytest.mark.parametrize("num_panels", [1, 2, 127, 128, 130])
def test_batches(num_panels: int, rng: np.random.Generator) -> None:
    check(blobs((num_panels, 96, 100), 20, rng))


def test_no_panels() -> None:
    assert (
        len(PeakFinder(3, 8, 8).enqueue(class_map=torch.zeros(0, 8, 8).cuda().int()).table()) == 0
    )


def test_borders_and_lines(rng: np.random.Generator) -> None:
    for shape in [(1, 1), (1, 200), (200, 1), (33, 31), (32, 64), (65, 33)]:
        mask_HW = np.zeros(shape, dtype=np.bool_)
        mask_HW[[0, -1], :] = mask_HW[:, [0, -1]] = True
        dots_HW = np.zeros(shape, dtype=np.bool_)
        dots_HW[::2, ::2] = True
        check(np.stack([mask_HW, ~mask_HW, dots_HW, rng.random(shape) < 0.5]))


@pytest.mark.parametrize("max_pieces", [None, 1])
def test_worst_cases_for_the_union(max_pieces: int | None) -> None:
    comb_HW = np.zeros((512, 512), dtype=np.bool_)
    comb_HW[:, ::2] = comb_HW[-1] = True
    zigzag_HW = np.zeros((512, 512), dtype=np.bool_)
    zigzag_HW[::2] = zigzag_HW[1::4, 0] = zigzag_HW[3::4, -1] = True
    diagonal_HW = np.indices((512, 512)).sum(0) % 3 == 0
    masks = [comb_HW, comb_HW[::-1], comb_HW.T, zigzag_HW, spiral(512), spiral(512).T, diagonal_HW]
    check(np.stack(masks), max_pieces=max_pieces)


def test_as_many_pieces_as_16_bits_can_number(rng: np.random.Generator) -> None:
    masks = np.zeros((4, 512, 512), dtype=np.bool_)
    masks[0, ::2, ::2] = masks[1, 1::2, 1::2] = masks[2, :, 1::2] = True
    masks[3] = rng.random((512, 512)) < 0.3
    finder = finder_for(masks.shape)
    assert finder._labeller._rooms == 0  # nothing can be too large
    found = finder.enqueue(class_map=torch.from_numpy(masks).cuda()).table()
    assert_same(found, find_peaks_reference(masks))


def test_noise_of_every_pixel(rng: np.random.Generator) -> None:
    check(rng.random((20, 512, 512)) < rng.uniform(0.1, 0.9, (20, 1, 1)))


def test_components_in_neighbouring_panels_never_join() -> None:
    mask_NHW = np.zeros((3, 8, 8), dtype=np.bool_)
    mask_NHW[0, 3:5, 3:5] = mask_NHW[1, 4:6, 4:6] = mask_NHW[1, 7, 7] = mask_NHW[2, 0, 0] = True
    assert check(mask_NHW).panel.tolist() == [0, 1, 1, 2]


# What the mask is made of


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_class_maps(dtype: torch.dtype, rng: np.random.Generator) -> None:
    classes = rng.integers(0, 3, (6, 44, 64))
    base = torch.from_numpy(classes).cuda().to(dtype)
    views = [base, base[::2], base[:, 3:, 5:-1], base.permute(2, 0, 1), base[0].expand(4, 44, 64)]
    for view in views:
        finder = finder_for(tuple(view.shape), max_peaks_per_panel=2000)
        found = finder.enqueue(class_map=view).table()
        assert_same(found, find_peaks_reference(view.cpu().numpy()))


def near_ties(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Logits (N, C, H, W) whose leads lie around the one at which rounded probabilities part."""
    lead = TIE_LEAD[dtype]
    kind = torch.randint(0, 4, (shape[0], 1, *shape[2:]), device="cuda")
    scale = torch.tensor([lead, 4 * lead, 64 * lead, 4.0], device="cuda")[kind]
    logits = torch.randn(shape, device="cuda") * scale
    # Offsets of powers of two make leads of few bits; small second logits make them of many.
    offset = torch.tensor([0.0, lead, 2 * lead, 1.0], device="cuda")[kind.roll(1, -1)]
    logits[:, 1:2] += offset
    logits[..., ::7] *= 2.0 ** -torch.randint(0, 20, shape, device="cuda")[..., ::7]
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_class_map_is_that_of_torch(
    dtype: torch.dtype, memory_format: torch.memory_format, classes: int, rng: np.random.Generator
) -> None:
    finder = PeakFinder(16, 512, 512)
    for _ in range(8):
        logits = near_ties((16, classes, 512, 512), dtype).contiguous(memory_format=memory_format)
        for special in (math.nan, math.inf, -math.inf):
            logits[torch.rand_like(logits) < 0.01] = special
        finder.enqueue(logits=logits)._finder._pending = None
        assert torch.equal(mask_of(finder, 16), logits.softmax(1).argmax(1) != 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_lead_around_the_tie(dtype: torch.dtype) -> None:
    """Leads one float32 step apart: a power of two less ever larger tiny numbers."""
    lead = TIE_LEAD[dtype]
    steps = torch.arange(-128, 128, device="cuda").float() * 2.0**-31 * (lead / 2.0**-8)
    widths = 2.0 ** torch.arange(0, 12, device="cuda").float()
    background = (steps[:, None] * widths).flatten().repeat(2)  # (6144,)
    finder = PeakFinder(1, 64, 96)
    for power in (lead / 2, lead, 2 * lead):
        logits = torch.stack([background, torch.full_like(background, power)])
        logits = logits.reshape(1, 2, 64, 96).to(dtype)
        finder.enqueue(logits=logits)._finder._pending = None
        assert torch.equal(mask_of(finder, 1), logits.softmax(1).argmax(1) != 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape_HW", [(1, 1), (37, 61), (128, 128), (480, 24)], ids=str)
def test_upsampling_is_that_of_torch(
    dtype: torch.dtype, memory_format: torch.memory_format, shape_HW: tuple[int, int]
) -> None:
    height, width = shape_HW
    finder = PeakFinder(8, 4 * height, 4 * width)
    for _ in range(8):
        logits = near_ties((8, 2, height, width), dtype).contiguous(memory_format=memory_format)
        logits[torch.rand_like(logits) < 0.001] = math.nan
        logits[torch.rand_like(logits) < 0.001] = math.inf
        finder.enqueue(logits=logits, upsampling=4)._finder._pending = None
        full = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
        assert torch.equal(mask_of(finder, 8), full.softmax(1).argmax(1) != 0)


@pytest.mark.parametrize("upsampling", [1, 4])
def test_from_logits_to_peaks(upsampling: Any, rng: np.random.Generator) -> None:
    shape = (9, 2, 200 // upsampling, 388 // upsampling)
    logits = (torch.randn(shape, device="cuda") - 2 * torch.tensor([[[0.0]], [[1.0]]]).cuda()).to(
        torch.bfloat16
    )
    valid = torch.rand((9, 200, 388), device="cuda") < 0.9
    full = logits if upsampling == 1 else F.interpolate(logits, scale_factor=4, mode="bilinear")
    classes = full.softmax(1).argmax(1)
    finder = PeakFinder(9, 200, 388, max_peaks_per_panel=4000)
    found = finder.enqueue(logits=logits, upsampling=upsampling).table()
    assert_same(found, find_peaks_reference(classes.cpu().numpy()))
    for mask in (valid, valid.byte(), valid.mT.contiguous().mT):
        found = finder.enqueue(logits=logits, upsampling=upsampling, valid=mask).table()
        assert_same(found, find_peaks_reference((classes * valid).cpu().numpy()))


# Intensity


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.float32, torch.float64],
    ids=str,
)
def test_intensity(dtype: torch.dtype, rng: np.random.Generator) -> None:
    mask_NHW = np.concatenate([blobs((5, 185, 388), 30, rng), rng.random((2, 185, 388)) < 0.3])
    counts = rng.normal(100, 40, (7, 200, 400))
    if dtype == torch.int32:
        counts *= 1e7
    images = torch.from_numpy(counts).to(dtype)
    if dtype.is_floating_point:
        images[torch.from_numpy(rng.random(images.shape) < 0.1)] = math.nan
        images[torch.from_numpy(rng.random(images.shape) < 0.05)] = -math.inf
    finder = PeakFinder(7, 185, 388, max_peaks_per_panel=100, max_pieces=4000)
    pixels = images.cuda()[:, 8:193, 5:393]
    found = finder.enqueue(class_map=torch.from_numpy(mask_NHW).cuda(), pixels=pixels).table()
    assert_same(found, find_peaks_reference(mask_NHW))
    assert found.intensity_sum is not None
    assert found.intensity_max is not None
    for panel, (mask_HW, image_HW) in enumerate(
        zip(mask_NHW, pixels.cpu().to(torch.float64).numpy(), strict=True)
    ):
        labels, num_peaks = ndimage.label(mask_HW, np.ones((3, 3)))
        index = np.arange(1, num_peaks + 1)
        finite = np.isfinite(image_HW)
        of_panel = found.panel == panel
        values = [image_HW[(labels == k) & finite] for k in index[:100]]
        # fsum is exact up to one rounding, and so is the finder for pixels like these.
        sums = [math.fsum(v) for v in values]
        assert found.intensity_sum[of_panel][:100].tolist() == sums
        highest = ndimage.maximum(np.where(finite, image_HW, -np.inf), labels, index)
        highest[np.isneginf(highest)] = np.nan
        np.testing.assert_array_equal(found.intensity_max[of_panel], highest)
        if not dtype.is_floating_point:
            scipy_sums = ndimage.sum(image_HW, labels, index)
            np.testing.assert_array_equal(found.intensity_sum[of_panel], scipy_sums)


# The columns that peak properties will use: docs/decisions/peak-intensities-on-the-gpu.md.
def test_intensity_of_float32_counts_equals_scipy(rng: np.random.Generator) -> None:
    mask_NHW = blobs((4, 352, 384), 50, rng)
    image_NHW = rng.poisson(30, mask_NHW.shape).astype(np.float32)
    finder = PeakFinder(4, 352, 384)
    found = finder.enqueue(
        class_map=torch.from_numpy(mask_NHW).cuda(), pixels=torch.from_numpy(image_NHW).cuda()
    ).table()
    expected = []
    for mask_HW, image_HW in zip(mask_NHW, image_NHW, strict=True):
        labels, num_peaks = ndimage.label(mask_HW, np.ones((3, 3)))
        expected += ndimage.sum(image_HW, labels, np.arange(1, num_peaks + 1)).tolist()
    assert found.intensity_sum is not None
    assert found.intensity_sum.tolist() == expected


# Overflow, repetition, concurrency, and what is refused


def test_more_peaks_than_room_are_recovered(rng: np.random.Generator) -> None:
    mask_NHW = rng.random((20, 128, 130)) < rng.choice([0.001, 0.1, 0.3], (20, 1, 1))
    image_NHW = torch.from_numpy(rng.integers(0, 1000, mask_NHW.shape)).int().cuda()
    class_map = torch.from_numpy(mask_NHW).cuda()
    for capacity in (1, 50, 256):
        for max_pieces in (None, 700):
            finder = PeakFinder(20, 128, 130, capacity, max_pieces=max_pieces)
            found = finder.enqueue(class_map=class_map, pixels=image_NHW).table()
            assert_same(found, find_peaks_reference(mask_NHW))
            roomy = PeakFinder(20, 128, 130, 5000)
            expected = roomy.enqueue(class_map=class_map, pixels=image_NHW).table()
            np.testing.assert_array_equal(found.intensity_sum, expected.intensity_sum)
            np.testing.assert_array_equal(found.intensity_max, expected.intensity_max)


def test_repetitions_are_equal_bit_for_bit(rng: np.random.Generator) -> None:
    classes = torch.from_numpy(rng.random((32, 256, 256)) < 0.42).cuda()
    pixels = torch.randn(classes.shape, device="cuda")
    finder = PeakFinder(32, 256, 256, max_peaks_per_panel=3000, max_pieces=8000)
    first = finder.enqueue(class_map=classes, pixels=pixels).table()
    for _ in range(20):
        again = finder.enqueue(class_map=classes, pixels=pixels).table()
        assert_same(again, first)
        for name in ("intensity_sum", "intensity_max"):
            assert getattr(again, name).tobytes() == getattr(first, name).tobytes()


def test_two_finders_on_two_streams(rng: np.random.Generator) -> None:
    masks = [blobs((64, 256, 256), 20, rng), rng.random((64, 256, 256)) < 0.3]
    expected = [find_peaks_reference(mask) for mask in masks]
    finders = [PeakFinder(64, 256, 256, max_pieces=5000) for _ in masks]
    on_device = [torch.from_numpy(mask).cuda() for mask in masks]
    streams = [torch.cuda.Stream() for _ in masks]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for k in range(10):
        pending = []
        for slot, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                # Slots change their streams and their contents from batch to batch.
                pending.append(finders[(slot + k) % 2].enqueue(class_map=on_device[slot]))
        for slot in (0, 1):
            assert_same(pending[slot].table(), expected[slot])
            assert pending[slot].done()


def test_waits_for_the_stream_that_writes_the_map(rng: np.random.Generator) -> None:
    mask_NHW = rng.random((8, 256, 256)) < 0.05
    on_device = torch.from_numpy(mask_NHW).cuda()
    finder = PeakFinder(8, 256, 256, 4000)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        class_map = torch.zeros_like(on_device)
        # About 0.1 s, in which another stream would see zeros.
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        class_map.copy_(on_device)
        pending = finder.enqueue(class_map=class_map)
        assert not pending.done()
        assert_same(pending.table(), find_peaks_reference(mask_NHW))


@pytest.mark.usefixtures("no_syncs")
def test_enqueue_does_not_wait() -> None:
    finder = PeakFinder(4, 64, 64)
    logits = torch.zeros((4, 2, 64, 64), device="cuda", dtype=torch.bfloat16)
    valid = torch.ones((4, 64, 64), device="cuda", dtype=torch.bool)
    pixels = torch.ones((4, 80, 80), device="cuda")[:, 8:72, 8:72]
    for _ in range(3):
        pending = finder.enqueue(logits=logits, valid=valid, pixels=pixels)
        assert len(pending.table()) == 0
        pending = finder.enqueue(logits=logits[:, :, ::4, ::4], upsampling=4)
        assert len(pending.table()) == 0


def test_fetch_before_the_next_batch() -> None:
    finder = PeakFinder(1, 8, 8)
    class_map = torch.ones((1, 8, 8), device="cuda", dtype=torch.uint8)
    pending = finder.enqueue(class_map=class_map)
    with pytest.raises(RuntimeError, match="not fetched"):
        finder.enqueue(class_map=class_map)
    assert pending.table() is pending.table()
    finder.enqueue(class_map=class_map)


def test_rejects_what_it_cannot_take() -> None:
    finder = PeakFinder(2, 8, 6)
    class_map = torch.zeros((2, 8, 6), dtype=torch.uint8, device="cuda")
    logits = torch.zeros((2, 2, 8, 6), device="cuda")
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "one of them", {}),
        (TypeError, "one of them", {"class_map": class_map, "logits": logits}),
        (TypeError, "pass logits as logits", {"class_map": logits[:, 0]}),
        (TypeError, "float64", {"logits": logits.double()}),
        (ValueError, "up to 2", {"class_map": class_map.repeat(2, 1, 1)}),
        (ValueError, "shape", {"class_map": class_map[:, 1:]}),
        (ValueError, "C >= 2", {"logits": logits[:, :1]}),
        (ValueError, "four times", {"logits": logits, "upsampling": 4}),
        (ValueError, "1 or 4", {"logits": logits, "upsampling": 2}),
        (TypeError, "valid", {"class_map": class_map, "valid": class_map.int()}),
        (TypeError, "pixels", {"class_map": class_map, "pixels": class_map.long()}),
        (ValueError, "cpu", {"class_map": class_map.cpu()}),
    ]
    for error, match, arguments in wrong:
        with pytest.raises(error, match=match):
            finder.enqueue(**arguments)
    assert len(finder.enqueue(class_map=class_map).table()) == 0
    with pytest.raises(ValueError, match="at least one"):
        PeakFinder(1, 0, 8)
    with pytest.raises(ValueError, match="larger"):
        PeakFinder(1, 8, 70000)
    with pytest.raises(ValueError, match="CUDA"):
        PeakFinder(1, 8, 8, device="cpu")
