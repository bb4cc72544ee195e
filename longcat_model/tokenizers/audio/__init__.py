"""Waveforms to audio codes and back: front end, encoder, quantizer, decoder, refiner, vocoder."""

from longcat_model.tokenizers.audio.tokenizer import AudioTokenizer

__all__ = ["AudioTokenizer"]
