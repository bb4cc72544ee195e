"""dNaViT, the vision tokenizer: images of native resolution to codes and back.

Dimension key
    T patches    M positions    L levels    D codeword width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longcat_model import config
from longcat_model.tokenizers.vision.encoder import Encoder, Features
from longcat_model.tokenizers.vision.packing import Layout, patchify, unpatchify
from longcat_model.tokenizers.vision.pixel_decoder import PixelDecoder
from longcat_model.tokenizers.vision.quantizer import Quantizer
from longcat_model.tokenizers.vision.refiner import Refiner


class VisionTokenizer(nn.Module):
    """Encoder, quantizer, pixel decoder and refiner; each is usable by itself.

    Example:
        >>> from longcat_model import presets
        >>> tokenizer = VisionTokenizer(presets.tiny().vision)
        >>> codes = tokenizer.encode([torch.rand(3, 8, 24), torch.rand(3, 16, 8)])
        >>> [tuple(x.shape) for x in codes]
        [(1, 3, 3), (2, 1, 3)]
        >>> [tuple(x.shape) for x in tokenizer.decode(codes)]
        [(3, 8, 24), (3, 16, 8)]
    """

    def __init__(self, sizes: config.VisionTokenizer) -> None:
        super().__init__()
        self.sizes = sizes
        encoder, codeword = sizes.encoder, sizes.quantizer.dim
        self.encoder = Encoder(encoder)
        self.quantizer = Quantizer(sizes.quantizer, encoder.bridge_width)
        self.decoder = PixelDecoder(sizes.decoder, codeword=codeword, patch=encoder.patch, merge=encoder.merge)
        self.refiner = Refiner(sizes.refiner, codeword=codeword, patch=encoder.patch, merge=encoder.merge)

    @property
    def levels(self) -> int:
        return len(self.sizes.quantizer.sizes)

    @property
    def device(self) -> torch.device:
        """Where the weights are: images and codes are brought there."""
        return self.encoder.visual_model.patch_embed.proj.weight.device

    def patches(self, images: Sequence[Tensor]) -> tuple[Tensor, Layout]:
        """Packed patches of images [3, height, width] and their layout; ValueError for sides no multiple of a cell."""
        sizes = self.sizes.encoder
        return patchify([image.to(self.device) for image in images], sizes.patch, sizes.merge)

    def features(self, images: Sequence[Tensor]) -> Features:
        """Continuous features of images, with gradient."""
        return self.encoder(*self.patches(images))

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Codes of images in one packed pass.

        Args:
            images: each [3, height, width], RGB in [0, 1], sides multiples of the cell.

        Returns:
            for each image int64 [height / cell, width / cell, L].

        Raises:
            ValueError: an image has another rank or size.
        """
        if not images:
            return []
        patches_TP, layout = self.patches(images)
        codes_ML = self.quantizer.encode(self.encoder(patches_TP, layout).bridged)
        runs = codes_ML.split(layout.positions)
        return [run.view(*grid, self.levels) for run, grid in zip(runs, layout.grids, strict=True)]

    @torch.no_grad()
    def decode(
        self, codes: Sequence[Tensor], *, levels: int | None = None, refine: bool = True, seed: int = 0
    ) -> list[Tensor]:
        """Images of codes in one packed pass.

        Args:
            codes: each int64 [h, w, L] in the level's range; -1 adds nothing.
            levels: how many of the first levels to use; all by default.
            refine: whether the flow-matching refiner follows the pixel decoder.
            seed: of the refiner's noise; an image depends on its own codes and this alone.

        Returns:
            for each [3, h * cell, w * cell] in [0, 1].

        Raises:
            ValueError: codes of another rank, type or level count, out of range, or `levels` out of range.
        """
        if not codes:
            return []
        self._check(codes, levels)
        layout = Layout.of([(x.shape[0], x.shape[1]) for x in codes], self.sizes.encoder.merge, self.device)
        codewords_MD = self.quantizer.decode(torch.cat([x.flatten(0, 1) for x in codes]).to(self.device), levels)
        patches_TP = self.decoder(codewords_MD, layout).clamp(0, 1)
        if refine:
            patches_TP = self.refiner.sample(patches_TP, codewords_MD, layout, seed).clamp(0, 1)
        return unpatchify(patches_TP, layout, self.sizes.encoder.patch)

    def _check(self, codes: Sequence[Tensor], levels: int | None) -> None:
        if levels is not None and not 1 <= levels <= self.levels:
            raise ValueError(f"VisionTokenizer: levels must be in 1..{self.levels}, got {levels}")
        bound_L = torch.tensor(self.sizes.quantizer.sizes)
        for x in codes:
            if x.ndim != 3 or x.shape[2] != self.levels or 0 in x.shape or x.dtype != torch.int64:
                raise ValueError(
                    f"VisionTokenizer: codes must be int64 [h, w, {self.levels}], got {x.dtype} {list(x.shape)}"
                )
            if bool((x < -1).any()) or bool((x >= bound_L.to(x.device)).any()):
                raise ValueError(
                    f"VisionTokenizer: codes must be below {self.sizes.quantizer.sizes} or -1, "
                    f"got {int(x.min())}..{int(x.max())}"
                )
