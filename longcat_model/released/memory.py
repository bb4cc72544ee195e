"""Most memory that the released decoders take beside their weights: `generation.memory` counts this project's own.

Of what runs one after the other the largest counts: pixel decoder, autoencoder and transformer of an image; codec and
prenet, flow, and vocoder of speech. The autoencoder's attention holds all pairs of its places, the others' do not.
"""

from __future__ import annotations

from math import ceil, prod

from longcat_model.released.audio_decoder import STRIDE
from longcat_model.released.pixel_decoder import TEMPORAL
from longcat_model.released.sizes import Sizes, VocoderSizes

FLOAT = 4  # bytes


def image(sizes: Sizes, height: int, width: int) -> tuple[int, int]:
    """Bytes of an image of so many cells, and of its decoding beside that."""
    vision, refiner, vae = sizes.model.vision, sizes.refiner, sizes.vae
    encoder, decoder = vision.encoder, vision.decoder
    cell, unit = encoder.patch * encoder.merge, vae.factor * refiner.patch
    pixels, positions = height * width * cell**2, height * width
    enlarged = unit**2 * -(-height * cell // unit) * -(-width * cell // unit)
    patch = _block(decoder.width, decoder.mlp_width) + 12 * TEMPORAL * encoder.patch**2
    tokens = positions + 2 * enlarged // unit**2
    places = enlarged // vae.factor**2
    network = max(
        positions * encoder.merge**2 * patch,
        tokens * _block(refiner.width, refiner.mlp_width),
        enlarged * 4 * max(vae.widths[:2]),
        places * (2 * places + 8 * vae.widths[-1]),
    )
    kept = 12 * enlarged + 4 * positions * max(vision.quantizer.dim, refiner.condition)
    return FLOAT * 3 * pixels, FLOAT * (kept + network)


def speech(sizes: Sizes, frames: int) -> tuple[int, int]:
    """Bytes of a waveform of so many frames, and of its decoding beside that."""
    audio, flow = sizes.model.audio, sizes.flow
    mels = STRIDE * frames
    piece = min(mels, flow.decoder_positions)
    codec = max(_block(audio.decoder.width, audio.decoder.mlp_width), _block(flow.prenet_width, flow.prenet_mlp))
    guided = 2 * (_block(max(flow.channels, flow.inner), 4 * flow.channels) + 4 * flow.channels)
    network = piece * max(codec, guided) + 3 * piece**2  # and masks
    samples = mels * sizes.vocoder.samples
    kept = 2 * mels * flow.mels + 4 * frames * audio.quantizer.dim
    return FLOAT * samples, FLOAT * (kept + max(network, _vocoder(sizes.vocoder, samples)))


def _block(width: int, mlp_width: int) -> int:
    """Numbers of a token in a transformer block: the attention's, or the MLP's."""
    return max(16 * width, 6 * width + 6 * mlp_width)


def _vocoder(sizes: VocoderSizes, samples: int) -> int:
    """Numbers of the spectrum, of the harmonics (some float64) or a stage, and of a weight with its norm."""
    stages, weights = [], []
    for i, kernel in enumerate(sizes.kernels):
        samples_a_place = prod(sizes.rates[i + 1 :]) * sizes.hop
        stages.append((sizes.width >> (i + 1)) / samples_a_place)
        weights.append((sizes.width >> i) * (sizes.width >> (i + 1)) * kernel)
    sample = 3 * (sizes.fft + 2) / sizes.hop + max(10 * (sizes.harmonics + 1), 16 * max(stages))
    return ceil(samples * sample) + 3 * max(weights)
