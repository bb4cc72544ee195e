"""The released image refiner: from the pixel decoder's image to a sharper one.

Latents of noise follow the transformer's velocity from t = 0 to 1 in 28 Euler steps, guided twice: by the first image,
and by the codewords besides. The released code draws with seed 42 and the autoencoder's posterior from the global
generator; here both follow from the seed. Parameter names are those under `image_refiner.` in
`image_decoder/image_decoder.safetensors`.

Dimension key
    M positions    T patches    P numbers of a patch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from longcat_model.released.quirks import Quirks, has_quirks
from longcat_model.released.refiner_transformer import Transformer
from longcat_model.released.sizes import TransformerSizes, VAESizes
from longcat_model.released.vae import VAE
from longcat_model.tokenizers.vision.packing import Layout, patchify, unpatchify

STEPS = 28
TEXT_GUIDANCE, IMAGE_GUIDANCE = 1.5, 1.5


class Refiner(nn.Module):
    """Takes the place of `tokenizers.vision.refiner.Refiner` in a tokenizer that decodes.

    Args:
        codeword: width of a codeword.
        patch, merge: of the images' patches.
        quirks: see `released.quirks`.
    """

    def __init__(
        self,
        transformer: TransformerSizes,
        vae: VAESizes,
        *,
        codeword: int,
        patch: int,
        merge: int,
        steps: int = STEPS,
        quirks: Quirks = "released",
    ) -> None:
        super().__init__()
        self.patch, self.merge, self.steps = patch, merge, steps
        self.has_quirks = has_quirks(quirks)
        self.cond_proj = nn.Linear(codeword, transformer.condition)
        self.base_transformer = Transformer(transformer)
        self.vae = VAE(vae)

    @torch.no_grad()
    def sample(self, coarse: Tensor, codewords: Tensor, layout: Layout, seed: int) -> Tensor:
        """Refines packed patches [T, P] of RGB in [0, 1]; an image depends on its own content and `seed` alone."""
        images = unpatchify(coarse, layout, self.patch)
        runs = codewords.split(layout.positions)
        refined = [self.refine(image, run, seed) for image, run in zip(images, runs, strict=True)]
        return patchify(refined, self.patch, self.merge)[0]

    def refine(self, image: Tensor, codewords: Tensor, seed: int) -> Tensor:
        """One image [3, height, width] in [0, 1] with its codewords [M, codeword].

        It is enlarged to the next multiples of the autoencoder's and the transformer's patches, 16 pixels in the
        released model, and the result brought back to its size.
        """
        size = image.shape[1:]
        unit = self.vae.sizes.factor * self.base_transformer.sizes.patch
        working = [-(-side // unit) * unit for side in size]
        first = interpolate(2 * image[None] - 1, size=working, mode="bilinear", align_corners=False)
        generator = torch.Generator().manual_seed(seed)
        reference = self.vae.encode(first, generator)[0]
        noise = torch.randn(reference.shape, generator=generator).to(reference)
        latents = self._flow(noise, reference, self.cond_proj(codewords.to(self.cond_proj.weight.dtype)))
        decoded = self.vae.decode(latents[None])
        return (interpolate(decoded, size=list(size), mode="bilinear", align_corners=False)[0] + 1) / 2

    def _flow(self, x: Tensor, reference: Tensor, condition: Tensor) -> Tensor:
        """Latents [channels, height, width] from noise, in its type; the transformer computes in the condition's."""
        nothing, reference = torch.zeros_like(condition), reference.to(condition.dtype)
        for start, end in pairwise(self.times(x.shape[1] * x.shape[2])):
            noisy = x.to(condition.dtype)
            both = self.base_transformer(noisy, reference, condition, start)
            image = self.base_transformer(noisy, reference, nothing, start)
            free = self.base_transformer(noisy, None, nothing, start)
            x = x + (end - start) * (free + IMAGE_GUIDANCE * (image - free) + TEXT_GUIDANCE * (both - image))
        return x

    def times(self, tokens: int) -> Sequence[float]:
        """Times of the steps for a latent image of so many places: equal ones with the released quirks."""
        even = [step / self.steps for step in range(self.steps + 1)]
        if self.has_quirks:
            return even
        shift = math.sqrt(tokens) / 40
        return [t / (shift - shift * t + t) for t in even]
