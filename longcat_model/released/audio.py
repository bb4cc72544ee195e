"""The released audio tokenizer: 16 kHz speech to codes, codes to the mels of a 24 kHz vocoder.

Dimension key
    T positions    L levels    D decoder width    S frames    M mels
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longcat_kernels.modules import ResidualVQ
from longcat_model.released.audio_decoder import STRIDE, CodecDecoder, Prenet
from longcat_model.released.flow import Estimator, sample
from longcat_model.released.quirks import Quirks
from longcat_model.released.sizes import Sizes
from longcat_model.tokenizers.audio import AudioTokenizer
from longcat_model.tokenizers.audio.vocoder import Vocoder


def _no_vocoder(log_mel: Tensor) -> Tensor:
    raise ValueError("ReleasedAudioTokenizer: vocoder must be given to make waveforms (decode_mel makes mels without)")


class ReleasedAudioTokenizer(AudioTokenizer):
    """`AudioTokenizer` with the released quantizer and decoder; encoder and pooling are the same.

    Codes of one clip are decoded together, up to the decoder's table of positions (60 s); the released decoder's norm
    goes over the time of a clip, so cutting changes it.

    Args:
        vocoder: takes a mel [M, S] at 50 Hz (`Vocoder`); `released.vocoder.Vocoder` is the released one.
        quirks: see `released.quirks`.
    """

    def __init__(self, sizes: Sizes, vocoder: Vocoder | None = None, *, quirks: Quirks = "released") -> None:
        audio, flow = sizes.model.audio, sizes.flow
        super().__init__(audio, vocoder=vocoder or _no_vocoder)
        self.quantizer = ResidualVQ(audio.quantizer.sizes, audio.quantizer.dim, residual_dtype=torch.bfloat16)
        self.proj_decoder = nn.Linear(audio.quantizer.dim, audio.decoder.width)
        self.decoder = CodecDecoder(audio.decoder, flow, quirks=quirks)  # type: ignore[assignment]
        self.prenet = Prenet(audio.decoder.width, flow, quirks=quirks)
        self.refiner = Estimator(flow)  # type: ignore[assignment]
        self.longest = flow.decoder_positions // STRIDE
        self._output_rate = sizes.vocoder.sample_rate

    @property
    def output_rate(self) -> int:
        return self._output_rate

    @torch.no_grad()
    def decode_mel(
        self, codes: Sequence[Tensor], *, levels: int | None = None, refine: bool = True, seed: int = 0
    ) -> list[Tensor]:
        """Mels [M, S] of codes [T, L], S = 4 T - 1 with the released quirks; clips longer than `longest` in pieces.

        Raises:
            ValueError: codes are not [positions > 0, levels] within the codebooks.
        """
        self._check_codes(codes, levels)
        return [
            torch.cat([self._mel(piece, levels, refine, seed) for piece in clip.split(self.longest)], 1)
            for clip in codes
        ]

    def _mel(self, codes_TL: Tensor, levels: int | None, refine: bool, seed: int) -> Tensor:
        codes_TL = codes_TL[:, :levels].to(self.front_end.window.device)
        quantized_TQ = self.quantizer.decode(codes_TL, levels).to(self.proj_decoder.weight.dtype)
        mel_SM = self.prenet(self.decoder(self.proj_decoder(quantized_TQ)))
        return (sample(self.refiner, mel_SM, seed=seed) if refine else mel_SM).T
