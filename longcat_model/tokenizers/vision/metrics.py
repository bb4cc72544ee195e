"""How close reconstructed images are: PSNR and SSIM, for pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

WINDOW = 7  # pixels a side
LUMINANCE, CONTRAST = 0.01**2, 0.03**2  # stabilisers of the two factors, for a range of 1


def psnr(images: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; identical images count as 100 dB."""
    errors = [(a - b).square().mean().clamp_min(1e-10) for a, b in zip(images, references, strict=True)]
    return float((-10 * torch.log10(torch.stack(errors))).mean())


def ssim(images: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Mean over images [channels, height, width] of the structural similarity (Wang et al. 2004).

    Windows are 7 x 7, weighted evenly, and wholly inside the image; covariances are those of samples.

    Raises:
        ValueError: an image is smaller than a window.
    """
    scores = [_similarity(a, b) for a, b in zip(images, references, strict=True)]
    return float(torch.stack(scores).mean())


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    if min(a.shape[1:]) < WINDOW:
        raise ValueError(f"ssim: images must have at least {WINDOW} pixels a side, got {list(a.shape)}")
    moments = torch.stack([a, b, a * a, b * b, a * b])
    mean_a, mean_b, square_a, square_b, product = avg_pool2d(moments, WINDOW, stride=1)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    variances = unbiased * (square_a - mean_a**2 + square_b - mean_b**2)
    covariance = unbiased * (product - mean_a * mean_b)
    luminance = (2 * mean_a * mean_b + LUMINANCE) / (mean_a**2 + mean_b**2 + LUMINANCE)
    return (luminance * (2 * covariance + CONTRAST) / (variances + CONTRAST)).mean()
