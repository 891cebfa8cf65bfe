"""Dense CRF: probabilities that follow the edges of the image, through ``pydensecrf2``."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss.errors import UserError

#: Probabilities are clipped here from below, so that no class is ruled out.
MIN_PROBABILITY = 1e-5
#: How far rounding may carry probabilities out of [0, 1].
TOLERANCE = 1e-3

Probabilities = TypeVar("Probabilities", NDArray[np.floating], Tensor)


@dataclass(frozen=True)
class CRFPreset:
    """Settings of :func:`dense_crf`.

    Attributes:
        iterations: of mean-field inference; 0 only clips and normalises the probabilities.
        gaussian_sxy: standard deviation of the smoothness kernel, pixels.
        gaussian_compat: its weight.
        bilateral_sxy: standard deviation of the appearance kernel in space, pixels.
        bilateral_srgb: the same in colour, of 0..255.
        bilateral_compat: its weight.

    Raises:
        ValueError: a negative number of iterations, or a deviation that is not positive.
    """

    iterations: int
    gaussian_sxy: float
    gaussian_compat: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_compat: float

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations}: give 0 or more.")
        for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a deviation must be positive.")


#: Published settings by name.
CRF_PRESETS: dict[str, CRFPreset] = {
    "cosa": CRFPreset(1, 1, 1, 121, 5, 4),
    "toco_seg": CRFPreset(10, 1, 1, 121, 5, 4),
    "toco_cam": CRFPreset(10, 3, 3, 36, 3, 4),
    "afa": CRFPreset(10, 3, 3, 64, 5, 4),
    "isl_fsl": CRFPreset(1, 3, 3, 32, 13, 10),
    "isl_fsl_cam": CRFPreset(10, 3, 3, 80, 13, 10),
}


def dense_crf(
    image: NDArray[np.uint8] | Tensor,
    probabilities: Probabilities,
    preset: str | CRFPreset = "cosa",
) -> Probabilities:
    r"""Refine the probabilities of one image in a fully connected CRF.

    Mean-field inference (Krähenbühl and Koltun, NIPS 2011) over all pairs of pixels, with the
    energy ``-log p`` and Potts labels. Every iteration takes

    .. math::
        Q_i(c) \propto \exp\Big(\log p_i(c) + \sum_k w_k \sum_j \frac{k(i, j)}
            {\sqrt{n_i n_j}} Q_j(c)\Big), \qquad n_i = \sum_j k(i, j)

    with a Gaussian of the distance and one of distance and colour for ``k``. The library filters
    on a permutohedral lattice: an approximation, on one CPU core.

    Args:
        image: (H, W, 3) RGB uint8, the pixels that the probabilities are of.
        probabilities: (C, H, W) in [0, 1], all classes that may win, background included. An
            array or a tensor on any device; no gradient flows through.
        preset: a name in :data:`CRF_PRESETS`, or settings of your own.

    Returns:
        (C, H, W) float32 probabilities that sum to 1 over classes: an array for an array, a
        tensor on the same device for a tensor.

    Raises:
        UserError: ``pydensecrf2`` is not installed.
        ValueError: an unknown preset, wrong shapes, an image that is not uint8, or values
            that are no probabilities.
    """
    settings = preset if isinstance(preset, CRFPreset) else _named_preset(preset)
    # The library wants C order and, although it only reads, writable memory.
    pixels = np.require(_as_array(image), requirements=["C", "W"])
    values = _as_array(probabilities)
    _check(pixels, values)
    library = _pydensecrf()

    classes, height, width = values.shape
    unary = -np.log(np.clip(values.astype(np.float32), MIN_PROBABILITY, 1))
    crf = library.DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(classes, -1)))
    crf.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_compat)
    crf.addPairwiseBilateral(
        sxy=settings.bilateral_sxy,
        srgb=settings.bilateral_srgb,
        rgbim=pixels,
        compat=settings.bilateral_compat,
    )
    # A copy: the result lives in memory of the library, in its own order.
    result = np.array(crf.inference(settings.iterations), order="C")
    result = result.reshape(classes, height, width)
    if isinstance(probabilities, Tensor):
        return torch.from_numpy(result).to(probabilities.device)
    return result


def _named_preset(name: str) -> CRFPreset:
    if name in CRF_PRESETS:
        return CRF_PRESETS[name]
    close = get_close_matches(str(name).lower(), CRF_PRESETS, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"preset='{name}': choose one of {', '.join(CRF_PRESETS)}.{hint}")


def _as_array(x: NDArray | Tensor) -> NDArray:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()  # numpy has no bfloat16
    return np.asarray(x)


def _check(image: NDArray, probabilities: NDArray) -> None:
    """Raises ValueError: the library itself would read past the end, or return nonsense."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"image has shape {image.shape} and type {image.dtype}: expected (H, W, 3), uint8."
        )
    if probabilities.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"probabilities have shape {probabilities.shape}, the image has {image.shape}: "
            "expected (C, H, W) and (H, W, 3) of the same H and W."
        )
    if probabilities.size == 0:
        raise ValueError(f"probabilities have shape {probabilities.shape}: there is nothing in it.")
    low, high = probabilities.min(), probabilities.max()
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also where they are NaN
        raise ValueError(
            f"probabilities lie in [{low:.4g}, {high:.4g}]: expected [0, 1]. Of logits, take "
            "the softmax first."
        )


def _pydensecrf() -> ModuleType:
    try:
        return import_module("pydensecrf.densecrf")
    except ImportError as error:
        raise UserError(
            f"The dense CRF needs the package pydensecrf2, which cannot be imported ({error}). "
            "Install it with: pip install 'wsss[crf]'. It is built from source, which needs a C++ "
            "compiler (Debian and Ubuntu: apt install g++; macOS: xcode-select --install)."
        ) from error
