"""``multi_scale`` against the one-image, one-pass oracle with a small deterministic network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import labels as oracle
from wsss.pseudo import multi_scale

CLASSES = 3
LABELS = {
    "mixed": [[1, 0, 1], [0, 1, 0]],
    "none": [[0, 0, 0], [0, 0, 0]],
    "all": [[1, 1, 1], [1, 1, 1]],
}


class PatchNetwork:
    """A linear layer on 4x4 patches, padded at the right and bottom, plus a ramp to the right.

    The ramp makes it depend on the position, so that a flip undone wrongly changes the result.
    Records the sizes it was called with.
    """

    patch = 4

    def __init__(self, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        channels = 3 * CLASSES + 1
        self.weight = 0.3 * torch.randn(
            channels, 3, self.patch, self.patch, generator=generator, dtype=torch.float64
        )
        self.dtype, self.shift = dtype, shift
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, images: Tensor, decode: bool = True) -> SimpleNamespace:
        height, width = images.shape[-2:]
        self.sizes.append((height, width))
        padded = F.pad(images.double(), (0, -width % self.patch, 0, -height % self.patch))
        maps = F.conv2d(padded - 0.5, self.weight, stride=self.patch)
        maps = maps + torch.linspace(-0.5, 0.5, maps.shape[-1], dtype=maps.dtype) + self.shift
        maps = maps.to(self.dtype)
        cam, early_cam, seg_logits = maps.split([CLASSES, CLASSES, CLASSES + 1], dim=1)
        return SimpleNamespace(
            class_logits=cam.amax((2, 3)),
            early_class_logits=early_cam.amax((2, 3)),
            cam=cam,
            early_cam=early_cam,
            seg_logits=seg_logits if decode else None,
            features=maps,
        )


def _images(height: int = 16, width: int = 24, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def _compare(found: object, expected: oracle.Fused, tolerance: float = 2e-5) -> None:
    for name in ("cam", "early_cam", "seg_logits"):
        ours, reference = getattr(found, name), getattr(expected, name)
        assert ours.shape == reference.shape
        torch.testing.assert_close(
            ours.double(), reference, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("fuse", ["max", "sum"])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (0.5,), (1.0, 0.5, 1.5)], ids=str)
def test_fusion(scales: tuple[float, ...], flip: bool, fuse: str) -> None:
    network, images = PatchNetwork(), _images(8, 12)
    _compare(
        multi_scale(network, images, scales, flip=flip, fuse=fuse),
        oracle.multi_scale(network, images, scales, flip, fuse),
    )


@pytest.mark.parametrize("fuse", ["max", "sum"])
@pytest.mark.parametrize("cam_scales", [(1.0,), (1.5,), (0.5, 1.0), (0.75, 1.0)], ids=str)
def test_cams_may_have_their_own_scales(cam_scales: tuple[float, ...], fuse: str) -> None:
    network, images, scales = PatchNetwork(), _images(8, 12), (1.0, 0.5, 1.5)
    _compare(
        multi_scale(network, images, scales, fuse=fuse, cam_scales=cam_scales),
        oracle.multi_scale(network, images, scales, fuse=fuse, cam_scales=cam_scales),
    )


@pytest.mark.parametrize("fuse", ["max", "sum"])
@pytest.mark.parametrize("case", LABELS)
def test_labels_mask_the_cams(case: str, fuse: str) -> None:
    network, images = PatchNetwork(), _images(8, 12)
    labels = torch.tensor(LABELS[case], dtype=torch.float32)
    found = multi_scale(network, images, (1.0, 0.5), fuse=fuse, labels=labels)
    expected = oracle.multi_scale(network, images, (1.0, 0.5), fuse=fuse, labels=labels)
    # absent classes of the segmentation are unspecified
    kept = torch.cat([torch.ones(2, 1), labels], dim=1).bool()[:, :, None, None]
    assert found.seg_logits is not None
    found = found._replace(seg_logits=found.seg_logits * kept)
    expected.seg_logits = expected.seg_logits * kept
    _compare(found, expected)
    absent = labels == 0
    assert not found.cam[absent].any()
    assert not found.early_cam[absent].any()


@pytest.mark.parametrize("size", [(20, 12), (8, 32), (4, 8)], ids=str)
def test_sizes(size: tuple[int, int]) -> None:
    network, images = PatchNetwork(), _images(*size, batch=1)
    _compare(
        multi_scale(network, images, (1.0, 0.5, 1.5)),
        oracle.multi_scale(network, images, (1.0, 0.5, 1.5)),
    )


def test_inputs_are_resized_to_rounded_sizes() -> None:
    network = PatchNetwork()
    found = multi_scale(network, _images(10, 14), (0.45, 1.0, 1.33))
    assert sorted(set(network.sizes)) == [(4, 6), (10, 14), (13, 19)]
    assert found.cam.shape == (2, CLASSES, 10, 14)


@pytest.mark.parametrize("fuse", ["max", "sum"])
def test_cams_are_normalised(fuse: str) -> None:
    found = multi_scale(PatchNetwork(shift=1.0), _images(), (1.0, 0.5), fuse=fuse)
    for cam in (found.cam, found.early_cam):
        assert (cam.amin((2, 3)) == 0).all()
        assert (cam.amax((2, 3)) <= 1).all()
        assert (cam.amax((2, 3)) > 0.99).all()


@pytest.mark.parametrize("shift", [-100.0, 0.0])
def test_no_activation_stays_zero(shift: float) -> None:
    """Negative logits everywhere: ReLU leaves a constant, which normalises to zero, not NaN."""
    network = PatchNetwork(shift=shift)
    network.weight *= 0 if shift == 0 else 1
    found = multi_scale(network, torch.rand(1, 3, 8, 4), (1.0,), flip=False)
    if shift < 0:
        assert not found.cam.any()
    assert found.cam.isfinite().all()
    assert found.early_cam.isfinite().all()


def test_mirrored_images_give_mirrored_maps() -> None:
    network, images = PatchNetwork(), _images()
    plain = multi_scale(network, images, (1.0, 0.5))
    mirrored = multi_scale(network, images.flip(-1), (1.0, 0.5))
    for ours, other in zip(plain[:3], mirrored[:3], strict=True):
        assert ours is not None
        assert other is not None
        torch.testing.assert_close(ours, other.flip(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("scales", [(1.0, 0.5), (0.5, 1.0), (0.25, 1.0)], ids=str)
def test_the_images_as_given_are_kept(scales: tuple[float, ...], flip: bool) -> None:
    network, images = PatchNetwork(), _images()
    alone = network(images)
    out = multi_scale(network, images, scales, flip=flip)
    torch.testing.assert_close(out.class_logits, alone.class_logits, rtol=0, atol=0)
    torch.testing.assert_close(out.single_seg_logits, alone.seg_logits, rtol=0, atol=0)
    without = multi_scale(network, images, scales, decode=False)
    assert without.single_seg_logits is None
    torch.testing.assert_close(without.class_logits, alone.class_logits, rtol=0, atol=0)
    assert multi_scale(network, images, (0.5,)).class_logits is None


def test_the_networks_own_maps_are_not_written_to() -> None:
    """A grid as fine as the image: nothing is resized, so nothing is a copy."""
    network, images = PatchNetwork(), _images()
    network.patch = 1
    network.weight = network.weight[:, :, :1, :1]
    out = multi_scale(network, images, (1.0, 0.5), flip=False)
    torch.testing.assert_close(out.single_seg_logits, network(images).seg_logits, rtol=0, atol=0)


def test_without_cams_the_segmentation_is_the_same() -> None:
    network, images = PatchNetwork(), _images(8, 12)
    everything = multi_scale(network, images, (1.0, 0.5))
    out = multi_scale(network, images, (1.0, 0.5), cam_scales=())
    assert out.cam.shape == out.early_cam.shape == (len(images), 0, 8, 12)
    assert out.seg_logits is not None
    torch.testing.assert_close(out.seg_logits, everything.seg_logits, rtol=0, atol=0)


def test_order_of_scales_does_not_matter() -> None:
    network, images = PatchNetwork(), _images(8, 12)
    one, other = (multi_scale(network, images, s) for s in ((1.0, 0.5, 1.5), (1.5, 1.0, 0.5)))
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_scale_named_twice_counts_once() -> None:
    twice = multi_scale(PatchNetwork(), _images(), (1.0, 0.5, 0.5))
    once = multi_scale(PatchNetwork(), _images(), (1.0, 0.5))
    for name in ("cam", "early_cam", "seg_logits"):
        torch.testing.assert_close(getattr(twice, name), getattr(once, name))


def test_batch_of_one_equals_its_part_of_a_batch() -> None:
    network, images = PatchNetwork(), _images(8, 12)
    labels = torch.tensor(LABELS["mixed"], dtype=torch.float32)
    together = multi_scale(network, images, (1.0, 0.5), labels=labels)
    for b in range(2):
        alone = multi_scale(network, images[b : b + 1], (1.0, 0.5), labels=labels[b : b + 1])
        torch.testing.assert_close(alone.cam[0], together.cam[b])
        torch.testing.assert_close(alone.early_cam[0], together.early_cam[b])


def test_bfloat16_network() -> None:
    """Mixed precision: only the network's own outputs are rounded, not what is made of them."""
    network, images = PatchNetwork(torch.bfloat16), _images(8, 12)
    _compare(
        multi_scale(network, images, (1.0, 0.5)),
        oracle.multi_scale(network, images, (1.0, 0.5)),
        tolerance=2e-2,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"fuse": "mean"},
        {"scales": ()},
        {"scales": (1.0, 0.0)},
        {"cam_scales": (0.0,)},
        {"cam_scales": (), "decode": False},
    ],
    ids=str,
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    options: dict[str, object] = {"scales": (1.0,), **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        multi_scale(PatchNetwork(), _images(8, 12), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("fuse", ["max", "sum"])
def test_a_refined_cam_takes_the_place_of_the_cam_alone(fuse: str) -> None:
    network, images = PatchNetwork(), _images(8, 12)

    def refining(images: Tensor, decode: bool = True) -> SimpleNamespace:
        output = network(images, decode)
        output.refined_cam, output.cam = output.cam, torch.full_like(output.cam, torch.nan)
        return output

    _compare(
        multi_scale(refining, images, (1.0, 0.5), fuse=fuse),
        oracle.multi_scale(network, images, (1.0, 0.5), fuse=fuse),
    )


@pytest.mark.parametrize("fuse", ["max", "sum"])
@pytest.mark.parametrize("flip", [True, False])
def test_calibrated_maps_keep_their_values(fuse: str, flip: bool) -> None:
    """The mean over scales and flips, not stretched; the early CAM is treated as ever."""
    network, images = PatchNetwork(), _images(8, 12)

    def calibrated(images: Tensor, decode: bool = True) -> SimpleNamespace:
        output = network(images, decode)
        output.refined_cam, output.calibrated = output.cam.sigmoid() * 0.4 + 0.2, True
        return output

    found = multi_scale(calibrated, images, (1.0, 0.5), flip=flip, fuse=fuse)
    maps = []
    for scale in (1.0, 0.5):
        size = (round(8 * scale), round(12 * scale))
        scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            cam = calibrated(scaled.flip(-1) if mirrored else scaled).refined_cam
            cam = cam.flip(-1) if mirrored else cam
            maps.append(F.interpolate(cam, size=(8, 12), mode="bilinear", align_corners=False))
    torch.testing.assert_close(found.cam, torch.stack(maps).mean(0))
    assert float(found.cam.min()) >= 0.2
    assert float(found.cam.max()) <= 0.6
    plain = multi_scale(network, images, (1.0, 0.5), flip=flip, fuse=fuse)
    torch.testing.assert_close(found.early_cam, plain.early_cam)
    labels = torch.zeros(len(images), found.cam.shape[1])
    labels[:, 0] = 1
    some = multi_scale(calibrated, images, (1.0, 0.5), flip=flip, fuse=fuse, labels=labels)
    torch.testing.assert_close(some.cam[:, 0], found.cam[:, 0])
    assert not some.cam[:, 1:].any()
