"""Matrix resizing against torch's interpolation, value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wsss.resize import resize_after, resize_small


@pytest.mark.parametrize("source", [(1, 1), (3, 5), (14, 14), (9, 4)])
@pytest.mark.parametrize("target", [(1, 1), (14, 14), (31, 20), (7, 50), (3, 2)])
def test_equals_interpolate(source: tuple[int, int], target: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *source, generator=generator, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours = resize_small(x, *target)
    theirs = F.interpolate(y, size=target, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_keeps_its_precision_under_autocast() -> None:
    x = torch.rand(1, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert resize_small(x, 8, 8).dtype == torch.float32


@pytest.mark.parametrize("source", [(1, 1), (28, 28), (31, 20), (448, 96)])
@pytest.mark.parametrize("target", [(1, 1), (14, 14), (7, 5), (28, 6), (40, 3)])
def test_a_function_of_pixels_may_come_first(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    x = torch.randn(2, 3, *source, dtype=torch.float64)
    ours = resize_after(lambda part: (part * 5).softmax(1), x, *target)
    theirs = F.interpolate((x * 5).softmax(1), size=target, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, theirs)
