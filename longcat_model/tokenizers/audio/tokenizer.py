"""The audio tokenizer: waveforms to codes at 12.5 Hz and back (report section 2.3).

Dimension key
    B clips    N samples    M mels    S mel frames    T positions    L quantizer levels    Q codeword width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from longcat_kernels.modules import ResidualVQ
from longcat_model import config
from longcat_model.tokenizers.audio.decoder import MelDecoder
from longcat_model.tokenizers.audio.encoder import AudioEncoder, GatedPool, length_mask
from longcat_model.tokenizers.audio.frontend import LogMel
from longcat_model.tokenizers.audio.refiner import MelRefiner
from longcat_model.tokenizers.audio.vocoder import GriffinLim, Vocoder

_Count = TypeVar("_Count", int, Tensor)
BATCH = 32  # clips of similar length encoded or decoded at once


class Mels(NamedTuple):
    """Log-mels of a batch of clips."""

    log_mel: Tensor  # [B, mels, S] float32, 0 beyond each clip
    positions: Tensor  # [B] int64, whole positions of each clip


class AudioTokenizer(nn.Module):
    """Encoder, quantizer, decoder and refiner; the vocoder is any `Vocoder` and holds no weights of this module."""

    def __init__(self, sizes: config.AudioTokenizer, vocoder: Vocoder | None = None) -> None:
        super().__init__()
        wide = sizes.encoder.width * sizes.pool
        if sizes.quantizer.dim != wide:
            raise ValueError(
                f"AudioTokenizer: quantizer.dim must equal encoder.width * pool = {wide}, got {sizes.quantizer.dim}"
            )
        quantizer = sizes.quantizer
        self.sizes = sizes
        self.front_end = LogMel(sizes.encoder)
        self.encoder = AudioEncoder(sizes.encoder)
        self.pool = GatedPool(sizes.encoder.width, sizes.pool)
        self.quantizer = ResidualVQ(
            quantizer.sizes,
            quantizer.dim,
            shared=quantizer.shared,
            decay=quantizer.decay,
            eps=quantizer.eps,
            restart_threshold=quantizer.restart_threshold,
        )
        self.decoder = MelDecoder(sizes)
        self.refiner = MelRefiner(sizes.refiner, sizes.encoder.mels)
        self.vocoder = vocoder or GriffinLim(sizes.encoder)

    @property
    def samples_per_position(self) -> int:
        return self.sizes.samples_per_position

    @property
    def output_rate(self) -> int:
        """Samples a second of what `decode` gives."""
        return self.sizes.encoder.sample_rate

    @property
    def positions_per_chunk(self) -> int:
        """Longest stretch encoded or decoded at once; longer clips are cut into chunks of this length."""
        return self.sizes.encoder.max_positions // self.sizes.pool

    def mels(self, waveforms: Sequence[Tensor]) -> Mels:
        """Log-mels of waveforms [samples], each followed by silence up to a whole position."""
        step = self.samples_per_position
        positions = torch.tensor([-(-len(waveform) // step) for waveform in waveforms])
        batch = torch.zeros(len(waveforms), int(positions.max()) * step)
        for row, waveform in enumerate(waveforms):
            batch[row, : len(waveform)] = waveform
        device = self.front_end.window.device
        batch, positions = batch.to(device), positions.to(device)
        return Mels(self.front_end(batch, positions * step), positions)

    def frames(self, positions: _Count) -> _Count:
        """Mel frames of so many positions."""
        return positions * (2 * self.sizes.pool)

    def features(self, mels: Mels) -> Tensor:
        """Pooled encoder output [B, T, Q], before quantization; meaningless beyond a clip's positions.

        Raises:
            ValueError: a clip is longer than a chunk.
        """
        positions = mels.log_mel.shape[2] // self.frames(1)
        if positions > self.positions_per_chunk:
            longest, found = (n / self.sizes.frame_hz for n in (self.positions_per_chunk, positions))
            raise ValueError(
                f"AudioTokenizer: clips must last at most {longest:g} s at once, got {found:g} s (cut it like encode)"
            )
        return self.pool(self.encoder(mels.log_mel, self.frames(mels.positions)))

    @torch.no_grad()
    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Codes [positions, levels] int64 of each waveform.

        Args:
            waveforms: [samples] float32 in [-1, 1] at `sizes.encoder.sample_rate`; a last part that does not fill a
                position (80 ms) is followed by silence.

        Raises:
            ValueError: a waveform is empty or not one-dimensional.
        """
        for waveform in waveforms:
            if waveform.ndim != 1 or waveform.numel() == 0:
                raise ValueError(
                    f"AudioTokenizer: waveforms must be [samples], samples > 0, got {list(waveform.shape)}"
                )
        chunk = self.positions_per_chunk * self.samples_per_position
        chunks = [piece for waveform in waveforms for piece in waveform.split(chunk)]
        codes: list[Tensor] = [torch.empty(0)] * len(chunks)
        for rows in _batches([len(piece) for piece in chunks]):
            mels = self.mels([chunks[row] for row in rows])
            mask = length_mask(mels.positions, int(mels.positions.max()))
            coded = self.quantizer.encode(self.features(mels), mask=mask).codes
            for row, of_row, positions in zip(rows, coded, mels.positions.tolist(), strict=True):
                codes[row] = of_row[:positions]
        return _join(codes, [-(-len(waveform) // chunk) for waveform in waveforms])

    @torch.no_grad()
    def decode(
        self, codes: Sequence[Tensor], *, levels: int | None = None, refine: bool = True, seed: int = 0
    ) -> list[Tensor]:
        """Waveforms [positions * samples_per_position] float32.

        Args:
            codes: [positions, levels] int64 of each clip.
            levels: how many levels count, from the first; all by default.
            refine: run the flow-matching refiner on the coarse mel.
            seed: of the refiner's noise; a clip's waveform does not depend on the clips beside it.

        Raises:
            ValueError: codes are not [positions > 0, levels] within the codebooks.
        """
        return [self.vocoder(mel) for mel in self.decode_mel(codes, levels=levels, refine=refine, seed=seed)]

    @torch.no_grad()
    def decode_mel(
        self, codes: Sequence[Tensor], *, levels: int | None = None, refine: bool = True, seed: int = 0
    ) -> list[Tensor]:
        """As `decode`, but the log-mels [mels, frames] that the vocoder would get."""
        self._check_codes(codes, levels)
        limit = self.positions_per_chunk
        chunks = [piece for clip in codes for piece in clip.split(limit)]
        mels: list[Tensor] = [torch.empty(0)] * len(chunks)
        for rows in _batches([len(piece) for piece in chunks]):
            pieces = [chunks[row] for row in rows]
            for row, mel in zip(rows, self._decode_batch(pieces, levels, refine, seed), strict=True):
                mels[row] = mel
        return _join(mels, [-(-len(clip) // limit) for clip in codes], dim=1)

    def _decode_batch(self, pieces: list[Tensor], levels: int | None, refine: bool, seed: int) -> Iterator[Tensor]:
        device = self.front_end.window.device
        positions = torch.tensor([len(piece) for piece in pieces], device=device)
        codes_BTL = nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=-1).to(device)
        if levels is not None:
            codes_BTL[..., levels:] = -1
        mel_BMS = self.decoder(self.quantizer.decode(codes_BTL), positions)
        frames = self.frames(positions)
        if refine:
            mel_BMS = self.refiner.refine(mel_BMS, frames, seed=seed)
        return (mel[:, :n] for mel, n in zip(mel_BMS, frames.tolist(), strict=True))

    def _check_codes(self, codes: Sequence[Tensor], levels: int | None) -> None:
        sizes = torch.tensor(self.sizes.quantizer.sizes)
        if levels is not None and not 1 <= levels <= len(sizes):
            raise ValueError(f"AudioTokenizer: levels must lie in [1, {len(sizes)}], got {levels}")
        for clip in codes:
            if clip.ndim != 2 or clip.shape[0] == 0 or clip.shape[1] != len(sizes):
                raise ValueError(f"AudioTokenizer: codes must be [positions > 0, {len(sizes)}], got {list(clip.shape)}")
            if bool((clip < 0).any()) or bool((clip.cpu() >= sizes).any()):
                raise ValueError(
                    f"AudioTokenizer: codes must lie in [0, {tuple(sizes.tolist())}), got {clip.amax(0).tolist()}"
                )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in groups of similar length, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def _join(pieces: list[Tensor], counts: Sequence[int], dim: int = 0) -> list[Tensor]:
    """Puts the chunks of each clip back together."""
    remaining = iter(pieces)
    return [torch.cat([next(remaining) for _ in range(count)], dim) for count in counts]
