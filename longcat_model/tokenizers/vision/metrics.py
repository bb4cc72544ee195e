"""How close reconstructed images are: PSNR and SSIM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def psnr(images: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, for pixels in [0, 1]."""
    errors = [(a - b).square().mean().clamp_min(1e-10) for a, b in zip(images, references, strict=True)]
    return float((-10 * torch.log10(torch.stack(errors))).mean())


def ssim(images: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Mean over images of the structural similarity in 7 x 7 windows, for [3, height, width] in [0, 1].

    Raises:
        ImportError: scikit-image (the `demo` extra) is not installed.
    """
    from skimage.metrics import structural_similarity

    pairs = [(a.cpu().numpy(), b.cpu().numpy()) for a, b in zip(images, references, strict=True)]
    scores = [structural_similarity(a, b, channel_axis=0, data_range=1.0) for a, b in pairs]
    return float(sum(scores) / len(scores))
