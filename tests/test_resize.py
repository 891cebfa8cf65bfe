"""Matrix resizing against torch's interpolation, value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wsss.resize import cell_centres, resize_after, resize_small, valid_on_grid


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


@pytest.mark.parametrize("size", [(448, 448), (60, 33), (25, 47), (7, 6)])
def test_what_was_enlarged_from_a_grid_comes_back(size: tuple[int, int]) -> None:
    """Scores enlarged as CAMs are, cut into labels at full size: a cell has its own again."""
    scores = torch.rand(2, 3, 7, 6, generator=torch.Generator().manual_seed(0))
    label = F.interpolate(scores, size=size, mode="bilinear", align_corners=False).argmax(1)
    back = cell_centres(label, (7, 6))
    clear = scores.sort(1).values.diff(dim=1)[:, -1] > 0.2  # even sizes: centres between pixels
    assert torch.equal(back[clear], scores.argmax(1)[clear])
    assert clear.float().mean() > 0.4


@pytest.mark.parametrize("source", [(1, 1), (28, 28), (31, 20), (448, 96)])
@pytest.mark.parametrize("target", [(1, 1), (14, 14), (7, 5), (28, 6), (40, 3)])
def test_cell_centres_are_the_nearest_pixels(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    x = torch.rand(2, 3, *source, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x, size=target, mode="nearest-exact")
    assert torch.equal(cell_centres(x, target), expected)


def test_a_cell_is_on_the_image_where_its_centre_is() -> None:
    valid = torch.zeros(1, 32, 16, dtype=torch.bool)
    valid[:, 3:29] = True  # 13 of the 16 rows of either cell
    assert valid_on_grid(valid, (2, 1)).all()
    valid[:, 7:] = False  # 4 of 16 rows, the first of them at the top of the cell
    valid[:, 0] = True
    assert not valid_on_grid(valid, (2, 1)).any()
    assert valid_on_grid(valid, (32, 16)) is valid
